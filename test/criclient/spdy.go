package criclient

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// DialSPDY upgrades a one-use URL of the streaming server, as kubectl's client
// does.
func DialSPDY(url, protocol string) (httpstream.Connection, error) {
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

// Terminal is the client's end of an exec or attach session.
type Terminal struct {
	conn                  httpstream.Connection
	Stdin, Stdout, Stderr httpstream.Stream // nil if not asked for
	status                httpstream.Stream
}

// Streams is what a client of Exec or Attach has asked for.
type Streams struct{ Stdin, Stdout, Stderr, TTY bool }

// OpenTerminal opens the streams of an Exec or Attach; a TTY has 100 columns and
// 40 rows.
func OpenTerminal(t *testing.T, url string, want Streams) *Terminal {
	t.Helper()
	conn, err := DialSPDY(url, remotecommand.StreamProtocolV4Name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	s := &Terminal{conn: conn}
	open := func(kind string) httpstream.Stream {
		st, err := conn.CreateStream(http.Header{remotecommand.StreamType: {kind}})
		if err != nil {
			t.Fatalf("open stream %s: %v", kind, err)
		}
		return st
	}
	s.status = open(remotecommand.StreamTypeError)
	if want.Stdin {
		s.Stdin = open(remotecommand.StreamTypeStdin)
	}
	if want.Stdout {
		s.Stdout = open(remotecommand.StreamTypeStdout)
	}
	if want.Stderr {
		s.Stderr = open(remotecommand.StreamTypeStderr)
	}
	if want.TTY {
		resize := open(remotecommand.StreamTypeResize)
		if err := json.NewEncoder(resize).Encode(remotecommand.TerminalSize{Width: 100, Height: 40}); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// Close ends the connection, as a client that vanishes does.
func (s *Terminal) Close() error { return s.conn.Close() }

// Finish reads all output and the exit code.
func (s *Terminal) Finish(bound time.Duration) (Result, error) {
	var out, errs, st bytes.Buffer
	var wg sync.WaitGroup
	read := func(to *bytes.Buffer, from io.Reader) {
		wg.Go(func() { _, _ = io.Copy(to, from) })
	}
	if s.Stdout != nil {
		read(&out, s.Stdout)
	}
	if s.Stderr != nil {
		read(&errs, s.Stderr)
	}
	read(&st, s.status)
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(bound):
		s.conn.Close()
		<-done
		return Result{Stdout: out.String(), Stderr: errs.String()}, fmt.Errorf("the session did not end within %v", bound)
	}
	r := Result{Stdout: out.String(), Stderr: errs.String()}
	var answer struct {
		Status, Message, Reason string
		Details                 struct {
			Causes []struct {
				Reason  string `json:"reason"`
				Message string `json:"message"`
			}
		}
	}
	if err := json.Unmarshal(st.Bytes(), &answer); err != nil {
		return r, fmt.Errorf("status %q: %w", st.Bytes(), err)
	}
	switch {
	case answer.Status == "Success":
		return r, nil
	case answer.Reason == remotecommand.NonZeroExitCodeReason && len(answer.Details.Causes) > 0:
		code, err := strconv.Atoi(answer.Details.Causes[0].Message)
		r.Code = int32(code)
		return r, err
	}
	return r, errors.New(answer.Message)
}

// Forwarder is a client of PortForward: one connection that carries many.
type Forwarder struct {
	conn httpstream.Connection
	mu   sync.Mutex
	next int
}

// Forward opens a connection for forwards to the pod.
func (p *Pod) Forward(t *testing.T) *Forwarder {
	t.Helper()
	r, err := p.PortForward(Timeout(t, CallTimeout), &runtimeapi.PortForwardRequest{PodSandboxId: p.ID})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := DialSPDY(r.GetUrl(), portforward.ProtocolV1Name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &Forwarder{conn: conn}
}

// Close ends the connection with all that it carries.
func (f *Forwarder) Close() error { return f.conn.Close() }

// Forwarded is one connection to a port of a pod.
type Forwarded struct {
	httpstream.Stream
	failure httpstream.Stream
}

// Dial opens a connection to a port of the pod.
func (f *Forwarder) Dial(port int) (*Forwarded, error) {
	f.mu.Lock()
	f.next++
	id := strconv.Itoa(f.next)
	f.mu.Unlock()
	h := http.Header{portforward.PortHeader: {strconv.Itoa(port)}, portforward.PortForwardRequestIDHeader: {id}}
	h.Set(portforward.StreamType, portforward.StreamTypeError)
	failure, err := f.conn.CreateStream(h)
	if err != nil {
		return nil, err
	}
	h.Set(portforward.StreamType, portforward.StreamTypeData)
	data, err := f.conn.CreateStream(h)
	if err != nil {
		return nil, err
	}
	return &Forwarded{data, failure}, nil
}

// Exchange sends request, ends the sending side, and reads the answer to its end.
func (f *Forwarded) Exchange(request []byte) ([]byte, error) {
	failure := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(io.LimitReader(f.failure, 64<<10))
		failure <- string(b)
	}()
	go func() {
		_, _ = f.Write(request)
		f.Close()
	}()
	answer, err := io.ReadAll(f)
	select {
	case text := <-failure:
		if text != "" {
			return answer, errors.New(text)
		}
	case <-time.After(10 * time.Second):
		return answer, errors.New("the forwarded connection's error stream did not end within 10 s")
	}
	return answer, err
}
