package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// qmpLineLimit caps one message. What the driver asks for is answered in a few
// hundred bytes; only QEMU itself writes here, but its guest may have taken it.
const qmpLineLimit = 64 << 10

// errQMPClosed is what commands fail with when QEMU is gone.
var errQMPClosed = errors.New("qmp: qemu closed the connection")

// qmpEvent is an asynchronous message of QEMU's.
type qmpEvent struct {
	Name string
	Data json.RawMessage
}

// qmpClient talks to one QEMU (docs/interop/qmp-spec.txt). Its methods may be
// called concurrently.
type qmpClient struct {
	conn    net.Conn
	onEvent func(qmpEvent)
	done    chan struct{} // closed when the reader has ended

	mu      sync.Mutex
	nextID  uint64
	waiting map[uint64]chan qmpMessage
	err     error // why the reader ended
}

// qmpMessage is anything that QEMU sends: a greeting, a response or an event.
type qmpMessage struct {
	QMP    json.RawMessage `json:"QMP"`
	ID     *uint64         `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

// newQMPClient reads from conn, which it owns, until that ends. It calls onEvent
// from the reader, one event at a time.
func newQMPClient(conn net.Conn, onEvent func(qmpEvent)) *qmpClient {
	c := &qmpClient{
		conn:    conn,
		onEvent: onEvent,
		done:    make(chan struct{}),
		waiting: map[uint64]chan qmpMessage{},
	}
	go c.read()
	return c
}

func (c *qmpClient) read() {
	err := readQMP(c.conn, func(m qmpMessage) {
		switch {
		case m.Event != "":
			c.onEvent(qmpEvent{Name: m.Event, Data: m.Data})
		case m.ID != nil:
			c.mu.Lock()
			reply := c.waiting[*m.ID]
			delete(c.waiting, *m.ID)
			c.mu.Unlock()
			if reply != nil {
				reply <- m // has room for it
			}
		}
	})
	_ = c.conn.Close()
	c.mu.Lock()
	c.err = err
	c.mu.Unlock()
	close(c.done)
}

// readQMP calls handle with each message of r. It returns errQMPClosed at the end
// of r, and else what is wrong with it.
func readQMP(r io.Reader, handle func(qmpMessage)) error {
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 0, 4096), qmpLineLimit)
	for in.Scan() {
		if len(in.Bytes()) == 0 {
			continue
		}
		var m qmpMessage
		if err := json.Unmarshal(in.Bytes(), &m); err != nil {
			return fmt.Errorf("qmp: message of %d bytes: %w", len(in.Bytes()), err)
		}
		handle(m)
	}
	if err := in.Err(); errors.Is(err, bufio.ErrTooLong) {
		return fmt.Errorf("qmp: message of more than %d bytes", qmpLineLimit)
	}
	return errQMPClosed
}

// execute runs a command and decodes its result into out, unless that is nil.
func (c *qmpClient) execute(ctx context.Context, command string, args, out any) error {
	reply := make(chan qmpMessage, 1)
	c.mu.Lock()
	c.nextID++
	id := c.nextID
	c.waiting[id] = reply
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, id)
		c.mu.Unlock()
	}()

	request := map[string]any{"execute": command, "id": id}
	if args != nil {
		request["arguments"] = args
	}
	b, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	// A QEMU that doesn't read must not hold the caller: a request is far smaller
	// than the socket's buffer, so this deadline only passes if QEMU hangs.
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(10 * time.Second)
	}
	_ = c.conn.SetWriteDeadline(deadline)
	if _, err := c.conn.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	select {
	case m := <-reply:
		return m.result(command, out)
	case <-c.done:
		c.mu.Lock()
		defer c.mu.Unlock()
		return fmt.Errorf("qmp %s: %w", command, c.err)
	case <-ctx.Done():
		return fmt.Errorf("qmp %s: wait for qemu's answer: %w", command, ctx.Err())
	}
}

func (m qmpMessage) result(command string, out any) error {
	switch {
	case m.Error != nil:
		return fmt.Errorf("qmp %s: %s: %q", command, m.Error.Class, m.Error.Desc)
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(m.Return, out); err != nil {
		return fmt.Errorf("qmp %s: result: %w", command, err)
	}
	return nil
}

// close ends the connection and waits for the reader, which is only ever held up
// by onEvent.
func (c *qmpClient) close() {
	_ = c.conn.Close()
	<-c.done
}
