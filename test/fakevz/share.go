package vz

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// shareDevice is a virtiofsd whose directory has the shared ones as mounts.
type shareDevice struct {
	tag     string
	base    string
	mounted map[string]*SharedDirectory // by name; "" is base itself
	server  *process
}

// serveShare starts the server of a device and returns QEMU's connection to it.
func serveShare(d *VirtioFileSystemDeviceConfiguration) (_ *shareDevice, front *os.File, err error) {
	base, err := os.MkdirTemp("", "fakevz")
	if err != nil {
		return nil, nil, err
	}
	s := &shareDevice{tag: d.tag, base: base, mounted: map[string]*SharedDirectory{}}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	switch share := d.share.(type) {
	case *SingleDirectoryShare:
		err = s.mount("", share.dir)
	case *MultipleDirectoryShare:
		err = s.set(share.dirs)
	case *LinuxRosettaDirectoryShare:
		translator := []byte("no translator")
		if path := os.Getenv("FAKEVZ_ROSETTA"); path != "" {
			translator, err = os.ReadFile(path)
		}
		err = errors.Join(err, os.WriteFile(filepath.Join(base, "rosetta"), translator, 0o755))
	default:
		err = fmt.Errorf("share %T", d.share)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("share %s: %w", d.tag, err)
	}
	if front, err = s.serve(); err != nil {
		return nil, nil, fmt.Errorf("share %s: %w", d.tag, err)
	}
	return s, front, nil
}

// serve runs virtiofsd with one user in its world: all others are nobody, and nobody
// can chown. // T47, T50
func (s *shareDevice) serve() (*os.File, error) {
	path := s.base + ".sock"
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	listener, err := l.File()
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	// It waits in the listener's queue until virtiofsd accepts it.
	front, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer front.Close()
	cmd := exec.Command("/usr/lib/qemu/virtiofsd", "--fd=3", "-f",
		"-o", "source="+s.base+",sandbox=chroot,cache=auto,announce_submounts,no_flock,no_posix_lock,no_xattr,log_level=warn")
	cmd.ExtraFiles = []*os.File{listener}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	if s.server, err = launch(cmd); err != nil {
		return nil, err
	}
	return front.File()
}

// set makes the mounts those of dirs; what stays is not touched.
func (s *shareDevice) set(dirs map[string]*SharedDirectory) error {
	var errs []error
	for name, old := range s.mounted {
		if d := dirs[name]; d == nil || *d != *old {
			errs = append(errs, s.unmount(name))
		}
	}
	for name, d := range dirs {
		if s.mounted[name] == nil {
			errs = append(errs, s.mount(name, d))
		}
	}
	return errors.Join(errs...)
}

func (s *shareDevice) mount(name string, d *SharedDirectory) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, d.path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV, Propagation: unix.MS_SLAVE}
	if d.readOnly {
		attr = unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV, Propagation: unix.MS_PRIVATE}
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	target := filepath.Join(s.base, name)
	if err := os.MkdirAll(target, 0o700); err != nil {
		return err
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount %s (in a mount namespace of its own?): %w", d.path, err)
	}
	s.mounted[name] = d
	return nil
}

func (s *shareDevice) unmount(name string) error {
	target := filepath.Join(s.base, name)
	if err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	delete(s.mounted, name)
	if name == "" {
		return nil
	}
	return os.Remove(target)
}

func (s *shareDevice) close() {
	if s.server != nil {
		// It ends with its front end; not before it has, which takes a moment.
		select {
		case <-s.server.gone:
		case <-time.After(time.Second):
			_ = s.server.cmd.Process.Kill()
			<-s.server.gone
		}
	}
	for name := range s.mounted {
		if err := s.unmount(name); err != nil {
			fmt.Fprintln(os.Stderr, "fakevz:", err)
			return // never remove what may still show the share
		}
	}
	_ = os.RemoveAll(s.base)
}

func (v *VirtualMachine) setShare(tag string, share DirectoryShare) error {
	v.mu.Lock()
	g := v.guest
	v.mu.Unlock()
	multiple, ok := share.(*MultipleDirectoryShare)
	if !ok || g == nil {
		return fmt.Errorf("set share %s to %T", tag, share)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range g.shares {
		if s.tag == tag {
			return s.set(multiple.dirs)
		}
	}
	return fmt.Errorf("no share %s", tag)
}
