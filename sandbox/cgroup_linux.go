package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// cgroupNames is the pod's cgroup relative to a hierarchy's mount point (T5).
func cgroupNames(root, parent, id string) (string, error) {
	leaf := "cri-vz-" + id
	if parent == "" {
		return path.Join("/", root, leaf), nil
	}
	if slices.Contains(strings.Split(parent, "/"), "..") || strings.ContainsAny(parent, "\x00\n") || len(parent) > 1024 {
		return "", fmt.Errorf("cgroup_parent %q: %w", parent, errdefs.ErrInvalidArgument)
	}
	if base := path.Base(parent); strings.HasSuffix(base, ".slice") {
		if !strings.Contains(strings.Trim(parent, "/"), "/") {
			parent = expandSlice(base)
		}
		leaf += ".scope"
	}
	return path.Join("/", parent, leaf), nil
}

// expandSlice is where systemd has a slice: a-b.slice lies in a.slice
// (systemd.slice(5)).
func expandSlice(name string) string {
	if name == "-.slice" {
		return "/"
	}
	parts := strings.Split(strings.TrimSuffix(name, ".slice"), "-")
	dir := "/"
	for i := range parts {
		dir = path.Join(dir, strings.Join(parts[:i+1], "-")+".slice")
	}
	return dir
}

// makeCgroups makes the pod's cgroup in cgroup v2, or in v1's hierarchies that
// count, and returns the directories. Below a parent of the kubelet's these are
// those whose limits it sets and whose figures it reports for the pod; else those
// that keep the VM's memory and processes apart. A host whose cgroups can't be
// written to has none: the sweep is then left to process ids.
func makeCgroups(root, parent, id string) ([]string, error) {
	rel, err := cgroupNames(root, parent, id)
	if err != nil {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	controllers := []string{"memory", "pids"}
	if parent != "" {
		controllers = append(controllers, "cpu", "cpuacct")
	}
	var dirs []string
	for _, m := range mounts {
		if m.FSType == "cgroup" && !slices.ContainsFunc(strings.Split(m.VFSOptions, ","), func(option string) bool {
			return slices.Contains(controllers, option)
		}) {
			continue
		}
		dir := filepath.Join(m.Mountpoint, rel)
		if slices.Contains(dirs, dir) {
			continue
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			klog.InfoS("No pod cgroup here", "dir", dir, "err", err)
			continue
		}
		if err := unix.Access(filepath.Join(dir, "cgroup.procs"), unix.W_OK); err != nil {
			klog.InfoS("No pod cgroup here", "dir", dir, "err", err)
			_ = os.Remove(dir)
			continue
		}
		dirs = append(dirs, dir)
	}
	return dirs, nil
}

// removeCgroups kills whatever is left in the pod's cgroups and removes them.
func removeCgroups(ctx context.Context, dirs []string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var errs []error
	for _, dir := range dirs {
		for {
			err := os.Remove(dir)
			if err == nil || os.IsNotExist(err) {
				break
			}
			if !errors.Is(err, unix.EBUSY) {
				errs = append(errs, fmt.Errorf("remove pod cgroup: %w", err))
				break
			}
			sweep(dir)
			select {
			case <-time.After(10 * time.Millisecond):
				continue
			case <-ctx.Done():
				errs = append(errs, fmt.Errorf("remove pod cgroup %s: processes in it don't end: %w", dir, ctx.Err()))
			}
			break
		}
	}
	return errors.Join(errs...)
}

// sweep kills what is in a cgroup.
func sweep(dir string) {
	if os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0) == nil {
		return
	}
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return
	}
	for _, f := range strings.Fields(string(b)) {
		pid, err := strconv.Atoi(f)
		if err != nil || pid <= 1 || pid == os.Getpid() {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		// The pidfd is of whoever has that pid now: look again before the shot.
		if again, err := os.ReadFile(filepath.Join(dir, "cgroup.procs")); err == nil && slices.Contains(strings.Fields(string(again)), f) {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		}
		unix.Close(fd)
	}
}
