//go:build linux

package node_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/test/testnode"
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
		rest := testnode.Descendants(os.Getpid())
		for _, p := range rest {
			if p.State == 'Z' {
				_, _ = unix.Wait4(p.PID, nil, unix.WNOHANG, nil)
				continue
			}
			left = append(left, fmt.Sprintf("process %d: %.200s", p.PID, p.Command))
			_ = unix.Kill(p.PID, unix.SIGKILL)
		}
		if len(rest) == 0 || time.Now().After(deadline) {
			break
		}
	}
	for _, m := range testnode.MountsBelow(base) {
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
	// cri-vz keeps the VMs of some pods in cgroups of its own.
	log, _ := os.ReadFile(logFile("cri-vz"))
	for _, dir := range directoriesBelow("/sys/fs/cgroup") {
		if id, ours := strings.CutPrefix(filepath.Base(dir), "cri-vz-"); ours && bytes.Contains(log, []byte(strings.TrimSuffix(id, ".scope"))) {
			left = append(left, "cgroup "+dir)
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
