package sandbox

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/network"
)

// sizeOf is what a pod's VM gets (T4): the class's size or what the pod's limits
// need, whichever is more, because the kubelet's linux.resources sums only the
// containers that have limits; and the pod's overhead. The reserve, which the
// guest's kernel and agent use, comes on top of Size. A limit of more CPUs than
// the host has means all of them.
func sizeOf(c Class, hostCPUs int, cfg *runtimeapi.PodSandboxConfig) (_ Size, reserve int64, err error) {
	res, over := cfg.GetLinux().GetResources(), cfg.GetLinux().GetOverhead()
	for _, m := range []int64{res.GetMemoryLimitInBytes(), over.GetMemoryLimitInBytes()} {
		if m < 0 || m > 1<<44 {
			return Size{}, 0, fmt.Errorf("memory limit of %d bytes is no size for a VM: %w", m, errdefs.ErrInvalidArgument)
		}
	}
	for _, r := range []*runtimeapi.LinuxContainerResources{res, over} {
		if err := (Size{HugepageBytes: c.HugepageBytes}).checkHugepages(r); err != nil {
			return Size{}, 0, err
		}
	}
	memory := max(cmp.Or(c.MemoryBytes, 512*mib), res.GetMemoryLimitInBytes()) + over.GetMemoryLimitInBytes()
	cpus := (max(int64(c.CPUs)*1000, 1000, milliCPUs(res)) + milliCPUs(over) + 999) / 1000
	return Size{
		CPUs:        min(max(c.CPUs, int(min(cpus, int64(hostCPUs))), 1), maxCPUs),
		MemoryBytes: roundUp(memory), HugepageBytes: c.HugepageBytes,
	}, roundUp(cmp.Or(c.ReserveBytes, 64*mib)), nil
}

const (
	mib = 1 << 20
	// maxCPUs is what QEMU's machines for both architectures can have.
	maxCPUs = 255
)

// roundUp makes a VM's memory a multiple of 1 MiB, as vmm wants it.
func roundUp(bytes int64) int64 { return (bytes + mib - 1) / mib * mib }

// vmOverhead is what an idle VM takes of the host besides its containers: the
// guest's kernel and agent, QEMU, shim and virtiofsd are 200 to 270 MiB
// (make bench), and some to spare.
const vmOverhead = 320 << 20

// cgroupParent is the cgroup that the pod's VM is charged to, empty for our own
// root (T5).
func cgroupParent(charge Charge, cfg *runtimeapi.PodSandboxConfig) string {
	linux := cfg.GetLinux()
	limited := linux.GetResources().GetMemoryLimitInBytes() > 0
	if charge == ChargeOwn || charge == ChargeAuto && limited && linux.GetOverhead().GetMemoryLimitInBytes() < vmOverhead {
		return ""
	}
	return linux.GetCgroupParent()
}

// hugepageSize is the one size of huge pages that VMs have, in the kernel's words
// and in the CRI's.
const hugepageSize, hugepageSizeCRI = "2M", "2MB"

// cmdline has the guest's kernel set huge pages aside while memory is still in
// one piece.
func (s Size) cmdline() string {
	if s.HugepageBytes == 0 {
		return ""
	}
	return fmt.Sprintf(" default_hugepagesz=%[1]s hugepagesz=%[1]s hugepages=%[2]d", hugepageSize, s.HugepageBytes/(2*mib))
}

// checkHugepages refuses limits on huge pages that the VM doesn't have (T28).
func (s Size) checkHugepages(r *runtimeapi.LinuxContainerResources) error {
	for _, h := range r.GetHugepageLimits() {
		switch {
		case h.GetLimit() == 0: // the kubelet sends one for each size that the node knows
		case s.HugepageBytes == 0:
			return fmt.Errorf("hugepage_limits: VMs of this runtime handler have no huge pages: %w", errdefs.ErrInvalidArgument)
		case h.GetPageSize() != hugepageSizeCRI:
			return fmt.Errorf("hugepage_limits: the VM has pages of %s, not of %q: %w", hugepageSizeCRI, h.GetPageSize(), errdefs.ErrInvalidArgument)
		case h.GetLimit() > uint64(s.HugepageBytes):
			return fmt.Errorf("hugepage_limits: %d MiB are more than the %d MiB that the VM has in huge pages: %w", h.GetLimit()>>20, s.HugepageBytes>>20, errdefs.ErrResourceExhausted)
		}
	}
	return nil
}

// Hostname is a pod's: a label of at most 63 characters; kubelet cuts so, too.
func Hostname(cfg *runtimeapi.PodSandboxConfig) string {
	name := cmp.Or(cfg.GetHostname(), cfg.GetMetadata().GetName())
	return name[:min(len(name), 63)]
}

