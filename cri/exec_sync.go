package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// maxExecSyncOutput is how much of each stream ExecSync keeps (T19).
const maxExecSyncOutput = 16 << 20

// ExecSync implements the CRI call of that name. Output past the cap is read and
// dropped; a timeout kills the process and is DeadlineExceeded.
func (s *Server) ExecSync(ctx context.Context, req *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	if len(req.GetCmd()) == 0 {
		return nil, refuse("cmd", "is empty")
	}
	c, err := s.Pods.Container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	run := ctx
	if t := req.GetTimeout(); t > 0 {
		var cancel context.CancelFunc
		run, cancel = context.WithTimeout(ctx, time.Duration(min(t, maxGrace))*time.Second)
		defer cancel()
	}
	var stdout, stderr capped
	code, err := s.exec(run, c.ID(), &guestapi.ExecRequest{Args: req.GetCmd()}, execIO{out: &stdout, err: &stderr})
	if err != nil {
		if ctx.Err() == nil && errors.Is(run.Err(), context.DeadlineExceeded) {
			return nil, fmt.Errorf("exec %q in container %s did not end within %d s and was killed: %w", req.GetCmd()[0], c.ID(), req.GetTimeout(), context.DeadlineExceeded)
		}
		return nil, err
	}
	return &runtimeapi.ExecSyncResponse{Stdout: stdout.kept.Bytes(), Stderr: stderr.kept.Bytes(), ExitCode: code}, nil
}

// capped keeps the first maxExecSyncOutput bytes written to it and drops the
// rest. The buffer is not embedded: io.Copy would find its ReadFrom and go
// around the cap.
type capped struct{ kept bytes.Buffer }

func (c *capped) Write(p []byte) (int, error) {
	c.kept.Write(p[:min(len(p), maxExecSyncOutput-c.kept.Len())])
	return len(p), nil
}

// execIO is where an exec's streams go; nil fields are not connected. With a
// terminal, out carries everything.
type execIO struct {
	in     io.Reader
	out    io.Writer
	err    io.Writer
	tty    bool
	resize func(func(width, height uint16)) // calls back until the client is gone
}

// exec runs a process to its end and returns its exit code. The process is
// killed and forgotten when ctx ends first.
func (s *Server) exec(ctx context.Context, id string, req *guestapi.ExecRequest, stdio execIO) (int32, error) {
	c, err := s.Pods.Container(id)
	if err != nil {
		return 0, err
	}
	req.Tty, req.Stdin = stdio.tty, stdio.in != nil
	p, err := c.Exec(ctx, req)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	ctx, cancel := context.WithCancel(ctx)

	outputs := outputs{patience: drainTime}
	// Nothing is written for the client when exec has returned, unless a write to
	// it hangs: that ends with the client's connection, which the caller closes.
	defer outputs.settle()
	defer cancel()
	open := func(k guestapi.Kind) (*guestapi.Stream, error) {
		st, err := p.Stream(ctx, k)
		if err == nil {
			// Unblocks the copies below when the client or the deadline ends ctx.
			context.AfterFunc(ctx, func() { st.Close() })
		}
		return st, err
	}
	input := func(st *guestapi.Stream) {
		// Not waited for: a client may keep its stdin open after the process ended.
		go func() {
			if err := send(st, stdio.in); err != nil {
				st.Reset("client vanished")
				return
			}
			_ = st.CloseWrite()
		}()
	}
	if stdio.tty {
		st, err := open(guestapi.Terminal)
		if err != nil {
			return 0, err
		}
		outputs.copy(stdio.out, st)
		if stdio.in != nil {
			input(st)
		}
		if stdio.resize != nil {
			go stdio.resize(func(w, h uint16) { _ = p.Resize(ctx, uint32(w), uint32(h)) })
		}
	} else {
		for _, o := range []struct {
			kind guestapi.Kind
			to   io.Writer
		}{{guestapi.Stdout, stdio.out}, {guestapi.Stderr, stdio.err}} {
			st, err := open(o.kind)
			if err != nil {
				return 0, err
			}
			outputs.copy(o.to, st)
		}
		if stdio.in != nil {
			st, err := open(guestapi.Stdin)
			if err != nil {
				return 0, err
			}
			input(st)
		}
	}
	code, err := p.Wait(ctx)
	if err != nil {
		return 0, err
	}
	return code, outputEnd(ctx, id, outputs.wait())
}

// outputEnd says why an exec's output is not whole, if it isn't: it must not pass
// for all that the process wrote.
func outputEnd(ctx context.Context, id string, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		err = ctx.Err()
	default:
		err = errors.Join(err, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("output of exec in container %s: %w", id, err)
}
