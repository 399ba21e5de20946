// Package network gives a pod sandbox its place on the node's network and the
// host's end of the cable: on Linux a network namespace, an address from CNI,
// and a tap device that is spliced to the interface CNI made, so that the
// virtual machine behind the tap is what answers at the pod's IP.
//
// It does not configure the guest (the agent does, from a [Result]), it does
// not start the VMM, and it does not decide when a pod may be torn down: call
// [Network.TearDown] once the VM is gone.
package network

import (
	"context"
	"net/netip"
	"os"
)

// InterfaceName is the pod's interface, in the namespace and in the guest.
const InterfaceName = "eth0"

// Config says where the network's parts are. Paths are absolute.
type Config struct {
	// ConfDir holds the user's CNI configuration; the first *.conflist, *.conf
	// or *.json by name is used, as containerd does. Default /etc/cni/net.d.
	// An empty or missing directory selects the built-in bridge network.
	ConfDir string
	// BinDirs are searched for CNI plugins, in order. Default /opt/cni/bin,
	// /usr/lib/cni, /usr/libexec/cni.
	BinDirs []string
	// StateDir survives reboots: one record per pod, libcni's cache, and the
	// address leases of the built-in network. Created 0700.
	StateDir string
	// RunDir need not survive reboots: it holds the bind mounts of the pods'
	// network namespaces, in RunDir/netns. Created 0700.
	RunDir string
	// Subnets of the built-in network, at most one per address family.
	// Default 10.87.0.0/16.
	Subnets []netip.Prefix
	// NodeNetns is the path of the network namespace that takes the node's
	// part: CNI plugins run in it and the bridge lives in it. Empty means the
	// caller's own. See [CreateNetns].
	NodeNetns string
}

// Pod is what CNI is told of a pod.
type Pod struct {
	// ID is the pod sandbox's id: letters, digits, '_', '.', '-'.
	ID           string            `json:"id"`
	Name         string            `json:"name,omitempty"`
	Namespace    string            `json:"namespace,omitempty"`
	UID          string            `json:"uid,omitempty"`
	PortMappings []PortMapping     `json:"portMappings,omitempty"`
	Annotations  map[string]string `json:"annotations,omitempty"`
}

// PortMapping publishes a port of the pod on the node (CNI conventions,
// "portMappings"). An entry whose HostPort is 0 publishes nothing and is
// skipped, as the CRI has it.
type PortMapping struct {
	HostPort      int32  `json:"hostPort"`
	ContainerPort int32  `json:"containerPort"`
	Protocol      string `json:"protocol"`         // tcp, udp or sctp; empty is tcp
	HostIP        string `json:"hostIP,omitempty"` // empty: every address of the node
}

// NIC is what a virtual machine needs to start, before its pod has a network.
type NIC struct {
	// MAC is the device's. The guest's NIC may take another: the [Result]'s.
	MAC string
	// MTU is the device's, in bytes; 0: the [Result] has it.
	MTU int
	// HostPorts are ports that the pod's shim has to publish: the network doesn't.
	HostPorts []PortMapping
	// Switch has the guest's second NIC, which leads to the other pods.
	Switch *Switch
}

// Result is the network a pod got. It goes through JSON into the pod's record
// and to the guest's agent.
type Result struct {
	// Netns is the path of the pod's network namespace on the host.
	Netns string `json:"netns"`
	// Interface is the name CNI gave the pod's interface; the guest's NIC takes
	// it, together with MAC and MTU (bytes).
	Interface string `json:"interface"`
	MAC       string `json:"mac"`
	MTU       int    `json:"mtu"`
	// DHCP: Addresses and Routes are empty, and the guest gets them by DHCP on this
	// interface.
	DHCP bool `json:"dhcp,omitempty"`
	// Addresses has at least one element otherwise; the first is the pod IP, the rest
	// are the CRI's additional_ips. The routes that a prefix implies are in
	// Routes, so the guest adds addresses with IFA_F_NOPREFIXROUTE.
	Addresses []netip.Prefix `json:"addresses"`
	// Routes is the complete routing table of the interface as the plugins
	// left it, in the order in which it can be added.
	Routes []Route `json:"routes,omitempty"`
	// DNS is what the CNI result says, often nothing; it does not replace the
	// pod's dns_config.
	DNS DNS `json:"dns,omitzero"`
}

