// Package streamclient is the client's side of the CRI's streaming URLs, over
// SPDY and over WebSocket, as kubectl's libraries speak them. It is for tests: it
// waits for the server for as long as the server takes.
package streamclient

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/net/websocket"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// Options say what a session connects.
type Options struct{ Stdin, Stdout, Stderr, TTY bool }

// Session is an exec or attach session. Fields that [Options] doesn't ask for are
// nil. All outputs and Status must be read, or the session stands still.
type Session struct {
	Stdin          io.WriteCloser // Close is the end of the input alone
	Stdout, Stderr io.Reader
	Status         io.Reader // one JSON object, then the end
	resize         io.Writer
	close          func() error
}

// Resize tells a new size of the terminal.
func (s *Session) Resize(width, height uint16) error {
	return json.NewEncoder(s.resize).Encode(remotecommand.TerminalSize{Width: width, Height: height})
}

// Close drops the connection without saying anything.
func (s *Session) Close() error { return s.close() }

// ExitCode reads Status: the exit code, or why there is none.
func (s *Session) ExitCode() (int, error) {
	var st struct {
		Status, Message, Reason string
		Details                 struct {
			Causes []struct{ Reason, Message string }
		}
	}
	if err := json.NewDecoder(s.Status).Decode(&st); err != nil {
		return 0, fmt.Errorf("read the status: %w", err)
	}
	switch {
	case st.Status == "Success":
		return 0, nil
	case st.Reason == remotecommand.NonZeroExitCodeReason && len(st.Details.Causes) == 1 && st.Details.Causes[0].Reason == remotecommand.ExitCodeCauseType:
		return strconv.Atoi(st.Details.Causes[0].Message)
	}
	return 0, fmt.Errorf("%s: %s", st.Reason, st.Message)
}

// SPDY opens a session over SPDY, protocol v4.channel.k8s.io.
func SPDY(url string, o Options) (*Session, error) {
	conn, err := dialSPDY(url, remotecommand.StreamProtocolV4Name)
	if err != nil {
		return nil, err
	}
	s := &Session{close: conn.Close}
	open := func(wanted bool, kind string) httpstream.Stream {
		if !wanted || err != nil {
			return nil
		}
		var st httpstream.Stream
		st, err = conn.CreateStream(http.Header{remotecommand.StreamType: {kind}})
		return st
	}
	s.Status = open(true, remotecommand.StreamTypeError)
	if o.Stdin {
		s.Stdin = open(true, remotecommand.StreamTypeStdin)
	}
	if o.Stdout {
		s.Stdout = open(true, remotecommand.StreamTypeStdout)
	}
	if o.Stderr {
		s.Stderr = open(true, remotecommand.StreamTypeStderr)
	}
	s.resize = open(o.TTY, remotecommand.StreamTypeResize)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return s, nil
}

// WebSocket opens a session over WebSocket, protocol v5.channel.k8s.io.
func WebSocket(url string, o Options) (*Session, error) {
	return WebSocketProtocol(url, remotecommand.StreamProtocolV5Name, o)
}

// WebSocketProtocol opens a session over a binary WebSocket protocol. Before v5
// the end of the input can't be said.
func WebSocketProtocol(url, protocol string, o Options) (*Session, error) {
	ws, conn, err := dialWebSocket(url, protocol)
	if err != nil {
		return nil, err
	}
	outputs := map[byte]*io.PipeWriter{}
	s := &Session{close: func() error {
		for _, w := range outputs {
			w.Close() // what waits to be read
		}
		return conn.Close()
	}}
	output := func(channel byte) io.Reader {
		r, w := io.Pipe()
		outputs[channel] = w
		return r
	}
	s.Status = output(remotecommand.StreamErr)
	if o.Stdin {
		s.Stdin = &channel{ws: ws, id: remotecommand.StreamStdIn}
	}
	if o.Stdout {
		s.Stdout = output(remotecommand.StreamStdOut)
	}
	if o.Stderr {
		s.Stderr = output(remotecommand.StreamStdErr)
	}
	s.resize = &channel{ws: ws, id: remotecommand.StreamResize}
	go func() {
		for {
			var m []byte
			err := websocket.Message.Receive(ws, &m)
			if err != nil {
				for _, w := range outputs {
					_ = w.CloseWithError(err)
				}
				return
			}
			if len(m) > 1 && outputs[m[0]] != nil {
				_, _ = outputs[m[0]].Write(m[1:])
			}
		}
	}()
	return s, nil
}

