//go:build linux && (amd64 || arm64)

package agent

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/cri-vz/cri-vz/guest/api"
	"golang.org/x/sys/unix"
)

// idMaps are the ids of a pod's user namespace (T33). The nil *idMaps is a pod
// without one: its root is the guest's.
type idMaps struct {
	uids, gids []syscall.SysProcIDMap
}

// parseIDMaps returns nil for a pod that wants no user namespace.
func parseIDMaps(uids, gids []*api.IDMapping) (*idMaps, error) {
	if len(uids) == 0 && len(gids) == 0 {
		return nil, nil
	}
	m := &idMaps{}
	for _, kind := range []struct {
		name string
		from []*api.IDMapping
		to   *[]syscall.SysProcIDMap
	}{{"uid", uids, &m.uids}, {"gid", gids, &m.gids}} {
		// Root has to be somebody, or nothing in the pod could be set up. More
		// ranges than one are nothing that a kubelet would ask for.
		if len(kind.from) != 1 || kind.from[0].GetContainerId() != 0 || kind.from[0].GetLength() == 0 {
			return nil, invalidf("%s mappings %v: there must be one, and it must begin with the container's id 0", kind.name, kind.from)
		}
		f := kind.from[0]
		*kind.to = []syscall.SysProcIDMap{{HostID: int(f.GetHostId()), Size: int(f.GetLength())}}
	}
	return m, nil
}

// giveToRoot makes the pod's root the owner of path.
func (m *idMaps) giveToRoot(path string) error {
	if m == nil {
		return nil
	}
	return os.Lchown(path, m.uids[0].HostID, m.gids[0].HostID)
}

// lastGroup is the largest group id of the pod, as far as ping_group_range goes.
func (m *idMaps) lastGroup() int {
	if m == nil {
		return math.MaxInt32
	}
	return min(m.gids[0].Size-1, math.MaxInt32)
}

// hostGroup is what the guest calls a group of the pod, which is nobody's if the
// pod has no such group.
func (m *idMaps) hostGroup(id uint32) uint32 {
	switch {
	case m == nil:
		return id
	case int64(id) >= int64(m.gids[0].Size):
		return 65534
	}
	return uint32(m.gids[0].HostID) + id
}

// owned makes the pod's root the owner of a new process's streams, so that the
// process can open them again as /dev/stdout.
func (m *idMaps) owned(p *process) (*process, error) {
	if m == nil {
		return p, nil
	}
	for _, f := range p.child {
		var st unix.Stat_t
		err := unix.Fstat(int(f.Fd()), &st)
		if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFCHR || uint64(st.Rdev) != unix.Mkdev(1, 3)) { // not /dev/null
			err = f.Chown(m.uids[0].HostID, m.gids[0].HostID)
		}
		if err != nil {
			p.discard()
			return nil, fmt.Errorf("owner of a standard stream: %w", err)
		}
	}
	return p, nil
}

// raiseLimits lets pod-init give its children as many descriptors as the kernel
// has: in a user namespace nobody raises a limit.
func raiseLimits(pid int) error {
	b, err := os.ReadFile("/proc/sys/fs/nr_open")
	if err != nil {
		return err
	}
	most, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return err
	}
	var l unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &l); err != nil {
		return os.NewSyscallError("prlimit", err)
	}
	l.Max = most
	return os.NewSyscallError("prlimit", unix.Prlimit(pid, unix.RLIMIT_NOFILE, &l, nil))
}

// useIDMaps makes layers that are mounted from now on have the ids of pod-init's
// user namespace, and prepares pod-init for what it can't do itself.
func (a *Agent) useIDMaps(pid int) error {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	if err != nil {
		return err
	}
	if err := a.layers.idmap(ns); err != nil {
		ns.Close()
		return err
	}
	return raiseLimits(pid)
}

// mayForkInto lets pod-init put processes into cg. The kernel asks for write
// access to the procs file of it and of the common parent of both cgroups, which is
// the root (cgroups(7)); each container sees only the subtree that is its own.
func (m *idMaps) mayForkInto(root string, cg cgroup) error {
	return errors.Join(m.giveToRoot(filepath.Join(root, "cgroup.procs")), m.giveToRoot(cg.file("cgroup.procs")))
}

// idmapMount replaces the mount at path, which nobody uses yet, by one in which
// the files' ids are those of a user namespace.
func idmapMount(path string, userns *os.File) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("open_tree", err)
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns.Fd())}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return os.NewSyscallError("mount_setattr(IDMAP)", err)
	}
	if err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW); err != nil {
		return os.NewSyscallError("umount", err)
	}
	return os.NewSyscallError("move_mount", unix.MoveMount(tree, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH))
}
