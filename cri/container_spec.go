package cri

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// translation is a CRI container config in the terms of the shim and the guest.
type translation struct {
	spec       *specs.Spec
	user       *guestapi.User
	volumes    []*shimapi.Volume
	pidMode    guestapi.NamespaceMode
	pidTarget  string
	stopSignal uint32
}

// defaultPath is the PATH of an image that sets none.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Limits of what one container may ask for; far above what pods need, far below
// what hurts the daemon.
const (
	maxMounts       = 1024
	maxLocalProfile = 4 << 20 // bytes of a localhost seccomp profile
	maxGroups       = 1 << 16 // the kernel's NGROUPS_MAX
)

// defaultCapabilities are what containers have had since Docker.
var defaultCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
	"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// knownCapabilities are those of Linux 6.12, the guest's kernel.
var knownCapabilities = []string{
	"CAP_AUDIT_CONTROL", "CAP_AUDIT_READ", "CAP_AUDIT_WRITE", "CAP_BLOCK_SUSPEND", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
	"CAP_KILL", "CAP_LEASE", "CAP_LINUX_IMMUTABLE", "CAP_MAC_ADMIN", "CAP_MAC_OVERRIDE", "CAP_MKNOD", "CAP_NET_ADMIN",
	"CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_RAW", "CAP_PERFMON", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP",
	"CAP_SETUID", "CAP_SYSLOG", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_CHROOT", "CAP_SYS_MODULE", "CAP_SYS_NICE",
	"CAP_SYS_PACCT", "CAP_SYS_PTRACE", "CAP_SYS_RAWIO", "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_WAKE_ALARM",
}

// translate makes an OCI runtime spec of what the CRI and the image ask for.
// What can't be honoured is refused by the field's name (T39).
func translate(pod *runtimeapi.PodSandboxConfig, c *runtimeapi.ContainerConfig, img *v1.ConfigFile) (*translation, error) {
	sc := c.GetLinux().GetSecurityContext()
	ns := sc.GetNamespaceOptions()
	if err := checkNamespaces("config.linux.security_context", ns, sc.GetApparmor(), sc.GetSelinuxOptions()); err != nil {
		return nil, err
	}
	if err := checkSameUserNamespace(pod, ns); err != nil {
		return nil, err
	}
	for field, paths := range map[string][]string{"masked_paths": sc.GetMaskedPaths(), "readonly_paths": sc.GetReadonlyPaths()} {
		for _, p := range paths {
			if !path.IsAbs(p) {
				return nil, refuse("config.linux.security_context."+field, fmt.Sprintf("%q is not an absolute path", p))
			}
		}
	}
	if len(c.GetCDIDevices()) > 0 {
		return nil, refuse("config.CDI_devices", "a device of the node can't be given to a pod's VM")
	}
	t := &translation{spec: &specs.Spec{
		Version:     specs.Version,
		Root:        &specs.Root{Readonly: sc.GetReadonlyRootfs()},
		Annotations: c.GetAnnotations(),
		Linux: &specs.Linux{
			MaskedPaths: sc.GetMaskedPaths(), ReadonlyPaths: sc.GetReadonlyPaths(), Resources: &specs.LinuxResources{},
		},
	}}
	if sc.GetPrivileged() {
		// The guest's devices, less those that the pod itself stands on (T37).
		t.spec.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}
	for _, step := range []func() error{
		func() error { return t.process(pod, c, img) },
		func() error { return t.identity(pod, sc, img) },
		func() error { return t.capabilities(sc) },
		func() error { return t.pidNamespace(pod, ns) },
		func() error { return t.mounts(pod, c) },
		func() error { return t.devices(c) },
		func() error { return t.resources(c.GetLinux().GetResources()) },
		func() error { return t.seccomp(sc) },
		func() error { return t.signal(c, img) },
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return t, nil
}

func (t *translation) process(pod *runtimeapi.PodSandboxConfig, c *runtimeapi.ContainerConfig, img *v1.ConfigFile) error {
	// The CRI's command replaces the image's entrypoint together with its
	// arguments; its args replace the arguments alone.
	args := append(slices.Clone(c.GetCommand()), c.GetArgs()...)
	if len(c.GetCommand()) == 0 {
		args = slices.Clone(img.Config.Entrypoint)
		if len(c.GetArgs()) > 0 {
			args = append(args, c.GetArgs()...)
		} else {
			args = append(args, img.Config.Cmd...)
		}
	}
	if len(args) == 0 || args[0] == "" {
		return refuse("config.command", "is empty, and the image has neither entrypoint nor command")
	}
	// Docker began to set HOSTNAME, and scripts have come to rely on it.
	env := mergeEnv([]string{defaultPath, "HOSTNAME=" + sandbox.Hostname(pod)}, img.Config.Env)
	if c.GetTty() {
		env = mergeEnv(env, []string{"TERM=xterm"})
	}
	var own []string
	for i, kv := range c.GetEnvs() {
		if kv.GetKey() == "" || strings.ContainsAny(kv.GetKey(), "=\x00") {
			return refuse(fmt.Sprintf("config.envs[%d].key", i), fmt.Sprintf("%q is not the name of an environment variable", kv.GetKey()))
		}
		if bytes.IndexByte(kv.GetValue(), 0) >= 0 {
			return refuse(fmt.Sprintf("config.envs[%d].value", i), fmt.Sprintf("%s has a NUL, which no environment can", kv.GetKey()))
		}
		own = append(own, kv.GetKey()+"="+string(kv.GetValue()))
	}
	cwd := c.GetWorkingDir()
	if cwd == "" {
		cwd = img.Config.WorkingDir
	}
	if cwd == "" {
		cwd = "/"
	}
	if !path.IsAbs(cwd) {
		return refuse("config.working_dir", fmt.Sprintf("%q is not an absolute path", cwd))
	}
	sc := c.GetLinux().GetSecurityContext()
	t.spec.Process = &specs.Process{
		Terminal:        c.GetTty(),
		Args:            args,
		Env:             mergeEnv(env, own),
		Cwd:             path.Clean(cwd),
		NoNewPrivileges: sc.GetNoNewPrivs(),
		// What systemd gives services, and so what images have come to expect.
		Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 524288}},
	}
	if adj := int(c.GetLinux().GetResources().GetOomScoreAdj()); adj != 0 {
		t.spec.Process.OOMScoreAdj = &adj
	}
	return nil
}

