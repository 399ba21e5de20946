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

// The mounts are made with the descriptor-based calls (fsopen, open_tree,
// mount_setattr, move_mount): a tree gets all its attributes while it is still
// detached, and is attached to a directory that is already open. There is no
// moment at which a read-only mount is writable and no path to race for.

// mountOptions are the options of one mount of the spec (OCI runtime-spec
// config.md#mounts), sorted by who acts on them.
type mountOptions struct {
	bind      bool // bind or rbind
	recursive bool // rbind
	// set and clear are MOUNT_ATTR_ bits for the mount itself, recSet and
	// recClear for the whole tree ("rro").
	set, clear, recSet, recClear uint64
	// propagation is 0 or one of MS_PRIVATE, MS_SLAVE, MS_SHARED, MS_UNBINDABLE.
	propagation    uint64
	recPropagation bool
	// data is for the file system: "key" or "key=value".
	data []string
}

// mountAttributes maps an option to the bits it sets and clears. With an "r" in
// front it holds for the whole tree.
//
// MOUNT_ATTR__ATIME is a field, not a set of bits: whoever sets a mode clears the
// whole of it, which is also what mount_setattr insists on.
var mountAttributes = map[string]struct{ set, clear uint64 }{
	"ro":            {unix.MOUNT_ATTR_RDONLY, 0},
	"rw":            {0, unix.MOUNT_ATTR_RDONLY},
	"nosuid":        {unix.MOUNT_ATTR_NOSUID, 0},
	"suid":          {0, unix.MOUNT_ATTR_NOSUID},
	"nodev":         {unix.MOUNT_ATTR_NODEV, 0},
	"dev":           {0, unix.MOUNT_ATTR_NODEV},
	"noexec":        {unix.MOUNT_ATTR_NOEXEC, 0},
	"exec":          {0, unix.MOUNT_ATTR_NOEXEC},
	"nodiratime":    {unix.MOUNT_ATTR_NODIRATIME, 0},
	"diratime":      {0, unix.MOUNT_ATTR_NODIRATIME},
	"relatime":      {unix.MOUNT_ATTR_RELATIME, unix.MOUNT_ATTR__ATIME},
	"norelatime":    {unix.MOUNT_ATTR_STRICTATIME, unix.MOUNT_ATTR__ATIME},
	"noatime":       {unix.MOUNT_ATTR_NOATIME, unix.MOUNT_ATTR__ATIME},
	"atime":         {unix.MOUNT_ATTR_RELATIME, unix.MOUNT_ATTR__ATIME},
	"strictatime":   {unix.MOUNT_ATTR_STRICTATIME, unix.MOUNT_ATTR__ATIME},
	"nostrictatime": {unix.MOUNT_ATTR_RELATIME, unix.MOUNT_ATTR__ATIME},
	"nosymfollow":   {unix.MOUNT_ATTR_NOSYMFOLLOW, 0},
	"symfollow":     {0, unix.MOUNT_ATTR_NOSYMFOLLOW},
}

// propagations maps an option to its mode; with an "r" in front it is recursive.
var propagations = map[string]uint64{
	"private":    unix.MS_PRIVATE,
	"slave":      unix.MS_SLAVE,
	"shared":     unix.MS_SHARED,
	"unbindable": unix.MS_UNBINDABLE,
}

