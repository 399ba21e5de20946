package vmmtest

import (
	"os"
	"testing"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// Ports of the test guest for measurements. Both serve traffic, RelayPort by way of
// a TCP connection to another process of the guest.
const (
	TrafficPort = 1125
	RelayPort   = 1126
)

// Boot returns a machine with nothing but the test guest in it, ready, for
// measurements. It ends with tb.
func Boot(tb testing.TB, driver vmm.Driver, guest Guest) vmm.Machine {
	tb.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = null.Close() })
	m, err := driver.New(tb.Context(), vmm.Config{
		ID: "measured", Arch: guest.Arch, Kernel: guest.Kernel, Initrd: WithInit(tb, guest.Initrd, Init(tb, guest.Arch)),
		Cmdline: guest.Cmdline, CPUs: 1, MemoryBytes: 512 << 20, Console: null, RunDir: tb.TempDir(),
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := m.Close(); err != nil {
			tb.Error(err)
		}
	})
	if err := m.Start(tb.Context()); err != nil {
		tb.Fatal(err)
	}
	bare := &machine{Machine: m}
	bare.waitReady(tb)
	return m
}
