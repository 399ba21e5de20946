package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

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
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("config.log_directory: %w", err)
		}
	}
	pod, err := s.Pods.Run(ctx, req.GetConfig(), req.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: pod.ID()}, nil
}

func (s *Server) checkPodSandbox(c *runtimeapi.PodSandboxConfig, handler string) error {
	m := c.GetMetadata()
	switch {
	case c == nil:
		return refuse("config", "is missing")
	case m.GetName() == "" || m.GetNamespace() == "" || m.GetUid() == "":
		return refuse("config.metadata", "name, namespace and uid are all needed")
	case handler != "" && !slices.Contains(s.Handlers, handler):
		return fmt.Errorf("runtime_handler %q is not configured (there are: \"\" and %q): %w", handler, s.Handlers, errdefs.ErrNotFound)
	case c.GetLogDirectory() != "" && !filepath.IsAbs(c.GetLogDirectory()):
		return refuse("config.log_directory", "must be an absolute path")
	case len(c.GetHostname()) > 64:
		return refuse("config.hostname", "is longer than the kernel's 64 bytes")
	}
	if w := c.GetWindows(); w != nil {
		return refuse("config.windows", "pods run Linux")
	}
	sc := c.GetLinux().GetSecurityContext()
	return checkNamespaces("config.linux.security_context", sc.GetNamespaceOptions(), sc.GetApparmor(), sc.GetSelinuxOptions())
}

// checkNamespaces refuses what a VM boundary makes impossible (T40) and what the
// guest kernel can't enforce (T39).
func checkNamespaces(at string, ns *runtimeapi.NamespaceOption, apparmor *runtimeapi.SecurityProfile, selinux *runtimeapi.SELinuxOption) error {
	if ns.GetNetwork() == runtimeapi.NamespaceMode_NODE {
		return refuse(at+".namespace_options.network", "NODE can't be had: the node's network is outside the pod's VM; run host-network pods on another node or runtime")
	}
	if ns.GetIpc() == runtimeapi.NamespaceMode_NODE {
		return refuse(at+".namespace_options.ipc", "NODE can't be had: the node's IPC objects belong to another kernel")
	}
	if u := ns.GetUsernsOptions(); u != nil && u.GetMode() != runtimeapi.NamespaceMode_NODE {
		return refuse(at+".namespace_options.userns_options", "user namespaces are not offered (see Status.runtime_handlers)")
	}
	if apparmor.GetProfileType() == runtimeapi.SecurityProfile_Localhost {
		return refuse(at+".apparmor", "the guest's kernel enforces no AppArmor profile")
	}
	if selinux.GetType() != "" || selinux.GetLevel() != "" || selinux.GetRole() != "" || selinux.GetUser() != "" {
		return refuse(at+".selinux_options", "the guest's kernel enforces no SELinux policy")
	}
	return nil
}
