package cri

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"maps"
	"math"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// This file is the README's section on the CRI: what becomes of each call and of
// each field of each request. The tests hold it against the API's descriptors
// and against the code, so that a field which a new version of the API brings
// can't be ignored by accident (T39).

//go:generate go test -run ^TestREADME$ -update .

var update = flag.Bool("update", false, "write the README's generated section")

// unimplemented are the calls that answer Unimplemented, and why.
var unimplemented = map[string]string{
	"CheckpointContainer": checkpoints, "CheckpointPod": checkpoints, "RestorePod": checkpoints,
}

const checkpoints = "QEMU can't save a VM that has vhost-user devices, which the pod's vsock and shares are, and the guest has no CRIU"

// message is one message of the API and its fields' classes.
type message struct {
	name string
	// honoured are the fields that do what the CRI says, separated by spaces.
	honoured string
	refused  []refusal
	accepted []meaning
}

// refusal is a field, or some values of it, that is refused by its name.
type refusal struct {
	field  string // NAME or NAME: WHICH VALUES
	reason string
	// pod or container makes a request that has such a value. The code must then
	// refuse it with InvalidArgument and name the field.
	pod       func(*runtimeapi.PodSandboxConfig)
	container func(*runtimeapi.ContainerConfig)
}

// meaning is a field that is accepted and means something of its own here.
type meaning struct{ field, meaning string }