// channel is one channel of a WebSocket session, for writing.
type channel struct {
	ws *websocket.Conn
	id byte
}

func (c *channel) Write(p []byte) (int, error) {
	for n := 0; n < len(p); {
		part := p[n:min(n+32<<10, len(p))]
		if err := websocket.Message.Send(c.ws, append([]byte{c.id}, part...)); err != nil {
			return n, err
		}
		n += len(part)
	}
	return len(p), nil
}

func (c *channel) Close() error {
	return websocket.Message.Send(c.ws, []byte{remotecommand.StreamClose, c.id})
}

// Forwarder carries connections to ports of a pod.
type Forwarder struct {
	conn httpstream.Connection
	mu   sync.Mutex
	last int
}

// ForwardSPDY opens a port-forward URL over SPDY.
func ForwardSPDY(url string) (*Forwarder, error) {
	conn, err := dialSPDY(url, portforward.ProtocolV1Name)
	if err != nil {
		return nil, err
	}
	return &Forwarder{conn: conn}, nil
}

// ForwardWebSocket opens a port-forward URL over SPDY in a WebSocket.
func ForwardWebSocket(url string) (*Forwarder, error) {
	ws, _, err := dialWebSocket(url, portforward.WebsocketsSPDYTunnelingPortForwardV1)
	if err != nil {
		return nil, err
	}
	conn, err := spdy.NewClientConnection(tunnel{ws})
	if err != nil {
		ws.Close()
		return nil, err
	}
	return &Forwarder{conn: conn}, nil
}

// tunnel doesn't tell that a connection was closed already.
type tunnel struct{ *websocket.Conn }

func (t tunnel) Close() error { _ = t.Conn.Close(); return nil }

// Close drops the connection and all that it carries.
func (f *Forwarder) Close() error { return f.conn.Close() }

// Dial connects to a port. Closing the data stream is the end of what is sent; the
// failure stream must be read and says why a connection ended, or nothing.
func (f *Forwarder) Dial(port int) (data, failure httpstream.Stream, err error) {
	f.mu.Lock()
	f.last++
	h := http.Header{portforward.PortHeader: {strconv.Itoa(port)}, portforward.PortForwardRequestIDHeader: {strconv.Itoa(f.last)}}
	f.mu.Unlock()
	h.Set(portforward.StreamType, portforward.StreamTypeError)
	if failure, err = f.conn.CreateStream(h); err != nil {
		return nil, nil, err
	}
	h.Set(portforward.StreamType, portforward.StreamTypeData)
	data, err = f.conn.CreateStream(h)
	return data, failure, err
}

func dialSPDY(url, protocol string) (httpstream.Connection, error) {
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequest(http.MethodPost, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	return rt.NewConnection(resp)
}

// dialWebSocket returns the connection, too: a WebSocket says goodbye before it
// closes, and waits for what is being written.
func dialWebSocket(url, protocol string) (*websocket.Conn, net.Conn, error) {
	c, err := websocket.NewConfig("ws"+strings.TrimPrefix(url, "http"), url)
	if err != nil {
		return nil, nil, err
	}
	c.Protocol = []string{protocol}
	conn, err := net.Dial("tcp", c.Location.Host)
	if err != nil {
		return nil, nil, err
	}
	ws, err := websocket.NewClient(c, conn)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	ws.PayloadType = websocket.BinaryFrame
	return ws, conn, nil
}
