//go:build linux

package e2e_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/sandbox/network"
)

// ptpNetwork has addresses of both families, a small MTU, and what bridges don't:
// the subnet is not on the link, all goes to the gateway. It has no portmap.
const ptpNetwork = `{
  "cniVersion": "1.0.0", "name": "ptp",
  "plugins": [{
    "type": "ptp", "mtu": 1400,
    "ipam": {
      "type": "host-local", "dataDir": %q,
      "ranges": [[{"subnet": "10.98.0.0/24"}], [{"subnet": "fd98::/64"}]],
      "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}, {"dst": "10.97.0.0/16"}]
    }
  }]
}`

// T42: all addresses and routes, MTU and MAC of the CNI result are the guest's, of
// both families. T43: without a DNS configuration the pod has the host's.
func TestNetworkOfAConfiguration(t *testing.T) {
	n := suite.node
	dir := filepath.Join(n.dir, "cni")
	file := filepath.Join(dir, "10-ptp.conflist")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, fmt.Appendf(nil, ptpNetwork, filepath.Join(n.dir, "ipam")), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(file); err != nil {
			t.Error(err)
		}
	})

	cfg := podConfig(n, "ptp")
	cfg.PortMappings = []*runtimeapi.PortMapping{{HostPort: 8080, ContainerPort: 80}}
	_, err := n.RunPodSandbox(timeout(t, callTimeout), &runtimeapi.RunPodSandboxRequest{Config: cfg})
	wantError(t, err, codes.FailedPrecondition, "8080", "portmap", "10-ptp.conflist")

	cfg.PortMappings, cfg.DnsConfig = nil, nil
	p := newPod(t, cfg)
	st := p.sandbox(t, p.id).GetNetwork()
	ip4, err4 := netip.ParseAddr(st.GetIp())
	if err4 != nil || !netip.MustParsePrefix("10.98.0.0/24").Contains(ip4) || len(st.GetAdditionalIps()) != 1 {
		t.Fatalf("addresses %v", st)
	}
	ip6, err6 := netip.ParseAddr(st.GetAdditionalIps()[0].GetIp())
	if err6 != nil || !netip.MustParsePrefix("fd98::/64").Contains(ip6) {
		t.Fatalf("additional address %v", st.GetAdditionalIps())
	}
	id := p.start(t, "web", asRoot, command("/bin/tcp-echo", "3000"))
	waitForLog(t, p.container(t, id).GetLogPath(), "listening")
	for _, ip := range []netip.Addr{ip4, ip6} {
		echo(t, "tcp", netip.AddrPortFrom(ip, 3000).String())
	}
	if got := p.output(t, id, "/bin/cat", "/sys/class/net/eth0/mtu"); got != "1400\n" {
		t.Errorf("MTU %q", got)
	}
	// Networks that look at who sends know the MAC of the interface that CNI made.
	link, err := exec.Command("nsenter", "--net="+filepath.Join(n.run, "network", "netns", p.id), "ip", "-o", "link", "show", network.InterfaceName).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, link)
	}
	if mac := strings.TrimSpace(p.output(t, id, "/bin/cat", "/sys/class/net/eth0/address")); !strings.Contains(string(link), "link/ether "+mac+" ") {
		t.Errorf("the guest's MAC is %q, CNI's interface is %s", mac, link)
	}
	all := hex.EncodeToString(ip6.AsSlice())
	if got := p.output(t, id, "/bin/cat", "/proc/net/if_inet6"); !strings.Contains(got, all) {
		t.Errorf("IPv6 addresses %q, want %s", got, all)
	}

	// In /proc/net/route numbers are as the processor has them in memory.
	hex4 := func(s string) string {
		b := netip.MustParseAddr(s).AsSlice()
		slices.Reverse(b)
		return strings.ToUpper(hex.EncodeToString(b))
	}
	var routes []string
	for line := range strings.Lines(p.output(t, id, "/bin/cat", "/proc/net/route")) {
		if f := strings.Fields(line); len(f) > 7 && f[0] == "eth0" {
			routes = append(routes, f[1]+" "+f[2]+" "+f[7])
		}
	}
	gateway := hex4("10.98.0.1")
	want := []string{
		hex4("0.0.0.0") + " " + gateway + " " + hex4("0.0.0.0"),
		hex4("10.97.0.0") + " " + gateway + " " + hex4("255.255.0.0"),
		hex4("10.98.0.0") + " " + gateway + " " + hex4("255.255.255.0"),
		gateway + " " + hex4("0.0.0.0") + " " + hex4("255.255.255.255"),
	}
	slices.Sort(routes)
	slices.Sort(want)
	if !slices.Equal(routes, want) {
		t.Errorf("IPv4 routes %q, want %q", routes, want)
	}
	gateway6 := hex.EncodeToString(netip.MustParseAddr("fd98::1").AsSlice())
	if got := p.output(t, id, "/bin/cat", "/proc/net/ipv6_route"); !strings.Contains(got, strings.Repeat("0", 32)+" 00 "+strings.Repeat("0", 32)+" 00 "+gateway6) {
		t.Errorf("IPv6 routes have no default by way of %s:\n%s", gateway6, got)
	}

	host, err := network.HostResolvConf()
	if err != nil {
		t.Logf("the host has no usable name server: %v", err)
	}
	resolv := p.output(t, id, "/bin/cat", "/etc/resolv.conf")
	for _, s := range host.Servers {
		if a, err := netip.ParseAddr(s); err != nil || a.IsLoopback() || !strings.Contains(resolv, "nameserver "+s+"\n") {
			t.Errorf("name server %s of the host; the pod's resolv.conf: %q", s, resolv)
		}
	}
}

