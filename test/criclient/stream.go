package criclient

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/cri-vz/cri-vz/test/streamclient"
)

// Streams is what a client of Exec or Attach has asked for.
type Streams = streamclient.Options

// Protocol is a way to open a session.
type Protocol func(url string, want Streams) (*streamclient.Session, error)

// Terminal is the client's end of an exec or attach session.
type Terminal struct{ *streamclient.Session }

// OpenTerminal opens the streams of an Exec or Attach over SPDY.
func OpenTerminal(t *testing.T, url string, want Streams) *Terminal {
	t.Helper()
	return OpenTerminalOver(t, streamclient.SPDY, url, want)
}

// OpenTerminalOver opens the streams of an Exec or Attach; a TTY has 100 columns
// and 40 rows.
func OpenTerminalOver(t *testing.T, p Protocol, url string, want Streams) *Terminal {
	t.Helper()
	s, err := p(url, want)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if want.TTY {
		if err := s.Resize(100, 40); err != nil {
			t.Fatal(err)
		}
	}
	return &Terminal{s}
}

// Finish reads all output and the exit code.
func (s *Terminal) Finish(bound time.Duration) (Result, error) {
	var out, errs bytes.Buffer
	var code int
	var err error
	var wg sync.WaitGroup
	read := func(to *bytes.Buffer, from io.Reader) {
		if from != nil {
			wg.Go(func() { _, _ = io.Copy(to, from) })
		}
	}
	read(&out, s.Stdout)
	read(&errs, s.Stderr)
	wg.Go(func() { code, err = s.ExitCode() })
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(bound):
		s.Close()
		<-done
		err = fmt.Errorf("the session did not end within %v", bound)
	}
	return Result{Stdout: out.String(), Stderr: errs.String(), Code: int32(code)}, err
}

// Forwarder is a client of PortForward: one connection that carries many.
type Forwarder struct{ *streamclient.Forwarder }

// Forward opens a connection for forwards to the pod, over SPDY.
func (p *Pod) Forward(t *testing.T) *Forwarder {
	t.Helper()
	return p.ForwardOver(t, streamclient.ForwardSPDY)
}

// ForwardOver opens a connection for forwards to the pod.
func (p *Pod) ForwardOver(t *testing.T, open func(url string) (*streamclient.Forwarder, error)) *Forwarder {
	t.Helper()
	r, err := p.PortForward(Timeout(t, CallTimeout), &runtimeapi.PortForwardRequest{PodSandboxId: p.ID})
	if err != nil {
		t.Fatal(err)
	}
	f, err := open(r.GetUrl())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &Forwarder{f}
}

// Forwarded is one connection to a port of a pod.
type Forwarded struct {
	httpstream.Stream
	failure httpstream.Stream
}

// Dial opens a connection to a port of the pod.
func (f *Forwarder) Dial(port int) (*Forwarded, error) {
	data, failure, err := f.Forwarder.Dial(port)
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
