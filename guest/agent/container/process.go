//go:build linux && (amd64 || arm64)

package container

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"syscall"
	"unsafe"

	"github.com/moby/sys/capability"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// resolveIdentity runs when the container's root is the process's, so the files
// it reads are those that the process itself will see, mounts included.
func resolveIdentity(p *process) error {
	own := p.config.Spec.Process.User
	user := User{UID: &own.UID, GID: &own.GID, AdditionalGIDs: own.AdditionalGids, SupplementalGroupsPolicy: GroupsStrict}
	if p.config.User != nil {
		user = *p.config.User
	}
	id, err := resolveUserIn(p.root, user)
	if err != nil {
		return invalid("%w", err)
	}
	p.id = id
	return nil
}

// makeEnvironment keeps the last of several values of a variable, and adds the
// HOME that the passwd file gives.
func makeEnvironment(p *process) error {
	p.env = environment(p.config.Spec.Process.Env, p.id.Home)
	return nil
}

func environment(env []string, home string) []string {
	last := make(map[string]int, len(env))
	for i, v := range env {
		name, _, _ := strings.Cut(v, "=")
		last[name] = i
	}
	var out []string
	for i, v := range env {
		if name, _, ok := strings.Cut(v, "="); ok && name != "" && last[name] == i {
			out = append(out, v)
		}
	}
	if v := lookupEnv(out, "HOME"); v == "" {
		// Set but empty is no home either: as runc.
		kept := out[:0]
		for _, v := range out {
			if !strings.HasPrefix(v, "HOME=") {
				kept = append(kept, v)
			}
		}
		out = append(kept, "HOME="+home)
	}
	return out
}

func lookupEnv(env []string, name string) string {
	for _, v := range env {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}

// newKeyring gives the process a session keyring of its own: the agent's would
// be shared by all containers.
func newKeyring(*process) error {
	// No name (a null pointer): an anonymous keyring that no one else can join.
	_, err := unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0)
	switch err {
	case nil, unix.ENOSYS: // a kernel without keys has none to share
		return nil
	case unix.EDQUOT:
		return fmt.Errorf("new session keyring: %w (raise kernel.keys.maxkeys)", err)
	}
	return fmt.Errorf("new session keyring: %w", err)
}

// ownStreams lets a user other than root reopen /dev/stdout and the terminal.
func ownStreams(p *process) error {
	for fd := range 3 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fmt.Errorf("stat descriptor %d: %w", fd, err)
		}
		if st.Uid == p.id.UID || st.Mode&unix.S_IFMT == unix.S_IFCHR && uint64(st.Rdev) == unix.Mkdev(1, 3) {
			continue // /dev/null is everyone's
		}
		switch err := unix.Fchown(fd, int(p.id.UID), int(st.Gid)); err {
		case nil, unix.EROFS, unix.EPERM, unix.EINVAL: // EINVAL: an id that the file's user namespace lacks
		default:
			return fmt.Errorf("change owner of descriptor %d: %w", fd, err)
		}
	}
	return nil
}

type limit struct {
	name     string
	resource int
	value    unix.Rlimit
}

var limitNames = map[string]int{
	"RLIMIT_AS":         unix.RLIMIT_AS,
	"RLIMIT_CORE":       unix.RLIMIT_CORE,
	"RLIMIT_CPU":        unix.RLIMIT_CPU,
	"RLIMIT_DATA":       unix.RLIMIT_DATA,
	"RLIMIT_FSIZE":      unix.RLIMIT_FSIZE,
	"RLIMIT_LOCKS":      unix.RLIMIT_LOCKS,
	"RLIMIT_MEMLOCK":    unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE":   unix.RLIMIT_MSGQUEUE,
	"RLIMIT_NICE":       unix.RLIMIT_NICE,
	"RLIMIT_NOFILE":     unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC":      unix.RLIMIT_NPROC,
	"RLIMIT_RSS":        unix.RLIMIT_RSS,
	"RLIMIT_RTPRIO":     unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME":     unix.RLIMIT_RTTIME,
	"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_STACK":      unix.RLIMIT_STACK,
}

