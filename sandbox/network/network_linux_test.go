package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const inside = "CRI_VZ_TEST_NAMESPACES"

// TestMain runs the tests in a network and a mount namespace of their own:
// whatever they make is gone with the process, also when it is killed, and the
// machine's own network is out of reach.
func TestMain(m *testing.M) {
	if os.Getenv(inside) != "" {
		// The net package asks the first namespace it sees whether there is
		// IPv6, by way of lo.
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "set lo up:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	if os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // Pdeathsig follows the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   syscall.CLONE_NEWNET,
		Unshareflags: syscall.CLONE_NEWNS, // which also makes / private
		Pdeathsig:    syscall.SIGKILL,
	}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(max(exit.ExitCode(), 1))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "run the tests in namespaces of their own:", err)
		os.Exit(1)
	}
}

const cniDir = "/usr/lib/cni"

// node is a private network namespace in the part of the node's.
type node struct {
	netns, state, run, conf string
}

func newNode(t *testing.T) *node {
	t.Helper()
	if os.Getenv(inside) == "" {
		t.Fatal("this test needs root: it makes network namespaces")
	}
	for name, pkg := range map[string]string{cniDir + "/bridge": "containernetworking-plugins", "iptables": "iptables", "ping": "iputils-ping"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%s is missing: apt-get install %s", name, pkg)
		}
	}
	dir := t.TempDir()
	nd := &node{netns: filepath.Join(dir, "node"), state: filepath.Join(dir, "state"), run: filepath.Join(dir, "run"), conf: filepath.Join(dir, "net.d")}
	if err := CreateNetns(nd.netns); err != nil {
		t.Fatal(err)
	}
	made := nd.netns
	t.Cleanup(func() {
		if err := DeleteNetns(made); err != nil {
			t.Error(err)
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil || bytes.Contains(mounts, []byte(dir)) {
			t.Errorf("mounts left below %s (%v):\n%s", dir, err, mounts)
		}
	})
	if err := os.Mkdir(nd.conf, 0o755); err != nil {
		t.Fatal(err)
	}
	return nd
}

