package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// startProcess runs a shim in a session and a mount namespace of its own.
func startProcess(cmd *exec.Cmd) error {
	// CLONE_NEWNS by clone and not by unshare: os/exec makes "/" private with
	// the latter, and what is private can't become a slave of the host's (T2).
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNS}
	return cmd.Start()
}

// hostMounts are descriptors of this process's mount namespace and of its root
// directory, which in a chroot is not the namespace's.
func hostMounts() (namespace, root *os.File, err error) {
	if namespace, err = os.Open("/proc/self/ns/mnt"); err != nil {
		return nil, nil, err
	}
	if root, err = os.Open("/"); err != nil {
		namespace.Close()
		return nil, nil, err
	}
	return namespace, root, nil
}

// startTime of a process, in clock ticks since boot, and whether it is a zombie.
func startTime(pid int) (start uint64, zombie bool, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, false, err
	}
	// The second field is the program's name in parentheses, which may hold
	// anything.
	_, rest, ok := strings.Cut(string(b), ") ")
	if i := strings.LastIndex(string(b), ") "); ok && i >= 0 {
		rest = string(b)[i+2:]
	}
	f := strings.Fields(rest)
	if len(f) < 20 {
		return 0, false, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(f))
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return start, f[0] == "Z" || f[0] == "X", err
}

// open returns a pidfd of the process if it is still the same one (T13).
func (p process) open() (int, bool) {
	if p.PID <= 0 {
		return -1, false
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return -1, false
	}
	// With the pidfd open, the pid can't be anyone else's any more.
	start, zombie, err := startTime(p.PID)
	if err != nil || zombie || start != p.Start {
		unix.Close(fd)
		return -1, false
	}
	return fd, true
}

func (p process) alive() bool {
	fd, ok := p.open()
	if ok {
		unix.Close(fd)
	}
	return ok
}

// wait waits until the process has ended.
func (p process) wait(ctx context.Context) error {
	fd, ok := p.open()
	if !ok {
		return nil
	}
	defer unix.Close(fd)
	start := time.Now()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 50)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", p.PID, err)
		}
		if n > 0 {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("waited %v for process %d to end: %w", time.Since(start).Round(time.Millisecond), p.PID, ctx.Err())
		}
	}
}

// kill sends SIGKILL and waits for the end.
func (p process) kill(ctx context.Context) error {
	fd, ok := p.open()
	if !ok {
		return nil
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	return p.wait(ctx)
}
