//go:build linux

package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// T34: a file system that was a volume is the host's alone again when
// RemoveContainer returns, while the pod lives on.
func TestVolumeIsReleased(t *testing.T) {
	p := sharedPodOf(t)
	image, dir := filepath.Join(suite.base, "loop.img"), filepath.Join(suite.base, "loop")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 8<<20), os.Mkdir(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-F", image}, {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	mounted := true
	t.Cleanup(func() {
		if mounted {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	id := p.start(t, "loop", asRoot, command("/bin/sleep", "infinity"), mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/data"}))
	p.output(t, id, "/bin/write", "/data/file", "x")
	p.removeContainer(t, id)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	mounted = false
	// The loop device is free when nobody has the file system mounted, in any mount
	// namespace.
	eventually(t, time.Second, "the loop device to be free", func() error {
		files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
		if err != nil {
			return err
		}
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte(image)) {
				return fmt.Errorf("%s still holds %s", f, image)
			}
		}
		return nil
	})
}

// T35: what a container leaves in a shared mapping is in the file when the host
// learns of its end.
func TestSharedMappingsAreSynced(t *testing.T) {
	p := sharedPodOf(t)
	dir := filepath.Join(suite.base, "mapped")
	if err := os.Mkdir(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	const text = "written by a mapping"
	r := p.run(t, "maps", asRoot, command("/app/web", "map-write", "/data/file", text), mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/data"}))
	if b, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(b) != text {
		t.Errorf("%+v; on the host: %q, %v", r, b, err)
	}
}

// T36: a memory-backed emptyDir is the host's tmpfs, with its size; and file locks
// of the host and of a pod don't exclude each other.
func TestMemoryVolumesAndLocks(t *testing.T) {
	p := sharedPodOf(t)
	dir := filepath.Join(suite.base, "memory")
	if err := errors.Join(os.Mkdir(dir, 0o755), unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,mode=0777")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	volume := mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/memory"})
	id := p.start(t, "memory", asRoot, command("/bin/sleep", "infinity"), volume)
	// A second container of the pod.
	other := p.start(t, "locks", asRoot, command("/bin/sleep", "infinity"), volume)
	writeFile(t, filepath.Join(dir, "locked"), "")
	f, err := os.Open(filepath.Join(dir, "locked"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	p.output(t, other, "/app/web", "lock", "/memory/locked") // the host's lock doesn't keep the pod out

	if r := p.exec(t, id, "/app/web", "fill", "/memory/file"); r.code != 1 || !strings.Contains(r.stderr, "no space left") {
		t.Errorf("filling 1 MiB: %+v", r)
	}
	if st, err := os.Stat(filepath.Join(dir, "file")); err != nil || st.Size() == 0 || st.Size() > 1<<20 {
		t.Errorf("on the host: %v, %v", st, err)
	}
	p.removeContainer(t, id)
	p.removeContainer(t, other)
}
