package shim

import (
	"fmt"
	"os"
)

// Main is the hidden command "shim POD_DIR"; it returns the exit code.
func Main([]string) int {
	fmt.Fprintln(os.Stderr, "pods can't run on macOS yet: this build has no driver for Virtualization.framework")
	return 1
}
