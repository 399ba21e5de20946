package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// mountedVolumes are bind mounts below dir, in the shim's own mount namespace, so
// that a shim that is killed leaves none behind (T2).
type mountedVolumes struct {
	dir string
	// hostMountFD is the daemon's mount namespace, in which host paths are
	// looked up: a private "/" would keep later mounts from the shim's. 0: the
	// shim's own.
	hostMountFD int
	hostRootFD  int

	mu      sync.Mutex
	mounted map[string]bool
}

func newVolumes(c Config) volumes {
	if c.Driver.Name == DriverVZ {
		return newLiveVolumes(c) // which is how its stand-in is tested
	}
	return &mountedVolumes{dir: filepath.Join(c.PodDir, VolumesDir), hostMountFD: c.HostMountFD, hostRootFD: c.HostRootFD, mounted: make(map[string]bool)}
}

func (v *mountedVolumes) share(context.Context, vmm.Driver) (vmm.Share, error) {
	return vmm.Share{Tag: guestapi.ShareVolumes, Dir: v.dir}, nil
}

func (v *mountedVolumes) attach(vmm.Machine) {}

// prepare makes dir a shared mount of its own, before the machine starts: mounts
// made in it later reach virtiofsd in its own namespace.
func (v *mountedVolumes) prepare() error {
	if err := os.MkdirAll(v.dir, 0o755); err != nil {
		return err
	}
	for _, m := range []struct {
		what  string
		flags uintptr
	}{{"bind", unix.MS_BIND}, {"make private", unix.MS_PRIVATE}, {"make shared", unix.MS_SHARED}} {
		src := ""
		if m.flags == unix.MS_BIND {
			src = v.dir
		}
		if err := unix.Mount(src, v.dir, "", m.flags, ""); err != nil {
			return fmt.Errorf("%s %s: %w", m.what, v.dir, err)
		}
	}
	return nil
}

// add mounts a host path as v.Name below the share.
func (v *mountedVolumes) add(vol *shimapi.Volume) (err error) {
	if err := checkVolume(vol); err != nil {
		return err
	}
	name := vol.GetName()
	v.mu.Lock()
	taken := v.mounted[name]
	v.mounted[name] = true
	v.mu.Unlock()
	if taken {
		return fmt.Errorf("volume %s: %w", name, errdefs.ErrAlreadyExists)
	}
	target := filepath.Join(v.dir, name)
	defer func() {
		if err != nil {
			_ = os.Remove(target)
			v.mu.Lock()
			delete(v.mounted, name)
			v.mu.Unlock()
		}
	}()
	tree, isDir, err := v.clone(vol.GetHostPath())
	if err != nil {
		return err
	}
	defer unix.Close(tree)

	if len(vol.GetUidMappings()) > 0 {
		if err := idmap(tree, vol.GetUidMappings(), vol.GetGidMappings()); err != nil {
			return err
		}
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV, Propagation: unix.MS_PRIVATE}
	if vol.GetHostToContainer() {
		attr.Propagation = unix.MS_SLAVE
	}
	if vol.GetRecursiveReadOnly() {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		return fmt.Errorf("set attributes of the mount: %w", err)
	}
	if vol.GetReadOnly() && !vol.GetRecursiveReadOnly() {
		// T3: on the detached tree; a remount in place would not propagate.
		ro := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &ro); err != nil {
			return fmt.Errorf("make the mount read-only: %w", err)
		}
	}
	if isDir {
		err = os.Mkdir(target, 0o700)
	} else {
		err = os.WriteFile(target, nil, 0o600)
	}
	if err != nil {
		return err
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount in the pod's share: %w", err)
	}
	return nil
}

// clone makes a detached copy of the mount tree at path, as the daemon sees it.
func (v *mountedVolumes) clone(path string) (tree int, isDir bool, err error) {
	if v.hostMountFD == 0 {
		return cloneTree(path)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The thread is given away with its namespace: never unlocked, it ends
		// with the goroutine.
		runtime.LockOSThread()
		if err = unix.Unshare(unix.CLONE_FS); err != nil {
			err = fmt.Errorf("unshare file system attributes: %w", err)
			return
		}
		if err = unix.Setns(v.hostMountFD, unix.CLONE_NEWNS); err != nil {
			err = fmt.Errorf("enter the host's mount namespace: %w", err)
			return
		}
		if err = unix.Fchdir(v.hostRootFD); err == nil {
			err = unix.Chroot(".")
		}
		if err != nil {
			err = fmt.Errorf("enter the host's root directory: %w", err)
			return
		}
		tree, isDir, err = cloneTree(path)
	}()
	<-done
	return tree, isDir, err
}

func cloneTree(path string) (int, bool, error) {
	// O_PATH, so that a fifo doesn't hang and a device isn't touched; what was
	// looked at is what gets mounted.
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		err = &os.PathError{Op: "open", Path: path, Err: err}
		if errors.Is(err, os.ErrNotExist) {
			return -1, false, fmt.Errorf("host path doesn't exist: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
		return -1, false, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, false, err
	}
	if err := shareable(path, st.Mode); err != nil {
		return -1, false, err
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	tree, err := unix.OpenTree(fd, "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return -1, false, fmt.Errorf("clone the mount at %s: %w", path, err)
	}
	return tree, isDir, nil
}

// release unmounts volumes. Lazily: a file that the guest still has open keeps
// nothing but itself.
func (v *mountedVolumes) release(names []string) error {
	var errs []error
	for _, name := range names {
		v.mu.Lock()
		mounted := v.mounted[name]
		v.mu.Unlock()
		if !mounted {
			continue
		}
		target := filepath.Join(v.dir, name)
		if err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", target, err))
			continue
		}
		if err := os.Remove(target); err != nil && !os.IsNotExist(err) {
			errs = append(errs, err)
			continue
		}
		v.mu.Lock()
		delete(v.mounted, name)
		v.mu.Unlock()
	}
	return errors.Join(errs...)
}

// close unmounts everything.
func (v *mountedVolumes) close() error {
	v.mu.Lock()
	var names []string
	for n := range v.mounted {
		names = append(names, n)
	}
	v.mu.Unlock()
	return v.release(names)
}
