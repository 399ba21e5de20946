package command

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// listenSocket opens the CRI socket for its owner alone. A socket that a dead
// daemon left is replaced; one that somebody answers on is not. Of daemons that
// start at once one gets it.
func listenSocket(path string) (_ net.Listener, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	// Two that find a dead daemon's socket would each remove it, the slower one
	// the other's new one.
	lock, err := lockFile(path + ".lock")
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("socket %s: another daemon listens there or is about to; stop it or use another --listen", path)
	}
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	unlock := sync.OnceFunc(func() {
		_ = os.Remove(lock.Name()) // still ours; one that stays does no harm
		lock.Close()
	})
	defer func() {
		if err != nil {
			unlock()
		}
	}()
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("socket %s: there is a file of that name that is no socket; remove it or use another --listen", path)
		}
		c, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			c.Close()
		}
		// Only a refusal says that nobody listens: a daemon whose backlog is full
		// is one that lives.
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("socket %s: another daemon listens there; stop it or use another --listen", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("socket %s: %w", path, err)
		}
	}
	old := syscall.Umask(0o177)
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return &lockedListener{Listener: l, unlock: unlock}, nil
}

// lockedListener holds the socket's lock until it is closed.
type lockedListener struct {
	net.Listener
	unlock func()
}

// Close removes the socket first and then gives its name free. It may be called
// again.
func (l *lockedListener) Close() error {
	defer l.unlock()
	return l.Listener.Close()
}

// lockFile makes and locks a file. The error wraps EWOULDBLOCK where somebody
// else has it.
func lockFile(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		// The one before may have removed it since it was opened.
		mine, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if named, err := os.Lstat(path); err == nil && os.SameFile(mine, named) {
			return f, nil
		}
		f.Close()
	}
}
