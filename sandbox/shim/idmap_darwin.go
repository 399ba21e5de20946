package shim

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// ProbeIDMaps says why there are no user namespaces: macOS has no mounts that map
// ids.
func ProbeIDMaps(string) error {
	return fmt.Errorf("macOS can't mount volumes with other ids: %w", errdefs.ErrNotImplemented)
}