// parseMountOptions sorts the options of a mount. The last of contradicting
// options wins, as in mount(8).
func parseMountOptions(options []string) (mountOptions, error) {
	var o mountOptions
	for _, option := range options {
		base, recursive := option, false
		if rest, ok := strings.CutPrefix(option, "r"); ok {
			_, isAttribute := mountAttributes[rest]
			_, isPropagation := propagations[rest]
			if isAttribute || isPropagation {
				base, recursive = rest, true
			}
		}
		if a, ok := mountAttributes[base]; ok {
			if recursive {
				o.recSet, o.recClear = o.recSet&^a.clear|a.set, o.recClear&^a.set|a.clear
			} else {
				o.set, o.clear = o.set&^a.clear|a.set, o.clear&^a.set|a.clear
			}
			continue
		}
		if p, ok := propagations[base]; ok {
			o.propagation, o.recPropagation = p, recursive
			continue
		}
		switch option {
		case "bind":
			o.bind = true
		case "rbind":
			o.bind, o.recursive = true, true
		case "defaults", "async", "nomand", "loud", "silent", "noiversion", "":
			// How it is anyway.
		case "remount", "idmap", "ridmap", "tmpcopyup", "mand":
			return o, invalid("mount option %q can't be honoured", option)
		default:
			if strings.ContainsRune(option, 0) {
				return o, invalid("mount option %q contains a NUL", option)
			}
			o.data = append(o.data, option)
		}
	}
	return o, nil
}

