//go:build fakevz

package vz

import "github.com/Code-Hex/vz/v3"

// What Objective-C and the kernel are asked on a Mac, the stand-in is asked here.

func hostArch() string                { return vz.TestArch }
func productVersion() (string, error) { return vz.TestMacOS, nil }

func canSetShare() error { return vz.TestCanSetShare }

func setShare(vm *vz.VirtualMachine, tag string, share vz.DirectoryShare) error {
	return vz.TestSetShare(vm, tag, share)
}

func setMemory(vm *vz.VirtualMachine, bytes int64) error { return vz.TestSetMemory(vm, bytes) }