// messages are all messages that a client can send, in the API's order.
var messages = []message{
	{name: "VersionRequest", accepted: []meaning{{"version", "none: there is one version of the API"}}},
	{name: "RunPodSandboxRequest", honoured: "config runtime_handler", refused: []refusal{
		{field: "runtime_handler: without a VM class of that name", reason: "`NotFound`, and the error lists the names that there are"},
	}},
	{name: "PodSandboxConfig", honoured: "metadata hostname log_directory dns_config port_mappings labels annotations linux", refused: []refusal{
		{field: "metadata: without name, namespace or uid", reason: "they are the pod's name", pod: func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Uid = "" }},
		{field: "hostname: longer than 64 bytes, or with spaces or control characters", reason: "it goes into `/etc/hosts`", pod: func(c *runtimeapi.PodSandboxConfig) { c.Hostname = "a b" }},
		{field: "log_directory: relative", reason: "the client doesn't know the daemon's directory", pod: func(c *runtimeapi.PodSandboxConfig) { c.LogDirectory = "x" }},
		{field: "windows", reason: "pods run Linux", pod: func(c *runtimeapi.PodSandboxConfig) { c.Windows = &runtimeapi.WindowsPodSandboxConfig{} }},
		{field: "metadata: a name with spaces or control characters, and no hostname", reason: "the name is the hostname then", pod: func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = "a\nb" }},
	}, accepted: []meaning{
		{"dns_config: none", "the host's resolv.conf, with loopback name servers replaced by the resolver's own"},
	}},
	{name: "PodSandboxMetadata", honoured: "name uid namespace attempt"},
	{name: "DNSConfig", honoured: "servers searches options", refused: []refusal{
		{field: "servers: with spaces or control characters, and searches and options likewise", reason: "they would be other lines of `/etc/resolv.conf`", pod: func(c *runtimeapi.PodSandboxConfig) {
			c.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"1.2.3.4\noptions ndots:5"}}
		}},
	}},
	{name: "PortMapping", honoured: "protocol container_port host_port host_ip", refused: []refusal{
		{field: "protocol: not TCP, UDP or SCTP", reason: "the CRI has no other", pod: func(c *runtimeapi.PodSandboxConfig) {
			c.PortMappings = []*runtimeapi.PortMapping{{Protocol: 9, HostPort: 80, ContainerPort: 80}}
		}},
		{field: "host_port: not 0 to 65535, and container_port likewise", reason: "no port", pod: func(c *runtimeapi.PodSandboxConfig) {
			c.PortMappings = []*runtimeapi.PortMapping{{HostPort: 1 << 20, ContainerPort: 80}}
		}},
		{field: "host_port: with a CNI configuration that lacks `portmap`", reason: "nothing would carry it out (`FailedPrecondition`)"},
		{field: "host_port: for UDP or SCTP, on macOS", reason: "there a host port is a proxy for TCP connections (`FailedPrecondition`)"},
		{field: "host_ip: not an address", reason: "nothing could listen there", pod: func(c *runtimeapi.PodSandboxConfig) {
			c.PortMappings = []*runtimeapi.PortMapping{{HostIp: "here", HostPort: 80, ContainerPort: 80}}
		}},
	}},
	{name: "LinuxPodSandboxConfig", honoured: "security_context", refused: []refusal{
		{field: "sysctls: of no namespace that the pod has", reason: "they would be the whole guest's", pod: func(c *runtimeapi.PodSandboxConfig) {
			c.Linux = &runtimeapi.LinuxPodSandboxConfig{Sysctls: map[string]string{"vm.swappiness": "1"}}
		}},
	}, accepted: []meaning{
		{"cgroup_parent", "where shim, QEMU and virtiofsd are charged on the host"},
		{"sysctls", "set in the pod's namespaces in the guest"},
		{"resources", "the VM's size: the class's or these limits, whichever is more, and overhead and a reserve for the guest's kernel on top; a limit of more CPUs than the host has means all of them. What the host's available memory can't hold is `ResourceExhausted`. The size is fixed when the pod starts"},
		{"overhead", "added to the VM's size"},
	}},
	{name: "LinuxSandboxSecurityContext", honoured: "namespace_options", refused: []refusal{
		{field: "selinux_options", reason: noSELinux, pod: sandboxSecurity(func(s *runtimeapi.LinuxSandboxSecurityContext) {
			s.SelinuxOptions = &runtimeapi.SELinuxOption{Level: "s0"}
		})},
		{field: "apparmor: Localhost", reason: noAppArmor, pod: sandboxSecurity(func(s *runtimeapi.LinuxSandboxSecurityContext) {
			s.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "x"}
		})},
	}, accepted: []meaning{
		{"apparmor: RuntimeDefault, Unconfined", "none"},
		{"run_as_user", noPause}, {"run_as_group", noPause}, {"readonly_rootfs", noPause},
		{"supplemental_groups", noPause}, {"supplemental_groups_policy", noPause},
		{"privileged", noPause}, {"seccomp", noPause}, {"seccomp_profile_path", noPause},
	}},
	{name: "NamespaceOption", honoured: "network pid ipc target_id userns_options", refused: []refusal{
		{field: "network: NODE", reason: "the node's network is outside the VM; run host-network pods on another node or runtime", pod: namespaces(&runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE})},
		{field: "network: CONTAINER or TARGET, and ipc likewise", reason: "the CRI has no such namespaces", pod: namespaces(&runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_TARGET})},
		{field: "ipc: NODE", reason: "the node's IPC objects belong to another kernel", pod: namespaces(&runtimeapi.NamespaceOption{Ipc: runtimeapi.NamespaceMode_NODE})},
		{field: "pid: TARGET for a sandbox", reason: "there is no container yet", pod: namespaces(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET})},
		{field: "pid: a container's NODE or POD that is not its sandbox's", reason: "its processes would not see each other", container: containerNamespaces(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE})},
		{field: "pid: TARGET without `target_id`", reason: "there is nothing to join", container: containerNamespaces(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET})},
		{field: "target_id: not of a running container in the same pod", reason: "there is no namespace to join (`NotFound` and `FailedPrecondition` for one that is not there or doesn't run)"},
		{field: "userns_options: with pid NODE", reason: "that pid namespace does not belong to the pod", pod: namespaces(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE, UsernsOptions: userns(oneMapping, oneMapping)})},
		{field: "userns_options: a container's that are not its sandbox's", reason: "the pod's namespaces belong to the sandbox's", container: containerNamespaces(&runtimeapi.NamespaceOption{UsernsOptions: userns(oneMapping, oneMapping)})},
		{field: "userns_options: POD where the node can't", reason: "the state directory's file system or the kernel has no id-mapped mounts; `Status` says so"},
	}, accepted: []meaning{
		{"pid: NODE", "the guest's first pid namespace"},
	}},
	{name: "UserNamespace", honoured: "mode uids gids", refused: []refusal{
		{field: "mode: CONTAINER or TARGET", reason: "the CRI has no such user namespaces", pod: namespaces(&runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_CONTAINER}})},
		{field: "uids: not exactly one mapping, and gids likewise", reason: "no kubelet asks for more", pod: namespaces(&runtimeapi.NamespaceOption{UsernsOptions: userns(nil, oneMapping)})},
	}},
	{name: "IDMapping", honoured: "host_id container_id length", refused: []refusal{
		{field: "container_id: not 0", reason: "the pod's root must be somebody", pod: namespaces(&runtimeapi.NamespaceOption{UsernsOptions: userns([]*runtimeapi.IDMapping{{ContainerId: 1, HostId: 100000, Length: 65536}}, oneMapping)})},
		{field: "length: 0, and host_id past the last id", reason: "no range of ids", pod: namespaces(&runtimeapi.NamespaceOption{UsernsOptions: userns([]*runtimeapi.IDMapping{{HostId: math.MaxUint32 - 65535, Length: 65536}}, oneMapping)})},
	}},
	{name: "SELinuxOption", refused: []refusal{
		{field: "user", reason: noSELinux}, {field: "role", reason: noSELinux}, {field: "type", reason: noSELinux}, {field: "level", reason: noSELinux},
	}},
	{name: "Int64Value", honoured: "value"},
	{name: "SecurityProfile", honoured: "profile_type localhost_ref", refused: []refusal{
		{field: "profile_type: unknown", reason: "the CRI has no such type", container: security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: 9}
		})},
		{field: "localhost_ref: missing, relative, or a file of more than 4 MiB", reason: "the profile can't be read", container: security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "/missing.json"}
		})},
	}},
	{name: "LinuxContainerResources", honoured: "cpu_period cpu_quota cpu_shares memory_limit_in_bytes memory_swap_limit_in_bytes", refused: []refusal{
		{field: "memory_limit_in_bytes: below -1, and memory_swap_limit_in_bytes likewise", reason: "-1 is no limit, 0 is not specified", container: resources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: -2})},
		{field: "memory_swap_limit_in_bytes: below the memory limit", reason: "it is the sum of both", container: resources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 2 << 20, MemorySwapLimitInBytes: 1 << 20})},
		{field: "cpu_period: not 1,000 to 1,000,000", reason: "what the kernel takes, in µs", container: resources(&runtimeapi.LinuxContainerResources{CpuPeriod: 5})},
		{field: "cpu_quota: 1 to 999", reason: "likewise", container: resources(&runtimeapi.LinuxContainerResources{CpuQuota: 5})},
		{field: "cpu_shares: negative", reason: "no weight", container: resources(&runtimeapi.LinuxContainerResources{CpuShares: -5})},
		{field: "cpuset_cpus: not a list of CPUs that the host has", reason: "nothing could run there"},
		{field: "oom_score_adj: not -1000 to 1000", reason: "what the kernel takes", container: resources(&runtimeapi.LinuxContainerResources{OomScoreAdj: 5000})},
		{field: "hugepage_limits: above 0", reason: "`hugepages_mib` of the VM class is 0, or the size is not 2MB; above it they are `ResourceExhausted`"},
		{field: "unified: not the name of a controller's file", reason: "it would be a path", container: resources(&runtimeapi.LinuxContainerResources{Unified: map[string]string{"../x": "1"}})},
	}, accepted: []meaning{
		{"oom_score_adj", "of the container's processes in the guest; on the host, the VM's processes have the lowest of the pod's containers"},
		{"cpuset_cpus", "the host's CPUs: the VM's virtual CPUs run on those of all its containers together, and in the guest each container runs on any of them"},
		{"cpuset_mems", "none: they number the host's memory nodes, and a VM's memory is not bound to one"},
		{"hugepage_limits", "of the guest's own huge pages, which a VM class with `hugepages_mib` sets aside. Programs map them by MAP_HUGETLB or memfd_create; a volume of the medium HugePages is the host's"},
		{"unified", "files of the container's cgroup in the guest"},
	}},
	{name: "HugepageLimit", honoured: "page_size limit"},
	{name: "StopPodSandboxRequest", honoured: "pod_sandbox_id", accepted: []meaning{
		{"pod_sandbox_id: of a pod with running containers", "ends them without a grace period: stop containers first, as the kubelet does"},
	}},
	{name: "RemovePodSandboxRequest", honoured: "pod_sandbox_id"},
	{name: "PodSandboxStatusRequest", honoured: "pod_sandbox_id verbose"},
	{name: "ListPodSandboxRequest", honoured: "filter"},
	{name: "PodSandboxFilter", honoured: "id state label_selector"},
	{name: "PodSandboxStateValue", honoured: "state"},
	{name: "StreamPodSandboxesRequest", honoured: "filter"},
	{name: "CreateContainerRequest", honoured: "pod_sandbox_id config", accepted: []meaning{
		{"sandbox_config", "none: the configuration that the sandbox was made with holds"},
	}},
	{name: "ContainerConfig", honoured: "metadata image command args working_dir envs mounts devices labels annotations log_path stdin stdin_once tty linux stop_signal", refused: []refusal{
		{field: "command: empty, and the image has none", reason: "there is nothing to run"},
		{field: "working_dir: relative", reason: "only absolute paths are unambiguous", container: func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "x" }},
		{field: "mounts: more than 1,024", reason: "far above what pods need", container: func(c *runtimeapi.ContainerConfig) { c.Mounts = make([]*runtimeapi.Mount, maxMounts+1) }},
		{field: "log_path: leads out of the pod's log directory", reason: "logs are the daemon's writing as root"},
		{field: "windows", reason: "containers run Linux"},
		{field: "CDI_devices", reason: noDevice, container: func(c *runtimeapi.ContainerConfig) {
			c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/gpu=0"}}
		}},
		{field: "stop_signal: unknown", reason: "no signal of Linux", container: func(c *runtimeapi.ContainerConfig) { c.StopSignal = 99 }},
	}},
	{name: "ContainerMetadata", honoured: "name attempt"},
	{name: "ImageSpec", honoured: "image user_specified_image runtime_handler", accepted: []meaning{
		{"image_ref", "none in a request: a container's status has it, for its image volumes"},
		{"annotations", "none: the platform of an image is the guest's"},
	}},
	{name: "KeyValue", honoured: "key value", refused: []refusal{
		{field: "key: empty, or with = or NUL, and a value with NUL", reason: "no environment variable", container: func(c *runtimeapi.ContainerConfig) {
			c.Envs = []*runtimeapi.KeyValue{{Key: "A=B"}}
		}},
	}},
	{name: "Mount", honoured: "container_path host_path readonly propagation recursive_read_only mount_options image image_sub_path uidMappings gidMappings", refused: []refusal{
		{field: "container_path: relative, or /", reason: "no place for a mount", container: mounts(&runtimeapi.Mount{ContainerPath: "x", HostPath: "/tmp"})},
		{field: "host_path: missing, or a socket, FIFO or device", reason: "only files and directories cross a VM's boundary", container: mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/dev/null"})},
		{field: "propagation: BIDIRECTIONAL", reason: "a mount made in the VM can't appear on the node", container: mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/tmp", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL})},
		{field: "uidMappings: not those of the pod's user namespace, and gidMappings likewise", reason: "its files would be nobody's", container: mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/tmp", UidMappings: oneMapping, GidMappings: oneMapping})},
		{field: "recursive_read_only: without readonly, or with propagation", reason: "as the CRI demands", container: mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/tmp", RecursiveReadOnly: true})},
		{field: "image: beside host_path", reason: "they exclude each other", container: mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/tmp", Image: &runtimeapi.ImageSpec{Image: "i"}})},
		{field: "readonly: not set beside image", reason: "an image is never written to", container: mounts(&runtimeapi.Mount{ContainerPath: "/x", Image: &runtimeapi.ImageSpec{Image: "i"}})},
		{field: "image_sub_path: without image, or leading out of it", reason: "it names a place in the image", container: mounts(&runtimeapi.Mount{ContainerPath: "/x", Readonly: true, Image: &runtimeapi.ImageSpec{Image: "i"}, ImageSubPath: "../x"})},
		{field: "mount_options: other than noexec, nodev and nosuid", reason: "nothing else is known to be safe", container: mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/tmp", MountOptions: []string{"suid"}})},
	}, accepted: []meaning{
		{"selinux_relabel", "none: the guest has no SELinux policy"},
	}},
	{name: "Device", honoured: "container_path permissions", refused: []refusal{
		{field: "host_path: other than `/dev/fuse` and `/dev/net/tun`", reason: noDevice, container: func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/sda", ContainerPath: "/dev/sda"}}
		}},
		{field: "permissions: other than r, w and m", reason: "there are no others", container: func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/fuse", ContainerPath: "/dev/fuse", Permissions: "rx"}}
		}},
	}, accepted: []meaning{{"host_path: `/dev/fuse`, `/dev/net/tun`", "the guest's own"}}},
	{name: "LinuxContainerConfig", honoured: "resources security_context"},
	{name: "LinuxContainerSecurityContext", honoured: "capabilities namespace_options run_as_user run_as_group run_as_username readonly_rootfs supplemental_groups supplemental_groups_policy no_new_privs masked_paths readonly_paths seccomp", refused: []refusal{
		{field: "selinux_options", reason: noSELinux, container: security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.SelinuxOptions = &runtimeapi.SELinuxOption{Type: "t"}
		})},
		{field: "apparmor: Localhost", reason: noAppArmor, container: security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "x"}
		})},
		{field: "run_as_user: together with run_as_username", reason: "they exclude each other", container: security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsUsername = &runtimeapi.Int64Value{}, "x"
		})},
		{field: "run_as_group: without a user", reason: "as the CRI demands", container: security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsGroup = &runtimeapi.Int64Value{Value: 5} })},
		{field: "run_as_user: not 0 to 2³¹-1, and groups likewise", reason: "no id of Linux", container: security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = &runtimeapi.Int64Value{Value: -1} })},
		{field: "supplemental_groups: more than 65,536", reason: "what the kernel takes", container: security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.SupplementalGroups = make([]int64, 1<<16+1) })},
		{field: "masked_paths: relative, and readonly_paths likewise", reason: "only absolute paths are unambiguous", container: security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.MaskedPaths = []string{"x"} })},
	}, accepted: []meaning{
		{"apparmor: RuntimeDefault, Unconfined", "none"},
		{"privileged", "all capabilities, all devices but the pod's own disks, no seccomp filter and a writable `/sys`, in the guest; no device of the node"},
		{"seccomp: none, and masked_paths, readonly_paths and no_new_privs likewise", "there are no defaults but what the client asks for, as the kubelet does. `cri-vz run` asks for the default seccomp profile and the usual masked and read-only paths"},
		{"apparmor_profile", "none: deprecated, use `apparmor`"},
		{"seccomp_profile_path", "none: deprecated, use `seccomp`"},
	}},
	{name: "Capability", honoured: "add_capabilities drop_capabilities add_ambient_capabilities", refused: []refusal{
		{field: "add_capabilities: not of Linux 6.12, and the others likewise", reason: "the guest's kernel has no such capability", container: security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"FLY"}}
		})},
	}},
	{name: "CDIDevice", refused: []refusal{{field: "name", reason: noDevice}}},
	{name: "StartContainerRequest", honoured: "container_id"},
	{name: "StopContainerRequest", honoured: "container_id timeout"},
	{name: "RemoveContainerRequest", honoured: "container_id"},
	{name: "ListContainersRequest", honoured: "filter"},
	{name: "ContainerFilter", honoured: "id state pod_sandbox_id label_selector"},
	{name: "ContainerStateValue", honoured: "state"},
	{name: "StreamContainersRequest", honoured: "filter"},
	{name: "ContainerStatusRequest", honoured: "container_id verbose"},
	{name: "UpdateContainerResourcesRequest", honoured: "container_id linux", refused: []refusal{
		{field: "linux: memory or CPUs past the pod's VM", reason: "a VM keeps its size (`ResourceExhausted`); nothing changes"},
		{field: "linux: a memory limit below what can't be given up", reason: "it would end the container (`FailedPrecondition`)"},
		{field: "windows", reason: "containers run Linux"},
	}, accepted: []meaning{{"annotations", "none: the CRI knows no key"}}},
	{name: "ReopenContainerLogRequest", honoured: "container_id"},
	{name: "ExecSyncRequest", honoured: "container_id cmd timeout"},
	{name: "ExecRequest", honoured: "container_id cmd tty stdin stdout stderr", refused: []refusal{
		{field: "stderr: with tty", reason: noTTYStderr},
		{field: "stdin: none of it, stdout and stderr", reason: noStreams},
	}},
	{name: "AttachRequest", honoured: "container_id stdin tty stdout stderr", refused: []refusal{
		{field: "stderr: with tty", reason: noTTYStderr},
		{field: "stdin: none of it, stdout and stderr", reason: noStreams},
	}},
	{name: "PortForwardRequest", honoured: "pod_sandbox_id", accepted: []meaning{{"port", "what the WebSocket protocols without a tunnel forward; otherwise the stream says which ports, as the kubelet's do"}}},
	{name: "ContainerStatsRequest", honoured: "container_id"},
	{name: "ListContainerStatsRequest", honoured: "filter"},
	{name: "ContainerStatsFilter", honoured: "id pod_sandbox_id label_selector"},
	{name: "StreamContainerStatsRequest", honoured: "filter"},
	{name: "PodSandboxStatsRequest", honoured: "pod_sandbox_id"},
	{name: "ListPodSandboxStatsRequest", honoured: "filter"},
	{name: "PodSandboxStatsFilter", honoured: "id label_selector"},
	{name: "StreamPodSandboxStatsRequest", honoured: "filter"},
	{name: "UpdateRuntimeConfigRequest", honoured: "runtime_config"},
	{name: "RuntimeConfig", honoured: "network_config"},
	{name: "NetworkConfig", refused: []refusal{{field: "pod_cidr: not a CIDR, or several with commas between", reason: "no address family's"}}, accepted: []meaning{{"pod_cidr", "none: CNI's configuration decides, else `network.builtin_subnet`"}}},
	{name: "StatusRequest", honoured: "verbose"},
	{name: "UpdatePodSandboxResourcesRequest", honoured: "pod_sandbox_id", accepted: []meaning{
		{"resources", "limits of all the pod's containers together, in the guest; what needs a larger VM is `ResourceExhausted`, because a VM keeps its size"},
		{"overhead", "on record; what needs a larger VM is `ResourceExhausted`"},
	}},
	{name: "ListImagesRequest", honoured: "filter"},
	{name: "ImageFilter", honoured: "image"},
	{name: "StreamImagesRequest", honoured: "filter"},
	{name: "ImageStatusRequest", honoured: "image verbose"},
	{name: "PullImageRequest", honoured: "image auth", accepted: []meaning{{"sandbox_config", "none: an image is the same for every pod"}}},
	{name: "AuthConfig", honoured: "username password auth server_address identity_token registry_token"},
	{name: "RemoveImageRequest", honoured: "image"},
}