// newFilesystem makes a detached mount of a new file system instance.
func newFilesystem(fstype, source string, data []string, attributes uint64) (int, error) {
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("file system type %q: %w", fstype, err)
	}
	defer unix.Close(fs)
	fail := func(what string, err error) (int, error) {
		// The context carries the kernel's own words, one line per read.
		buf := make([]byte, 512)
		if n, _ := unix.Read(fs, buf); n > 0 {
			return -1, fmt.Errorf("%s: %w (%s)", what, err, strings.TrimSpace(string(buf[:n])))
		}
		return -1, fmt.Errorf("%s: %w", what, err)
	}
	if source == "" {
		source = fstype
	}
	if err := unix.FsconfigSetString(fs, "source", source); err != nil {
		return fail("source "+strconv.Quote(source), err)
	}
	for _, option := range data {
		key, value, hasValue := strings.Cut(option, "=")
		if hasValue {
			err = unix.FsconfigSetString(fs, key, value)
		} else {
			err = unix.FsconfigSetFlag(fs, key)
		}
		if err != nil {
			return fail("option "+strconv.Quote(option), err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fail("create "+fstype+" file system", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, int(attributes))
	if err != nil {
		return fail("mount "+fstype+" file system", err)
	}
	return fd, nil
}

// cloneTree makes a detached bind mount of what fd refers to.
func cloneTree(fd int, recursive bool) (int, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	tree, err := unix.OpenTree(fd, "", flags)
	if err != nil {
		return -1, os.NewSyscallError("open_tree", err)
	}
	return tree, nil
}

func setAttributes(fd int, recursive bool, attr unix.MountAttr) error {
	if attr == (unix.MountAttr{}) {
		return nil
	}
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	return os.NewSyscallError("mount_setattr", unix.MountSetattr(fd, "", flags, &attr))
}

// attach puts a detached tree on top of target.
func attach(tree, target int) error {
	return os.NewSyscallError("move_mount",
		unix.MoveMount(tree, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH))
}

// privateMounts cuts the process off from the namespace it was cloned from, in
// the direction that matters: nothing it mounts is seen outside. Mounts made
// outside still arrive, for volumes with HostToContainer propagation.
func privateMounts(*process) error {
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make all mounts slaves: %w", err)
	}
	return nil
}

// mountRoot bind-mounts the root file system onto itself, because pivot_root
// wants a mount point, and keeps it open: from here on it is the container's "/".
func mountRoot(p *process) error {
	name := p.config.Spec.Root.Path
	at, err := openat2(unix.AT_FDCWD, name, unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return fmt.Errorf("open root file system %s: %w", name, err)
	}
	defer unix.Close(at)
	tree, err := cloneTree(at, true)
	if err != nil {
		return fmt.Errorf("bind root file system %s: %w", name, err)
	}
	if err := setAttributes(tree, true, unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
		unix.Close(tree)
		return fmt.Errorf("make root file system private: %w", err)
	}
	if err := attach(tree, at); err != nil {
		unix.Close(tree)
		return fmt.Errorf("attach root file system %s: %w", name, err)
	}
	// The descriptor of a clone is one of the mount, wherever it is attached.
	p.root = rootDir{tree}
	return nil
}

// defaultDev is mounted when the spec has nothing at /dev.
var defaultDev = specs.Mount{
	Destination: "/dev", Type: "tmpfs", Source: "tmpfs",
	Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"},
}

// mountAll makes the spec's mounts in order.
func mountAll(p *process) error {
	mounts := p.config.Spec.Mounts
	if !slices.ContainsFunc(mounts, isDev) {
		mounts = append([]specs.Mount{defaultDev}, mounts...)
	}
	for _, m := range mounts {
		if err := mountOne(p, m); err != nil {
			return fmt.Errorf("mount %s at %s: %w", describe(m), m.Destination, err)
		}
	}
	return nil
}

func isDev(m specs.Mount) bool { return path.Clean(m.Destination) == "/dev" }

func describe(m specs.Mount) string {
	if m.Type == "" || m.Type == "bind" || m.Type == "none" {
		return m.Source
	}
	return m.Type
}

func mountOne(p *process, m specs.Mount) error {
	if !path.IsAbs(m.Destination) || path.Clean(m.Destination) == "/" {
		return invalid("destination must be an absolute path below /")
	}
	if len(m.UIDMappings) > 0 || len(m.GIDMappings) > 0 {
		return invalid("id-mapped mounts can't be honoured here: volumes are mapped on the host")
	}
	o, err := parseMountOptions(m.Options)
	if err != nil {
		return err
	}
	if o.bind || m.Type == "bind" {
		return bindMount(p, m, o)
	}
	return filesystemMount(p, m, o)
}

func bindMount(p *process, m specs.Mount, o mountOptions) error {
	if len(o.data) > 0 {
		return invalid("option %q can't be honoured for a bind mount", o.data[0])
	}
	// The source lies in a tree that a container may be able to write: a link
	// there must not lead to the guest's own files.
	source, err := openat2(unix.AT_FDCWD, m.Source, unix.O_PATH, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return fmt.Errorf("open source %s: %w", m.Source, err)
	}
	defer unix.Close(source)
	var st unix.Stat_t
	if err := unix.Fstat(source, &st); err != nil {
		return fmt.Errorf("stat source %s: %w", m.Source, err)
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	target, err := p.root.make(m.Destination, !isDir)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	var at unix.Stat_t
	if err := unix.Fstat(target, &at); err != nil {
		return err
	}
	if (at.Mode&unix.S_IFMT == unix.S_IFDIR) != isDir {
		return invalid("can't mount a directory onto a file or a file onto a directory")
	}
	// A fake /proc/self below the real /proc would be believed by everyone who
	// writes to it (runc CVE-2019-16884, CVE-2025-52881).
	if path.Clean(m.Destination) != "/proc" {
		if inside, err := isProc(target); err != nil || inside {
			return errors.Join(err, invalid("a bind mount inside /proc is refused"))
		}
	}
	tree, err := cloneTree(source, o.recursive)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	if err := setAttributes(tree, true, unix.MountAttr{Attr_set: o.recSet, Attr_clr: o.recClear}); err != nil {
		return err
	}
	if err := setAttributes(tree, false, unix.MountAttr{Attr_set: o.set, Attr_clr: o.clear}); err != nil {
		return err
	}
	propagation, recursive := o.propagation, o.recPropagation
	if propagation == 0 {
		propagation, recursive = unix.MS_PRIVATE, true
	}
	if err := setAttributes(tree, recursive, unix.MountAttr{Propagation: propagation}); err != nil {
		return err
	}
	return attach(tree, target)
}

// isProc tells whether fd lies on a procfs.
func isProc(fd int) (bool, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return false, err
	}
	return fs.Type == unix.PROC_SUPER_MAGIC, nil
}

func filesystemMount(p *process, m specs.Mount, o mountOptions) error {
	fstype := m.Type
	switch fstype {
	case "proc", "sysfs":
		// Through a link the paths to be masked would lie elsewhere.
		if err := requireRealDirectory(p.root, m.Destination); err != nil {
			return err
		}
	case "cgroup":
		fstype = "cgroup2" // the spec's portable name; the guest has version 2 only
	case "tmpfs", "devpts", "mqueue", "cgroup2":
	default:
		return invalid("file system type %q can't be mounted in a container", m.Type)
	}
	if fstype == "tmpfs" && !slices.ContainsFunc(o.data, func(s string) bool { return strings.HasPrefix(s, "mode=") }) {
		// As runc: a directory of the image keeps its mode.
		if fd, err := p.root.open(m.Destination, unix.O_PATH); err == nil {
			var st unix.Stat_t
			err = unix.Fstat(fd, &st)
			unix.Close(fd)
			if err != nil {
				return err
			}
			o.data = append(o.data, "mode="+strconv.FormatUint(uint64(st.Mode&0o7777), 8))
		}
	}
	target, err := p.root.make(m.Destination, false)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	set := o.set&^o.recClear | o.recSet
	// Later mounts and devices have their mount points on it.
	if fstype == "tmpfs" && set&unix.MOUNT_ATTR_RDONLY != 0 {
		set &^= unix.MOUNT_ATTR_RDONLY
		p.readonlyLater = append(p.readonlyLater, m.Destination)
	}
	var tree int
	if p.config.TerminalsFD != 0 && isTerminals(m) {
		// Made by NewTerminals, with these options.
		tree, err = unix.FcntlInt(uintptr(p.config.TerminalsFD), unix.F_DUPFD_CLOEXEC, 0)
	} else {
		tree, err = newFilesystem(fstype, m.Source, o.data, set)
	}
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	propagation := o.propagation
	if propagation == 0 {
		propagation = unix.MS_PRIVATE
	}
	if err := setAttributes(tree, false, unix.MountAttr{Propagation: propagation}); err != nil {
		return err
	}
	return attach(tree, target)
}

// isTerminals tells whether a mount is the devpts in which a container's terminals
// have their names.
func isTerminals(m specs.Mount) bool {
	return m.Type == "devpts" && path.Clean(m.Destination) == "/dev/pts"
}

// NewTerminals makes the devpts that the spec mounts at /dev/pts ahead of the
// container, attached nowhere: a terminal that is opened in it is one of the
// container's, with a name there. Config.TerminalsFD hands it to container-init. group
// is what the caller calls a group of the container's user namespace. Nil without an
// error: the spec mounts none. The caller closes the file, before which the container
// must have been started.
func NewTerminals(spec *specs.Spec, group func(id uint32) uint32) (*os.File, error) {
	i := slices.IndexFunc(spec.Mounts, isTerminals)
	if i < 0 {
		return nil, nil
	}
	m := spec.Mounts[i]
	o, err := parseMountOptions(m.Options)
	if err != nil {
		return nil, err
	}
	for i, option := range o.data {
		if text, ok := strings.CutPrefix(option, "gid="); ok {
			if id, err := strconv.ParseUint(text, 10, 32); err == nil {
				o.data[i] = "gid=" + strconv.FormatUint(uint64(group(uint32(id))), 10)
			}
		}
	}
	fd, err := newFilesystem(m.Type, m.Source, o.data, o.set&^o.recClear|o.recSet)
	if err != nil {
		return nil, fmt.Errorf("devpts of the container: %w", err)
	}
	return os.NewFile(uintptr(fd), "devpts"), nil
}

func requireRealDirectory(root rootDir, name string) error {
	fd, err := root.open(name, unix.O_PATH|unix.O_NOFOLLOW)
	if errors.Is(err, os.ErrNotExist) {
		return nil // it will be created
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return invalid("%s of the image is not an ordinary directory", name)
	}
	return nil
}

// maskPaths hides files behind /dev/null and directories behind an empty
// read-only tmpfs (OCI runtime-spec config-linux.md#masked-paths).
func maskPaths(p *process) error {
	paths := p.config.linux().MaskedPaths
	if len(paths) == 0 {
		return nil
	}
	// The guest's own device, checked: the container's could have been swapped
	// for a link (runc CVE-2025-31133).
	null, err := openat2(unix.AT_FDCWD, "/dev/null", unix.O_PATH, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return fmt.Errorf("open the guest's /dev/null: %w", err)
	}
	defer unix.Close(null)
	if err := requireDevice(null, unix.Mkdev(1, 3)); err != nil {
		return fmt.Errorf("the guest's /dev/null: %w", err)
	}
	for _, name := range paths {
		if err := maskPath(p.root, name, null); err != nil {
			return fmt.Errorf("mask %s: %w", name, err)
		}
	}
	return nil
}

func maskPath(root rootDir, name string, null int) error {
	target, err := root.open(name, unix.O_PATH)
	if isAbsent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(target)
	var st unix.Stat_t
	if err := unix.Fstat(target, &st); err != nil {
		return err
	}
	var tree int
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		tree, err = newFilesystem("tmpfs", "tmpfs", []string{"size=0k", "nr_inodes=2", "mode=755"}, unix.MOUNT_ATTR_RDONLY)
	} else {
		tree, err = cloneTree(null, false)
	}
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	if err := setAttributes(tree, false, unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
		return err
	}
	return attach(tree, target)
}

