//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// UpdateContainer changes limits of a container or of the pod, all or none (T28).
func (a *Agent) UpdateContainer(ctx context.Context, r *api.UpdateContainerRequest) (*api.UpdateContainerResponse, error) {
	var resources specs.LinuxResources
	if err := json.Unmarshal(r.Resources, &resources); err != nil {
		return nil, invalidf("update container %q: resources: %w", r.Id, err)
	}
	if adj := r.GetOomScoreAdj(); adj < -1000 || adj > 1000 {
		return nil, invalidf("update container %q: oom_score_adj %d is not within -1000..1000", r.Id, adj)
	}
	if r.Id == "" {
		err := a.require(ctx) // the boot makes the pod's cgroup
		if err == nil {
			err = cgroup(filepath.Join(a.paths.cgroup, "pod")).update(&resources)
		}
		if err != nil {
			return nil, fmt.Errorf("update pod: %w", err)
		}
		return &api.UpdateContainerResponse{}, nil
	}
	c, err := a.container(r.Id)
	if err != nil {
		return nil, err
	}
	if err := c.awaitUpdatable(ctx); err != nil {
		return nil, fmt.Errorf("update container %q: %w", r.Id, err)
	}
	err = c.cgroup.update(&resources)
	if err == nil && r.OomScoreAdj != nil {
		err = c.adjustOOMScore(int(*r.OomScoreAdj))
	}
	if err != nil {
		return nil, fmt.Errorf("update container %q: %w", r.Id, err)
	}
	return &api.UpdateContainerResponse{}, nil
}

// update changes the limits that r has, all or none.
func (c cgroup) update(r *specs.LinuxResources) error {
	set, err := settings(r)
	if err != nil {
		return err
	}
	if err := c.checkMemory(r.Memory); err != nil {
		return err
	}
	return c.apply(set)
}

// awaitUpdatable waits until a container that is being started has its processes.
func (c *ctr) awaitUpdatable(ctx context.Context) error {
	for {
		c.mu.Lock()
		state, settled := c.state, c.settled
		c.mu.Unlock()
		switch state {
		case creating, removing:
			return preconditionf("it is %v", state)
		case starting:
		default:
			return nil
		}
		select {
		case <-settled:
		case <-ctx.Done():
			return fmt.Errorf("wait while it is %v: %w", state, ctx.Err())
		}
	}
}

// checkMemory refuses a limit that the kernel could only keep by killing: what
// the page cache holds can be given up, anonymous and kernel memory can't, as
// the guest has no swap.
func (c cgroup) checkMemory(m *specs.LinuxMemory) error {
	if m == nil || m.CheckBeforeUpdate == nil || !*m.CheckBeforeUpdate || m.Limit == nil || *m.Limit <= 0 {
		return nil
	}
	// In this order: what is read from files in between counts as used, and doesn't
	// hide what is.
	stat := c.flat("memory.stat")
	used, _ := c.number("memory.current")
	used -= min(used, stat["file"]-min(stat["file"], stat["shmem"]))
	if used > uint64(*m.Limit) {
		return preconditionf("memory limit of %d bytes: %d bytes are used that can't be taken back", *m.Limit, used)
	}
	return nil
}

// adjustOOMScore sets the score of the container's processes, of those that it
// will start, and of execs to come.
func (c *ctr) adjustOOMScore(adj int) error {
	c.mu.Lock()
	spec, process := *c.spec, *c.spec.Process // the old ones may be in use
	process.OOMScoreAdj = &adj
	spec.Process = &process
	c.spec = &spec
	c.mu.Unlock()
	return c.cgroup.walk(func(dir cgroup) error {
		for _, pid := range dir.procs() {
			err := os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(strconv.Itoa(adj)), 0)
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("oom_score_adj %d: %w", adj, err)
			}
		}
		return nil
	})
}
