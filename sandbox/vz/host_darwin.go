//go:build cgo && !fakevz

package vz

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// hostArch is the architecture of the guests: the framework emulates no other.
func hostArch() string { return runtime.GOARCH }

func productVersion() (string, error) { return unix.Sysctl("kern.osproductversion") }
