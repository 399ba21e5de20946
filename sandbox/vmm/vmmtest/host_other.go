//go:build !linux

package vmmtest

import (
	"testing"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// hostState is what a machine must not change for good; only Linux tells.
type hostState struct{}

func resources(*testing.T) hostState { return hostState{} }

func (hostState) compare(*testing.T, hostState) {}

// laterMounts has no meaning where there are no mounts to make.
func (s *suite) laterMounts(*testing.T, *vmm.Config) func(*testing.T, *client) { return nil }

// fullDisk would take a file system that the test can fill.
func (s *suite) fullDisk(*testing.T, *vmm.Config) func(*testing.T, *client) { return nil }

// pinCPUs has nothing to look at where there are no affinities.
func pinCPUs(*testing.T, *machine, vmm.CPUPinner, int) {}
