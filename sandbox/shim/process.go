package shim

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// Exec implements shim/api.
func (s *Shim) Exec(ctx context.Context, req *guestapi.ExecRequest) (*guestapi.ExecResponse, error) {
	if err := checkID("exec", req.GetExecId()); err != nil {
		return nil, err
	}
	c, err := s.find(req.GetId())
	if err != nil {
		return nil, err
	}
	if s.stateOf(c).GetPhase() != shimapi.Phase_RUNNING {
		return nil, fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	a, _, err := s.running()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return call(ctx, a, "exec", a.Exec, req)
}

// WaitExec implements shim/api.
func (s *Shim) WaitExec(ctx context.Context, req *guestapi.WaitRequest) (*guestapi.WaitResponse, error) {
	if err := checkID("exec", req.GetExecId()); err != nil {
		return nil, err
	}
	a, _, err := s.running()
	if err != nil {
		return nil, err
	}
	type result struct {
		resp *guestapi.WaitResponse
		err  error
	}
	answer := make(chan result, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		resp, err := a.Wait(ctx, req)
		answer <- result{resp, err}
	}()
	select {
	case r := <-answer:
		if r.err != nil {
			return nil, fmt.Errorf("container %s: exec %s: %w", req.GetId(), req.GetExecId(), agentError("wait", r.err))
		}
		return r.resp, nil
	case <-s.gone:
		_, _, err := s.running()
		return nil, fmt.Errorf("container %s: exec %s: %w", req.GetId(), req.GetExecId(), err)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// RemoveExec implements shim/api.
func (s *Shim) RemoveExec(ctx context.Context, req *guestapi.RemoveExecRequest) (*guestapi.RemoveExecResponse, error) {
	if err := checkID("exec", req.GetExecId()); err != nil {
		return nil, err
	}
	a, _, err := s.running()
	if err != nil {
		return &guestapi.RemoveExecResponse{}, nil // gone with its VM
	}
	return call(ctx, a, "remove exec", a.RemoveExec, req)
}

// ResizePty implements shim/api.
func (s *Shim) ResizePty(ctx context.Context, req *guestapi.ResizePtyRequest) (*guestapi.ResizePtyResponse, error) {
	a, err := s.agentFor(req.GetId())
	if err != nil {
		return nil, err
	}
	return call(ctx, a, "resize", a.ResizePty, req)
}

// UpdateContainer implements shim/api.
func (s *Shim) UpdateContainer(ctx context.Context, req *guestapi.UpdateContainerRequest) (*guestapi.UpdateContainerResponse, error) {
	var a *agent
	var err error
	if req.GetId() == "" { // the pod
		a, _, err = s.running()
	} else {
		a, err = s.agentFor(req.GetId())
	}
	if err != nil {
		return nil, err
	}
	return call(ctx, a, "update container", a.UpdateContainer, req)
}

// Stats implements shim/api.
func (s *Shim) Stats(ctx context.Context, req *guestapi.StatsRequest) (*guestapi.StatsResponse, error) {
	a, _, err := s.running()
	if err != nil {
		return nil, err
	}
	return call(ctx, a, "stats", a.Stats, req)
}

func (s *Shim) agentFor(id string) (*agent, error) {
	if _, err := s.find(id); err != nil {
		return nil, err
	}
	a, _, err := s.running()
	return a, err
}
