//go:build linux && (amd64 || arm64)

package agent

import (
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// forkIn runs a shell script in a cgroup.
func forkIn(t *testing.T, r *reaper, c cgroup, dir, script string, stdout *os.File) int {
	t.Helper()
	fd, err := unix.Open(string(c), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if stdout == nil {
		stdout = null
	}
	pid, err := r.start(func() (int, error) {
		return syscall.ForkExec(busybox, []string{"sh", "-c", script}, &syscall.ProcAttr{
			Dir: dir, Env: []string{"PATH=/bin:/usr/bin"}, Files: []uintptr{null.Fd(), stdout.Fd(), null.Fd()},
			Sys: &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd},
		})
	}, func(unix.WaitStatus, time.Time) {})
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// startIn starts a process that stays until its cgroup is killed.
func startIn(t *testing.T, r *reaper, c cgroup) int {
	t.Helper()
	return forkIn(t, r, c, "/", "exec sleep 1000", nil)
}

// runIn returns a script's output.
func runIn(t *testing.T, r *reaper, c cgroup, dir, script string) string {
	t.Helper()
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	forkIn(t, r, c, dir, script, w)
	w.Close()
	_ = out.SetReadDeadline(time.Now().Add(10 * time.Second))
	b, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
