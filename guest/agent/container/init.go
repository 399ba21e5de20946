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

// initSteps is what container-init does, in order.
var initSteps = slices.Concat([]step{
	{"check the spec", checkInit},
	{"OOM score", setOOMScore},
	{"protect the process", undump},
	{"session", newSession},
	{"mount propagation", privateMounts},
	{"root file system", mountRoot},
	{"mounts", mountAll},
	{"devices", makeDevices},
	{"console", bindConsole},
	{"working directory", makeCwd},
	{"masked paths", maskPaths},
	{"read-only paths", readonlyPaths},
	{"sysctls", setSysctls},
	{"pivot root", pivotRoot},
	{"read-only root", sealReadonly},
}, processSteps)

// execSteps is what exec-init does, in order.
var execSteps = slices.Concat([]step{
	{"check the spec", checkExec},
	{"OOM score", setOOMScore},
	{"protect the process", undump},
	{"session", newSession},
	{"join namespaces", joinNamespaces},
}, processSteps)

// processSteps turn a process that sees the container's root into the one that
// the spec describes.
var processSteps = []step{
	{"user", resolveIdentity},
	{"environment", makeEnvironment},
	{"session keyring", newKeyring},
	{"standard streams", ownStreams},
	{"resource limits", setLimits},
	{"working directory", changeDirectoryAsRoot},
	{"descriptors", sealDescriptors},
	{"seccomp", seccompBeforeDrop},
	{"user and capabilities", becomeUser},
	{"working directory", changeDirectory},
	{"command", findCommand},
	{"no_new_privs and seccomp", seccompLast},
	{"exec", execute},
}

// process is what the steps share.
type process struct {
	config        Config
	root          rootDir  // the container's "/"
	readonlyLater []string // tmpfs destinations, see sealReadonly

	limits       []limit
	capabilities capabilitySets
	seccomp      *seccompFilter // nil: no filter

	id      Identity
	env     []string
	cwdErr  error // why root could not enter the working directory
	command string
}

var noLinux specs.Linux

// linux is Spec.Linux, never nil.
func (c *Config) linux() *specs.Linux {
	if c.Spec.Linux == nil {
		return &noLinux
	}
	return c.Spec.Linux
}

// checkInit refuses by name what can't be honoured, before anything is done.
func checkInit(p *process) error {
	spec := &p.config.Spec
	if spec.Root == nil || !path.IsAbs(spec.Root.Path) {
		return invalid("root.path must be an absolute path")
	}
	if len(p.config.Namespaces) > 0 {
		return invalid("container-init joins no namespaces")
	}
	linux := p.config.linux()
	for _, unsupported := range []struct {
		name string
		is   bool
	}{
		{"hooks", spec.Hooks != nil},
		{"domainname", spec.Domainname != ""},
		{"linux.personality", linux.Personality != nil},
		{"linux.netDevices", len(linux.NetDevices) > 0},
		{"linux.intelRdt", linux.IntelRdt != nil},
		{"linux.memoryPolicy", linux.MemoryPolicy != nil},
		{"linux.mountLabel", linux.MountLabel != ""},
		{"linux.timeOffsets", len(linux.TimeOffsets) > 0},
	} {
		if unsupported.is {
			return invalid("%s can't be honoured", unsupported.name)
		}
	}
	return checkProcess(p)
}

func checkExec(p *process) error {
	for _, n := range p.config.Namespaces {
		if _, ok := namespaceFlags[n.Type]; !ok {
			return invalid("exec-init can't join a namespace of type %q", n.Type)
		}
		if n.FD <= ConfigFD {
			return invalid("descriptor %d is no namespace's", n.FD)
		}
	}
	return checkProcess(p)
}

func checkProcess(p *process) error {
	process := p.config.Spec.Process
	if process == nil || len(process.Args) == 0 || process.Args[0] == "" {
		return invalid("process.args is empty: there is no command to execute")
	}
	for _, unsupported := range []struct {
		name string
		is   bool
	}{
		{"process.apparmorProfile", process.ApparmorProfile != ""},
		{"process.selinuxLabel", process.SelinuxLabel != ""},
		{"process.scheduler", process.Scheduler != nil},
		{"process.ioPriority", process.IOPriority != nil},
		{"process.execCPUAffinity", process.ExecCPUAffinity != nil},
	} {
		if unsupported.is {
			return invalid("%s can't be honoured", unsupported.name)
		}
	}
	if process.Cwd == "" {
		process.Cwd = "/"
	}
	if !path.IsAbs(process.Cwd) {
		return invalid("working directory %q is not an absolute path", process.Cwd)
	}
	for _, s := range slices.Concat(process.Args, process.Env) {
		if strings.ContainsRune(s, 0) {
			return invalid("an argument or environment variable contains a NUL: %q", s)
		}
	}
	var err error
	if p.limits, err = parseLimits(process.Rlimits); err != nil {
		return err
	}
	if p.capabilities, err = parseCapabilities(process.Capabilities); err != nil {
		return err
	}
	if profile := p.config.linux().Seccomp; profile != nil {
		if p.seccomp, err = compileSeccomp(profile); err != nil {
			return invalid("seccomp profile: %w", err)
		}
	}
	return nil
}

// undump keeps processes of the container that see this one (shared pid
// namespace, exec) from reading its memory and descriptors or tracing it
// (runc CVE-2016-9962). execve makes the process dumpable again.
func undump(*process) error {
	// Files made here get the modes asked for; changeDirectory sets the final mask.
	unix.Umask(0)
	return os.NewSyscallError("prctl(PR_SET_DUMPABLE)", unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0))
}

