//go:build linux && (amd64 || arm64)

package container

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// defaultDevices are in every container (OCI runtime-spec
// config-linux.md#default-devices).
var defaultDevices = []specs.LinuxDevice{
	{Path: "/dev/null", Type: "c", Major: 1, Minor: 3},
	{Path: "/dev/zero", Type: "c", Major: 1, Minor: 5},
	{Path: "/dev/full", Type: "c", Major: 1, Minor: 7},
	{Path: "/dev/random", Type: "c", Major: 1, Minor: 8},
	{Path: "/dev/urandom", Type: "c", Major: 1, Minor: 9},
	{Path: "/dev/tty", Type: "c", Major: 5, Minor: 0},
}

// devLinks are the links of OCI runtime-spec runtime-linux.md#dev-symbolic-links.
var devLinks = []struct{ name, target string }{
	{"/dev/fd", "/proc/self/fd"},
	{"/dev/stdin", "/proc/self/fd/0"},
	{"/dev/stdout", "/proc/self/fd/1"},
	{"/dev/stderr", "/proc/self/fd/2"},
	{"/dev/ptmx", "pts/ptmx"},
}

// makeDevices fills /dev, unless it is a bind mount: then it belongs to the
// guest or to another container.
func makeDevices(p *process) error {
	for _, m := range p.config.Spec.Mounts {
		if o, err := parseMountOptions(m.Options); isDev(m) && (err != nil || o.bind || m.Type == "bind") {
			return nil
		}
	}
	devices := slices.Clone(p.config.linux().Devices)
	for _, d := range defaultDevices {
		if !slices.ContainsFunc(devices, func(o specs.LinuxDevice) bool { return path.Clean(o.Path) == d.Path }) {
			devices = append(devices, d)
		}
	}
	for _, d := range devices {
		if err := makeDevice(p.root, d); err != nil {
			return fmt.Errorf("device %s: %w", d.Path, err)
		}
	}
	for _, l := range devLinks {
		dir, name, err := parent(p.root, l.name)
		if err != nil {
			return err
		}
		err = unix.Symlinkat(l.target, dir, name)
		unix.Close(dir)
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("link %s: %w", l.name, err)
		}
	}
	return nil
}

// parent opens the directory that holds a path's last component.
func parent(root rootDir, name string) (dir int, base string, err error) {
	name = path.Clean(name)
	if !path.IsAbs(name) || name == "/" {
		return -1, "", invalid("%q is not an absolute path below /", name)
	}
	dir, err = root.make(path.Dir(name), false)
	return dir, path.Base(name), err
}

func makeDevice(root rootDir, d specs.LinuxDevice) error {
	var kind uint32
	switch d.Type {
	case "c", "u":
		kind = unix.S_IFCHR
	case "b":
		kind = unix.S_IFBLK
	case "p":
		kind = unix.S_IFIFO
	default:
		return invalid("unknown device type %q", d.Type)
	}
	if d.Major < 0 || d.Minor < 0 || d.Major > 1<<12-1 || d.Minor > 1<<20-1 {
		return invalid("no such device number: %d:%d", d.Major, d.Minor)
	}
	mode := uint32(0o666)
	if d.FileMode != nil {
		mode = uint32(d.FileMode.Perm())
	}
	dir, name, err := parent(root, d.Path)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	number := unix.Mkdev(uint32(d.Major), uint32(d.Minor))
	if kind == unix.S_IFIFO {
		number = 0
	}
	switch err := unix.Mknodat(dir, name, kind|mode, int(number)); err {
	case nil:
	case unix.EPERM:
		// In a user namespace nobody makes devices: use the guest's node.
		return bindDevice(root, d.Path, kind, number)
	default:
		return os.NewSyscallError("mknod", err)
	}
	if d.UID != nil || d.GID != nil {
		uid, gid := 0, 0
		if d.UID != nil {
			uid = int(*d.UID)
		}
		if d.GID != nil {
			gid = int(*d.GID)
		}
		if err := unix.Fchownat(dir, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return os.NewSyscallError("chown", err)
		}
	}
	return nil
}

