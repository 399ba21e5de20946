package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

var _ vmm.CPUPinner = (*machine)(nil)

// PinCPUs implements vmm.CPUPinner. QEMU has a thread for each virtual CPU, under
// emulation too.
func (m *machine) PinCPUs(ctx context.Context, cpus []int) error {
	m.mu.Lock()
	vm, monitor := m.qemu, m.monitor
	m.mu.Unlock()
	if monitor == nil {
		return fmt.Errorf("machine %s: pin its CPUs: it doesn't run: %w", m.config.ID, errdefs.ErrFailedPrecondition)
	}
	var set unix.CPUSet
	if len(cpus) == 0 {
		if err := unix.SchedGetaffinity(0, &set); err != nil {
			return fmt.Errorf("machine %s: the CPUs of its owner: %w", m.config.ID, err)
		}
	}
	for _, n := range cpus {
		set.Set(n)
	}
	var list []struct {
		Thread int `json:"thread-id"`
	}
	if err := monitor.execute(ctx, "query-cpus-fast", nil, &list); err != nil {
		return fmt.Errorf("machine %s: its CPUs' threads: %w", m.config.ID, err)
	}
	ours, err := threadsByOwnID(vm.pid())
	if err != nil {
		return fmt.Errorf("machine %s: its CPUs' threads: %w", m.config.ID, err)
	}
	type change struct {
		thread int
		before unix.CPUSet
	}
	var done []change
	for _, cpu := range list {
		c := change{thread: ours[cpu.Thread]}
		if c.thread == 0 {
			err = fmt.Errorf("qemu has no thread %d", cpu.Thread)
		} else if err = unix.SchedGetaffinity(c.thread, &c.before); err == nil {
			err = unix.SchedSetaffinity(c.thread, &set)
		}
		if err != nil {
			for _, d := range done {
				err = errors.Join(err, unix.SchedSetaffinity(d.thread, &d.before))
			}
			return fmt.Errorf("machine %s: run on CPUs %v of the host: %w", m.config.ID, cpus, err)
		}
		done = append(done, c)
	}
	return nil
}

// threadsByOwnID maps the ids that a process's threads have in its own pid
// namespace, which are those that QEMU tells, to those that they have in ours
// (proc(5), NSpid).
func threadsByOwnID(pid int) (map[int]int, error) {
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		return nil, err
	}
	ids := make(map[int]int, len(paths))
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // a thread that has ended
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "NSpid:" {
				own, err1 := strconv.Atoi(f[len(f)-1])
				ours, err2 := strconv.Atoi(filepath.Base(filepath.Dir(path)))
				if err := errors.Join(err1, err2); err != nil {
					return nil, fmt.Errorf("%s: %w", path, err)
				}
				ids[own] = ours
			}
		}
	}
	return ids, nil
}