func (nd *node) network(t *testing.T, edit ...func(*Config)) *Network {
	t.Helper()
	cfg := Config{
		ConfDir: nd.conf, BinDirs: []string{cniDir}, StateDir: nd.state, RunDir: nd.run, NodeNetns: nd.netns,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.87.0.0/16"), netip.MustParsePrefix("fd00:87::/64")},
	}
	for _, e := range edit {
		e(&cfg)
	}
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (nd *node) configure(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(nd.conf, name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// command runs a program in the node's namespace.
func (nd *node) command(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var out []byte
	err := inNetns(nd.netns, func() (err error) {
		out, err = exec.CommandContext(ctx, name, args...).CombinedOutput()
		return err
	})
	return string(out), err
}

// assertClean checks that nothing of any pod is left: records, namespaces,
// host sides of veths, firewall rules, leases.
func (nd *node) assertClean(t *testing.T) {
	t.Helper()
	for _, pattern := range []string{nd.state + "/pods/*", nd.state + "/pods/.*", nd.run + "/netns/*", nd.state + "/cni/results/*", nd.state + "/ipam/*/*.*.*.*", nd.state + "/ipam/*/*:*"} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("files left: %q", left)
		}
	}
	err := inNetns(nd.netns, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if l.Type() == "veth" {
				t.Errorf("interface left: %s", l.Attrs().Name)
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	for _, save := range []string{"iptables-save", "ip6tables-save"} {
		rules, err := nd.command(t, save, "-t", "nat")
		if err != nil {
			t.Errorf("%s: %v %s", save, err, rules)
		}
		for line := range strings.Lines(rules) {
			// portmap's three top chains stay, they belong to the node.
			if strings.HasPrefix(line, ":CNI-") && !strings.HasPrefix(line, ":CNI-HOSTPORT-") ||
				strings.HasPrefix(line, "-A") && (strings.Contains(line, "/32") || strings.Contains(line, "cri-vz")) {
				t.Errorf("firewall rule left: %s", line)
			}
		}
	}
}

// makeNetwork is Prepare and SetUp in a row.
func makeNetwork(ctx context.Context, n *Network, pod Pod) (*Result, error) {
	if _, err := n.Prepare(ctx, pod); err != nil {
		return nil, err
	}
	return n.SetUp(ctx, pod.ID)
}

func setUp(t *testing.T, n *Network, pod Pod) *Result {
	t.Helper()
	start := time.Now()
	r, err := makeNetwork(t.Context(), n, pod)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("SetUp took %v", time.Since(start))
	t.Cleanup(func() { tearDown(t, n, pod.ID) })
	return r
}

func tearDown(t *testing.T, n *Network, id string) {
	t.Helper()
	if err := n.TearDown(context.Background(), id); err != nil {
		t.Error(err)
	}
}

// guest stands for a VM: a network stack behind the pod's tap, with the frames
// carried between the two taps as a virtio NIC does, header and all.
type guest struct{ netns string }

func bootGuest(t *testing.T, n *Network, id string, r *Result) *guest {
	t.Helper()
	g := &guest{netns: filepath.Join(t.TempDir(), "guest")}
	podTap, err := n.OpenTap(id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.OpenTap(id); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second OpenTap: %v, want ErrAlreadyExists", err)
	}
	var nic *os.File
	err = createNetns(g.netns, func() (err error) {
		nic, err = attachTap()
		if err != nil {
			return err
		}
		link, err := netlink.LinkByName(tapName)
		if err != nil {
			return err
		}
		mac, err := net.ParseMAC(r.MAC)
		if err != nil {
			return err
		}
		err = errors.Join(netlink.LinkSetName(link, r.Interface), netlink.LinkSetHardwareAddr(link, mac), netlink.LinkSetMTU(link, r.MTU), netlink.LinkSetUp(link))
		if err != nil {
			return err
		}
		for _, a := range r.Addresses {
			err := netlink.AddrAdd(link, &netlink.Addr{
				IPNet: ipNet(a), Flags: unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE,
			})
			if err != nil {
				return fmt.Errorf("address %s: %w", a, err)
			}
		}
		for _, rt := range r.Routes {
			k := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(rt.Destination), Priority: rt.Metric, Scope: netlink.SCOPE_LINK}
			if rt.Gateway.IsValid() {
				k.Gw, k.Scope = rt.Gateway.AsSlice(), netlink.SCOPE_UNIVERSE
			}
			if err := netlink.RouteAdd(k); err != nil {
				return fmt.Errorf("route %+v: %w", rt, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var pumps sync.WaitGroup
	pump := func(dst, src *os.File) {
		buf := make([]byte, 128<<10)
		for {
			n, err := src.Read(buf)
			if err != nil {
				return
			}
			dst.Write(buf[:n])
		}
	}
	pumps.Go(func() { pump(nic, podTap) })
	pumps.Go(func() { pump(podTap, nic) })
	t.Cleanup(func() {
		podTap.Close()
		nic.Close()
		pumps.Wait()
		if err := DeleteNetns(g.netns); err != nil {
			t.Error(err)
		}
	})
	return g
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// serve echoes one TCP connection after the other, in the namespace at path.
func serve(t *testing.T, path, addr string) {
	t.Helper()
	var l net.Listener
	err := inNetns(path, func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(20 * time.Second))
			io.Copy(c, c)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
}

// echo sends size bytes both ways: enough for segments that only an offload
// makes, and whose checksums only an offload completes.
func echo(t *testing.T, path, addr string, size int) {
	t.Helper()
	var c net.Conn
	err := inNetns(path, func() (err error) {
		// One thread and no resolver: the socket belongs to this namespace.
		c, err = net.DialTimeout("tcp", addr, 5*time.Second)
		return err
	})
	if err != nil {
		t.Errorf("dial %s: %v", addr, err)
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	want := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(want)
		sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(c)
	if err := errors.Join(err, <-sent); err != nil {
		t.Errorf("echo from %s: %v", addr, err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("echo from %s: %d bytes came back of %d", addr, len(got), len(want))
	}
}

// ping wants an answer to the first IPv4 packet. The node's own IPv6 address on
// a new bridge is not usable before duplicate address detection is through.
func ping(t *testing.T, path string, addr netip.Addr) {
	t.Helper()
	tries := 1
	if addr.Is6() {
		tries = 10
	}
	var out []byte
	err := inNetns(path, func() (err error) {
		for range tries {
			out, err = exec.Command("ping", "-n", "-c", "1", "-W", "3", addr.String()).CombinedOutput()
			if err == nil {
				return nil
			}
			time.Sleep(200 * time.Millisecond)
		}
		return err
	})
	if err != nil {
		t.Errorf("ping %s: %v\n%s", addr, err, out)
	}
}

func hostPort(a netip.Addr, port int) string { return netip.AddrPortFrom(a, uint16(port)).String() }

func TestBuiltinNetwork(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t)
	if err := n.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	a := Pod{ID: "pod-a", Name: "a", Namespace: "default", UID: "1", PortMappings: []PortMapping{{HostPort: 8080, ContainerPort: 80}, {ContainerPort: 81}}}
	ra := setUp(t, n, a)
	rb := setUp(t, n, Pod{ID: "pod-b", Name: "b", Namespace: "default"})

	// The result travels as JSON.
	b, err := json.Marshal(ra)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", b)
	var again Result
	if err := json.Unmarshal(b, &again); err != nil || fmt.Sprint(again) != fmt.Sprint(*ra) {
		t.Errorf("through JSON: %+v, %v", again, err)
	}

	// T42: all addresses, routes and the MTU.
	if len(ra.Addresses) != 2 || !ra.Addresses[0].Addr().Is4() || !ra.Addresses[1].Addr().Is6() || ra.MTU != 1500 {
		t.Fatalf("result %+v: want an address of each family and MTU 1500", ra)
	}
	var defaults int
	for _, r := range ra.Routes {
		if r.Destination.Bits() == 0 && r.Gateway.IsValid() {
			defaults++
		}
	}
	if defaults != 2 {
		t.Errorf("routes %+v: want a default route of each family", ra.Routes)
	}

	if _, err := n.Prepare(t.Context(), a); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second Prepare: %v, want ErrAlreadyExists", err)
	}

	ga := bootGuest(t, n, "pod-a", ra)
	gb := bootGuest(t, n, "pod-b", rb)
	for _, addr := range ra.Addresses {
		serve(t, ga.netns, hostPort(addr.Addr(), 80))
		for _, path := range []string{nd.netns, gb.netns} {
			ping(t, path, addr.Addr())
			echo(t, path, hostPort(addr.Addr(), 80), 4<<20)
		}
	}
	// A host port, on an address of the node that is not the gateway's.
	if out, err := nd.command(t, "ip", "link", "add", "uplink", "type", "veth"); err != nil {
		t.Fatal(err, out)
	}
	if out, err := nd.command(t, "ip", "addr", "add", "192.0.2.1/24", "dev", "uplink"); err != nil {
		t.Fatal(err, out)
	}
	echo(t, nd.netns, "192.0.2.1:8080", 1<<20)
	echo(t, gb.netns, "192.0.2.1:8080", 1<<20)
	echo(t, nd.netns, "127.0.0.1:8080", 64<<10)

	// And out: a pod reaches the node.
	serve(t, nd.netns, "192.0.2.1:7000")
	echo(t, ga.netns, "192.0.2.1:7000", 1<<20)

	if out, err := nd.command(t, "ip", "link", "del", "uplink"); err != nil {
		t.Fatal(err, out)
	}
	for _, id := range []string{"pod-a", "pod-b", "pod-a"} { // twice is no error
		tearDown(t, n, id)
	}
	nd.assertClean(t)
}

// A world that knows no way to pods answers the node, for as long as there are pods, and
// again for the next pod after somebody has flushed the firewall.
func TestMasquerade(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t)
	world := filepath.Join(t.TempDir(), "world")
	addresses := func(name string, addrs ...string) error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			err = errors.Join(err, netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(a)), Flags: unix.IFA_F_NODAD}))
		}
		return errors.Join(err, netlink.LinkSetUp(link))
	}
	f, err := openNetns(nd.netns)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = createNetns(world, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "downlink"
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "uplink", PeerNamespace: netlink.NsFd(f.Fd())})
		if err != nil {
			return err
		}
		return addresses("downlink", "192.0.2.2/24", "2001:db8::2/64")
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeNetns(world); err != nil {
			t.Error(err)
		}
	})
	if err := inNetns(nd.netns, func() error { return addresses("uplink", "192.0.2.1/24", "2001:db8::1/64") }); err != nil {
		t.Fatal(err)
	}
	outside := []string{"192.0.2.2:7000", "[2001:db8::2]:7000"}
	for _, a := range outside {
		serve(t, world, a)
	}
	check := func(id string) {
		t.Helper()
		g := bootGuest(t, n, id, setUp(t, n, Pod{ID: id}))
		for _, a := range outside {
			echo(t, g.netns, a, 1<<20)
		}
		for _, save := range []string{"iptables-save", "ip6tables-save"} {
			if rules, err := nd.command(t, save, "-t", "nat"); err != nil || strings.Count(rules, "MASQUERADE") != 1 {
				t.Errorf("%s: want one rule, %v:\n%s", save, err, rules)
			}
		}
	}
	check("one")
	check("two")
	tearDown(t, n, "one")
	for _, tool := range []string{"iptables", "ip6tables"} {
		if out, err := nd.command(t, tool, "-t", "nat", "-F"); err != nil {
			t.Fatal(err, out)
		}
	}
	check("three")
	tearDown(t, n, "two")
	if out, err := nd.command(t, "iptables", "-t", "nat", "-F"); err != nil {
		t.Fatal(err, out)
	}
	tearDown(t, n, "three") // flushed is as good as removed
	if out, err := nd.command(t, "ip", "link", "del", "uplink"); err != nil {
		t.Fatal(err, out)
	}
	nd.assertClean(t)
}