// isAbsent is true for the errors that say there is nothing to hide.
func isAbsent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR)
}

// readonlyPaths makes trees unwritable (OCI runtime-spec
// config-linux.md#readonly-paths).
func readonlyPaths(p *process) error {
	for _, name := range p.config.linux().ReadonlyPaths {
		if err := readonlyPath(p.root, name); err != nil {
			return fmt.Errorf("make %s read-only: %w", name, err)
		}
	}
	return nil
}

func readonlyPath(root rootDir, name string) error {
	target, err := root.open(name, unix.O_PATH)
	if isAbsent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(target)
	tree, err := cloneTree(target, true)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	if err := setAttributes(tree, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return err
	}
	if err := setAttributes(tree, true, unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
		return err
	}
	return attach(tree, target)
}

// pivotRoot makes the container's root the process's and lets go of the guest's.
func pivotRoot(p *process) error {
	old, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the guest's root: %w", err)
	}
	defer unix.Close(old)
	if err := unix.Fchdir(p.root.fd); err != nil {
		return fmt.Errorf("enter root file system: %w", err)
	}
	// The old root ends up on top of the new one, at the same place: no
	// directory for it is needed in the image.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Fchdir(old); err != nil {
		return fmt.Errorf("enter the guest's root: %w", err)
	}
	// Slave already, and said again because an unmount that propagates would
	// take the guest's own mounts away.
	if err := unix.Mount("", ".", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make the guest's root a slave: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the guest's root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	mode := p.config.linux().RootfsPropagation
	if mode == "" {
		return nil
	}
	base := strings.TrimPrefix(mode, "r")
	propagation, ok := propagations[base]
	if !ok {
		return invalid("unknown rootfsPropagation %q", mode)
	}
	return setAttributes(p.root.fd, base != mode, unix.MountAttr{Propagation: propagation})
}

// sealReadonly takes write access away from what had to be writable until all
// mount points and devices were made.
func sealReadonly(p *process) error {
	for _, name := range p.readonlyLater {
		fd, err := p.root.open(name, unix.O_PATH)
		if err != nil {
			return err
		}
		err = setAttributes(fd, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("make %s read-only: %w", name, err)
		}
	}
	if p.config.Spec.Root.Readonly {
		if err := setAttributes(p.root.fd, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fmt.Errorf("make the root file system read-only: %w", err)
		}
	}
	return nil
}
