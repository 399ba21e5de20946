//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cri-vz/cri-vz/guest/api"
)

// Memory tells what memory the guest has to spare, after it has dropped the caches if
// it is asked to.
func (a *Agent) Memory(ctx context.Context, r *api.MemoryRequest) (*api.MemoryResponse, error) {
	if err := a.require(ctx, "cgroup"); err != nil {
		return nil, err
	}
	if r.DropCaches && os.Getpid() == 1 { // in a guest: a test's host keeps its own
		// 3: pages of files, and what the kernel remembers of their names. Only what is
		// clean goes; what an idle pod has written was written back meanwhile.
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			return nil, fmt.Errorf("drop caches: %w", err)
		}
	}
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	out := parseMeminfo(string(text))
	out.CpuUsageNanos = cgroup(filepath.Join(a.paths.cgroup, "pod")).flat("cpu.stat")["usage_usec"] * 1000
	return out, nil
}

// parseMeminfo reads lines like "MemFree:  1234 kB".
func parseMeminfo(text string) *api.MemoryResponse {
	out := &api.MemoryResponse{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, err := strconv.ParseUint(f[1], 10, 54)
		if err != nil {
			continue
		}
		switch f[0] {
		case "MemFree:":
			out.FreeBytes = n << 10
		case "MemAvailable:":
			out.AvailableBytes = n << 10
		}
	}
	return out
}
