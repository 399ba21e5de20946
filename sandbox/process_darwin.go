package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func startProcess(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Start()
}

// hostMounts: macOS has no mount namespaces.
func hostMounts() (namespace, root *os.File, err error) { return nil, nil, nil }

// startTime of a process, in microseconds, and whether it is a zombie.
func startTime(pid int) (uint64, bool, error) {
	k, err := unix.SysctlKinfoProc("kern.proc.pid", pid)
	if err != nil {
		return 0, false, err
	}
	const zombie = 5 // SZOMB of sys/proc.h
	t := k.Proc.P_starttime
	return uint64(t.Sec)*1e6 + uint64(t.Usec), k.Proc.P_stat == zombie, nil
}

func (p process) alive() bool {
	if p.PID <= 0 {
		return false
	}
	start, zombie, err := startTime(p.PID)
	return err == nil && !zombie && start == p.Start
}

func (p process) wait(ctx context.Context) error {
	begin := time.Now()
	for p.alive() {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("waited %v for process %d to end: %w", time.Since(begin).Round(time.Millisecond), p.PID, ctx.Err())
		}
	}
	return nil
}

func (p process) kill(ctx context.Context) error {
	if !p.alive() {
		return nil
	}
	if err := unix.Kill(p.PID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	return p.wait(ctx)
}