// sandboxSetUp is what the agent needs to know of the pod; nic may be nil.
func sandboxSetUp(c Class, cfg *runtimeapi.PodSandboxConfig, nic *network.NIC, net *network.Result) (*guestapi.SetUpSandboxRequest, error) {
	sec := cfg.GetLinux().GetSecurityContext()
	ns := sec.GetNamespaceOptions()
	req := &guestapi.SetUpSandboxRequest{
		Hostname: Hostname(cfg),
		PidMode:  guestapi.NamespaceMode(ns.GetPid()),
		Sysctls:  cfg.GetLinux().GetSysctls(),
		PidsMax:  c.PidsMax,
	}
	if u := ns.GetUsernsOptions(); u.GetMode() == runtimeapi.NamespaceMode_POD {
		for _, m := range u.GetUids() {
			req.UidMappings = append(req.UidMappings, idMapping(m))
		}
		for _, m := range u.GetGids() {
			req.GidMappings = append(req.GidMappings, idMapping(m))
		}
	}
	if d := cfg.GetDnsConfig(); d != nil {
		req.Dns = &guestapi.DNS{Servers: d.GetServers(), Searches: d.GetSearches(), Options: d.GetOptions()}
	} else if host, err := network.HostResolvConf(); err == nil {
		req.Dns = &guestapi.DNS{Servers: host.Servers, Searches: host.Searches, Options: host.Options}
	} else if errdefs.IsNotFound(err) {
		// A host without a usable name server still runs pods (T43).
		req.Dns = &guestapi.DNS{Servers: host.Servers, Searches: host.Searches, Options: host.Options}
	} else {
		return nil, fmt.Errorf("the host's name servers: %w", err)
	}
	if nic == nil {
		return req, nil
	}
	iface := &guestapi.Interface{Name: net.Interface, Mac: nic.MAC, Mtu: uint32(net.MTU), Dhcp: net.DHCP}
	if net.MAC != nic.MAC {
		iface.SetMac = net.MAC
	}
	for _, a := range net.Addresses {
		iface.Addresses = append(iface.Addresses, a.String())
	}
	req.Interfaces = []*guestapi.Interface{iface}
	if s := nic.Switch; s != nil {
		req.Interfaces = append(req.Interfaces, &guestapi.Interface{Name: network.SwitchName, Mac: s.MAC, Mtu: uint32(net.MTU), DhcpPeers: true})
	}
	for _, r := range net.Routes {
		route := &guestapi.Route{Interface: net.Interface, Metric: uint32(max(r.Metric, 0))}
		if r.Destination.IsValid() {
			route.Destination = r.Destination.String()
		}
		if r.Gateway.IsValid() {
			route.Gateway = r.Gateway.String()
		}
		if r.Source.IsValid() {
			route.Source = r.Source.String()
		}
		req.Routes = append(req.Routes, route)
	}
	if len(net.Addresses) > 0 {
		req.HostAliases = []*guestapi.HostAlias{{Address: net.Addresses[0].Addr().String(), Names: []string{req.Hostname}}}
	}
	return req, nil
}

func idMapping(m *runtimeapi.IDMapping) *guestapi.IDMapping {
	return &guestapi.IDMapping{ContainerId: m.GetContainerId(), HostId: m.GetHostId(), Length: m.GetLength()}
}

// networkPod is what CNI is told.
func networkPod(id string, cfg *runtimeapi.PodSandboxConfig) network.Pod {
	m := cfg.GetMetadata()
	p := network.Pod{ID: id, Name: m.GetName(), Namespace: m.GetNamespace(), UID: m.GetUid(), Annotations: cfg.GetAnnotations()}
	for _, pm := range cfg.GetPortMappings() {
		p.PortMappings = append(p.PortMappings, network.PortMapping{
			HostPort: pm.GetHostPort(), ContainerPort: pm.GetContainerPort(), HostIP: pm.GetHostIp(),
			Protocol: []string{"tcp", "udp", "sctp"}[min(max(int(pm.GetProtocol()), 0), 2)],
		})
	}
	return p
}

// addresses of a pod, the pod IP first.
func addresses(net *network.Result) []netip.Addr {
	if net == nil {
		return nil
	}
	var ips []netip.Addr
	for _, a := range net.Addresses {
		if ip := a.Addr(); !slices.Contains(ips, ip) {
			ips = append(ips, ip)
		}
	}
	return ips
}

// podKey is what makes a pod sandbox's name unique.
func podKey(m *runtimeapi.PodSandboxMetadata) string {
	return m.GetNamespace() + "/" + m.GetName() + "/" + m.GetUid() + "/" + strconv.FormatUint(uint64(m.GetAttempt()), 10)
}

func containerKey(pod string, m *runtimeapi.ContainerMetadata) string {
	return pod + "/" + m.GetName() + "/" + strconv.FormatUint(uint64(m.GetAttempt()), 10)
}
