package cri

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RunPodSandbox implements the CRI call of that name: when it returns, the
// pod's VM runs and its address answers.
func (s *Server) RunPodSandbox(ctx context.Context, req *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	if err := s.checkPodSandbox(req.GetConfig(), req.GetRuntimeHandler()); err != nil {
		return nil, err
	}
	// The kubelet makes the folder itself; other clients expect it to be made.
	if dir := req.GetConfig().GetLogDirectory(); dir != "" {
		if err := makeLogDirectory("config.log_directory", dir); err != nil {
			return nil, err
		}
	}
	pod, err := s.Pods.Run(ctx, req.GetConfig(), req.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: pod.ID()}, nil
}

// makeLogDirectory makes a directory that a field names.
func makeLogDirectory(field, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("%s: %w: %w", field, err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (s *Server) checkPodSandbox(c *runtimeapi.PodSandboxConfig, handler string) error {
	m := c.GetMetadata()
	switch {
	case c == nil:
		return refuse("config", "is missing")
	case m.GetName() == "" || m.GetNamespace() == "" || m.GetUid() == "":
		return refuse("config.metadata", "name, namespace and uid are all needed")
	case c.GetLogDirectory() != "" && !filepath.IsAbs(c.GetLogDirectory()):
		return refuse("config.log_directory", "must be an absolute path")
	case len(c.GetHostname()) > 64:
		return refuse("config.hostname", "is longer than the kernel's 64 bytes")
	case notAWord(c.GetHostname()):
		return refuse("config.hostname", fmt.Sprintf("%q has spaces or control characters", c.GetHostname()))
	case c.GetHostname() == "" && notAWord(m.GetName()):
		return refuse("config.metadata.name", fmt.Sprintf("%q has spaces or control characters, and would be the hostname", m.GetName()))
	case c.GetWindows() != nil:
		return refuse("config.windows", "pods run Linux")
	}
	if err := s.checkHandler(handler); err != nil {
		return err
	}
	dns := c.GetDnsConfig()
	for field, words := range map[string][]string{"servers": dns.GetServers(), "searches": dns.GetSearches(), "options": dns.GetOptions()} {
		if i := slices.IndexFunc(words, notAWord); i >= 0 {
			return refuse("config.dns_config."+field, fmt.Sprintf("%q has spaces or control characters", words[i]))
		}
	}
	for i, p := range c.GetPortMappings() {
		if err := checkPortMapping(fmt.Sprintf("config.port_mappings[%d]", i), p); err != nil {
			return err
		}
	}
	for name := range c.GetLinux().GetSysctls() {
		if !podSysctl(name) {
			return refuse("config.linux.sysctls", fmt.Sprintf("%q belongs to no namespace of the pod: it would be the whole guest's", name))
		}
	}
	for field, r := range map[string]*runtimeapi.LinuxContainerResources{"resources": c.GetLinux().GetResources(), "overhead": c.GetLinux().GetOverhead()} {
		if err := checkResources("config.linux."+field, r); err != nil {
			return err
		}
	}
	sc := c.GetLinux().GetSecurityContext()
	if pid := sc.GetNamespaceOptions().GetPid(); pid == runtimeapi.NamespaceMode_TARGET || runtimeapi.NamespaceMode_name[int32(pid)] == "" {
		return refuse("config.linux.security_context.namespace_options.pid", fmt.Sprintf("a sandbox can't have %v", pid))
	}
	if userNamespaceOf(c) != nil && s.NoUserNamespaces != nil {
		return refuse("config.linux.security_context.namespace_options.userns_options", fmt.Sprintf("this node has no user namespaces: %v", s.NoUserNamespaces))
	}
	return checkNamespaces("config.linux.security_context", sc.GetNamespaceOptions(), sc.GetApparmor(), sc.GetSelinuxOptions())
}

func (s *Server) checkHandler(name string) error {
	if name != "" && !slices.Contains(s.Handlers, name) {
		return fmt.Errorf("runtime_handler %q is not configured (there are: \"\" and %q): %w", name, s.Handlers, errdefs.ErrNotFound)
	}
	return nil
}

// notAWord tells whether s would be more than one word of a line in resolv.conf
// or hosts.
func notAWord(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) })
}