// SwitchName is the guest's NIC on a frame switch.
const SwitchName = "eth1"

// Switch is a pod's place on a frame switch (package frameswitch).
type Switch struct {
	Socket string
	MAC    string
}

// Route of a pod's interface.
type Route struct {
	Destination netip.Prefix `json:"destination"`
	// Gateway is the zero Addr for a destination on the link itself.
	Gateway netip.Addr `json:"gateway,omitzero"`
	// Source is the preferred source address, or the zero Addr.
	Source netip.Addr `json:"source,omitzero"`
	// OnLink: the gateway is reachable though no other route says so.
	OnLink bool `json:"onLink,omitempty"`
	// Metric is the route's priority; 0 is the kernel's default.
	Metric int `json:"metric,omitempty"`
}

// DNS is the content of a resolv.conf.
type DNS struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// Network connects pods. Its methods may be called concurrently, for one pod
// one at a time.
type Network struct {
	cfg Config
	platform
}

// New checks cfg and fills in defaults. It creates StateDir and RunDir and
// nothing else: neither a bridge nor a namespace before the first pod.
func New(cfg Config) (*Network, error) {
	return newNetwork(cfg)
}

// Status reports whether SetUp can work (the CRI's NetworkReady): the
// configuration parses, its plugins and the tools they need are installed, and
// plugins of CNI 1.1 say so themselves. The error wraps
// errdefs.ErrFailedPrecondition or ErrInvalidArgument and says what to do.
func (n *Network) Status(ctx context.Context) error {
	return n.status(ctx)
}

// Prepare makes the near end of the pod's cable, namespace and tap, so that its virtual
// machine can start while the network is set up. After an error nothing of it is left,
// see [Network.SetUp]. A pod that has a network already is errdefs.ErrAlreadyExists;
// port mappings that the configuration can't carry out are ErrFailedPrecondition.
func (n *Network) Prepare(ctx context.Context, pod Pod) (*NIC, error) {
	return n.prepare(ctx, pod)
}

// SetUp connects a prepared pod: CNI ADD, then the splice of tap and interface. After
// an error nothing of it, nor of Prepare, is left; where the clean-up itself failed, the
// error says so, [Network.Pods] still lists the pod, and TearDown tries again.
func (n *Network) SetUp(ctx context.Context, podID string) (*Result, error) {
	return n.setUp(ctx, podID)
}

// OpenTap opens the pod's tap device (IFF_VNET_HDR, non-blocking, opened in
// the pod's namespace) for the VMM. The caller closes it. The tap outlives the
// descriptor, so a second VM can take the place of one that failed; while a
// descriptor is open anywhere, OpenTap answers errdefs.ErrAlreadyExists.
func (n *Network) OpenTap(podID string) (*os.File, error) {
	return n.openTap(podID)
}

// TearDown undoes Prepare and SetUp, or as much of it as a killed daemon or a reboot left:
// CNI DEL with the configuration of the ADD, then the namespace. It is
// idempotent, needs no VM, no namespace and no Result, and is bounded whatever
// the plugins do. After an error it may be called again; until it succeeds
// [Network.Pods] lists the pod.
func (n *Network) TearDown(ctx context.Context, podID string) error {
	return n.tearDown(ctx, podID)
}

// Pods returns the ids that TearDown has work for, sorted. A daemon that
// starts compares them with its own records.
func (n *Network) Pods() ([]string, error) {
	return n.pods()
}

// CreateNetns makes a network namespace with its loopback interface up and
// pins it at path by a bind mount, in the caller's mount namespace; it serves
// as [Config.NodeNetns] where the node's own must stay untouched. A namespace
// that is there already is errdefs.ErrAlreadyExists.
func CreateNetns(path string) error {
	return createNodeNetns(path)
}

// DeleteNetns removes what CreateNetns made. The interfaces in it vanish when
// nothing else holds the namespace. Nothing there is no error.
func DeleteNetns(path string) error {
	return removeNetns(path)
}