// bindDevice mounts the guest's own node of a device at name.
func bindDevice(root rootDir, name string, kind uint32, number uint64) error {
	if kind == unix.S_IFIFO {
		return invalid("a FIFO can't be made in a user namespace")
	}
	node, err := guestNode(kind, number)
	if err != nil {
		return err
	}
	source, err := openat2(unix.AT_FDCWD, node, unix.O_PATH, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return fmt.Errorf("the guest's %s: %w", node, err)
	}
	defer unix.Close(source)
	if err := requireDevice(source, number); err != nil {
		return fmt.Errorf("the guest's %s: %w", node, err)
	}
	return bindFile(root, source, name)
}

// guestNode is where the guest's kernel has put a device's node (devtmpfs), which
// is not what the container calls it (T37).
func guestNode(kind uint32, number uint64) (string, error) {
	class := "char"
	if kind == unix.S_IFBLK {
		class = "block"
	}
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/%s/%d:%d/uevent", class, unix.Major(number), unix.Minor(number)))
	if err != nil {
		return "", fmt.Errorf("the guest has no such device: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			return path.Join("/dev", name), nil
		}
	}
	return "", fmt.Errorf("the guest has no node of device %d:%d", unix.Major(number), unix.Minor(number))
}

// bindFile mounts the non-directory source at name.
func bindFile(root rootDir, source int, name string) error {
	target, err := root.make(name, true)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	tree, err := cloneTree(source, false)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	if err := setAttributes(tree, false, unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
		return err
	}
	return attach(tree, target)
}

// requireDevice checks that fd is the device of that number.
func requireDevice(fd int, number uint64) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFCHR && kind != unix.S_IFBLK || uint64(st.Rdev) != number {
		return fmt.Errorf("is not device %d:%d", unix.Major(number), unix.Minor(number))
	}
	return nil
}

// bindConsole makes the terminal known as /dev/console, too. A terminal of the
// container's own devpts has its name in that, as under runc; one that lies in the
// guest's is /dev/console for ttyname(3) and in /proc/self/fd.
func bindConsole(p *process) error {
	if !p.config.Spec.Process.Terminal {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(0, &st); err != nil {
		return fmt.Errorf("stat terminal: %w", err)
	}
	number := uint64(st.Rdev)
	// Descriptor 0 belongs to the mount namespace it was opened in and can't be
	// bound from here: find the same device in this one.
	name := "/dev/pts/" + strconv.FormatUint(uint64(unix.Minor(number)), 10)
	own, root, resolve := p.config.TerminalsFD != 0, unix.AT_FDCWD, uint64(unix.RESOLVE_NO_SYMLINKS)
	if own {
		root, resolve = p.root.fd, resolve|unix.RESOLVE_IN_ROOT
	}
	source, err := openat2(root, name, unix.O_PATH, resolve)
	if err != nil {
		return fmt.Errorf("find the terminal in its devpts: %w", err)
	}
	defer unix.Close(source)
	var found unix.Stat_t
	if err := unix.Fstat(source, &found); err != nil {
		return fmt.Errorf("stat %s: %w", name, err)
	}
	if found.Dev != st.Dev || found.Rdev != st.Rdev {
		return fmt.Errorf("descriptor 0 is not %s of its devpts", name)
	}
	if err := bindFile(p.root, source, "/dev/console"); err != nil {
		return fmt.Errorf("mount terminal at /dev/console: %w", err)
	}
	if own {
		return nil
	}
	// Descriptors that were opened elsewhere have a name that is nothing here, or
	// somebody else's terminal.
	console, err := openat2(p.root.fd, "dev/console", unix.O_RDWR|unix.O_NOCTTY, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_SYMLINKS)
	if errors.Is(err, unix.EACCES) {
		return nil // root of a user namespace doesn't own it yet
	}
	if err != nil {
		return fmt.Errorf("open /dev/console: %w", err)
	}
	defer unix.Close(console)
	for fd := range 3 {
		if err := unix.Dup3(console, fd, 0); err != nil {
			return os.NewSyscallError("dup3", err)
		}
	}
	return nil
}