// A pod goes although nobody can tell what another one needs.
func TestTearDownBesideABrokenRecord(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t)
	setUp(t, n, Pod{ID: "one"})
	broken := filepath.Join(nd.state, "pods", "two.json")
	if err := os.WriteFile(broken, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	tearDown(t, n, "one")
	rules, err := nd.command(t, "iptables-save", "-t", "nat")
	if err != nil || !strings.Contains(rules, "MASQUERADE") {
		t.Errorf("the other pod's rule is gone: %v\n%s", err, rules)
	}
}

// Without NodeNetns the daemon's own namespace is the node's; the test's own is
// private, see TestMain.
func TestOwnNamespace(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t, func(c *Config) { c.NodeNetns = "" })
	r := setUp(t, n, Pod{ID: "own"})
	t.Cleanup(func() {
		if l, err := netlink.LinkByName(builtinBridge); err == nil {
			netlink.LinkDel(l)
		}
	})
	bootGuest(t, n, "own", r)
	ping(t, "", r.Addresses[0].Addr())
	tearDown(t, n, "own")
	nd.netns = ""
	nd.assertClean(t)
}

// The namespace's own stack must not answer at the pod's IP beside the guest.
func TestNamespaceIsSilent(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t)
	r := setUp(t, n, Pod{ID: "silent"})
	if out, err := nd.command(t, "ping", "-n", "-c", "1", "-W", "1", r.Addresses[0].Addr().String()); err == nil {
		t.Errorf("the pod IP answers though there is no guest:\n%s", out)
	}
	tearDown(t, n, "silent")
	nd.assertClean(t)
}

