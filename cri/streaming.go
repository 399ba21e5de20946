package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// listenStreams opens the streaming server's port: loopback only, because its
// URLs carry one-use tokens over plain HTTP.
func (s *Server) listenStreams() error {
	host, _, err := net.SplitHostPort(s.StreamAddress)
	if err != nil {
		return fmt.Errorf("streaming address %q: %w", s.StreamAddress, err)
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("streaming address %q: the host must be a loopback address such as 127.0.0.1: %w", s.StreamAddress, errdefs.ErrInvalidArgument)
	}
	if s.streamsLn, err = net.Listen("tcp", s.StreamAddress); err != nil {
		return fmt.Errorf("streaming server: %w", err)
	}
	addr := s.streamsLn.Addr().String()
	s.streams, err = streaming.NewServer(streaming.Config{
		Addr:                            addr,
		BaseURL:                         &url.URL{Scheme: "http", Host: addr},
		StreamIdleTimeout:               4 * time.Hour, // the kubelet's own default
		StreamCreationTimeout:           30 * time.Second,
		SupportedRemoteCommandProtocols: remotecommand.SupportedStreamingProtocols,
		SupportedPortForwardProtocols:   portforward.SupportedProtocols,
	}, streamRuntime{s})
	if err != nil {
		s.streamsLn.Close()
		return fmt.Errorf("streaming server: %w", err)
	}
	s.streamsHT = &http.Server{Handler: s.streams, ReadHeaderTimeout: 10 * time.Second}
	return nil
}

// Exec implements the CRI call of that name: it answers with a one-use URL.
func (s *Server) Exec(_ context.Context, req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	if len(req.GetCmd()) == 0 {
		return nil, refuse("cmd", "is empty")
	}
	if err := s.checkRunning(req.GetContainerId()); err != nil {
		return nil, err
	}
	return s.streams.GetExec(req)
}

// Attach implements the CRI call of that name: it answers with a one-use URL.
func (s *Server) Attach(_ context.Context, req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	if err := s.checkRunning(req.GetContainerId()); err != nil {
		return nil, err
	}
	return s.streams.GetAttach(req)
}