// setOOMScore writes through the guest's /proc, which is still the one in sight.
func setOOMScore(p *process) error {
	score := p.config.Spec.Process.OOMScoreAdj
	if score == nil {
		return nil
	}
	if *score < -1000 || *score > 1000 {
		return invalid("oomScoreAdj %d is not within -1000..1000", *score)
	}
	return writeFile("/proc/self/oom_score_adj", strconv.Itoa(*score))
}

// writeFile writes to an existing file in one call, as procfs wants it.
func writeFile(name, value string) error {
	fd, err := unix.Open(name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(value)); err != nil {
		return &os.PathError{Op: "write " + strconv.Quote(value) + " to", Path: name, Err: err}
	}
	return nil
}

// newSession detaches the process from the agent's session and makes its
// terminal, if it has one, the controlling one.
func newSession(p *process) error {
	if _, err := unix.Setsid(); err != nil {
		// The parent may have done it already (SysProcAttr.Setsid).
		if sid, serr := unix.Getsid(0); serr != nil || sid != unix.Getpid() {
			return os.NewSyscallError("setsid", err)
		}
	}
	process := p.config.Spec.Process
	if !process.Terminal {
		return nil
	}
	if err := unix.IoctlSetInt(0, unix.TIOCSCTTY, 0); err != nil {
		return fmt.Errorf("make descriptor 0 the controlling terminal: %w", err)
	}
	if size := process.ConsoleSize; size != nil && size.Height > 0 && size.Width > 0 {
		ws := unix.Winsize{Row: uint16(min(size.Height, 0xffff)), Col: uint16(min(size.Width, 0xffff))}
		if err := unix.IoctlSetWinsize(0, unix.TIOCSWINSZ, &ws); err != nil {
			return fmt.Errorf("set the terminal's size: %w", err)
		}
	}
	return nil
}

// makeCwd creates a missing working directory, as runc does, while the root
// file system is still writable.
func makeCwd(p *process) error {
	fd, err := p.root.make(p.config.Spec.Process.Cwd, false)
	if errors.Is(err, unix.EROFS) {
		return nil // changeDirectory will say it is missing
	}
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// setSysctls writes the sysctls that belong to a namespace of the pod.
func setSysctls(p *process) error {
	sysctls := p.config.linux().Sysctl
	if len(sysctls) == 0 {
		return nil
	}
	// A procfs of its own, attached nowhere: nothing the image or another
	// container does can redirect the write (runc CVE-2025-52881).
	proc, err := newFilesystem("proc", "proc", nil, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(proc)
	names := make([]string, 0, len(sysctls))
	for name := range sysctls {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		file, err := sysctlPath(name)
		if err != nil {
			return err
		}
		fd, err := openat2(proc, "sys/"+file, unix.O_WRONLY, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
		if err != nil {
			return fmt.Errorf("sysctl %s: %w", name, err)
		}
		_, err = unix.Write(fd, []byte(sysctls[name]))
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("sysctl %s: write %q: %w", name, sysctls[name], err)
		}
	}
	return nil
}

// sysctlPath turns "net.ipv4.ip_forward" or "net/ipv4/conf/eth0.1/rp_filter"
// into a path below /proc/sys, and refuses what is not of a namespace.
func sysctlPath(name string) (string, error) {
	file := name
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		file = strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}
	for _, c := range strings.Split(file, "/") {
		if c == "" || c == "." || c == ".." {
			return "", invalid("sysctl %q is malformed", name)
		}
	}
	switch file {
	case "kernel/msgmax", "kernel/msgmnb", "kernel/msgmni", "kernel/sem",
		"kernel/shmall", "kernel/shmmax", "kernel/shmmni", "kernel/shm_rmid_forced":
		return file, nil
	}
	if strings.HasPrefix(file, "net/") || strings.HasPrefix(file, "fs/mqueue/") {
		return file, nil
	}
	return "", invalid("sysctl %q is not of a namespace", name)
}

// namespaceFlags are the namespaces exec-init can join. The pid namespace is
// its parent's choice: setns changes it for children only.
var namespaceFlags = map[specs.LinuxNamespaceType]int{
	specs.MountNamespace:   unix.CLONE_NEWNS,
	specs.CgroupNamespace:  unix.CLONE_NEWCGROUP,
	specs.IPCNamespace:     unix.CLONE_NEWIPC,
	specs.UTSNamespace:     unix.CLONE_NEWUTS,
	specs.NetworkNamespace: unix.CLONE_NEWNET,
}

// joinNamespaces ends with the mount namespace, which also sets root and
// working directory to the container's.
func joinNamespaces(p *process) error {
	// The kernel lets no thread change its mount namespace that shares its root
	// with others (T21).
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare(CLONE_FS)", err)
	}
	namespaces := slices.Clone(p.config.Namespaces)
	slices.SortStableFunc(namespaces, func(a, b Namespace) int {
		last := func(n Namespace) int {
			if n.Type == specs.MountNamespace {
				return 1
			}
			return 0
		}
		return last(a) - last(b)
	})
	for _, n := range namespaces {
		if err := unix.Setns(n.FD, namespaceFlags[n.Type]); err != nil {
			return fmt.Errorf("join %s namespace: %w", n.Type, err)
		}
	}
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the container's root: %w", err)
	}
	p.root = rootDir{root}
	return nil
}