// A VM that fails to boot is replaced by a fresh one on the same tap (T7).
func TestTapIsReopened(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t)
	r := setUp(t, n, Pod{ID: "retry"})
	f, err := n.OpenTap("retry")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	bootGuest(t, n, "retry", r)
	ping(t, nd.netns, r.Addresses[0].Addr())
	if _, err := n.OpenTap("other"); !errdefs.IsNotFound(err) {
		t.Errorf("tap of an unknown pod: %v, want ErrNotFound", err)
	}
}

const userConflist = `{
  "cniVersion": "0.4.0", "name": "mine",
  "plugins": [{"type": "ptp", "mtu": 1400, "ipMasq": true,
    "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.99.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "198.51.100.0/24"}]},
    "dns": {"nameservers": ["192.0.2.53"], "domain": "example"}}%s]}`

func TestUsersConfiguration(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t)
	ipam := filepath.Join(nd.state, "ipam")
	first := nd.configure(t, "10-mine.conflist", fmt.Sprintf(userConflist, ipam, ""))
	nd.configure(t, "20-broken.conflist", "{")
	r := setUp(t, n, Pod{ID: "user"})
	if r.MTU != 1400 || r.Addresses[0] != netip.MustParsePrefix("10.99.0.2/24") || len(r.DNS.Servers) != 1 || r.DNS.Searches[0] != "example" {
		t.Errorf("result %+v", r)
	}
	// ptp has no connected route for the subnet, but one to the gateway, which
	// its result doesn't mention.
	var gatewayFirst bool
	for _, rt := range r.Routes {
		if rt.Destination == netip.MustParsePrefix("10.99.0.1/32") && !rt.Gateway.IsValid() {
			gatewayFirst = true
		} else if rt.Gateway.IsValid() && !gatewayFirst {
			t.Errorf("route by way of %v before the one to it: %+v", rt.Gateway, r.Routes)
		}
	}
	if !gatewayFirst {
		t.Errorf("no route to the gateway: %+v", r.Routes)
	}
	bootGuest(t, n, "user", r)
	ping(t, nd.netns, r.Addresses[0].Addr())

	t.Run("host port without portmap is refused by name", func(t *testing.T) { // T42
		_, err := n.Prepare(t.Context(), Pod{ID: "ports", PortMappings: []PortMapping{{HostPort: 80, ContainerPort: 80, Protocol: "TCP"}}})
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "portmap") || !strings.Contains(err.Error(), first) {
			t.Errorf("got %v", err)
		}
	})
	// The user replaces the configuration while the pod runs; DEL goes by the
	// old one.
	if err := os.Remove(first); err != nil {
		t.Fatal(err)
	}
	tearDown(t, n, "user")
	nd.assertClean(t)
}

