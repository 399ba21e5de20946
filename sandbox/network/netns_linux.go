package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNetns runs fn on a thread that is in the network namespace at path, and
// so are the processes that fn starts. The thread ends with the call: a thread
// that changed its namespace must never serve another goroutine. An empty path
// runs fn where the caller is.
func inNetns(path string, fn func() error) error {
	if path == "" {
		return fn()
	}
	f, err := openNetns(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return onThrowawayThread(func() error {
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", path, err)
		}
		return fn()
	})
}

// onThrowawayThread runs fn on a thread of its own, which the runtime ends
// because its goroutine exits while still locked to it.
func onThrowawayThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- fn()
	}()
	return <-done
}

// openNetns opens the network namespace that is pinned at path. Without one
// (no file, or a file whose mount is gone) the error wraps errdefs.ErrNotFound.
func openNetns(path string) (*os.File, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("network namespace %s: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	if int64(st.Type) != unix.NSFS_MAGIC {
		f.Close()
		return nil, fmt.Errorf("network namespace %s: nothing is mounted there: %w", path, errdefs.ErrNotFound)
	}
	return f, nil
}

// createNetns makes a network namespace, runs setup in it and pins it at path.
// After an error nothing is left at path.
func createNetns(path string, setup func() error) (err error) {
	if f, err := openNetns(path); err == nil {
		f.Close()
		return fmt.Errorf("network namespace %s: %w", path, errdefs.ErrAlreadyExists)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("create network namespace: %w", err)
	}
	// A file without a mount is what a reboot left.
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("create network namespace: %w", err)
	}
	f.Close()
	defer func() {
		if err != nil {
			err = errors.Join(err, removeNetns(path))
		}
	}()
	return onThrowawayThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("create network namespace %s (needs CAP_SYS_ADMIN): %w", path, err)
		}
		if err := setup(); err != nil {
			return fmt.Errorf("prepare network namespace %s: %w", path, err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount network namespace at %s: %w", path, err)
		}
		return nil
	})
}

// removeNetns unpins the namespace at path, if there is one. Removing the file
// also detaches copies of the mount in other mount namespaces (a shim's), which
// would otherwise keep the namespace alive.
func removeNetns(path string) error {
	switch err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err {
	case nil, unix.EINVAL, unix.ENOENT: // EINVAL: not a mount
	default:
		return fmt.Errorf("unmount network namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network namespace: %w", err)
	}
	return nil
}

func createNodeNetns(path string) error {
	return createNetns(path, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("set lo up: %w", err)
		}
		return nil
	})
}
