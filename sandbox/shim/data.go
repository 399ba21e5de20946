package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

const (
	// headerTimeout bounds how long a client of the data socket may take to say
	// what it wants.
	headerTimeout = 5 * time.Second
	// maxStreams bounds the data connections of a pod at one time.
	maxStreams = 1024
)

// serveConns has serve called for each connection of l, which it closes afterwards,
// until l is closed or until is, which may be nil. It closes l then, ends the context
// of those that are served, and returns when they have ended. Connections above
// [maxStreams] at one time are closed.
func (s *Shim) serveConns(l net.Listener, until <-chan struct{}, serve func(context.Context, net.Conn)) {
	var conns sync.WaitGroup
	defer conns.Wait()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-until:
			cancel()
		case <-ctx.Done():
		}
		l.Close()
	}()
	slots := make(chan struct{}, maxStreams)
	for {
		conn, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			klog.ErrorS(err, "Accepting a connection failed", "pod", s.cfg.ID, "address", l.Addr())
			select {
			case <-time.After(50 * time.Millisecond): // EMFILE passes
				continue
			case <-until:
				return
			}
		}
		select {
		case slots <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		conns.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			serve(ctx, conn)
		})
	}
}

func (s *Shim) serveStream(ctx context.Context, conn net.Conn) {
	// Nothing outlives the shim's service.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	_ = conn.SetDeadline(time.Now().Add(headerTimeout))
	in := &headerReader{conn: conn}
	h, err := guestapi.ReadHeader(in)
	if err != nil || in.file != nil && h.Kind != guestapi.Port {
		if in.file != nil {
			in.file.Close()
		}
		return
	}
	_ = conn.SetDeadline(time.Time{})
	if in.file != nil {
		s.forward(ctx, conn, h, in.file)
		return
	}
	if h.Exec == "" && (h.Kind == guestapi.Stdout || h.Kind == guestapi.Stderr || h.Kind == guestapi.Terminal) {
		s.attach(conn, h)
		return
	}
	guest, err := s.dialGuest(ctx, h)
	if err == nil {
		_ = guest.SetWriteDeadline(time.Now().Add(streamTimeout))
		if err = guestapi.WriteHeader(guest, h); err != nil {
			guest.Close()
			err = fmt.Errorf("pod %s: send stream header: %w", s.cfg.ID, err)
		}
	}
	if err != nil {
		_, _ = guestapi.Accept(conn, err)
		return
	}
	// The guest's answer to the header, open or reset, goes to the client as it is.
	splice(conn, guest)
}

// dialGuest connects to the guest's data port, for what h says.
func (s *Shim) dialGuest(ctx context.Context, h guestapi.Header) (net.Conn, error) {
	if h.Kind != guestapi.Port {
		c, err := s.find(h.Container)
		if err != nil {
			return nil, err
		}
		if s.stateOf(c).GetPhase() != shimapi.Phase_RUNNING {
			return nil, fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
		}
		if h.Exec == "" && !c.stdin {
			return nil, fmt.Errorf("container %s was created without stdin: %w", c.id, errdefs.ErrFailedPrecondition)
		}
	}
	_, m, err := s.running()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	guest, err := m.Dial(ctx, guestapi.PortData)
	if err != nil {
		return nil, fmt.Errorf("pod %s: dial the guest's data port: %w", s.cfg.ID, err)
	}
	return guest, nil
}

// attach lets a client follow a container's own output, and type into its
// terminal.
func (s *Shim) attach(conn net.Conn, h guestapi.Header) {
	c, err := s.find(h.Container)
	if err == nil {
		switch phase := s.stateOf(c).GetPhase(); {
		case phase != shimapi.Phase_RUNNING:
			err = fmt.Errorf("container %s is not running but %v: %w", c.id, phase, errdefs.ErrFailedPrecondition)
		case c.tty != (h.Kind == guestapi.Terminal):
			err = fmt.Errorf("container %s: it has no %v stream, its tty is %v: %w", c.id, h.Kind, c.tty, errdefs.ErrFailedPrecondition)
		}
	}
	if err != nil {
		_, _ = guestapi.Accept(conn, err)
		return
	}
	fan := &c.stdout
	if h.Kind == guestapi.Stderr {
		fan = &c.stderr
	}
	// First this: a client that was let in misses nothing from then on.
	sub := fan.subscribe()
	defer fan.unsubscribe(sub)
	stream, err := guestapi.Accept(conn, nil)
	if err != nil {
		return
	}
	gone := make(chan struct{})
	var reader sync.WaitGroup
	reader.Go(func() {
		in := io.Discard
		if h.Kind == guestapi.Terminal && c.stdin {
			in = terminalInput{c, conn}
		}
		if _, err := io.Copy(in, onlyReader{stream}); err != nil {
			close(gone) // vanished, or broke off
		}
	})
	sub.send(stream, gone)
	reader.Wait()
}

type onlyReader struct{ io.Reader }

// terminalInput hands what an attached client types to the guest's terminal. A
// process that doesn't read holds up its clients, for as long as they are there.
type terminalInput struct {
	c      *container
	client net.Conn
}

func (t terminalInput) Write(p []byte) (int, error) {
	chunk := bytes.Clone(p)
	for {
		select {
		case t.c.input <- chunk:
			return len(p), nil
		case <-t.c.ended:
			return 0, net.ErrClosed
		case <-time.After(vanishCheck):
			if vanished(t.client) {
				return 0, net.ErrClosed
			}
		}
	}
}

// typeInput writes attached clients' input to the terminal until the container
// or the stream ends.
func (c *container) typeInput(terminal *guestapi.Stream) {
	for {
		select {
		case p := <-c.input:
			if _, err := terminal.Write(p); err != nil {
				return
			}
		case <-c.ended:
			return
		}
	}
}
