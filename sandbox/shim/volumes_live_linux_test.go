package shim

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

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
