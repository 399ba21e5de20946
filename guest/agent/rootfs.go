//go:build linux && (amd64 || arm64)

package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// scratch is the disk for everything that containers write.
type scratch struct {
	dir    string // mount point
	device string // "" if it isn't a disk of its own
	quota  bool   // project quotas account for each container
}

// writable is a container's directory on the scratch disk.
type writable struct {
	scratch *scratch
	dir     string
	project uint32
}

// number is the device's, 0 if it isn't a disk of its own.
func (s *scratch) number() uint64 {
	var st unix.Stat_t
	if s.device == "" || unix.Stat(s.device, &st) != nil {
		return 0
	}
	return uint64(st.Rdev)
}

// makeWritable makes directory n, which counts containers and is also its
// quota project. T15: usage is then exact and cheap to ask for.
func (s *scratch) makeWritable(n int) (*writable, error) {
	w := &writable{scratch: s, dir: filepath.Join(s.dir, "c"+strconv.Itoa(n)), project: uint32(n)}
	if err := os.Mkdir(w.dir, 0o700); err != nil {
		return nil, err
	}
	err := func() error {
		if s.quota {
			// The directories below inherit it.
			if err := setProject(w.dir, w.project); err != nil {
				return err
			}
		}
		if err := os.Mkdir(w.upper(), 0o755); err != nil {
			return err
		}
		return os.Mkdir(filepath.Join(w.dir, "w"), 0o700)
	}()
	if err != nil {
		_ = w.remove() // what went wrong first is what matters
		return nil, err
	}
	return w, nil
}

func (w *writable) upper() string { return filepath.Join(w.dir, "u") }

func (w *writable) remove() error { return os.RemoveAll(w.dir) }

// usage is what the container has written, in bytes and inodes.
func (w *writable) usage() (bytes, inodes uint64, err error) {
	if w.scratch.quota {
		return projectUsage(w.scratch.device, w.project)
	}
	return treeUsage(w.upper())
}

// fsxattr is struct fsxattr of linux/fs.h.
type fsxattr struct {
	Xflags     uint32
	Extsize    uint32
	Nextents   uint32
	Projid     uint32
	Cowextsize uint32
	_          [8]byte
}

const (
	fsIocFsGetXattr       = 0x801c581f
	fsIocFsSetXattr       = 0x401c5820
	fsXflagProjectInherit = 0x200
)

func setProject(dir string, project uint32) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	var attr fsxattr
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFsGetXattr, uintptr(unsafe.Pointer(&attr))); e != 0 {
		return fmt.Errorf("quota project of %s: %w", dir, e)
	}
	attr.Projid = project
	attr.Xflags |= fsXflagProjectInherit
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFsSetXattr, uintptr(unsafe.Pointer(&attr))); e != 0 {
		return fmt.Errorf("set quota project of %s: %w", dir, e)
	}
	return nil
}

// dqblk is struct if_dqblk of linux/quota.h.
type dqblk struct {
	BHardLimit, BSoftLimit, CurSpace  uint64
	IHardLimit, ISoftLimit, CurInodes uint64
	BTime, ITime                      uint64
	Valid                             uint32
	_                                 [4]byte
}

func projectUsage(device string, project uint32) (bytes, inodes uint64, err error) {
	const (
		getQuota     = 0x800007
		projectQuota = 2
	)
	path, err := unix.BytePtrFromString(device)
	if err != nil {
		return 0, 0, err
	}
	var q dqblk
	_, _, e := unix.Syscall6(unix.SYS_QUOTACTL, uintptr(getQuota<<8|projectQuota),
		uintptr(unsafe.Pointer(path)), uintptr(project), uintptr(unsafe.Pointer(&q)), 0, 0)
	if e == unix.ESRCH {
		return 0, 0, nil
	}
	if e != 0 {
		return 0, 0, fmt.Errorf("quota of project %d on %s: %w", project, device, e)
	}
	return q.CurSpace, q.CurInodes, nil
}

