package shim

import (
	"fmt"

	"github.com/containerd/errdefs"

	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// volumes are the host paths in the share "volumes". On macOS there are no bind
// mounts, and so none yet.
type volumes struct{}

func newVolumes(Config) *volumes { return &volumes{} }

func (*volumes) add(v *shimapi.Volume) error {
	return fmt.Errorf("host path %s can't be mounted: volumes are not available on macOS yet: %w", v.GetHostPath(), errdefs.ErrNotImplemented)
}

func (*volumes) release([]string) error { return nil }
func (*volumes) close() error           { return nil }