const (
	noSELinux   = "the guest's kernel enforces no SELinux policy"
	noAppArmor  = "the guest's kernel enforces no AppArmor profile"
	noDevice    = "a device of the node can't be given to a pod's VM"
	noTTYStderr = "a terminal has one output"
	noStreams   = "there would be nothing to connect to"
	noPause     = "none: a sandbox has no process of its own (no pause container)"
)

func sandboxSecurity(edit func(*runtimeapi.LinuxSandboxSecurityContext)) func(*runtimeapi.PodSandboxConfig) {
	return func(c *runtimeapi.PodSandboxConfig) {
		c.Linux = &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{}}
		edit(c.Linux.SecurityContext)
	}
}

var oneMapping = []*runtimeapi.IDMapping{{HostId: 100000, Length: 65536}}

func userns(uids, gids []*runtimeapi.IDMapping) *runtimeapi.UserNamespace {
	return &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: uids, Gids: gids}
}

func namespaces(o *runtimeapi.NamespaceOption) func(*runtimeapi.PodSandboxConfig) {
	return sandboxSecurity(func(s *runtimeapi.LinuxSandboxSecurityContext) { s.NamespaceOptions = o })
}

func security(edit func(*runtimeapi.LinuxContainerSecurityContext)) func(*runtimeapi.ContainerConfig) {
	return func(c *runtimeapi.ContainerConfig) { edit(c.Linux.SecurityContext) }
}