// Host ports of the built-in network, TCP and UDP.
func TestHostPorts(t *testing.T) {
	cfg := podConfig(suite.node, "ports")
	cfg.PortMappings = []*runtimeapi.PortMapping{
		{Protocol: runtimeapi.Protocol_TCP, HostPort: 18080, ContainerPort: 3000},
		{Protocol: runtimeapi.Protocol_UDP, HostPort: 18080, ContainerPort: 3001},
		{Protocol: runtimeapi.Protocol_TCP, ContainerPort: 3000}, // publishes nothing
	}
	p := newPod(t, cfg)
	for _, proto := range []string{"tcp", "udp"} {
		port := map[string]string{"tcp": "3000", "udp": "3001"}[proto]
		id := p.start(t, proto, command("/bin/"+proto+"-echo", port))
		waitForLog(t, p.container(t, id).GetLogPath(), "listening")
		echo(t, proto, net.JoinHostPort(p.sandbox(t, p.id).GetNetwork().GetIp(), port))
		for _, ip := range nodeAddresses(t) {
			echo(t, proto, netip.AddrPortFrom(ip, 18080).String())
		}
	}
}

// nodeAddresses are the node's own, by which host ports can be reached.
func nodeAddresses(t *testing.T) []netip.Addr {
	t.Helper()
	list, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	var ips []netip.Addr
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
			ips = append(ips, p.Addr())
		}
	}
	return ips
}

// echo says something to an echo server, until it answers: the first datagram may
// be the one that asks for a neighbour's address.
func echo(t *testing.T, proto, address string) {
	t.Helper()
	say := []byte("hello, " + address)
	eventually(t, 10*time.Second, "echo of "+proto+" "+address, func() error {
		c, err := net.DialTimeout(proto, address, 2*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
			return err
		}
		if _, err := c.Write(say); err != nil {
			return err
		}
		got := make([]byte, len(say))
		if _, err := io.ReadFull(c, got); err != nil {
			return err
		}
		if !bytes.Equal(got, say) {
			return fmt.Errorf("got %q", got)
		}
		return nil
	})
}
