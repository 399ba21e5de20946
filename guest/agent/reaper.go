//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// reaper owns every wait of a process, because an init process must wait for
// strangers too and two waiters steal each other's statuses (T22). Nothing
// else in the process may wait: no os/exec, no os.Process.
type reaper struct {
	// mu spans fork and registration, so that no child is reaped unknown. It
	// guards waiting.
	mu      sync.Mutex
	waiting map[int]func(unix.WaitStatus, time.Time)
}

func newReaper() *reaper {
	return &reaper{waiting: map[int]func(unix.WaitStatus, time.Time){}}
}

// start runs fork, which returns the pid of a new child, and has done called
// once with that child's end. done runs on the reaper's goroutine and must not
// block.
func (r *reaper) start(fork func() (int, error), done func(unix.WaitStatus, time.Time)) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := fork()
	if err != nil {
		return 0, err
	}
	r.waiting[pid] = done
	return pid, nil
}

// run reaps until ctx is done. sigs carries SIGCHLD; one pending is enough,
// because every round waits for all that ended.
func (r *reaper) run(ctx context.Context, sigs <-chan os.Signal) {
	for {
		r.reap()
		select {
		case <-sigs:
		case <-ctx.Done():
			return
		}
	}
}

func (r *reaper) reap() {
	for {
		r.mu.Lock()
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		var done func(unix.WaitStatus, time.Time)
		if pid > 0 {
			done = r.waiting[pid]
			delete(r.waiting, pid)
		}
		r.mu.Unlock()
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if done != nil {
			done(ws, time.Now())
		}
	}
}

// childSignals is what run needs; call it before the first start.
func childSignals() chan os.Signal {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGCHLD)
	return c
}

// exitCode is the CRI's reading of a wait status: 128+n for signal n.
func exitCode(ws unix.WaitStatus) int32 {
	if ws.Signaled() {
		return 128 + int32(ws.Signal())
	}
	return int32(ws.ExitStatus())
}
