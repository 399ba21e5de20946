package network

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"
	"k8s.io/klog/v2"
)

const (
	// Plugins of a cluster ask API servers: generous, and below the two
	// minutes after which a kubelet gives up on a call.
	addTimeout = 60 * time.Second
	delTimeout = 30 * time.Second
	// statusTimeout: Status is polled every few seconds.
	statusTimeout = 5 * time.Second
)

// platform is what a Network is made of here.
type platform struct {
	// firewallTurn is a semaphore of one; see firewall.
	firewallTurn chan struct{}
}

func newNetwork(cfg Config) (*Network, error) {
	if cfg.ConfDir == "" {
		cfg.ConfDir = "/etc/cni/net.d"
	}
	if len(cfg.BinDirs) == 0 {
		cfg.BinDirs = []string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"}
	}
	if len(cfg.Subnets) == 0 {
		cfg.Subnets = []netip.Prefix{netip.MustParsePrefix("10.87.0.0/16")}
	}
	families := map[bool]netip.Prefix{}
	for _, s := range cfg.Subnets {
		if !s.IsValid() || s.Addr().Is4In6() || s.Addr().BitLen()-s.Bits() < 2 {
			return nil, fmt.Errorf("network: subnet %s has no room for a gateway and a pod: %w", s, errdefs.ErrInvalidArgument)
		}
		if other, ok := families[s.Addr().Is6()]; ok {
			return nil, fmt.Errorf("network: subnets %s and %s are of one address family, give one of each at most: %w", other, s, errdefs.ErrInvalidArgument)
		}
		families[s.Addr().Is6()] = s
	}
	for _, p := range append([]string{cfg.ConfDir, cfg.StateDir, cfg.RunDir}, cfg.BinDirs...) {
		if !filepath.IsAbs(p) {
			return nil, fmt.Errorf("network: path %q is not absolute: %w", p, errdefs.ErrInvalidArgument)
		}
	}
	if cfg.NodeNetns != "" {
		f, err := openNetns(cfg.NodeNetns)
		if err != nil {
			return nil, fmt.Errorf("network: node's namespace: %w", err)
		}
		f.Close()
	}
	n := &Network{cfg: cfg, platform: platform{firewallTurn: make(chan struct{}, 1)}}
	for _, dir := range []string{n.recordDir(), filepath.Join(cfg.RunDir, "netns")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("network: %w", err)
		}
	}
	return n, nil
}

func (n *Network) recordDir() string              { return filepath.Join(n.cfg.StateDir, "pods") }
func (n *Network) recordPath(podID string) string { return filepath.Join(n.recordDir(), podID+".json") }
func (n *Network) netnsPath(podID string) string {
	return filepath.Join(n.cfg.RunDir, "netns", podID)
}