// mergeEnv appends add to env; a later value of a variable takes the place of
// the earlier one.
func mergeEnv(env, add []string) []string {
	out := slices.Clone(env)
	at := make(map[string]int, len(env)+len(add))
	for i, e := range out {
		k, _, _ := strings.Cut(e, "=")
		at[k] = i
	}
	for _, e := range add {
		k, _, _ := strings.Cut(e, "=")
		if i, ok := at[k]; ok {
			out[i] = e
			continue
		}
		at[k] = len(out)
		out = append(out, e)
	}
	return out
}

func (t *translation) identity(pod *runtimeapi.PodSandboxConfig, sc *runtimeapi.LinuxContainerSecurityContext, img *v1.ConfigFile) error {
	u := &guestapi.User{Name: img.Config.User}
	switch {
	case sc.GetRunAsUser() != nil:
		if sc.GetRunAsUsername() != "" {
			return refuse("config.linux.security_context", "run_as_user and run_as_username exclude each other")
		}
		uid := sc.GetRunAsUser().GetValue()
		u.Name, u.Uid = "", &uid
	case sc.GetRunAsUsername() != "":
		u.Name = sc.GetRunAsUsername()
	}
	if g := sc.GetRunAsGroup(); g != nil {
		if sc.GetRunAsUser() == nil && sc.GetRunAsUsername() == "" {
			return refuse("config.linux.security_context.run_as_group", "needs run_as_user or run_as_username")
		}
		gid := g.GetValue()
		u.Gid = &gid
	}
	uids, gids := mappedIDs(pod)
	for _, id := range []struct {
		field string
		id    *int64
		ids   int64
	}{{"run_as_user", u.Uid, uids}, {"run_as_group", u.Gid, gids}} {
		if id.id != nil && (*id.id < 0 || *id.id >= id.ids) {
			return refuse("config.linux.security_context."+id.field, fmt.Sprintf("%d is not an id, which the pod has from 0 to %d", *id.id, id.ids-1))
		}
	}
	if n := len(sc.GetSupplementalGroups()); n > maxGroups {
		return refuse("config.linux.security_context.supplemental_groups", fmt.Sprintf("%d groups are more than %d", n, maxGroups))
	}
	for _, g := range sc.GetSupplementalGroups() {
		if g < 0 || g >= gids {
			return refuse("config.linux.security_context.supplemental_groups", fmt.Sprintf("%d is not a group id, which the pod has from 0 to %d", g, gids-1))
		}
		u.SupplementalGroups = append(u.SupplementalGroups, uint32(g))
	}
	switch p := sc.GetSupplementalGroupsPolicy(); p {
	case runtimeapi.SupplementalGroupsPolicy_Merge:
	case runtimeapi.SupplementalGroupsPolicy_Strict:
		u.StrictGroups = true
	default:
		return refuse("config.linux.security_context.supplemental_groups_policy", fmt.Sprintf("%v is unknown", p))
	}
	t.user = u
	return nil
}

