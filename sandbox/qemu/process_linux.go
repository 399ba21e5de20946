package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stderrLimit is how much of a child's standard error is kept for messages.
const stderrLimit = 16 << 10

// starter runs functions on a thread that never ends: the kernel sends the
// parent-death signal when the thread that forked ends, not when the process does
// (prctl(2), PR_SET_PDEATHSIG). // T8
var starter = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go startChildren(work)
	return work
})

func startChildren(work <-chan func()) {
	runtime.LockOSThread()
	for f := range work {
		f()
	}
}

// startChild starts cmd from the thread for children. A child that keeps its
// capabilities has them whatever user it acts as (capabilities(7),
// SECBIT_NO_SETUID_FIXUP).
func startChild(cmd *exec.Cmd, keepCapabilities bool) error {
	const noSetuidFixup = 1 << 2
	err := make(chan error, 1)
	starter() <- func() {
		err <- func() error {
			if keepCapabilities {
				if err := unix.Prctl(unix.PR_SET_SECUREBITS, noSetuidFixup, 0, 0, 0); err != nil {
					return os.NewSyscallError("prctl(PR_SET_SECUREBITS)", err)
				}
			}
			serr := cmd.Start()
			if keepCapabilities {
				if err := unix.Prctl(unix.PR_SET_SECUREBITS, 0, 0, 0, 0); err != nil {
					// The next child would have them too.
					panic(err)
				}
			}
			return serr
		}()
	}
	return <-err
}

// child is a process of a machine.
type child struct {
	// what names it in messages: "qemu", "virtiofsd of share layers".
	what   string
	cmd    *exec.Cmd
	stderr *tail
	gone   chan struct{} // closed when it is reaped
	err    error         // how it ended, set before gone is closed
}

// launch starts cmd with the descriptors files[i] as number 3+i and no input.
// killed with its parent. The caller keeps files. For keepCapabilities see
// startChild.
func launch(what string, cmd *exec.Cmd, files []*os.File, keepCapabilities bool) (*child, error) {
	c := &child{what: what, cmd: cmd, stderr: &tail{limit: stderrLimit}, gone: make(chan struct{})}
	cmd.ExtraFiles = files
	cmd.Stdout = c.stderr
	cmd.Stderr = c.stderr
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	// A grandchild that keeps stderr open must not keep us waiting for its end.
	cmd.WaitDelay = time.Second
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr.Setsid = true // a terminal's signals are for the owner alone
	if err := startChild(cmd, keepCapabilities); err != nil {
		return nil, fmt.Errorf("start %s (%s): %w", what, cmd.Path, err)
	}
	go func() {
		c.err = c.describe(cmd.Wait())
		close(c.gone)
	}()
	return c, nil
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// kill sends SIGKILL, by pidfd: never to a process that has taken over the number.
func (c *child) kill() { _ = c.cmd.Process.Signal(syscall.SIGKILL) }

// describe says how the process ended; nil if with status 0.
func (c *child) describe(err error) error {
	if err == nil || errors.Is(err, exec.ErrWaitDelay) {
		return nil
	}
	how := err.Error()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if s, ok := exit.Sys().(syscall.WaitStatus); ok && s.Signaled() {
			how = fmt.Sprintf("was killed by signal %d", s.Signal())
		} else {
			how = fmt.Sprintf("exited with status %d", exit.ExitCode())
		}
	}
	if out := c.stderr.String(); out != "" {
		return fmt.Errorf("%s %s: %s", c.what, how, out)
	}
	return fmt.Errorf("%s %s", c.what, how)
}

// cpuTime is the processor time in nanoseconds that the process has used.
func (c *child) cpuTime() (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(c.pid()) + "/stat")
	if err != nil {
		return 0, err
	}
	// proc(5): the name, field 2, may contain anything; utime is 14 and stime 15.
	i := bytes.LastIndexByte(b, ')')
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 13 {
		return 0, fmt.Errorf("%s: unexpected content of /proc/%d/stat", c.what, c.pid())
	}
	user, err1 := strconv.ParseUint(f[11], 10, 64)
	system, err2 := strconv.ParseUint(f[12], 10, 64)
	// The unit is 1/100 s on every architecture that Go supports.
	return (user + system) * uint64(time.Second/100), errors.Join(err1, err2)
}

// tail keeps the last limit bytes that are written to it.
type tail struct {
	limit int

	mu  sync.Mutex
	buf []byte
}

// Write never fails.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if len(t.buf) > t.limit {
		t.buf = append(t.buf[:0], t.buf[len(t.buf)-t.limit:]...)
	}
	return len(p), nil
}

// String is the text on one line, quoted where it is not plain.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := strings.TrimSpace(string(t.buf))
	if s == "" {
		return ""
	}
	return strconv.QuoteToGraphic(s)
}
