//go:build linux

package node_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// saveMachine notes what a kubelet changes outside of its own directories; the
// function that it returns puts that back.
func saveMachine() (func() error, error) {
	saved := map[string][]byte{}
	for _, name := range []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"} {
		path := filepath.Join("/proc/sys", name)
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		saved[path] = b
	}
	var made []string
	for _, dir := range []string{"/var/log/containers", "/var/lib/kubelet", "/var/log/pods"} {
		if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
			made = append(made, dir)
		}
	}
	return func() error {
		var errs []error
		for path, b := range saved {
			if now, err := os.ReadFile(path); err == nil && bytes.Equal(now, b) {
				continue
			}
			errs = append(errs, os.WriteFile(path, b, 0o644))
		}
		for _, dir := range made {
			errs = append(errs, os.RemoveAll(dir))
		}
		return errors.Join(errs...)
	}, nil
}

// podCgroups lists the cgroups that kubelets make for all their pods.
func podCgroups() []string {
	var found []string
	for _, pattern := range []string{"/sys/fs/cgroup/kubepods*", "/sys/fs/cgroup/*/kubepods*"} {
		dirs, _ := filepath.Glob(pattern)
		found = append(found, dirs...)
	}
	return found
}

// sweep removes all that the test made, and says what should not have been there.
func sweep(base string) (left []string) {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		rest := descendants(os.Getpid())
		for _, p := range rest {
			if p.state == 'Z' {
				_, _ = unix.Wait4(p.pid, nil, unix.WNOHANG, nil)
				continue
			}
			left = append(left, fmt.Sprintf("process %d: %.200s", p.pid, p.command))
			_ = unix.Kill(p.pid, unix.SIGKILL)
		}
		if len(rest) == 0 || time.Now().After(deadline) {
			break
		}
	}
	for _, m := range mountsBelow(base) {
		// The kubelet mounts its own directory where the machine's mounts aren't shared.
		if m != filepath.Join(base, kubeletRoot) {
			left = append(left, "mount "+m)
		}
		_ = unix.Unmount(m, unix.MNT_DETACH)
	}
	// The kubelet never removes the cgroups of the classes of pods, whatever ends;
	// those of pods it does.
	for _, root := range podCgroups() {
		for _, dir := range directoriesBelow(root) {
			if name := filepath.Base(dir); strings.Contains(name, "pod") && !strings.HasPrefix(name, "kubepods") {
				left = append(left, "cgroup "+dir)
			}
			if err := unix.Rmdir(dir); err != nil {
				left = append(left, fmt.Sprintf("cgroup %s: %v", dir, err))
			}
		}
	}
	if err := os.RemoveAll(base); err != nil {
		left = append(left, err.Error())
	}
	slices.Sort(left)
	return slices.Compact(left)
}

// directoriesBelow lists dir and all below it, the deepest first.
func directoriesBelow(dir string) []string {
	var found []string
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			found = append(found, path)
		}
		return nil
	})
	slices.Reverse(found)
	return found
}

func becomeSubreaper() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become a subreaper: %w", err)
	}
	return nil
}

// waitAndReap waits for cmd and meanwhile reaps what was orphaned to us, as a
// node's PID 1 does.
func waitAndReap(cmd *exec.Cmd) error {
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
			for _, p := range processes() {
				if p.parent == os.Getpid() && p.pid != cmd.Process.Pid && p.state == 'Z' {
					_, _ = unix.Wait4(p.pid, nil, unix.WNOHANG, nil)
				}
			}
		}
	}()
	err := cmd.Wait()
	close(stop)
	<-done
	return err
}

// process is a process of this host as /proc shows it.
type process struct {
	pid, parent int
	state       byte
	command     string // arguments, separated by spaces
}

// processes lists all processes; those that end meanwhile are left out.
func processes() []process {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var all []process
	for _, dir := range dirs {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) < 2 {
			continue
		}
		p := process{state: fields[0][0]}
		p.pid, _ = strconv.Atoi(filepath.Base(dir))
		p.parent, _ = strconv.Atoi(fields[1])
		args, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		p.command = strings.TrimSpace(strings.ReplaceAll(string(args), "\x00", " "))
		all = append(all, p)
	}
	return all
}

// descendants lists the children of pid, theirs and so on.
func descendants(pid int) []process {
	all := processes()
	var found []process
	for parents := []int{pid}; len(parents) > 0; parents = parents[1:] {
		for _, p := range all {
			if p.parent == parents[0] {
				found, parents = append(found, p), append(parents, p.pid)
			}
		}
	}
	return found
}

// mountsBelow lists mount points below dir, the deepest first.
func mountsBelow(dir string) []string {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{err.Error()}
	}
	var found []string
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			found = append(found, f[4])
		}
	}
	slices.SortFunc(found, func(a, b string) int { return len(b) - len(a) })
	return found
}