func (t *translation) capabilities(sc *runtimeapi.LinuxContainerSecurityContext) error {
	caps := slices.Clone(defaultCapabilities)
	var ambient []string
	if sc.GetPrivileged() {
		caps = slices.Clone(knownCapabilities)
	}
	name := func(field, c string) (string, error) {
		full := "CAP_" + strings.TrimPrefix(strings.ToUpper(c), "CAP_")
		if !slices.Contains(knownCapabilities, full) {
			return "", refuse("config.linux.security_context.capabilities."+field, fmt.Sprintf("%q is no capability of the guest's kernel", c))
		}
		return full, nil
	}
	has := func(list []string, want string) bool {
		return slices.ContainsFunc(list, func(c string) bool { return strings.EqualFold(c, want) })
	}
	// ALL first, so that "drop ALL, add X" and "add ALL, drop X" mean what they say.
	if has(sc.GetCapabilities().GetAddCapabilities(), "ALL") {
		caps = slices.Clone(knownCapabilities)
	}
	if has(sc.GetCapabilities().GetDropCapabilities(), "ALL") {
		caps = nil
	}
	for _, list := range []struct {
		field string
		names []string
		do    func(string)
	}{
		{"add_capabilities", sc.GetCapabilities().GetAddCapabilities(), func(c string) { caps = append(caps, c) }},
		{"add_ambient_capabilities", sc.GetCapabilities().GetAddAmbientCapabilities(), func(c string) { caps, ambient = append(caps, c), append(ambient, c) }},
		{"drop_capabilities", sc.GetCapabilities().GetDropCapabilities(), func(c string) {
			is := func(x string) bool { return x == c }
			caps, ambient = slices.DeleteFunc(caps, is), slices.DeleteFunc(ambient, is)
		}},
	} {
		for _, c := range list.names {
			if strings.EqualFold(c, "ALL") {
				continue
			}
			full, err := name(list.field, c)
			if err != nil {
				return err
			}
			list.do(full)
		}
	}
	slices.Sort(caps)
	caps = slices.Compact(caps)
	t.spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps, Ambient: ambient}
	if len(ambient) > 0 {
		t.spec.Process.Capabilities.Inheritable = ambient
	}
	return nil
}

func (t *translation) pidNamespace(pod *runtimeapi.PodSandboxConfig, ns *runtimeapi.NamespaceOption) error {
	podMode := pod.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid()
	const field = "config.linux.security_context.namespace_options.pid"
	switch ns.GetPid() {
	case runtimeapi.NamespaceMode_POD:
		if podMode != runtimeapi.NamespaceMode_POD {
			return refuse(field, fmt.Sprintf("POD, but the sandbox was made with %v", podMode))
		}
		t.pidMode = guestapi.NamespaceMode_POD
	case runtimeapi.NamespaceMode_CONTAINER:
		t.pidMode = guestapi.NamespaceMode_CONTAINER
	case runtimeapi.NamespaceMode_NODE:
		if podMode != runtimeapi.NamespaceMode_NODE {
			return refuse(field, fmt.Sprintf("NODE, but the sandbox was made with %v", podMode))
		}
		t.pidMode = guestapi.NamespaceMode_NODE
	case runtimeapi.NamespaceMode_TARGET:
		if ns.GetTargetId() == "" {
			return refuse(field, "TARGET needs target_id")
		}
		t.pidMode, t.pidTarget = guestapi.NamespaceMode_TARGET, ns.GetTargetId()
	default:
		return refuse(field, fmt.Sprintf("%v is unknown", ns.GetPid()))
	}
	return nil
}

// baseMounts are what every container has unless one of its own mounts takes
// the place. Sources with the scheme agent:// are the guest agent's (T26).
func baseMounts(privileged bool) []specs.Mount {
	sys := []string{"nosuid", "noexec", "nodev", "ro"}
	if privileged {
		sys = sys[:3]
	}
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: sys},
		{Destination: "/sys/fs/cgroup", Type: "cgroup2", Source: "cgroup", Options: append(slices.Clone(sys), "relatime")},
		{Destination: "/dev/shm", Type: "bind", Source: "agent://shm", Options: []string{"rbind", "rw", "nosuid", "nodev", "noexec"}},
		{Destination: "/etc/hosts", Type: "bind", Source: "agent://hosts", Options: []string{"rbind", "rw"}},
		{Destination: "/etc/hostname", Type: "bind", Source: "agent://hostname", Options: []string{"rbind", "rw"}},
		{Destination: "/etc/resolv.conf", Type: "bind", Source: "agent://resolv.conf", Options: []string{"rbind", "rw"}},
	}
}