func TestSingleConf(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t)
	// Version 0.2.0 results know no interfaces, only ip4 and ip6.
	nd.configure(t, "10.conf", fmt.Sprintf(`{"cniVersion": "0.2.0", "name": "old", "type": "bridge", "bridge": "old0", "isGateway": true,
		"ipam": {"type": "host-local", "dataDir": %q, "subnet": "10.98.0.0/24"}}`, filepath.Join(nd.state, "ipam")))
	r := setUp(t, n, Pod{ID: "old"})
	if r.Addresses[0].Addr() != netip.MustParseAddr("10.98.0.2") || r.MAC == "" {
		t.Errorf("result %+v", r)
	}
	tearDown(t, n, "old")
	nd.assertClean(t)
}

func TestBadConfiguration(t *testing.T) {
	for _, tt := range []struct {
		name, file, text string
		wantErr          error
		want             string
	}{
		{"no JSON", "10-a.conflist", "{", errdefs.ErrInvalidArgument, "10-a.conflist"},
		{"no name", "10-a.conflist", `{"plugins": [{"type": "bridge"}]}`, errdefs.ErrInvalidArgument, "10-a.conflist"},
		{"no plugins", "10-a.conflist", `{"name": "x", "plugins": []}`, errdefs.ErrInvalidArgument, "10-a.conflist"},
		{"conf without type", "10-a.conf", `{"name": "x"}`, errdefs.ErrInvalidArgument, "10-a.conf"},
		{"conf without name", "10-a.conf", `{"type": "bridge"}`, errdefs.ErrInvalidArgument, "10-a.conf"},
		{"future version", "10-a.conflist", `{"cniVersion": "9.0.0", "name": "x", "plugins": [{"type": "bridge"}]}`, errdefs.ErrInvalidArgument, "9.0.0"},
		{"plugin outside of the directories", "10-a.conflist", `{"name": "x", "plugins": [{"type": "../../bin/sh"}]}`, errdefs.ErrFailedPrecondition, "../../bin/sh"},
		{"unknown plugin", "10-a.conflist", `{"name": "x", "plugins": [{"type": "calico"}]}`, errdefs.ErrFailedPrecondition, `"calico"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nd := newNode(t)
			n := nd.network(t)
			nd.configure(t, tt.file, tt.text)
			_, err := makeNetwork(t.Context(), n, Pod{ID: "pod"})
			for what, err := range map[string]error{"SetUp": err, "Status": n.Status(t.Context())} {
				if !errors.Is(err, tt.wantErr) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%s: %v; want %v that names %s", what, err, tt.wantErr, tt.want)
				}
			}
			nd.assertClean(t)
		})
	}
}

func TestPluginMissing(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t, func(c *Config) { c.BinDirs = []string{t.TempDir()} })
	_, err := makeNetwork(t.Context(), n, Pod{ID: "pod"})
	for what, err := range map[string]error{"SetUp": err, "Status": n.Status(t.Context())} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), `"bridge"`) || !strings.Contains(err.Error(), "containernetworking-plugins") {
			t.Errorf("%s: %v", what, err)
		}
	}
	nd.assertClean(t)
}

// script installs a plugin made of shell into a directory of its own and
// configures it behind the real bridge.
func (nd *node) script(t *testing.T, body string) func(*Config) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "script"), []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	nd.configure(t, "10-script.conflist", fmt.Sprintf(userConflist, filepath.Join(nd.state, "ipam"), `, {"type": "script"}`))
	return func(c *Config) { c.BinDirs = []string{dir, cniDir} }
}

func TestFailedAddLeavesNothing(t *testing.T) {
	for _, tt := range []struct{ name, body, want string }{
		{"error by the book", `[ $CNI_COMMAND = ADD ] || exit 0; echo '{"code": 7, "msg": "no more cables"}'; exit 1`, "no more cables"},
		{"error on stderr only", `[ $CNI_COMMAND = ADD ] || exit 0; echo kaputt >&2; exit 3`, "kaputt"},
		{"garbage on stdout", `echo garbage`, "garbage"},
		{"no address", `echo '{"cniVersion": "0.4.0"}'`, "no IP address"}, // T42
		{"address without end", `[ $CNI_COMMAND = ADD ] || exit 0; yes | head -c 3000000`, "larger than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nd := newNode(t)
			n := nd.network(t, nd.script(t, tt.body))
			_, err := makeNetwork(t.Context(), n, Pod{ID: "pod"})
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "undoing it failed") {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
			nd.assertClean(t)
		})
	}
}

// A plugin that hangs, with a child that ignores signals, ends with the
// caller's context, and the clean-up has a bound of its own.
func TestHangingPlugin(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t, nd.script(t, `[ $CNI_COMMAND = ADD ] || exit 0; trap '' TERM INT; sleep 600 & sleep 600`))
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	start := time.Now()
	_, err := makeNetwork(ctx, n, Pod{ID: "pod"})
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 10*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
	nd.assertClean(t)
}

// A DEL that fails keeps the record, and the next TearDown succeeds.
func TestTearDownIsRepeated(t *testing.T) {
	nd := newNode(t)
	flag := filepath.Join(t.TempDir(), "broken")
	n := nd.network(t, nd.script(t, fmt.Sprintf(`[ ! -e %s ] || exit 1
		[ $CNI_COMMAND = DEL ] || echo '{"cniVersion": "0.4.0", "interfaces": [{"name": "eth0", "sandbox": "x"}], "ips": [{"version": "4", "interface": 0, "address": "10.99.0.2/24"}]}'`, flag)))
	setUp(t, n, Pod{ID: "pod"})
	if err := os.WriteFile(flag, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.TearDown(t.Context(), "pod"); err == nil || !strings.Contains(err.Error(), "script") {
		t.Errorf("got %v", err)
	}
	if ids, err := n.Pods(); err != nil || !slices.Equal(ids, []string{"pod"}) {
		t.Errorf("Pods: %q, %v", ids, err)
	}
	if err := os.Remove(flag); err != nil {
		t.Fatal(err)
	}
	tearDown(t, n, "pod")
	nd.assertClean(t)
}

// T11
func TestTearDownWithoutNamespace(t *testing.T) {
	for _, tt := range []struct {
		name string
		lose func(t *testing.T, nd *node, path string) error
	}{
		{"deleted", func(_ *testing.T, _ *node, path string) error { return DeleteNetns(path) }},
		{"unmounted", func(_ *testing.T, _ *node, path string) error { return unix.Unmount(path, 0) }},
		{"run directory gone", func(_ *testing.T, nd *node, path string) error {
			return errors.Join(DeleteNetns(path), os.RemoveAll(nd.run))
		}},
		{"interface gone", func(_ *testing.T, _ *node, path string) error {
			return inNetns(path, func() error {
				l, err := netlink.LinkByName(InterfaceName)
				if err != nil {
					return err
				}
				return netlink.LinkDel(l)
			})
		}},
		{"reboot", func(t *testing.T, nd *node, path string) error {
			// The node's interfaces and rules are gone too.
			return errors.Join(DeleteNetns(path), os.RemoveAll(nd.run), DeleteNetns(nd.netns), CreateNetns(nd.netns))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nd := newNode(t)
			n := nd.network(t)
			pod := Pod{ID: "pod", PortMappings: []PortMapping{{HostPort: 8080, ContainerPort: 80}}}
			r := setUp(t, n, pod)
			if err := tt.lose(t, nd, r.Netns); err != nil {
				t.Fatal(err)
			}
			n = nd.network(t) // a daemon that starts
			for range 2 {
				tearDown(t, n, "pod")
			}
			if tt.name == "interface gone" {
				// Nobody can tell plugins which rules were the pod's; what has
				// to go is the rest.
				return
			}
			nd.assertClean(t)
		})
	}
}

// A daemon killed half-way through SetUp finds the pod in Pods and undoes it.
func TestTearDownOfHalfASetUp(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t)
	w, err := n.configuration()
	if err != nil {
		t.Fatal(err)
	}
	pod := Pod{ID: "half"}
	r := newRecord(pod, w)
	for _, upTo := range []string{"record", "namespace", "leftover file", "CNI ADD"} {
		t.Run(upTo, func(t *testing.T) {
			if err := r.write(n.recordPath(pod.ID)); err != nil {
				t.Fatal(err)
			}
			switch upTo {
			case "namespace", "CNI ADD":
				if err := createNetns(n.netnsPath(pod.ID), makeCable); err != nil {
					t.Fatal(err)
				}
			case "leftover file":
				if err := os.WriteFile(n.netnsPath(pod.ID), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if upTo == "CNI ADD" {
				if err := n.add(t.Context(), r, n.netnsPath(pod.ID), &Result{}); err != nil {
					t.Fatal(err)
				}
			}
			if ids, err := n.Pods(); err != nil || !slices.Equal(ids, []string{pod.ID}) {
				t.Errorf("Pods: %q, %v", ids, err)
			}
			tearDown(t, n, pod.ID)
			nd.assertClean(t)
		})
	}
}

func TestParallelSetUps(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t)
	const pods = 8
	results := make([]*Result, pods)
	errs := make([]error, pods)
	var wg sync.WaitGroup
	start := time.Now()
	for i := range pods {
		wg.Go(func() {
			results[i], errs[i] = makeNetwork(t.Context(), n, Pod{
				ID: fmt.Sprint("pod-", i), PortMappings: []PortMapping{{HostPort: int32(8000 + i), ContainerPort: 80}},
			})
		})
	}
	wg.Wait()
	t.Logf("%d parallel SetUps took %v", pods, time.Since(start))
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
	seen := map[netip.Prefix]int{}
	for i, r := range results {
		if r == nil {
			continue
		}
		for _, a := range r.Addresses {
			if j, ok := seen[a]; ok {
				t.Errorf("pods %d and %d both have %s", i, j, a)
			}
			seen[a] = i
		}
	}
	for i := range pods {
		wg.Go(func() { tearDown(t, n, fmt.Sprint("pod-", i)) })
	}
	wg.Wait()
	nd.assertClean(t)
}

func TestBadPod(t *testing.T) {
	nd := newNode(t)
	n := nd.network(t)
	for _, pod := range []Pod{
		{},
		{ID: "../x"},
		{ID: "a/b"},
		{ID: "a", Name: "x;CNI_PATH=/tmp"},
		{ID: "a", PortMappings: []PortMapping{{HostPort: 70000, ContainerPort: 80}}},
		{ID: "a", PortMappings: []PortMapping{{HostPort: 80, ContainerPort: 80, Protocol: "icmp"}}},
		{ID: "a", PortMappings: []PortMapping{{HostPort: 80, ContainerPort: 80, HostIP: "example.org"}}},
	} {
		if _, err := n.Prepare(t.Context(), pod); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v, want ErrInvalidArgument", pod, err)
		}
	}
	if err := n.TearDown(t.Context(), "../x"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("TearDown: %v", err)
	}
	nd.assertClean(t)
}

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	ok := Config{StateDir: dir, RunDir: dir}
	p := netip.MustParsePrefix
	for name, edit := range map[string]func(*Config){
		"no state":          func(c *Config) { c.StateDir = "" },
		"relative run":      func(c *Config) { c.RunDir = "run" },
		"two of one family": func(c *Config) { c.Subnets = []netip.Prefix{p("10.0.0.0/16"), p("10.1.0.0/16")} },
		"no room":           func(c *Config) { c.Subnets = []netip.Prefix{p("10.0.0.0/31")} },
	} {
		cfg := ok
		edit(&cfg)
		if _, err := New(cfg); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want ErrInvalidArgument", name, err)
		}
	}
	cfg := ok
	cfg.NodeNetns = filepath.Join(dir, "nowhere")
	if _, err := New(cfg); !errdefs.IsNotFound(err) {
		t.Errorf("node's namespace missing: %v, want ErrNotFound", err)
	}
	if _, err := New(ok); err != nil {
		t.Error(err)
	}
}
