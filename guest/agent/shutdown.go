//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"path/filepath"
	"time"

	"github.com/cri-vz/cri-vz/guest/api"
	"golang.org/x/sys/unix"
)

// shutdownTimeout is how long the list below may take. The host kills the VM
// after 2 s; the rest is for end's own sync.
const shutdownTimeout = 900 * time.Millisecond

// shutdownSteps put the scratch disk in order; each may fail.
var shutdownSteps = []struct {
	name string
	run  func(*Agent) error
}{
	{"kill containers", func(a *Agent) error { return cgroup(filepath.Join(a.paths.cgroup, "pod")).kill() }},
	{"sync", func(*Agent) error { unix.Sync(); return nil }},
	{"unmount the volumes", func(a *Agent) error { return unmount(a.paths.volumes) }},
	{"unmount the scratch disk", func(a *Agent) error { return unmount(a.paths.scratch) }},
}

// Shutdown does not return in a guest.
func (a *Agent) Shutdown(context.Context, *api.ShutdownRequest) (*api.ShutdownResponse, error) {
	a.log.Printf("shutdown")
	done := make(chan struct{})
	go func() {
		defer a.crash()
		defer close(done)
		for _, s := range shutdownSteps {
			if err := s.run(a); err != nil {
				a.log.Printf("shutdown: %s: %v", s.name, err)
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(shutdownTimeout):
		a.log.Printf("shutdown: not done after %v", shutdownTimeout)
	}
	a.end()
	return &api.ShutdownResponse{}, nil
}

// watchPodInit ends the machine when pod-init has ended: the containers are
// gone, or have lost the parent that tells how they end.
func (a *Agent) watchPodInit(p *podClient) {
	defer a.crash()
	<-p.gone
	a.log.Printf("pod-init has ended: the pod is lost")
	a.end()
}
