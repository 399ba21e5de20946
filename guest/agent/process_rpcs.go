//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"fmt"

	"github.com/cri-vz/cri-vz/guest/api"
	"golang.org/x/sys/unix"
)

// Wait waits for the end of a process and of its output.
func (a *Agent) Wait(ctx context.Context, r *api.WaitRequest) (*api.WaitResponse, error) {
	p, err := a.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the end of container %q, process %q: %w", r.Id, r.ExecId, ctx.Err())
	}
	return &api.WaitResponse{ExitCode: p.status, ExitedAt: p.exitedAt.UnixNano(), OomKilled: p.oom, Message: p.amiss}, nil
}

// Signal signals a process. SIGKILL to an exec ends all that it has forked.
func (a *Agent) Signal(_ context.Context, r *api.SignalRequest) (*api.SignalResponse, error) {
	if r.Signal == 0 || r.Signal > 64 {
		return nil, invalidf("signal %d is not within 1..64", r.Signal)
	}
	sig := unix.Signal(r.Signal)
	c, err := a.container(r.Id)
	if err != nil {
		return nil, err
	}
	p, err := a.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	if !p.hasStarted() && !p.hasExited() {
		return nil, preconditionf("signal container %q: it has not been started", r.Id)
	}
	switch {
	case r.All && sig == unix.SIGKILL:
		err = c.cgroup.kill()
	case r.All:
		err = c.cgroup.signal(sig)
	case p.hasExited():
	case r.ExecId != "" && sig == unix.SIGKILL:
		err = p.cgroup.kill()
	default:
		err = p.signal(sig)
	}
	if err != nil {
		return nil, fmt.Errorf("send signal %d to container %q, process %q: %w", r.Signal, r.Id, r.ExecId, err)
	}
	return &api.SignalResponse{}, nil
}

// ResizePty sets a terminal's size; a process that has ended is not an error.
func (a *Agent) ResizePty(_ context.Context, r *api.ResizePtyRequest) (*api.ResizePtyResponse, error) {
	p, err := a.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	if err := p.stdio.resize(r.Width, r.Height); err != nil && !p.hasExited() {
		return nil, fmt.Errorf("resize the terminal of container %q, process %q: %w", r.Id, r.ExecId, err)
	}
	return &api.ResizePtyResponse{}, nil
}