// checkID keeps what becomes part of paths and of plugins' environments free of
// separators; ids come from clients of the CRI.
func checkID(podID string) error {
	if err := utils.ValidateContainerID(podID); err != nil {
		return fmt.Errorf("pod id %q: %s: %w", podID, err.Msg, errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkPod(pod Pod) (Pod, error) {
	if err := checkID(pod.ID); err != nil {
		return pod, err
	}
	// ';' separates CNI_ARGS; no Kubernetes name has one.
	for _, v := range []string{pod.Name, pod.Namespace, pod.UID} {
		if strings.ContainsAny(v, ";=\x00") {
			return pod, fmt.Errorf("pod %s: name, namespace or uid %q: ';', '=' and NUL can't be given to CNI plugins: %w", pod.ID, v, errdefs.ErrInvalidArgument)
		}
	}
	var published []PortMapping
	for _, m := range pod.PortMappings {
		if m.HostPort == 0 {
			continue
		}
		m.Protocol = strings.ToLower(m.Protocol)
		if m.Protocol == "" {
			m.Protocol = "tcp"
		}
		bad := func(p int32) bool { return p < 1 || p > 65535 }
		if bad(m.HostPort) || bad(m.ContainerPort) || !slices.Contains([]string{"tcp", "udp", "sctp"}, m.Protocol) ||
			m.HostIP != "" && net.ParseIP(m.HostIP) == nil {
			return pod, fmt.Errorf("pod %s: port mapping %+v is not valid: %w", pod.ID, m, errdefs.ErrInvalidArgument)
		}
		published = append(published, m)
	}
	pod.PortMappings = published
	return pod, nil
}

func (n *Network) status(ctx context.Context) error {
	w, err := n.configuration()
	if err != nil {
		return err
	}
	if err := n.installed(w); err != nil {
		return err
	}
	if _, err := os.Stat(tunDevice); err != nil {
		return fmt.Errorf("pods need tap devices (modprobe tun; in a container pass %s in): %w: %w", tunDevice, err, errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, statusTimeout, fmt.Errorf("no answer to STATUS within %v", statusTimeout))
	defer cancel()
	if err := n.cni().GetStatusNetworkList(ctx, w.list); err != nil {
		return fmt.Errorf("network %s (%s) says it is not ready: %w: %w", w.list.Name, w.source, err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (n *Network) prepare(ctx context.Context, pod Pod) (*NIC, error) {
	pod, err := checkPod(pod)
	if err != nil {
		return nil, err
	}
	w, err := n.configuration()
	if err != nil {
		return nil, fmt.Errorf("pod %s: %w", pod.ID, err)
	}
	if err := n.installed(w); err != nil {
		return nil, fmt.Errorf("pod %s: %w", pod.ID, err)
	}
	if len(pod.PortMappings) > 0 && !w.supports(capPortMappings) {
		return nil, fmt.Errorf("pod %s asks for host port %d, and network %s (%s) has no plugin with the capability portMappings: add portmap to it: %w",
			pod.ID, pod.PortMappings[0].HostPort, w.list.Name, w.source, errdefs.ErrFailedPrecondition)
	}
	if len(pod.PortMappings) == 0 && w.builtin {
		// Without host ports portmap does nothing, twice and slowly.
		w.list.Plugins = w.list.Plugins[:1]
	}
	if _, err := os.Lstat(n.recordPath(pod.ID)); err == nil {
		return nil, fmt.Errorf("pod %s has a network already, tear it down first: %w", pod.ID, errdefs.ErrAlreadyExists)
	}
	// Locally administered, and only for as long as nothing is sent: the guest's NIC
	// takes the MAC of the interface that CNI makes.
	mac := make(net.HardwareAddr, 6)
	_, _ = rand.Read(mac) // never fails
	mac[0] = mac[0]&^1 | 2
	err = n.run(ctx, pod.ID, w.list.Name, []step{
		{"record", func(context.Context) error { return newRecord(pod, w).write(n.recordPath(pod.ID)) }},
		{"namespace", func(context.Context) error { return createNetns(n.netnsPath(pod.ID), makeCable) }},
	})
	if err != nil {
		return nil, err
	}
	return &NIC{MAC: mac.String()}, nil
}

func (n *Network) setUp(ctx context.Context, podID string) (*Result, error) {
	if err := checkID(podID); err != nil {
		return nil, err
	}
	r, err := readRecord(n.recordPath(podID))
	if err != nil {
		return nil, fmt.Errorf("pod %s: %w", podID, err)
	}
	netns := n.netnsPath(podID)
	result := &Result{Netns: netns, Interface: InterfaceName}
	err = n.run(ctx, podID, r.Network, []step{
		{"masquerading", func(ctx context.Context) error { return n.masquerade(ctx, r) }},
		{"CNI ADD", func(ctx context.Context) error { return n.add(ctx, r, netns, result) }},
		{"splice", func(context.Context) error { return spliceInto(netns, result) }},
	})
	if err != nil {
		return nil, err
	}
	return result, nil
}

// step is a part of what makes a pod's network. TearDown inverts them all, from
// whatever point; see the record.
type step struct {
	name string
	do   func(context.Context) error
}

func (n *Network) run(ctx context.Context, podID, network string, steps []step) error {
	for _, step := range steps {
		start := time.Now()
		if err := context.Cause(ctx); err != nil {
			return n.undo(ctx, podID, step.name, fmt.Errorf("cancelled: %w", err))
		}
		if err := step.do(ctx); err != nil {
			return n.undo(ctx, podID, step.name, err)
		}
		klog.V(2).InfoS("Pod network step done", "pod", podID, "network", network, "step", step.name, "took", time.Since(start))
	}
	return nil
}

// undo returns the error of the step that failed, after having undone the
// ones before it.
func (n *Network) undo(ctx context.Context, podID, step string, cause error) error {
	cause = fmt.Errorf("pod %s: network step %q: %w", podID, step, cause)
	// The caller's context may be what ended the step.
	err := n.tearDown(context.WithoutCancel(ctx), podID)
	if err == nil {
		return cause
	}
	// The record stays for a later TearDown; the namespace is of no use to it.
	err = errors.Join(err, removeNetns(n.netnsPath(podID)))
	return fmt.Errorf("%w; and undoing it failed, which TearDown can repeat: %v", cause, err)
}

func (n *Network) add(ctx context.Context, r *record, netns string, result *Result) error {
	list, err := r.list()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, addTimeout, fmt.Errorf("network %s did not finish ADD within %v", r.Network, addTimeout))
	defer cancel()
	added, err := n.cni().AddNetworkList(ctx, list, runtimeConf(r.Pod, netns))
	if err != nil {
		return fmt.Errorf("network %s (%s): %w", r.Network, r.Source, err)
	}
	addrs, dns, err := addressesOf(added)
	if err != nil {
		return fmt.Errorf("network %s (%s): %w", r.Network, r.Source, err)
	}
	if len(addrs) == 0 {
		// T42
		return fmt.Errorf("network %s (%s) gave %s no IP address; a pod needs one, add an ipam section: %w", r.Network, r.Source, InterfaceName, errdefs.ErrFailedPrecondition)
	}
	result.Addresses = addrs
	result.DNS = dnsOf(dns)
	return nil
}

func dnsOf(d cnitypes.DNS) DNS {
	out := DNS{Servers: d.Nameservers, Searches: d.Search, Options: d.Options}
	if len(out.Searches) == 0 && d.Domain != "" {
		out.Searches = []string{d.Domain}
	}
	return out
}

func spliceInto(netns string, result *Result) error {
	return inNetns(netns, func() error {
		link, err := splice()
		if err != nil {
			return err
		}
		result.MAC = link.Attrs().HardwareAddr.String()
		result.MTU = link.Attrs().MTU
		if len(link.Attrs().HardwareAddr) != 6 {
			return fmt.Errorf("interface %s is no Ethernet interface (hardware address %q), a VM can't take its place: %w", InterfaceName, result.MAC, errdefs.ErrFailedPrecondition)
		}
		result.Routes, err = linkRoutes(link)
		return err
	})
}

func (n *Network) openTap(podID string) (f *os.File, err error) {
	if err := checkID(podID); err != nil {
		return nil, err
	}
	err = inNetns(n.netnsPath(podID), func() (err error) {
		// attachTap would make a new one.
		if _, err := net.InterfaceByName(tapName); err != nil {
			return fmt.Errorf("%s: %v: %w", tapName, err, errdefs.ErrNotFound)
		}
		f, err = attachTap()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("pod %s: %w", podID, err)
	}
	return f, nil
}

func (n *Network) tearDown(ctx context.Context, podID string) error {
	if err := checkID(podID); err != nil {
		return err
	}
	start := time.Now()
	r, err := readRecord(n.recordPath(podID))
	if errdefs.IsNotFound(err) {
		// Nothing was done, or everything undone but for this.
		return n.forget(podID)
	}
	if err != nil {
		return fmt.Errorf("pod %s: %w", podID, err)
	}
	if err := n.del(ctx, r); err != nil {
		return fmt.Errorf("pod %s: take down network %s: %w", podID, r.Network, err)
	}
	if err := n.unmasquerade(ctx, r); err != nil {
		return fmt.Errorf("pod %s: %w", podID, err)
	}
	if err := n.forget(podID); err != nil {
		return err
	}
	klog.V(2).InfoS("Pod network removed", "pod", podID, "network", r.Network, "took", time.Since(start))
	return nil
}

// forget removes the namespace and, when that is gone, the record.
func (n *Network) forget(podID string) error {
	if err := removeNetns(n.netnsPath(podID)); err != nil {
		return fmt.Errorf("pod %s: %w", podID, err)
	}
	if err := os.Remove(n.recordPath(podID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pod %s: network record: %w", podID, err)
	}
	return nil
}

func (n *Network) del(ctx context.Context, r *record) error {
	list, err := r.list()
	if err != nil {
		return fmt.Errorf("recorded configuration: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, delTimeout, fmt.Errorf("network %s did not finish DEL within %v", r.Network, delTimeout))
	defer cancel()
	rt := runtimeConf(r.Pod, n.netnsPath(r.Pod.ID))
	cni := n.cni()
	// A reference plugin fails where a firewall rule that it wants to remove
	// is gone already (a reload flushed it), but gets further the next time.
	second := rt.NetNS
	f, err := openNetns(rt.NetNS)
	switch {
	case err == nil:
		f.Close()
	case errdefs.IsNotFound(err):
		// T11: reboot, or somebody took our mounts away. Without a namespace
		// the reference plugins free the address and leave their firewall
		// rules, so give them one that looks like the pod's. After a reboot,
		// where there are no rules, DEL without a namespace is what works.
		second = ""
		addrs := cachedAddresses(cni, list, rt)
		if err := createNetns(rt.NetNS, func() error { return makeStandIn(addrs) }); err != nil {
			klog.ErrorS(err, "Could not make a stand-in for a lost network namespace, CNI DEL runs without one", "pod", r.Pod.ID)
			rt.NetNS = ""
		}
	default:
		return err
	}
	err = cni.DelNetworkList(ctx, list, rt)
	if err == nil || ctx.Err() != nil {
		return err
	}
	klog.V(2).InfoS("CNI DEL failed, trying once more", "pod", r.Pod.ID, "network", r.Network, "netns", second, "err", err)
	rt.NetNS = second
	return cni.DelNetworkList(ctx, list, rt)
}

// cachedAddresses are those of the ADD, none if it never ended well.
func cachedAddresses(cni *libcni.CNIConfig, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) []netip.Prefix {
	result, err := cni.GetNetworkListCachedResult(list, rt)
	if err != nil || result == nil {
		return nil
	}
	addrs, _, err := addressesOf(result)
	if err != nil {
		return nil
	}
	return addrs
}

func (n *Network) pods() ([]string, error) {
	var ids []string
	entries, err := os.ReadDir(n.recordDir())
	if err != nil {
		return nil, fmt.Errorf("network records: %w", err)
	}
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), ".json"); ok {
			ids = append(ids, id)
		}
	}
	return ids, nil
}