func (t *translation) mounts(pod *runtimeapi.PodSandboxConfig, c *runtimeapi.ContainerConfig) error {
	if len(c.GetMounts()) > maxMounts {
		return refuse("config.mounts", fmt.Sprintf("%d mounts are more than %d", len(c.GetMounts()), maxMounts))
	}
	own := map[string]bool{}
	var mounts []specs.Mount
	for i, m := range c.GetMounts() {
		at := fmt.Sprintf("config.mounts[%d]", i)
		dest := path.Clean(m.GetContainerPath())
		switch {
		case !path.IsAbs(m.GetContainerPath()) || dest == "/":
			return refuse(at+".container_path", fmt.Sprintf("%q is not an absolute path below /", m.GetContainerPath()))
		case m.GetPropagation() == runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
			return refuse(at+".propagation", "BIDIRECTIONAL can't be had: a mount made in the pod's VM can't appear on the node")
		case m.GetImage().GetImage() != "" && m.GetHostPath() != "":
			return refuse(at+".host_path", "must be empty beside image")
		case m.GetImage().GetImage() != "" && !m.GetReadonly():
			return refuse(at+".readonly", "must be set beside image: an image is never written to")
		case m.GetImage().GetImage() == "" && m.GetImageSubPath() != "":
			return refuse(at+".image_sub_path", "needs image")
		case m.GetImageSubPath() != "" && !filepath.IsLocal(m.GetImageSubPath()):
			return refuse(at+".image_sub_path", fmt.Sprintf("%q leads out of the image", m.GetImageSubPath()))
		case runtimeapi.MountPropagation_name[int32(m.GetPropagation())] == "":
			return refuse(at+".propagation", fmt.Sprintf("%v is unknown", m.GetPropagation()))
		case m.GetRecursiveReadOnly() && !m.GetReadonly():
			return refuse(at+".recursive_read_only", "needs readonly")
		case m.GetRecursiveReadOnly() && m.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE:
			return refuse(at+".recursive_read_only", "needs private propagation")
		}
		for _, o := range m.GetMountOptions() {
			if !slices.Contains([]string{"noexec", "nodev", "nosuid"}, o) {
				return refuse(at+".mount_options", fmt.Sprintf("%q is none of noexec, nodev and nosuid", o))
			}
		}
		own[dest] = true
		if ref := m.GetImage().GetImage(); ref != "" {
			opts := slices.Clone(m.GetMountOptions())
			if sub := m.GetImageSubPath(); sub != "" {
				opts = append(opts, guestapi.ImageSubpath+sub)
			}
			mounts = append(mounts, specs.Mount{Destination: dest, Type: guestapi.ImageMount, Source: ref, Options: opts})
			continue
		}
		host, err := hostPath(at, m.GetHostPath())
		if err != nil {
			return err
		}
		uids, gids, err := mountIDs(at, pod, m)
		if err != nil {
			return err
		}
		name := "v" + strconv.Itoa(i)
		opts := []string{"rbind", "rprivate"}
		if m.GetPropagation() == runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER {
			opts[1] = "rslave"
		}
		// The host makes the volume's top read-only (T1, T3). Saying so in the guest
		// too would reach the mounts below it, which only a recursive read-only
		// volume may lose: they appear there as automounts and inherit the flag.
		if m.GetRecursiveReadOnly() {
			opts = append(opts, "rro")
		} else {
			opts = append(opts, "rw")
		}
		opts = append(opts, m.GetMountOptions()...)
		mounts = append(mounts, specs.Mount{Destination: dest, Type: "bind", Source: guestapi.VolumeScheme + name, Options: opts})
		t.volumes = append(t.volumes, &shimapi.Volume{
			Name:              name,
			HostPath:          host,
			ReadOnly:          m.GetReadonly(),
			RecursiveReadOnly: m.GetRecursiveReadOnly(),
			HostToContainer:   m.GetPropagation() == runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
			UidMappings:       uids,
			GidMappings:       gids,
		})
	}
	for _, m := range baseMounts(c.GetLinux().GetSecurityContext().GetPrivileged()) {
		if !own[m.Destination] {
			t.spec.Mounts = append(t.spec.Mounts, m)
		}
	}
	// A mount on /a must come before one on /a/b, whatever order they were given in.
	slices.SortStableFunc(mounts, func(a, b specs.Mount) int {
		return strings.Count(a.Destination, "/") - strings.Count(b.Destination, "/")
	})
	t.spec.Mounts = append(t.spec.Mounts, mounts...)
	return nil
}

