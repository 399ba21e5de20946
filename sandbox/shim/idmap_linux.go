package shim

import (
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// ProbeIDMaps says why directories like dir can't be given to pods with user
// namespaces, or nil: their volumes are mounted with other ids (T33), which takes
// a kernel (Linux 5.12) and a file system that can do that. Each volume's own file
// system has the last word.
func ProbeIDMaps(dir string) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("clone the mount at %s: %w", dir, err)
	}
	defer unix.Close(tree)
	ids := []*guestapi.IDMapping{{HostId: 65536, Length: 65536}}
	return idmap(tree, ids, ids)
}

// idmap makes the files of a detached mount belong to other ids, as in a user
// namespace with these mappings. Mounts below it keep theirs.
func idmap(tree int, uids, gids []*guestapi.IDMapping) error {
	ns, err := newUserNamespace(uids, gids)
	if err != nil {
		return fmt.Errorf("user namespace for a mount's ids: %w", err)
	}
	defer ns.Close()
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("map the ids of its files (the file system must support id-mapped mounts): %w", err)
	}
	return nil
}

// newUserNamespace makes a user namespace without processes. The kernel makes one
// for a process only: that is this program, which is traced from its first
// instruction on, never runs, and is killed.
func newUserNamespace(uids, gids []*guestapi.IDMapping) (*os.File, error) {
	// The tracer is a thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	p, err := os.StartProcess("/proc/self/exe", []string{"userns"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: sysProcMappings(uids),
		GidMappings: sysProcMappings(gids),
		Ptrace:      true,
		Pdeathsig:   unix.SIGKILL,
	}})
	if err != nil {
		return nil, err
	}
	defer func() {
		_ = p.Kill()
		_, _ = p.Wait()
	}()
	return os.Open(fmt.Sprintf("/proc/%d/ns/user", p.Pid))
}

func sysProcMappings(ids []*guestapi.IDMapping) []syscall.SysProcIDMap {
	var out []syscall.SysProcIDMap
	for _, m := range ids {
		out = append(out, syscall.SysProcIDMap{ContainerID: int(m.GetContainerId()), HostID: int(m.GetHostId()), Size: int(m.GetLength())})
	}
	return out
}
