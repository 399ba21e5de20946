package sandbox

import "golang.org/x/sys/unix"

// availableMemory is the host's whole memory, in bytes: macOS compresses and
// swaps, and has no figure that means what Linux's MemAvailable does.
func availableMemory() (int64, error) {
	n, err := unix.SysctlUint64("hw.memsize")
	return int64(n), err
}