// hostPath follows symbolic links on the host and refuses what can't be shared
// with a VM (T29).
func hostPath(at, p string) (string, error) {
	if !filepath.IsAbs(p) {
		return "", refuse(at+".host_path", fmt.Sprintf("%q is not an absolute path", p))
	}
	resolved, err := filepath.EvalSymlinks(p)
	if err != nil {
		return "", refuse(at+".host_path", err.Error())
	}
	fi, err := os.Stat(resolved)
	if err != nil {
		return "", refuse(at+".host_path", err.Error())
	}
	if m := fi.Mode(); !m.IsRegular() && !m.IsDir() {
		return "", refuse(at+".host_path", fmt.Sprintf("%s is neither a file nor a directory, and nothing else works across a VM's boundary", p))
	}
	return resolved, nil
}

// guestDevices are the devices of the guest that a container may ask for by the
// path they also have on a node (T37).
var guestDevices = map[string]specs.LinuxDevice{
	"/dev/fuse":    {Type: "c", Major: 10, Minor: 229},
	"/dev/net/tun": {Type: "c", Major: 10, Minor: 200},
}

func (t *translation) devices(c *runtimeapi.ContainerConfig) error {
	for i, d := range c.GetDevices() {
		at := fmt.Sprintf("config.devices[%d]", i)
		dev, ok := guestDevices[path.Clean(d.GetHostPath())]
		if !ok {
			return refuse(at+".host_path", fmt.Sprintf("%q: a device of the node can't be given to a pod's VM; /dev/fuse and /dev/net/tun are the guest's own", d.GetHostPath()))
		}
		if dev.Path = path.Clean(d.GetContainerPath()); !path.IsAbs(d.GetContainerPath()) {
			return refuse(at+".container_path", fmt.Sprintf("%q is not an absolute path", d.GetContainerPath()))
		}
		if strings.Trim(d.GetPermissions(), "rwm") != "" {
			return refuse(at+".permissions", fmt.Sprintf("%q has other letters than r, w and m", d.GetPermissions()))
		}
		mode := os.FileMode(0o666)
		dev.FileMode = &mode
		t.spec.Linux.Devices = append(t.spec.Linux.Devices, dev)
		rule := specs.LinuxDeviceCgroup{Allow: true, Type: dev.Type, Major: &dev.Major, Minor: &dev.Minor, Access: d.GetPermissions()}
		t.spec.Linux.Resources.Devices = append(t.spec.Linux.Resources.Devices, rule)
	}
	return nil
}

func (t *translation) resources(r *runtimeapi.LinuxContainerResources) error {
	if err := checkResources("config.linux.resources", r); err != nil {
		return err
	}
	res := linuxResources(r)
	res.Devices = t.spec.Linux.Resources.Devices
	t.spec.Linux.Resources = res
	return nil
}

func (t *translation) seccomp(sc *runtimeapi.LinuxContainerSecurityContext) error {
	if sc.GetPrivileged() || sc.GetSeccomp() == nil {
		return nil
	}
	const at = "config.linux.security_context.seccomp"
	switch p := sc.GetSeccomp(); p.GetProfileType() {
	case runtimeapi.SecurityProfile_Unconfined:
		return nil
	case runtimeapi.SecurityProfile_RuntimeDefault:
		profile, err := defaultSeccomp(t.spec)
		if err != nil {
			return refuse(at, err.Error())
		}
		t.spec.Linux.Seccomp = profile
	case runtimeapi.SecurityProfile_Localhost:
		f := strings.TrimPrefix(p.GetLocalhostRef(), "localhost/")
		if !filepath.IsAbs(f) {
			return refuse(at+".localhost_ref", fmt.Sprintf("%q is not an absolute path", p.GetLocalhostRef()))
		}
		fi, err := os.Stat(f)
		if err != nil {
			return refuse(at+".localhost_ref", err.Error())
		}
		if !fi.Mode().IsRegular() || fi.Size() > maxLocalProfile {
			return refuse(at+".localhost_ref", fmt.Sprintf("%s is not a file of at most %d bytes", f, maxLocalProfile))
		}
		b, err := os.ReadFile(f)
		if err != nil {
			return refuse(at+".localhost_ref", err.Error())
		}
		profile := &specs.LinuxSeccomp{}
		if err := json.Unmarshal(b, profile); err != nil {
			return refuse(at+".localhost_ref", fmt.Sprintf("%s: %v", f, err))
		}
		t.spec.Linux.Seccomp = profile
	default:
		return refuse(at+".profile_type", fmt.Sprintf("%v is unknown", p.GetProfileType()))
	}
	return nil
}
