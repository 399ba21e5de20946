//go:build !linux

package qemu

import (
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// New fails: QEMU's devices need Linux. Other systems have drivers of their own.
func New(Options) (vmm.Driver, error) {
	return nil, fmt.Errorf("the qemu driver runs on linux only, on %s use vz: %w", runtime.GOOS, errdefs.ErrNotImplemented)
}
