package cri

import (
	"context"
	"errors"
	"fmt"
	"github.com/containerd/errdefs"
	"io"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// Exec implements the CRI call of that name: it answers with a one-use URL.
func (s *Server) Exec(_ context.Context, req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	if len(req.GetCmd()) == 0 {
		return nil, refuse("cmd", "is empty")
	}
	if err := checkStreams(req); err != nil {
		return nil, err
	}
	if err := s.checkRunning(req.GetContainerId()); err != nil {
		return nil, err
	}
	u, err := s.streams.url("exec", req)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ExecResponse{Url: u}, nil
}

// Attach implements the CRI call of that name: it answers with a one-use URL.
func (s *Server) Attach(_ context.Context, req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	if err := checkStreams(req); err != nil {
		return nil, err
	}
	if err := s.checkRunning(req.GetContainerId()); err != nil {
		return nil, err
	}
	u, err := s.streams.url("attach", req)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.AttachResponse{Url: u}, nil
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
	u, err := s.streams.url("portforward", req)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PortForwardResponse{Url: u}, nil
}

// checkStreams refuses what no client could connect to.
func checkStreams(req interface {
	GetStdin() bool
	GetStdout() bool
	GetStderr() bool
	GetTty() bool
}) error {
	switch {
	case req.GetTty() && req.GetStderr():
		return refuse("stderr", "a terminal has one output, which is stdout")
	case !req.GetStdin() && !req.GetStdout() && !req.GetStderr():
		return refuse("stdin, stdout, stderr", "at least one is needed")
	}
	return nil
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

// streamRuntime is the streamer of the node's pods.
type streamRuntime struct{ s *Server }

// Exec runs a process to its end. One whose client is gone is killed: nobody is
// there to read what it writes.
func (r streamRuntime) Exec(ctx context.Context, id string, cmd []string, in io.Reader, out, errw io.WriteCloser, tty bool, sizes <-chan remotecommand.TerminalSize) error {
	stdio := execIO{in: in, tty: tty, resize: resizeFrom(ctx, sizes)}
	if in != nil && tty {
		stdio.in = readAhead(ctx, in)
	}
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

// Attach connects a client to a running container until either ends.
func (r streamRuntime) Attach(ctx context.Context, id string, in io.Reader, out, errw io.WriteCloser, resize <-chan remotecommand.TerminalSize) error {
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
			go func() { _ = send(st, readAhead(ctx, in)) }()
		}
		go resizeFrom(ctx, resize)(func(w, h uint16) { _ = c.Resize(ctx, uint32(w), uint32(h)) })
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
		if err := send(st, in); err != nil {
			st.Close()
			return
		}
		_ = st.CloseWrite()
	}()
	_, _ = io.Copy(io.Discard, st)
}

// send copies a client's input to the guest. What the guest doesn't take any
// more is dropped, so that it doesn't hold up the client's other streams.
func send(st *guestapi.Stream, in io.Reader) error {
	_, err := io.Copy(st, onlyReader{in})
	if err != nil {
		_, _ = io.Copy(io.Discard, onlyReader{in})
	}
	return err
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