func containerNamespaces(o *runtimeapi.NamespaceOption) func(*runtimeapi.ContainerConfig) {
	return security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.NamespaceOptions = o })
}

func resources(r *runtimeapi.LinuxContainerResources) func(*runtimeapi.ContainerConfig) {
	return func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = r }
}

func mounts(m ...*runtimeapi.Mount) func(*runtimeapi.ContainerConfig) {
	return func(c *runtimeapi.ContainerConfig) { c.Mounts = m }
}

// fieldOf is the field's name in a row of the table.
func fieldOf(row string) string {
	name, _, _ := strings.Cut(row, ":")
	return name
}

var apiFile = (&runtimeapi.VersionRequest{}).ProtoReflect().Descriptor().ParentFile()

// calls are the API's calls, by service.
func calls(service protoreflect.Name) []protoreflect.MethodDescriptor {
	methods := apiFile.Services().ByName(service).Methods()
	list := make([]protoreflect.MethodDescriptor, methods.Len())
	for i := range list {
		list[i] = methods.Get(i)
	}
	return list
}

// implemented tells whether Server has a method of its own, or the generated one
// that answers Unimplemented: the compiler writes the method that calls that.
func implemented(name protoreflect.Name) bool {
	m, ok := reflect.TypeFor[*Server]().MethodByName(string(name))
	if !ok {
		return false
	}
	file, _ := runtime.FuncForPC(m.Func.Pointer()).FileLine(m.Func.Pointer())
	return file != "<autogenerated>"
}

