//go:build fakevz

package vz

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/Code-Hex/vz/v3"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// inside marks the process in which the tests run.
const inside = "CRI_VZ_VZ_TEST"

// TestMain runs the tests in a mount namespace of its own, which the stand-in needs.
// The Mac that it stands in for has Apple silicon.
func TestMain(m *testing.M) {
	if os.Getenv(inside) == "" {
		os.Exit(reexec())
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		fmt.Fprintln(os.Stderr, "make / a slave mount:", err)
		os.Exit(1)
	}
	vz.TestArch = "arm64"
	sleep = sleepHere
	os.Exit(m.Run())
}

// reexec runs the tests with a directory for temporary files in which nothing may be
// left. Shares that were mounted in it are gone with the namespace.
func reexec() (code int) {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests make mounts in a namespace of their own: run them as root")
		return 1
	}
	tmp, err := os.MkdirTemp("", "vz")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		left, err := filepath.Glob(filepath.Join(tmp, "*"))
		if err = errors.Join(err, os.RemoveAll(tmp)); err != nil || len(left) > 0 {
			fmt.Fprintf(os.Stderr, "the tests left files behind: %q %v\n", left, err)
			code = max(code, 1)
		}
	}()
	runtime.LockOSThread() // Pdeathsig is about the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inside+"=tests", "TMPDIR="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// sleepHere is a sleep of the Mac that the stand-in stands in for.
func sleepHere(t *testing.T, m vmm.Machine) time.Duration {
	const asleep = 3 * time.Second
	mac := m.(*machine)
	mac.mu.Lock()
	vm := mac.vm
	mac.mu.Unlock()
	if err := vz.TestSleep(vm, asleep); err != nil {
		t.Fatal(err)
	}
	return asleep
}
