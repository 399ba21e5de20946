//go:build linux

package testnode

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/sandbox/network"
)

// baseEnv tells the inner process where its place is.
const baseEnv = "CRI_VZ_TEST_BASE"

// Run runs the program twice, nested, and returns its exit status. The outer
// process makes the place (a directory in /tmp whose name begins with prefix,
// and a network namespace that plays the node), starts the program again in it
// with the same arguments, and cleans up and judges what was left, however the
// inner one ended. The inner process calls inner with the directory.
//
// The prefix is short, because of the sockets below the directory (T14). The
// namespace is at Netns(base).
func Run(prefix string, inner func(base string) (code int, err error)) (code int, err error) {
	if base := os.Getenv(baseEnv); base != "" {
		return inner(base)
	}
	return outer(prefix)
}

// Netns is the path of the network namespace of the place at base.
func Netns(base string) string { return filepath.Join(base, "node") }

func outer(prefix string) (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("these tests make network namespaces and VMs: run them as root (make test does)")
	}
	runtime.LockOSThread() // the inner process dies with this thread, and starts in its namespace
	before, err := Links()
	if err != nil {
		return 1, err
	}
	base, err := os.MkdirTemp("/tmp", prefix)
	if err != nil {
		return 1, err
	}
	// QEMU runs as nobody.
	if err := os.Chmod(base, 0o755); err != nil {
		return 1, err
	}
	// What the inner process leaves becomes ours, and is found.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return 1, fmt.Errorf("become a subreaper: %w", err)
	}
	node := Netns(base)
	if err := network.CreateNetns(node); err != nil {
		return 1, errors.Join(err, os.RemoveAll(base))
	}
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM) // the inner process ends, then this one cleans up
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), baseEnv+"="+base)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := inNetns(node, cmd.Start); err != nil {
		return 1, err
	}
	werr := WaitAndReap(cmd)
	left := sweep(base, node)
	after, lerr := Links()
	for _, l := range after {
		if !slices.Contains(before, l) && strings.HasPrefix(l, "cri-vz") {
			left = append(left, "network interface "+l)
		}
	}
	if len(left) > 0 {
		err = fmt.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
	}
	var exit *exec.ExitError
	if errors.As(werr, &exit) {
		return max(1, exit.ExitCode()), err
	}
	return 0, errors.Join(err, werr, lerr)
}

// inNetns calls f on this thread in the network namespace at path.
func inNetns(path string, f func() error) error {
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer own.Close()
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	return errors.Join(f(), unix.Setns(int(own.Fd()), unix.CLONE_NEWNET))
}

// WaitAndReap waits for cmd and meanwhile reaps what was orphaned to us, as a
// node's PID 1 does.
func WaitAndReap(cmd *exec.Cmd) error {
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(200 * time.Millisecond):
			}
			for _, p := range Processes() {
				if p.Parent == os.Getpid() && p.PID != cmd.Process.Pid && p.State == 'Z' {
					_, _ = unix.Wait4(p.PID, nil, unix.WNOHANG, nil)
				}
			}
		}
	}()
	err := cmd.Wait()
	close(stop)
	<-done
	return err
}

// sweep removes all that is below base, and says what should not have been there.
func sweep(base, node string) (left []string) {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		rest := Descendants(os.Getpid())
		for _, p := range rest {
			if p.State == 'Z' {
				_, _ = unix.Wait4(p.PID, nil, unix.WNOHANG, nil)
				continue
			}
			left = append(left, fmt.Sprintf("process %d: %.200s", p.PID, p.Command))
			_ = unix.Kill(p.PID, unix.SIGKILL)
		}
		if len(rest) == 0 || time.Now().After(deadline) {
			break
		}
	}
	for _, m := range MountsBelow(base) {
		if m != node {
			left = append(left, "mount "+m)
			_ = unix.Unmount(m, unix.MNT_DETACH)
		}
	}
	for _, err := range []error{network.DeleteNetns(node), os.RemoveAll(base)} {
		if err != nil {
			left = append(left, err.Error())
		}
	}
	sort.Strings(left)
	return left
}