func checkPortMapping(at string, p *runtimeapi.PortMapping) error {
	switch {
	case runtimeapi.Protocol_name[int32(p.GetProtocol())] == "":
		return refuse(at+".protocol", fmt.Sprintf("%v is none of TCP, UDP and SCTP", p.GetProtocol()))
	case p.GetHostPort() < 0 || p.GetHostPort() > 65535:
		return refuse(at+".host_port", fmt.Sprintf("%d is no port", p.GetHostPort()))
	case p.GetContainerPort() < 0 || p.GetContainerPort() > 65535 || p.GetHostPort() > 0 && p.GetContainerPort() == 0:
		return refuse(at+".container_port", fmt.Sprintf("%d is no port", p.GetContainerPort()))
	case p.GetHostIp() != "" && net.ParseIP(p.GetHostIp()) == nil:
		return refuse(at+".host_ip", fmt.Sprintf("%q is not an address", p.GetHostIp()))
	}
	return nil
}

// podSysctl tells whether a sysctl belongs to a namespace that a pod has. The
// agent decides the same when it sets it, but a VM would have booted for it.
func podSysctl(name string) bool {
	// sysctl.d(5): the first of the two is the separator.
	if dot, slash := strings.IndexByte(name, '.'), strings.IndexByte(name, '/'); slash < 0 || dot >= 0 && dot < slash {
		name = strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." || notAWord(part) {
			return false
		}
	}
	return strings.HasPrefix(name, "net/") || strings.HasPrefix(name, "fs/mqueue/") ||
		strings.HasPrefix(name, "kernel/shm") || strings.HasPrefix(name, "kernel/msg") ||
		slices.Contains([]string{"kernel/sem", "kernel/hostname", "kernel/domainname"}, name)
}

// checkNamespaces refuses what a VM boundary makes impossible (T40) and what the
// guest kernel can't enforce (T39).
func checkNamespaces(at string, ns *runtimeapi.NamespaceOption, apparmor *runtimeapi.SecurityProfile, selinux *runtimeapi.SELinuxOption) error {
	if ns.GetNetwork() == runtimeapi.NamespaceMode_NODE {
		return refuse(at+".namespace_options.network", "NODE can't be had: the node's network is outside the pod's VM; run host-network pods on another node or runtime")
	}
	for field, mode := range map[string]runtimeapi.NamespaceMode{"network": ns.GetNetwork(), "ipc": ns.GetIpc()} {
		if mode != runtimeapi.NamespaceMode_POD && mode != runtimeapi.NamespaceMode_NODE {
			return refuse(at+".namespace_options."+field, fmt.Sprintf("%v: the CRI has POD and NODE", mode))
		}
	}
	if ns.GetIpc() == runtimeapi.NamespaceMode_NODE {
		return refuse(at+".namespace_options.ipc", "NODE can't be had: the node's IPC objects belong to another kernel")
	}
	if err := checkUserNamespace(at, ns); err != nil {
		return err
	}
	if runtimeapi.SecurityProfile_ProfileType_name[int32(apparmor.GetProfileType())] == "" {
		return refuse(at+".apparmor.profile_type", fmt.Sprintf("%v is unknown", apparmor.GetProfileType()))
	}
	if apparmor.GetProfileType() == runtimeapi.SecurityProfile_Localhost {
		return refuse(at+".apparmor", "the guest's kernel enforces no AppArmor profile")
	}
	if selinux.GetType() != "" || selinux.GetLevel() != "" || selinux.GetRole() != "" || selinux.GetUser() != "" {
		return refuse(at+".selinux_options", "the guest's kernel enforces no SELinux policy")
	}
	return nil
}
