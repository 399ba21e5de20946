//go:build linux

package e2e_test

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

// dialSPDY upgrades a one-use URL of the streaming server, as kubectl's client
// does.
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

// terminal is the client's end of an exec or attach session.
type terminal struct {
	conn   httpstream.Connection
	stdin  httpstream.Stream // nil if not asked for
	stdout httpstream.Stream
	stderr httpstream.Stream // nil with a tty
	status httpstream.Stream
}

func openTerminal(t *testing.T, url string, stdin, tty bool) *terminal {
	t.Helper()
	conn, err := dialSPDY(url, remotecommand.StreamProtocolV4Name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	s := &terminal{conn: conn}
	open := func(kind string) httpstream.Stream {
		st, err := conn.CreateStream(http.Header{remotecommand.StreamType: {kind}})
		if err != nil {
			t.Fatalf("open stream %s: %v", kind, err)
		}
		return st
	}
	s.status = open(remotecommand.StreamTypeError)
	if stdin {
		s.stdin = open(remotecommand.StreamTypeStdin)
	}
	s.stdout = open(remotecommand.StreamTypeStdout)
	if !tty {
		s.stderr = open(remotecommand.StreamTypeStderr)
	} else {
		resize := open(remotecommand.StreamTypeResize)
		if err := json.NewEncoder(resize).Encode(remotecommand.TerminalSize{Width: 100, Height: 40}); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// finish reads all output and the exit code.
func (s *terminal) finish(bound time.Duration) (result, error) {
	var out, errs, st bytes.Buffer
	var wg sync.WaitGroup
	read := func(to *bytes.Buffer, from io.Reader) {
		wg.Go(func() { _, _ = io.Copy(to, from) })
	}
	read(&out, s.stdout)
	if s.stderr != nil {
		read(&errs, s.stderr)
	}
	read(&st, s.status)
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(bound):
		s.conn.Close()
		<-done
		return result{stdout: out.String(), stderr: errs.String()}, fmt.Errorf("the session did not end within %v", bound)
	}
	r := result{stdout: out.String(), stderr: errs.String()}
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
		r.code = int32(code)
		return r, err
	}
	return r, errors.New(answer.Message)
}

// forwarder is a client of PortForward: one connection that carries many.
type forwarder struct {
	conn httpstream.Connection
	mu   sync.Mutex
	next int
}

func (p *pod) forward(t *testing.T) *forwarder {
	t.Helper()
	r, err := p.PortForward(timeout(t, callTimeout), &runtimeapi.PortForwardRequest{PodSandboxId: p.id})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := dialSPDY(r.GetUrl(), portforward.ProtocolV1Name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &forwarder{conn: conn}
}

// forwarded is one connection to a port of a pod.
type forwarded struct {
	httpstream.Stream
	failure httpstream.Stream
}

func (f *forwarder) dial(port int) (*forwarded, error) {
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
	return &forwarded{data, failure}, nil
}

// exchange sends request, ends the sending side, and reads the answer to its end.
func (f *forwarded) exchange(request []byte) ([]byte, error) {
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
