//go:build !((darwin && cgo) || fakevz)

package vz

import (
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// New fails: the framework is part of macOS, and reaching it takes cgo.
func New() (vmm.Driver, error) {
	if runtime.GOOS == "darwin" {
		return nil, fmt.Errorf("this cri-vz was built without cgo and can't reach the Virtualization framework: build it on a Mac with `make build`: %w", errdefs.ErrNotImplemented)
	}
	return nil, fmt.Errorf("the vz driver runs on macOS only, on %s use qemu: %w", runtime.GOOS, errdefs.ErrNotImplemented)
}

// Features fails as New does.
func Features() ([]Feature, error) {
	_, err := New()
	return nil, err
}
