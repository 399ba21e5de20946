package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// virtiofsd is the file server: QEMU's own in C, which Debian 12 has in
// qemu-system-common, or the project in Rust that followed it, in Debian 13.
type virtiofsd struct {
	path     string
	rust     bool
	readOnly bool // has --readonly
}

// Neither is in PATH.
var virtiofsdPaths = []string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/libexec/qemu/virtiofsd"}

func findVirtiofsd(override string) (virtiofsd, error) {
	paths := virtiofsdPaths
	if override != "" {
		paths = []string{override}
	}
	for _, p := range paths {
		if _, err := os.Stat(p); errors.Is(err, os.ErrNotExist) {
			continue
		}
		return identifyVirtiofsd(p)
	}
	return virtiofsd{}, fmt.Errorf("virtiofsd is not at %s: install it (Debian 13: apt install virtiofsd, Debian 12: apt install qemu-system-common): %w",
		strings.Join(paths, ", "), errdefs.ErrNotFound)
}

// identifyVirtiofsd tells the two by their help, whose options they are.
func identifyVirtiofsd(path string) (virtiofsd, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--help").CombinedOutput()
	switch {
	case bytes.Contains(out, []byte("--shared-dir")):
		return virtiofsd{path: path, rust: true, readOnly: bytes.Contains(out, []byte("--readonly"))}, nil
	case bytes.Contains(out, []byte("source=PATH")):
		return virtiofsd{path: path}, nil
	}
	return virtiofsd{}, fmt.Errorf("%s --help shows the options of no known virtiofsd (%v): %.200q: %w", path, err, out, errdefs.ErrFailedPrecondition)
}

// command is the server of dir for the listening socket that it inherits as fd.
func (v virtiofsd) command(dir string, readOnly, root bool, fd int) (*exec.Cmd, error) {
	var args []string
	switch {
	case v.rust:
		sandbox := "chroot"
		if !root {
			sandbox = "namespace" // a user namespace: there is no chroot without root
		}
		args = []string{
			"--fd=" + strconv.Itoa(fd), "--shared-dir=" + dir, "--sandbox=" + sandbox,
			"--cache=auto", "--announce-submounts", "--inode-file-handles=never", "--log-level=warn",
		}
		if readOnly && v.readOnly {
			args = append(args, "--readonly")
		}
	case !root:
		return nil, fmt.Errorf("%s needs root: run as root or install virtiofsd 1.x (Debian 13: apt install virtiofsd): %w", v.path, errdefs.ErrFailedPrecondition)
	case strings.Contains(dir, ","):
		return nil, fmt.Errorf("%s can't share %q because of the comma: choose another directory: %w", v.path, dir, vmm.ErrConfig)
	default:
		options := "source=" + dir + ",sandbox=chroot,cache=auto,announce_submounts,no_flock,no_posix_lock,no_xattr,log_level=warn"
		if !readOnly {
			// T31: a name that the host changes is seen at once. With the second that
			// is cache=auto's, a link that was swapped led to a directory that was
			// gone. What a file holds is cached as before.
			options += ",timeout=0"
		}
		args = []string{"--fd=" + strconv.Itoa(fd), "-f", "-o", options}
	}
	cmd := exec.Command(v.path, args...)
	if root {
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWPID,
		}
	}
	return cmd, nil
}

// mountReadOnly makes a read-only clone of dir, with all that is mounted below it,
// at target, a new directory. // T1
func mountReadOnly(dir, target string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("share %s read-only: it takes root to enforce that: %w", dir, errdefs.ErrFailedPrecondition)
	}
	if err := hiddenFromOthers(filepath.Dir(target)); err != nil {
		return err
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("clone the mounts of %s: %w", dir, err)
	}
	defer unix.Close(tree)
	// Private, so that a mount which appears below dir later, and may be writable,
	// does not show.
	attr := unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID,
		Propagation: unix.MS_PRIVATE,
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		return fmt.Errorf("make the clone of %s read-only: %w", dir, err)
	}
	if err := os.Mkdir(target, 0o700); err != nil {
		return err
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return errors.Join(fmt.Errorf("mount the clone of %s at %s: %w", dir, target, err), os.Remove(target))
	}
	return nil
}

// hiddenFromOthers refuses a directory whose mount is shared: what is mounted in it
// would show in the namespaces of others, and outlive this process.
func hiddenFromOthers(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.ParentsFilter(dir))
	if err != nil {
		return fmt.Errorf("look for the mount of %s: %w", dir, err)
	}
	var over *mountinfo.Info // the deepest, and the last of those
	for _, m := range mounts {
		if over == nil || len(m.Mountpoint) >= len(over.Mountpoint) {
			over = m
		}
	}
	if over != nil && strings.Contains(over.Optional, "shared:") {
		return fmt.Errorf("run directory %s is on %s, a mount that others share: start machines from a mount namespace of their own in which it is private or slave: %w",
			dir, over.Mountpoint, errdefs.ErrFailedPrecondition)
	}
	if inFirstNamespace() {
		return fmt.Errorf("this process is in the machine's first mount namespace, in which a read-only share would leave a mount behind: start machines from a mount namespace of their own: %w",
			errdefs.ErrFailedPrecondition)
	}
	return nil
}

// inFirstNamespace tells whether this process has the mount namespace of PID 1. In
// some containers nobody can know; there it is the caller's word that it has not.
func inFirstNamespace() bool {
	own, err1 := os.Readlink("/proc/self/ns/mnt")
	first, err2 := os.Readlink("/proc/1/ns/mnt")
	return err1 == nil && err2 == nil && own == first
}