func parseLimits(rlimits []specs.POSIXRlimit) ([]limit, error) {
	var out []limit
	seen := make(map[string]bool)
	for _, r := range rlimits {
		resource, ok := limitNames[r.Type]
		switch {
		case !ok:
			return nil, invalid("unknown resource limit %q", r.Type)
		case seen[r.Type]:
			return nil, invalid("resource limit %s is given twice", r.Type)
		case r.Soft > r.Hard:
			return nil, invalid("%s: the soft limit %d is above the hard limit %d", r.Type, r.Soft, r.Hard)
		}
		seen[r.Type] = true
		out = append(out, limit{r.Type, resource, unix.Rlimit{Cur: r.Soft, Max: r.Hard}})
	}
	return out, nil
}

func setLimits(p *process) error {
	for _, l := range p.limits {
		var err error
		if l.resource == unix.RLIMIT_NOFILE {
			// By this call the Go runtime learns that it must not put back the
			// soft limit it was started with.
			err = syscall.Setrlimit(l.resource, &syscall.Rlimit{Cur: l.value.Cur, Max: l.value.Max})
		} else {
			err = unix.Prlimit(0, l.resource, &l.value, nil)
		}
		if err != nil {
			return fmt.Errorf("%s to soft %d, hard %d: %w", l.name, l.value.Cur, l.value.Max, err)
		}
	}
	return nil
}

// capabilitySets is a parsed specs.LinuxCapabilities.
type capabilitySets map[capability.CapType][]capability.Cap

// parseCapabilities leaves out what this kernel does not know: nobody can have
// it. Nil means no capabilities.
func parseCapabilities(c *specs.LinuxCapabilities) (capabilitySets, error) {
	if c == nil {
		return nil, nil
	}
	last, err := capability.LastCap()
	if err != nil {
		return nil, err
	}
	known := make(map[string]capability.Cap)
	for _, c := range capability.ListKnown() {
		known["CAP_"+strings.ToUpper(c.String())] = c
	}
	sets := make(capabilitySets)
	for _, set := range []struct {
		kind  capability.CapType
		names []string
	}{
		{capability.BOUNDING, c.Bounding},
		{capability.EFFECTIVE, c.Effective},
		{capability.PERMITTED, c.Permitted},
		{capability.INHERITABLE, c.Inheritable},
		{capability.AMBIENT, c.Ambient},
	} {
		for _, name := range set.names {
			c, ok := known[name]
			if !ok {
				return nil, invalid("unknown capability %q", name)
			}
			if c <= last {
				sets[set.kind] = append(sets[set.kind], c)
			}
		}
	}
	return sets, nil
}

// sealDescriptors marks everything but the standard streams close-on-exec once
// more, should a step have left something open (runc CVE-2024-21626).
func sealDescriptors(*process) error {
	return os.NewSyscallError("close_range", unix.CloseRange(ConfigFD, ^uint(0), unix.CLOSE_RANGE_CLOEXEC))
}

// seccompBeforeDrop installs the filter while CAP_SYS_ADMIN is still there:
// without no_new_privs the kernel asks for it. The profile then has to allow
// what the remaining steps call, as under runc.
func seccompBeforeDrop(p *process) error {
	if p.seccomp == nil || p.config.Spec.Process.NoNewPrivileges {
		return nil
	}
	return p.seccomp.install()
}

