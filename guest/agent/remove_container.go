//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"fmt"

	"github.com/cri-vz/cri-vz/guest/api"
)

// RemoveContainer kills, unmounts and forgets a container. It is idempotent,
// and after an error it may be tried again.
func (a *Agent) RemoveContainer(ctx context.Context, r *api.RemoveContainerRequest) (*api.RemoveContainerResponse, error) {
	for {
		a.mu.Lock()
		c := a.containers[r.Id]
		a.mu.Unlock()
		if c == nil {
			return &api.RemoveContainerResponse{}, nil
		}
		c.mu.Lock()
		state, settled := c.state, c.settled
		switch state {
		case creating, removing:
			c.mu.Unlock()
			select {
			case <-settled:
			case <-ctx.Done():
				return nil, fmt.Errorf("remove container %q: wait while it is %v: %w", r.Id, state, ctx.Err())
			}
			continue
		case starting:
			c.mu.Unlock()
			if err := c.cgroup.kill(); err != nil {
				return nil, fmt.Errorf("remove container %q: %w", r.Id, err)
			}
			select {
			case <-settled:
			case <-ctx.Done():
				return nil, fmt.Errorf("remove container %q: wait while it is %v: %w", r.Id, state, ctx.Err())
			}
			continue
		}
		c.state, c.settled = removing, make(chan struct{})
		settled = c.settled
		init := c.init
		c.mu.Unlock()

		err := a.destroy(c)
		c.mu.Lock()
		if err != nil {
			c.state = stopped // to be tried again
		}
		c.mu.Unlock()
		if err == nil {
			if !init.hasStarted() {
				init.fail() // whoever waits for a container that never ran
			}
			a.mu.Lock()
			delete(a.containers, r.Id)
			a.mu.Unlock()
		}
		close(settled)
		if err != nil {
			return nil, fmt.Errorf("remove container %q: %w", r.Id, err)
		}
		return &api.RemoveContainerResponse{}, nil
	}
}
