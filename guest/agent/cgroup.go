//go:build linux && (amd64 || arm64)

package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// cgroup is a directory of the cgroup v2 hierarchy. A container's processes are
// in the container's own cgroup, which is the root of its cgroup namespace, so
// that software which sizes itself by its limits finds them there. Each exec is
// in a child of it that has no controllers and serves to kill the exec's tree:
// without controllers the kernel allows processes in parent and child.
type cgroup string

// controllers are enabled for the pod and its containers where the kernel has
// them.
var controllers = []string{"cpu", "memory", "pids", "io", "cpuset", "hugetlb"}

// enableControllers enables in dir, for its children, what the kernel has.
func enableControllers(dir string) error {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	var enable []string
	for _, c := range strings.Fields(string(have)) {
		if slices.Contains(controllers, c) {
			enable = append(enable, "+"+c)
		}
	}
	// In one write: each costs the kernel a grace period.
	if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(strings.Join(enable, " ")), 0); err != nil {
		return fmt.Errorf("enable controllers %v: %w", enable, err)
	}
	return nil
}

func (c cgroup) file(name string) string { return filepath.Join(string(c), name) }

// write sets a file; strings are written in one go, as cgroupfs wants.
func (c cgroup) write(name, value string) error {
	f, err := os.OpenFile(c.file(name), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(value)
		if e := f.Close(); err == nil {
			err = e
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cgroup limit %s = %s: the guest's kernel doesn't have it", name, value)
	}
	if err != nil {
		return fmt.Errorf("cgroup limit %s = %s: %w", name, value, err)
	}
	return nil
}

func (c cgroup) read(name string) (string, error) {
	b, err := os.ReadFile(c.file(name))
	return strings.TrimSpace(string(b)), err
}

// number reads a single-value file; "max" and absence are 0, false.
func (c cgroup) number(name string) (uint64, bool) {
	s, err := c.read(name)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 64)
	return n, err == nil
}

// flat reads a "key value" file.
func (c cgroup) flat(name string) map[string]uint64 {
	m := map[string]uint64{}
	s, err := c.read(name)
	if err != nil {
		return m
	}
	for line := range strings.Lines(s) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(v, 10, 64); err == nil {
			m[k] = n
		}
	}
	return m
}

// setting is one write to a cgroup.
type setting struct{ file, value string }

// settings translates OCI resources to cgroup v2 files, in the order to write
// them; zero values are left out. Host cpusets and device rules are not the
// cgroup's business here (T28).
func settings(r *specs.LinuxResources) ([]setting, error) {
	var s []setting
	if r == nil {
		return nil, nil
	}
	if m := r.Memory; m != nil {
		if m.Reservation != nil && *m.Reservation != 0 {
			s = append(s, setting{"memory.low", limit(*m.Reservation)})
		}
		if m.Limit != nil && *m.Limit != 0 {
			s = append(s, setting{"memory.max", limit(*m.Limit)})
			// The guest has no swap, and a limit that swap could stretch is none.
			swap := setting{"memory.swap.max", "0"}
			if m.Swap != nil && *m.Swap != 0 {
				switch {
				case *m.Swap < 0:
					swap.value = "max"
				case *m.Limit < 0 || *m.Swap < *m.Limit:
					return nil, invalidf("memory and swap limit %d is below the memory limit %d", *m.Swap, *m.Limit)
				default:
					swap.value = strconv.FormatInt(*m.Swap-*m.Limit, 10)
				}
			} else if *m.Limit < 0 {
				swap.value = "max"
			}
			s = append(s, swap)
		}
	}
	if c := r.CPU; c != nil {
		if c.Shares != nil && *c.Shares != 0 {
			s = append(s, setting{"cpu.weight", strconv.FormatUint(weight(*c.Shares), 10)})
		}
		quota, period := "max", uint64(100000)
		if c.Period != nil && *c.Period != 0 {
			period = *c.Period
		}
		if c.Quota != nil && *c.Quota > 0 {
			quota = strconv.FormatInt(*c.Quota, 10)
		}
		if c.Quota != nil && *c.Quota != 0 || c.Period != nil && *c.Period != 0 {
			s = append(s, setting{"cpu.max", quota + " " + strconv.FormatUint(period, 10)})
		}
		if c.Burst != nil && *c.Burst != 0 {
			s = append(s, setting{"cpu.max.burst", strconv.FormatUint(*c.Burst, 10)})
		}
		if c.Idle != nil && *c.Idle != 0 {
			s = append(s, setting{"cpu.idle", strconv.FormatInt(*c.Idle, 10)})
		}
	}
	if p := r.Pids; p != nil && p.Limit != nil && *p.Limit != 0 {
		s = append(s, setting{"pids.max", limit(*p.Limit)})
	}
	for _, h := range r.HugepageLimits {
		if strings.ContainsAny(h.Pagesize, "/.") {
			return nil, invalidf("huge page size %q", h.Pagesize)
		}
		s = append(s, setting{"hugetlb." + h.Pagesize + ".max", strconv.FormatUint(h.Limit, 10)})
	}
	names := make([]string, 0, len(r.Unified))
	for name := range r.Unified {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if !strings.Contains(name, ".") || strings.Contains(name, "/") || strings.HasPrefix(name, "cgroup.") {
			return nil, invalidf("unified cgroup setting %q: not a controller's file", name)
		}
		// Several lines are several writes, for files like io.max.
		for line := range strings.Lines(r.Unified[name]) {
			s = append(s, setting{name, strings.TrimSpace(line)})
		}
	}
	return s, nil
}

