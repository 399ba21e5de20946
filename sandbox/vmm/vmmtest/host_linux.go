package vmmtest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// hostState is what a machine must not change for good.
type hostState struct {
	children, files, mounts []string
}

func resources(t *testing.T) hostState {
	t.Helper()
	var s hostState
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range tasks {
		b, err := os.ReadFile(f)
		if err == nil { // a thread may have ended
			s.children = append(s.children, strings.Fields(string(b))...)
		}
	}
	fds, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fds {
		target, err := os.Readlink(f)
		// Go's own files for polling and for children appear when first used.
		if err != nil || strings.HasPrefix(target, "anon_inode:[event") || strings.HasPrefix(target, "/proc/") {
			continue
		}
		s.files = append(s.files, target)
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		s.mounts = append(s.mounts, strings.Fields(line)[4])
	}
	return s
}

func (s hostState) compare(t *testing.T, after hostState) {
	t.Helper()
	for _, kind := range []struct {
		what          string
		before, after []string
	}{
		{"processes", s.children, after.children},
		{"open files", s.files, after.files},
		{"mounts", s.mounts, after.mounts},
	} {
		left := slices.Clone(kind.after)
		for _, b := range kind.before {
			if i := slices.Index(left, b); i >= 0 {
				left = slices.Delete(left, i, i+1)
			}
		}
		if len(left) > 0 {
			t.Errorf("%s left behind: %s", kind.what, strings.Join(left, ", "))
		}
	}
}

// laterMounts adds shares whose directories lie on mounts of either propagation,
// and a tree below a read-only share, and returns the test to run after boot. The
// caller is in a mount namespace of its own.
func (s *suite) laterMounts(t *testing.T, c *vmm.Config) func(*testing.T, *client) {
	if !s.caps.SharePropagation {
		return nil
	}
	below := filepath.Join(c.Shares[1].Dir, "below")
	mountTmpfs(t, below, unix.MS_SHARED)
	write(t, filepath.Join(below, "layer"), "intact")
	dirs := map[string]string{}
	for name, propagation := range map[string]uintptr{"private": unix.MS_PRIVATE, "shared": unix.MS_SHARED} {
		parent := filepath.Join(t.TempDir(), name)
		mountTmpfs(t, parent, propagation)
		dirs[name] = filepath.Join(parent, "share")
		if err := os.Mkdir(dirs[name], 0o755); err != nil {
			t.Fatal(err)
		}
		c.Shares = append(c.Shares, vmm.Share{Tag: name, Dir: dirs[name]})
	}
	return func(t *testing.T, guest *client) {
		for name, dir := range dirs {
			at := guest.do(t, "mount %s", name)
			guest.expect(t, "", "list %s", at)
			volume := filepath.Join(dir, "volume")
			mountTmpfs(t, volume, unix.MS_PRIVATE)
			write(t, filepath.Join(volume, "file"), "mounted later")
			guest.expect(t, "mounted later", "read %s/volume/file", at)
			guest.do(t, "write %s/volume/answer yes", at)
			if b, err := os.ReadFile(filepath.Join(volume, "answer")); err != nil || string(b) != "yes" {
				t.Errorf("%s: host reads %q, %v", name, b, err)
			}
			// A read-only mount below a writable share is read-only for guest root. // T1
			fixed := filepath.Join(dir, "fixed")
			mountTmpfs(t, fixed, unix.MS_PRIVATE)
			write(t, filepath.Join(fixed, "file"), "intact")
			if err := unix.Mount("", fixed, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
				t.Fatal(err)
			}
			guest.expect(t, "intact", "read %s/fixed/file", at)
			_, _ = guest.try(t, "remount-rw %s/fixed", at)
			if _, err := guest.try(t, "write %s/fixed/file poisoned", at); err == nil || !strings.Contains(err.Error(), "read-only file system") {
				t.Errorf("%s: write to a read-only mount: %v, want a read-only file system", name, err)
			}
		}
		// T1: what is mounted below a read-only share is read-only too, and what is
		// mounted later doesn't show.
		guest.expect(t, "intact", "read /mnt/layers/below/layer")
		_, _ = guest.try(t, "remount-rw /mnt/layers/below")
		if _, err := guest.try(t, "write /mnt/layers/below/layer poisoned"); err == nil {
			t.Error("guest wrote below a read-only share")
		}
		mountTmpfs(t, filepath.Join(below, "late"), unix.MS_SHARED)
		if _, err := guest.try(t, "write /mnt/layers/below/late/file poisoned"); err == nil {
			t.Error("guest wrote to what was mounted below a read-only share later")
		}
	}
}