// maxTreeWalk bounds a walk through what a container wrote.
const maxTreeWalk = 200_000

// treeUsage walks; it is for scratch disks without quota.
func treeUsage(dir string) (bytes, inodes uint64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err != nil {
			return nil // gone meanwhile
		}
		fi, err := d.Info()
		if err != nil {
			return nil
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok {
			bytes += uint64(st.Blocks) * 512
		}
		if inodes++; inodes >= maxTreeWalk {
			return filepath.SkipAll
		}
		return nil
	})
	return bytes, inodes, err
}

// mountOverlay mounts layers under w at target. The root directory looks like
// the topmost layer's.
func (s *layerStore) mountOverlay(layers []*layer, w *writable, target string) error {
	if len(layers) > 0 {
		var st unix.Stat_t
		if err := unix.Stat(layers[len(layers)-1].path, &st); err != nil {
			return err
		}
		if err := unix.Chown(w.upper(), int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
		if err := unix.Chmod(w.upper(), st.Mode&0o7777); err != nil {
			return err
		}
	}
	options := "lowerdir=" + s.lowerdirs(layers) + ",upperdir=" + w.upper() + ",workdir=" + filepath.Join(w.dir, "w")
	if len(options) >= os.Getpagesize() {
		return invalidf("%d layers are more than one overlay mount takes", len(layers))
	}
	if err := unix.Mount("overlay", target, "overlay", 0, options); err != nil {
		return fmt.Errorf("mount overlay of %d layers: %w", len(layers), err)
	}
	return nil
}

// mountLayers mounts layers read-only at target, for an image volume.
func (s *layerStore) mountLayers(layers []*layer, target string) error {
	// An overlay without an upper directory wants two lower ones.
	options := "lowerdir=" + s.lowerdirs(layers) + ":" + s.empty()
	if len(options) >= os.Getpagesize() {
		return invalidf("%d layers are more than one overlay mount takes", len(layers))
	}
	if err := unix.Mount("overlay", target, "overlay", unix.MS_RDONLY, options); err != nil {
		return fmt.Errorf("mount overlay of %d layers: %w", len(layers), err)
	}
	return nil
}

// openIn opens what path names below root as O_PATH, without leaving root.
func openIn(root int, path string) (fd int, err error) {
	for range 100 {
		fd, err = unix.Openat2(root, path, &unix.OpenHow{
			Flags:   unix.O_PATH | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
		// EAGAIN: something was renamed meanwhile.
		if err != unix.EAGAIN && err != unix.EINTR {
			break
		}
	}
	return fd, err
}

// pinBelow mounts what path names below base at target: a clone of the tree,
// found without leaving base, so that neither a link nor a rename by another
// container leads elsewhere, then or later. It reports whether it is a
// directory.
func pinBelow(base, path, target string) (isDir bool, err error) {
	root, err := unix.Open(base, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, &os.PathError{Op: "open", Path: base, Err: err}
	}
	defer unix.Close(root)
	if path == "" {
		path = "."
	}
	// O_PATH alone does not enter the last component, and a volume is a mount of
	// the host's that appears here as an automount: without the "/." the clone
	// would be of the directory below it, and the first access would mount over
	// the clone.
	fd, err := openIn(root, path+"/.")
	if err == unix.ENOTDIR {
		fd, err = openIn(root, path)
	}
	if errors.Is(err, unix.ENOENT) {
		return false, notFoundf("nothing there")
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	isDir = st.Mode&unix.S_IFMT == unix.S_IFDIR
	tree, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	if err != nil {
		return false, fmt.Errorf("clone the mount: %w", err)
	}
	defer unix.Close(tree)
	if isDir {
		err = os.Mkdir(target, 0o755)
	} else {
		err = os.WriteFile(target, nil, 0o644)
	}
	if err != nil {
		return false, err
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		os.Remove(target)
		return false, fmt.Errorf("attach the mount: %w", err)
	}
	return isDir, nil
}
