package frameswitch

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	// idleEnd is how long the process lives without a port: no pod is left. Until the
	// first one joins it gets idleStart, in which a VM is prepared.
	idleEnd   = 3 * time.Second
	idleStart = 30 * time.Second

	lockFile = "switch.lock"
	logFile  = "switch.log"
	// maxLog is where the log begins anew: some ten thousand pods.
	maxLog = 1 << 20
)

// Process is a switch in a process of its own, which outlives whoever started it, and
// ends when no machine needs it. At most one runs for a state directory.
type Process struct {
	// Command is the program and its first arguments, which get to [Main]: Socket and
	// StateDir are appended.
	Command []string
	// Socket is what [Join] wants. Its directory is its user's alone.
	Socket string
	// StateDir holds the lock and the log.
	StateDir string
}

// Ensure starts the process unless one runs. It doesn't wait until the socket is
// served, which takes some milliseconds. It may be called at any time: of two that are
// started at once one ends.
func (p Process) Ensure() error {
	lock, err := takeLock(p.StateDir)
	if lock == nil {
		return err
	}
	lock.Close()
	path := filepath.Join(p.StateDir, logFile)
	how := os.O_CREATE | os.O_WRONLY | os.O_APPEND
	if st, err := os.Stat(path); err == nil && st.Size() > maxLog {
		how |= os.O_TRUNC
	}
	log, err := os.OpenFile(path, how, 0o600)
	if err != nil {
		return fmt.Errorf("frame switch: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(p.Command[0], append(p.Command[1:len(p.Command):len(p.Command)], p.Socket, p.StateDir)...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the frame switch: %w", err)
	}
	go func() { _ = cmd.Wait() }() // it outlives this process, or is reaped
	return nil
}

// takeLock returns nil and no error if a process has it.
func takeLock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("frame switch: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, fmt.Errorf("frame switch: lock %s: %w", f.Name(), err)
	}
	return f, nil
}

// Main is the hidden command "switch SOCKET STATE_DIR". It returns the exit code.
func Main(args []string) int {
	if len(args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: switch SOCKET STATE_DIR (started by the daemon, not by hand)")
		return 2
	}
	defer klog.Flush()
	// A terminal's end, and who stops the daemon by it, are none of the pods' business.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	if err := run(ctx, args[0], args[1]); err != nil {
		klog.ErrorS(err, "The frame switch ends")
		return 1
	}
	return 0
}

func run(ctx context.Context, socket, dir string) error {
	lock, err := takeLock(dir)
	if lock == nil {
		return err // somebody was faster
	}
	defer lock.Close()
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("frame switch: %w", err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return fmt.Errorf("frame switch: %w", err)
	}
	// The directory is its user's alone, so nobody was here in between.
	if err := os.Chmod(socket, 0o600); err != nil {
		ln.Close()
		return fmt.Errorf("frame switch: %w", err)
	}
	klog.InfoS("The frame switch serves", "socket", socket, "pid", os.Getpid())
	s := New()
	go func() {
		defer s.Close()
		look := time.NewTicker(idleEnd / 6)
		defer look.Stop()
		for needed, left := time.Now(), idleStart; time.Since(needed) < left; {
			select {
			case <-look.C:
			case <-ctx.Done():
				return
			}
			if len(*s.ports.Load()) > 0 {
				needed, left = time.Now(), idleEnd
			}
		}
		klog.InfoS("No pod needs the frame switch any more")
	}()
	return s.Serve(ln)
}