func TestCallsOfTheAPI(t *testing.T) {
	if n, m := len(calls("RuntimeService")), len(calls("ImageService")); n != 37 || m != 6 {
		t.Errorf("the API has %d and %d calls: the README says 37 and 6", n, m)
	}
	all := append(calls("RuntimeService"), calls("ImageService")...)
	for _, c := range all {
		if _, reason := unimplemented[string(c.Name())]; reason == implemented(c.Name()) {
			t.Errorf("%s: implemented is %v, and a reason why not in the table %v", c.Name(), implemented(c.Name()), reason)
		}
	}
	for name := range unimplemented {
		if !slices.ContainsFunc(all, func(c protoreflect.MethodDescriptor) bool { return string(c.Name()) == name }) {
			t.Errorf("the API has no call %s", name)
		}
	}
}

// Every field that a client can send is in the table, and nothing else (T39).
func TestFieldsOfTheAPI(t *testing.T) {
	table := map[protoreflect.Name]message{}
	for _, m := range messages {
		if _, twice := table[protoreflect.Name(m.name)]; twice {
			t.Errorf("%s is in the table twice", m.name)
		}
		table[protoreflect.Name(m.name)] = m
	}
	var order []string
	seen := map[protoreflect.FullName]bool{}
	var visit func(protoreflect.MessageDescriptor)
	visit = func(d protoreflect.MessageDescriptor) {
		if seen[d.FullName()] || d.Fields().Len() == 0 {
			return
		}
		seen[d.FullName()] = true
		order = append(order, string(d.Name()))
		m, ok := table[d.Name()]
		if !ok {
			t.Errorf("%s has no entry in the table", d.Name())
		}
		delete(table, d.Name())
		classes := map[string]bool{}
		for _, name := range strings.Fields(m.honoured) {
			classes[name] = true
		}
		for _, r := range m.refused {
			classes[fieldOf(r.field)] = true
		}
		for _, a := range m.accepted {
			classes[fieldOf(a.field)] = true
		}
		fields := d.Fields()
		for i := range fields.Len() {
			f := fields.Get(i)
			if !classes[string(f.Name())] {
				t.Errorf("%s.%s is neither honoured, nor refused, nor accepted with a meaning: see T39", d.Name(), f.Name())
			}
			delete(classes, string(f.Name()))
			// What is in a message for Windows doesn't matter: all of it is refused.
			if f.Message() != nil && !f.IsMap() && f.Name() != "windows" {
				visit(f.Message())
			}
		}
		for name := range classes {
			t.Errorf("%s has no field %s", d.Name(), name)
		}
	}
	for _, c := range append(calls("RuntimeService"), calls("ImageService")...) {
		if _, none := unimplemented[string(c.Name())]; !none {
			visit(c.Input())
		}
	}
	for name := range table {
		t.Errorf("no call takes a %s", name)
	}
	at := func(m message) int { return slices.Index(order, m.name) }
	if !slices.IsSortedFunc(messages, func(a, b message) int { return cmp.Compare(at(a), at(b)) }) {
		t.Errorf("the table is not in the API's order, which is %v", order)
	}
}

