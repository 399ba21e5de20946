//go:build !((darwin && cgo) || fakevz)

package vz

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestNoFramework(t *testing.T) {
	for name, f := range map[string]func() error{
		"New":      func() error { _, err := New(); return err },
		"Features": func() error { _, err := Features(); return err },
	} {
		err := f()
		if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "qemu") && !strings.Contains(err.Error(), "make build") {
			t.Errorf("%s: %v, want what to do instead", name, err)
		}
	}
}
