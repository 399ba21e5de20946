//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"os"
	"runtime"

	"github.com/cri-vz/cri-vz/guest/api"
	"golang.org/x/sys/unix"
)

// Hello answers at once, also while the boot is still going on; Boot is then
// what has been done so far.
func (a *Agent) Hello(context.Context, *api.HelloRequest) (*api.HelloResponse, error) {
	r := &api.HelloResponse{Version: api.Version, AgentVersion: Version, Cpus: uint32(runtime.NumCPU())}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err == nil {
		r.KernelRelease = unix.ByteSliceToString(uts.Release[:])
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		r.MemoryBytes = uint64(info.Totalram) * uint64(info.Unit)
	}
	a.bootMu.Lock()
	r.Boot = apiSteps(a.steps)
	quota := a.scratch != nil && a.scratch.quota
	a.bootMu.Unlock()
	for _, f := range []struct {
		name string
		has  bool
	}{
		{"psi", exists("/proc/pressure/cpu")},
		{"quota", quota},
		{"cgroup.kill", exists(a.paths.cgroup + "/pod/cgroup.kill")},
	} {
		if f.has {
			r.Features = append(r.Features, f.name)
		}
	}
	return r, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