// becomeUser changes ids and capabilities of the calling thread.
func becomeUser(p *process) error {
	caps, err := capability.NewPid2(0)
	if err != nil {
		return err
	}
	for kind, list := range p.capabilities {
		caps.Set(kind, list...)
	}
	// The bounding set first: shrinking it takes CAP_SETPCAP.
	if err := caps.Apply(capability.BOUNDS); err != nil {
		return fmt.Errorf("bounding set: %w", err)
	}
	// Apply passes over it in silence when CAP_SETPCAP is missing.
	last, err := capability.LastCap()
	if err != nil {
		return err
	}
	for c := capability.Cap(0); c <= last; c++ {
		if has, err := capability.GetBound(c); err != nil || has && !caps.Get(capability.BOUNDING, c) {
			return errors.Join(err, fmt.Errorf("capability %s can't be taken out of the bounding set", c))
		}
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl(PR_SET_KEEPCAPS)", err)
	}
	// Raw calls: only this thread goes on, and the package syscall would
	// interrupt all others to change theirs.
	groups := p.id.Groups
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(unsafe.SliceData(groups))), 0); errno != 0 {
		return os.NewSyscallError("setgroups", errno)
	}
	gid, uid := uintptr(p.id.GID), uintptr(p.id.UID)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, gid, gid, gid); errno != 0 {
		return fmt.Errorf("setresgid to %d: %w", gid, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 {
		return fmt.Errorf("setresuid to %d: %w", uid, errno)
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 0, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl(PR_SET_KEEPCAPS)", err)
	}
	if err := caps.Apply(capability.CAPS | capability.AMBS); err != nil {
		return fmt.Errorf("capabilities: %w", err)
	}
	return nil
}

// changeDirectoryAsRoot enters a directory that the user may not be allowed to
// reach, as runc does.
func changeDirectoryAsRoot(p *process) error {
	p.cwdErr = unix.Chdir(p.config.Spec.Process.Cwd)
	return nil
}

// changeDirectory tries again as the user, who may be allowed what root is not,
// and makes sure of where it arrived.
func changeDirectory(p *process) error {
	cwd := p.config.Spec.Process.Cwd
	if p.cwdErr != nil {
		if err := unix.Chdir(cwd); err != nil {
			return &classified{classOf(err, ClassInvalid), fmt.Errorf("change to %s: %w", cwd, err)}
		}
	}
	// A leaked descriptor of the guest, named as /proc/self/fd/N, would be a
	// working directory outside of the root (runc CVE-2024-21626).
	buf := make([]byte, unix.PathMax)
	n, err := unix.Getcwd(buf)
	if err != nil {
		return fmt.Errorf("working directory %s: %w", cwd, err)
	}
	if n < 1 || buf[0] != '/' {
		return fmt.Errorf("working directory %s is outside of the container's root", cwd)
	}
	mask := 0o022
	if u := p.config.Spec.Process.User.Umask; u != nil {
		mask = int(*u & 0o777)
	}
	unix.Umask(mask)
	return nil
}

// classOf sorts the errors of path lookups; ENOENT is the caller's to judge.
func classOf(err error, notFound string) string {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return notFound
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.EISDIR):
		return ClassPermission
	case errors.Is(err, unix.ENOEXEC), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.E2BIG):
		return ClassInvalid
	}
	return ClassOther
}

var errNotInPath = errors.New("executable file not found in $PATH")

// findCommand looks argv[0] up as the user, in the container's own PATH. The
// words are those of runc, which users and tests look for.
func findCommand(p *process) error {
	name := p.config.Spec.Process.Args[0]
	command, err := lookPath(name, lookupEnv(p.env, "PATH"))
	if err != nil {
		class := ClassNotFound
		if err != errNotInPath {
			class = classOf(err, ClassNotFound)
		}
		return &classified{class, fmt.Errorf("exec: %q: %w", name, err)}
	}
	p.command = command
	return nil
}

func lookPath(name, pathVar string) (string, error) {
	if strings.Contains(name, "/") {
		return name, executable(name)
	}
	denied := error(nil)
	for _, dir := range strings.Split(pathVar, ":") {
		if dir == "" {
			if pathVar == "" {
				break
			}
			dir = "." // as execvp(3) has it
		}
		file := path.Join(dir, name)
		if !strings.Contains(file, "/") {
			file = "./" + file
		}
		err := executable(file)
		if err == nil {
			return file, nil
		}
		if errors.Is(err, unix.EACCES) && denied == nil {
			denied = err
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", errNotInPath
}

// executable tells why a file can't be executed by the calling thread.
func executable(file string) error {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return &os.PathError{Op: "stat", Path: file, Err: err}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return unix.EISDIR
	}
	// This knows noexec mounts and access lists. Where a filter forbids the call
	// or the kernel lacks it, the mode has to do, as in os/exec.
	err := unix.Faccessat(unix.AT_FDCWD, file, unix.X_OK, unix.AT_EACCESS)
	if err != unix.ENOSYS && err != unix.EPERM {
		return err
	}
	if st.Mode&0o111 == 0 {
		return unix.EACCES
	}
	return nil
}

// seccompLast closes the door behind itself: with no_new_privs the filter needs
// no capability, and has to allow little more than execve.
func seccompLast(p *process) error {
	if !p.config.Spec.Process.NoNewPrivileges {
		return nil // the filter is there already
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl(PR_SET_NO_NEW_PRIVS)", err)
	}
	if p.seccomp == nil {
		return nil
	}
	return p.seccomp.install()
}

// execute becomes the container's process.
func execute(p *process) error {
	err := syscall.Exec(p.command, p.config.Spec.Process.Args, p.env)
	return &classified{classOf(err, ClassNotFound), fmt.Errorf("exec %s: %w", p.command, err)}
}