// What the table calls refused is refused, and the error names the field.
func TestRefusalsOfTheTable(t *testing.T) {
	for _, m := range messages {
		for _, r := range m.refused {
			t.Run(m.name+"."+r.field, func(t *testing.T) {
				var err error
				switch {
				case r.pod != nil:
					c := &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "a", Namespace: "b", Uid: "c"}}
					r.pod(c)
					err = (&Server{}).checkPodSandbox(c, "")
				case r.container != nil:
					_, err = translate(&runtimeapi.PodSandboxConfig{}, container(r.container), testImage)
				default:
					return // it takes more than a configuration; e2e has it
				}
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), fieldOf(r.field)) {
					t.Errorf("error %v does not refuse %s", err, fieldOf(r.field))
				}
			})
		}
	}
}

const (
	readme    = "../README.md"
	beginMark = "<!-- Generated from cri/api_table_test.go by go generate ./cri -->\n"
	endMark   = "<!-- End of what is generated -->\n"
)

func TestREADME(t *testing.T) {
	text, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := bytes.Cut(text, []byte(beginMark))
	old, after, ok2 := bytes.Cut(rest, []byte(endMark))
	if !ok || !ok2 {
		t.Fatalf("%s has no section between %q and %q", readme, beginMark, endMark)
	}
	section := apiSection()
	if bytes.Equal(old, section) {
		return
	}
	if !*update {
		t.Fatal("README.md is not what the table says: go generate ./cri")
	}
	text = slices.Concat(before, []byte(beginMark), section, []byte(endMark), after)
	if err := os.WriteFile(readme, text, 0o644); err != nil {
		t.Fatal(err)
	}
}

