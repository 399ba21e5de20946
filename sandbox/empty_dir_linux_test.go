package sandbox

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// T47: which host paths are emptyDirs, and how they are described to the guest.
func TestGuestEmptyDir(t *testing.T) {
	kubelet := t.TempDir()
	pod := filepath.Join(kubelet, "pods", "uid-1")
	empty := filepath.Join(pod, "volumes/kubernetes.io~empty-dir")
	for dir, mode := range map[string]os.FileMode{
		filepath.Join(empty, "data"): 0o777 | os.ModeSetgid, filepath.Join(empty, "data/sub"): 0o755, filepath.Join(empty, "data/sub/b"): 0o777 | os.ModeSticky,
		filepath.Join(empty, "memory"): 0o777, filepath.Join(pod, "volumes/kubernetes.io~configmap/c"): 0o777, filepath.Join(kubelet, "data"): 0o777,
	} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(filepath.Join(empty, "data"), 0, 2000); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(empty, "data"), 0o777|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(empty, "data/sub"), 1000, 0); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(empty, "data/file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("memory", filepath.Join(empty, "memory"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(filepath.Join(empty, "memory"), 0); err != nil {
			t.Error(err)
		}
	})
	for _, test := range []struct {
		name, uid, path, source string
		options                 []string
		readOnly                bool
	}{
		{"itself", "uid-1", filepath.Join(empty, "data"), "data", []string{"make=2777:2000", "nodev"}, false},
		{"below", "uid-1", filepath.Join(empty, "data/sub/b"), "data/sub/b", []string{"make=2777:2000", "make=755:0", "make=1777:0", "nodev", "ro"}, true},
		{"all of them", "uid-1", empty, "", nil, false},
		{"another pod's", "uid-2", filepath.Join(empty, "data"), "", nil, false},
		{"of nobody", "", filepath.Join(empty, "data"), "", nil, false},
		{"in memory (T36)", "uid-1", filepath.Join(empty, "memory"), "", nil, false},
		{"a file", "uid-1", file, "", nil, false},
		{"a ConfigMap", "uid-1", filepath.Join(pod, "volumes/kubernetes.io~configmap/c"), "", nil, false},
		{"a host path", "uid-1", filepath.Join(kubelet, "data"), "", nil, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			m, err := guestEmptyDir(test.uid, &shimapi.Volume{HostPath: test.path, ReadOnly: test.readOnly})
			switch {
			case err != nil:
				t.Fatal(err)
			case test.source == "" && m != nil:
				t.Errorf("it is taken for an emptyDir: %+v", m)
			case test.source != "" && (m == nil || m.Source != test.source || !slices.Equal(m.Options, test.options)):
				t.Errorf("%+v, want %s with %q", m, test.source, test.options)
			}
		})
	}
	if _, err := guestEmptyDir("uid-1", &shimapi.Volume{HostPath: filepath.Join(empty, "gone")}); err == nil {
		t.Error("one that is gone is described")
	}
}
