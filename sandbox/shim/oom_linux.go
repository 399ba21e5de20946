package shim

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// setOOMScoreAdj sets how readily the kernel's OOM killer takes a process
// (proc(5)); one that has ended is no error.
func setOOMScoreAdj(pid, adj int) error {
	err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), fmt.Append(nil, adj), 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}