// apiSection is the README's section.
func apiSection() []byte {
	var b bytes.Buffer
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	for _, service := range []protoreflect.Name{"RuntimeService", "ImageService"} {
		var have []string
		missing := map[string][]string{} // by reason
		for _, c := range calls(service) {
			if reason, none := unimplemented[string(c.Name())]; none {
				missing[reason] = append(missing[reason], string(c.Name()))
			} else {
				have = append(have, string(c.Name()))
			}
		}
		line("| %s, %d calls | |\n|---|---|", service, len(calls(service)))
		line("| %s | implemented |", strings.Join(have, ", "))
		for _, reason := range slices.Sorted(maps.Keys(missing)) {
			line("| %s | `Unimplemented`: %s |", strings.Join(missing[reason], ", "), reason)
		}
		line("")
	}
	line("A field of a request is honoured as the CRI describes it, or refused by name, or accepted with a meaning of its own.\n")
	line("Refused, as `InvalidArgument` unless the table says otherwise, with the field's name and the reason:\n")
	line("| message | field | reason |\n|---|---|---|")
	for _, m := range messages {
		for _, r := range m.refused {
			line("| %s | %s | %s |", m.name, code(r.field), r.reason)
		}
	}
	line("\nAccepted:\n")
	line("| message | field | meaning |\n|---|---|---|")
	for _, m := range messages {
		for _, a := range m.accepted {
			line("| %s | %s | %s |", m.name, code(a.field), a.meaning)
		}
	}
	line("\nHonoured, except for the values that the tables above name:\n")
	line("| message | fields |\n|---|---|")
	for _, m := range messages {
		if f := strings.Fields(m.honoured); len(f) > 0 {
			line("| %s | `%s` |", m.name, strings.Join(f, "`, `"))
		}
	}
	return b.Bytes()
}

// code is a row's field in code style, and its values as they are.
func code(row string) string {
	name, values, ok := strings.Cut(row, ":")
	if !ok {
		return "`" + name + "`"
	}
	return "`" + name + "`:" + values
}
