//go:build linux && !amd64

package qemu

// tscKHz is 0: only x86 has that counter.
func tscKHz() uint64 { return 0 }