func limit(n int64) string {
	if n < 0 {
		return "max"
	}
	return strconv.FormatInt(n, 10)
}

// weight turns v1 CPU shares (2 to 262144) into a v2 weight (1 to 10000), with
// the formula of runc and kubelet before KEP-2254's change to it, so that a
// request means the same here as on their nodes.
func weight(shares uint64) uint64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}

// create makes the cgroup with limits; on error nothing is left.
func (c cgroup) create(r *specs.LinuxResources) error {
	set, err := settings(r)
	if err != nil {
		return err
	}
	if err := os.Mkdir(string(c), 0o755); err != nil {
		return fmt.Errorf("create cgroup: %w", err)
	}
	if err := c.apply(set); err != nil {
		os.Remove(string(c))
		return err
	}
	return nil
}

// apply writes all settings or none: what was written before a failure is put
// back.
func (c cgroup) apply(set []setting) error {
	type old struct{ setting }
	var undo []old
	for _, s := range set {
		before, err := c.read(s.file)
		if err == nil {
			err = c.write(s.file, s.value)
		} else if errors.Is(err, fs.ErrNotExist) {
			if s.value == "0" && (s.file == "memory.swap.max" || strings.HasPrefix(s.file, "hugetlb.")) {
				// A kernel without swap accounting has nothing to forbid, and kubelet
				// sends a zero for every page size that the host knows.
				continue
			}
			err = invalidf("cgroup limit %s = %s: the guest's kernel doesn't have it", s.file, s.value)
		}
		if err != nil {
			for _, u := range slices.Backward(undo) {
				_ = c.write(u.file, u.value)
			}
			return err
		}
		undo = append(undo, old{setting{s.file, before}})
	}
	return nil
}

// kill ends every process in the cgroup and below.
func (c cgroup) kill() error {
	err := os.WriteFile(c.file("cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		if _, e := os.Stat(string(c)); e != nil {
			return nil // no cgroup, no processes
		}
		// Before Linux 5.14.
		return c.signal(unix.SIGKILL)
	}
	return err
}

// signal sends sig to every process in the cgroup and below. Processes forked
// meanwhile may be missed.
func (c cgroup) signal(sig unix.Signal) error {
	return c.walk(func(dir cgroup) error {
		for _, pid := range dir.procs() {
			if err := unix.Kill(pid, sig); err != nil && err != unix.ESRCH {
				return err
			}
		}
		return nil
	})
}

// walk calls f for every cgroup of the subtree, children first.
func (c cgroup) walk(f func(cgroup) error) error {
	entries, err := os.ReadDir(string(c))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := cgroup(c.file(e.Name())).walk(f); err != nil {
				return err
			}
		}
	}
	return f(c)
}

// procs lists the cgroup's own processes.
func (c cgroup) procs() []int {
	s, _ := c.read("cgroup.procs")
	var pids []int
	for _, f := range strings.Fields(s) {
		// 0 is a process of a pid namespace that can't be seen from here.
		if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// remove kills what is in the cgroup and removes it with its children. It waits
// up to 2 s for the kernel to bury the processes.
func (c cgroup) remove() error {
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if err := c.kill(); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("kill cgroup: %w", err)
		}
		err := c.walk(func(dir cgroup) error {
			if err := unix.Rmdir(string(dir)); err != nil && err != unix.ENOENT {
				return err
			}
			return nil
		})
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup %s: processes %v are still there 2s after SIGKILL: %w", c, c.procs(), err)
		}
	}
}

// disband removes a cgroup whose processes live on in its parent.
func (c cgroup) disband() error {
	parent := cgroup(filepath.Dir(string(c)))
	for range 16 { // processes fork while they are moved
		for _, pid := range c.procs() {
			_ = os.WriteFile(parent.file("cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
		}
		err := unix.Rmdir(string(c))
		if err == nil || err == unix.ENOENT {
			return nil
		}
		if err != unix.EBUSY && err != unix.ENOTEMPTY {
			return os.NewSyscallError("rmdir", err)
		}
	}
	return c.remove()
}
