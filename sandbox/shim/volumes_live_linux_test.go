package shim

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/shim/shimtest"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

type liveDriver struct{ *shimtest.Driver }

func (liveDriver) Capabilities(context.Context, string) (vmm.Capabilities, error) {
	return vmm.Capabilities{LiveShares: true}, nil
}

// Where the share of a machine that runs can't change, there are pods, and no host
// paths in them.
func TestNoLiveShares(t *testing.T) {
	for _, test := range []struct {
		name   string
		driver vmm.Driver
		live   bool
	}{{"as they are", liveDriver{&shimtest.Driver{}}, true}, {"none", &shimtest.Driver{}, false}} {
		t.Run(test.name, func(t *testing.T) {
			v := newLiveVolumes(Config{PodDir: t.TempDir()})
			if err := v.prepare(); err != nil {
				t.Fatal(err)
			}
			s, err := v.share(t.Context(), test.driver)
			if err != nil {
				t.Fatal(err)
			}
			if test.live != (s.Dirs != nil) || test.live == s.ReadOnly {
				t.Errorf("share %+v", s)
			}
			if !test.live {
				if left, err := os.ReadDir(s.Dir); err != nil || len(left) != 0 {
					t.Errorf("the guest sees %v, %v", left, err)
				}
			}
			err = v.add(&shimapi.Volume{Name: "v", HostPath: t.TempDir()})
			if test.live && err != nil || !test.live && (!errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "`cri-vz doctor` says why")) {
				t.Errorf("add: %v", err)
			}
			if err := v.close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A single file is a link, which reaches no other disk: that is said, and what to do,
// and nothing of it is left. // T30
func TestSingleFileOnAnotherDisk(t *testing.T) {
	v := newLiveVolumes(Config{PodDir: t.TempDir()})
	if err := v.prepare(); err != nil {
		t.Fatal(err)
	}
	disk := t.TempDir()
	if err := unix.Mount("disk", disk, "tmpfs", 0, ""); err != nil {
		t.Fatalf("mount another disk (as root?): %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	file := filepath.Join(disk, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := v.add(&shimapi.Volume{Name: "v", HostPath: file})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "mount its directory") || !strings.Contains(err.Error(), file) {
		t.Errorf("add: %v", err)
	}
	if left, err := os.ReadDir(filepath.Join(v.podDir, FilesDir)); err != nil || len(left) != 0 || len(v.dirs) != 0 {
		t.Errorf("left behind: %v, %v, %v", left, v.dirs, err)
	}
	if err := v.add(&shimapi.Volume{Name: "v", HostPath: disk}); err != nil {
		t.Errorf("its directory: %v", err)
	}
}