// fullDisk adds a disk that is larger than the file system it is on.
func (s *suite) fullDisk(t *testing.T, c *vmm.Config) func(*testing.T, *client) {
	dir := filepath.Join(t.TempDir(), "full")
	mountTmpfs(t, dir, unix.MS_PRIVATE)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=1m"); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "disk")
	write(t, path, "")
	if err := os.Truncate(path, 8<<20); err != nil {
		t.Fatal(err)
	}
	c.Disks = append(c.Disks, vmm.Disk{Serial: "full", Path: path})
	failed := make(chan string, len(c.Disks))
	c.DiskFailed = func(serial, reason string) { failed <- serial + ": " + reason }
	return func(t *testing.T, guest *client) {
		if _, err := guest.try(t, "blockfill %s", guest.do(t, "disk full")); err == nil || !strings.Contains(err.Error(), "input/output error") {
			t.Errorf("fill: %v, want an input/output error", err)
		}
		guest.expect(t, "pong", "ping")
		if !s.caps.DiskErrors {
			return
		}
		select {
		case got := <-failed:
			if got != "full: No space left on device" {
				t.Errorf("DiskFailed said %q", got)
			}
		case <-time.After(5 * time.Second):
			t.Error("nobody was told why the guest's write failed")
		}
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if n := st.Sys().(*syscall.Stat_t).Blocks * 512; n > 1<<20 {
			t.Errorf("the disk has %d bytes on a file system of 1 MiB", n)
		}
	}
}

// mountTmpfs mounts a tmpfs at dir, which it makes, until the test ends.
func mountTmpfs(t *testing.T, dir string, propagation uintptr) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(fmt.Errorf("mount a tmpfs at %s (this test needs root): %w", dir, err))
	}
	t.Cleanup(func() {
		// Detached: the guest may hold it, and ends after this.
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	if err := unix.Mount("", dir, "", propagation, ""); err != nil {
		t.Fatal(err)
	}
}

// pinCPUs pins the machine's virtual CPUs to one of the host's, and lets go again.
func pinCPUs(t *testing.T, m *machine, pinner vmm.CPUPinner, cpus int) {
	var own unix.CPUSet
	if err := unix.SchedGetaffinity(0, &own); err != nil {
		t.Fatal(err)
	}
	if own.Count() < 2 {
		t.Log("this host gives the test one CPU: nothing can be seen")
		return
	}
	first := 0
	for !own.IsSet(first) {
		first++
	}
	pinned := func() (n int) {
		for _, pid := range m.PIDs() {
			tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
			if err != nil {
				t.Fatal(err)
			}
			for _, task := range tasks {
				var set unix.CPUSet
				tid, err := strconv.Atoi(filepath.Base(task))
				if err == nil && unix.SchedGetaffinity(tid, &set) == nil && set.Count() == 1 && set.IsSet(first) {
					n++
				}
			}
		}
		return n
	}
	if err := pinner.PinCPUs(t.Context(), []int{first}); err != nil {
		t.Fatal(err)
	}
	if n := pinned(); n != cpus {
		t.Errorf("%d threads run on CPU %d alone, want the %d virtual CPUs", n, first, cpus)
	}
	// A number that no host has is refused, and nothing changes.
	if err := pinner.PinCPUs(t.Context(), []int{1023}); err == nil {
		t.Error("CPU 1023 was accepted")
	}
	if n := pinned(); n != cpus {
		t.Errorf("%d threads run on CPU %d alone after an error, want %d", n, first, cpus)
	}
	if err := pinner.PinCPUs(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if n := pinned(); n != 0 {
		t.Errorf("%d threads are still pinned", n)
	}
}