// PortForward implements the CRI call of that name: it answers with a one-use URL.
func (s *Server) PortForward(_ context.Context, req *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	pod, err := s.Pods.Get(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if !pod.Status().Ready {
		return nil, fmt.Errorf("pod sandbox %s is not ready: %w", pod.ID(), errdefs.ErrFailedPrecondition)
	}
	return s.streams.GetPortForward(req)
}

func (s *Server) checkRunning(id string) error {
	c, err := s.Pods.Container(id)
	if err != nil {
		return err
	}
	if c.Status().Phase != shimapi.Phase_RUNNING {
		return fmt.Errorf("container %s is not running: %w", c.ID(), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// streamRuntime carries out what a one-use URL was made for.
type streamRuntime struct{ s *Server }

func (r streamRuntime) Exec(ctx context.Context, id string, cmd []string, in io.Reader, out, errw io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	// A terminal whose client is gone is hung up. The HTTP connection was taken
	// over, so its context says nothing; the end of the size updates does.
	ctx, hangUp := context.WithCancel(ctx)
	defer hangUp()
	sizes := resizeFrom(ctx, resize)
	stdio := execIO{in: in, tty: tty, resize: func(set func(w, h uint16)) {
		sizes(set)
		hangUp()
	}}
	if out != nil {
		stdio.out = out
	}
	if errw != nil {
		stdio.err = errw
	}
	code, err := r.s.exec(ctx, id, &guestapi.ExecRequest{Args: cmd}, stdio)
	if err != nil {
		return err
	}
	if code != 0 {
		return utilexec.CodeExitError{Err: fmt.Errorf("command terminated with exit code %d", code), Code: int(code)}
	}
	return nil
}

func resizeFrom(ctx context.Context, sizes <-chan remotecommand.TerminalSize) func(func(w, h uint16)) {
	return func(set func(w, h uint16)) {
		for {
			select {
			case sz, ok := <-sizes:
				if !ok {
					return
				}
				set(sz.Width, sz.Height)
			case <-ctx.Done():
				return
			}
		}
	}
}

func (r streamRuntime) Attach(ctx context.Context, id string, in io.Reader, out, errw io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	c, err := r.s.Pods.Container(id)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	open := func(k guestapi.Kind) (*guestapi.Stream, error) {
		st, err := c.Pod().Stream(ctx, guestapi.Header{Kind: k, Container: c.ID()})
		if err == nil {
			context.AfterFunc(ctx, func() { st.Close() })
		}
		return st, err
	}
	outputs := make(chan error, 2)
	n := 0
	output := func(st *guestapi.Stream, w io.Writer) {
		n++
		go func() { _, err := io.Copy(w, st); outputs <- err }()
	}
	if c.Config().GetTty() {
		st, err := open(guestapi.Terminal)
		if err != nil {
			return err
		}
		// Read in any case: a client that lags is disconnected (T18).
		if out != nil {
			output(st, out)
		} else {
			output(st, io.Discard)
		}
		if in != nil {
			// The end of one client's input is not the terminal's.
			go func() { _, _ = io.Copy(st, in) }()
		}
		go func() {
			resizeFrom(ctx, resize)(func(w, h uint16) { _ = c.Resize(ctx, uint32(w), uint32(h)) })
			cancel() // the client is gone
		}()
	} else {
		for _, o := range []struct {
			kind guestapi.Kind
			to   io.Writer
			want bool
		}{{guestapi.Stdout, out, out != nil}, {guestapi.Stderr, errw, errw != nil}} {
			if !o.want {
				continue
			}
			st, err := open(o.kind)
			if err != nil {
				return err
			}
			output(st, o.to)
		}
		if in != nil {
			st, err := open(guestapi.Stdin)
			if err != nil {
				return err
			}
			go func() {
				feed(st, in)
				if n == 0 {
					cancel() // nothing else to wait for
				}
			}()
		}
	}
	for range n {
		select {
		case err := <-outputs:
			if err != nil && ctx.Err() == nil {
				return fmt.Errorf("attach to container %s: %w", id, err)
			}
		case <-ctx.Done():
			return nil
		}
	}
	if n == 0 {
		<-ctx.Done()
	}
	return nil
}

// feed sends in to a process's stdin. It returns when the guest has taken all of
// it, or has ended the stream because the process is gone, also while in is
// silent: a stream that is closed before that loses what is on its way.
func feed(st *guestapi.Stream, in io.Reader) {
	go func() {
		if _, err := io.Copy(st, in); err != nil {
			st.Close()
			return
		}
		_ = st.CloseWrite()
	}()
	_, _ = io.Copy(io.Discard, st)
}

func (r streamRuntime) PortForward(ctx context.Context, id string, port int32, client io.ReadWriteCloser) error {
	defer client.Close()
	pod, err := r.s.Pods.Get(id)
	if err != nil {
		return err
	}
	if port < 1 || port > 65535 {
		return fmt.Errorf("port %d is not in 1 to 65535: %w", port, errdefs.ErrInvalidArgument)
	}
	st, err := pod.Stream(ctx, guestapi.Header{Kind: guestapi.Port, Port: uint16(port)})
	if err != nil {
		return err
	}
	defer st.Close()
	stop := context.AfterFunc(ctx, func() { st.Close() })
	defer stop()
	// The client's end of file is passed on; its answer may still come. When the
	// pod's side ends, the connection is over.
	go func() {
		if _, err := io.Copy(st, client); err != nil {
			st.Reset("client vanished")
			return
		}
		_ = st.CloseWrite()
	}()
	_, err = io.Copy(client, st)
	var reset *guestapi.ResetError
	if err != nil && !errors.As(err, &reset) && ctx.Err() == nil {
		return fmt.Errorf("forward port %d of pod %s: %w", port, id, err)
	}
	return nil
}
