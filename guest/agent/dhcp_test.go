//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/test/natnet"
)

var natGateway = netip.MustParsePrefix("192.168.64.1/24")

const longLease = 24 * time.Hour

func ip(t *testing.T, args string) {
	t.Helper()
	tool := "ip"
	if rest, ok := strings.CutPrefix(args, "bridge "); ok {
		tool, args = "bridge", rest
	}
	path, err := exec.LookPath(tool)
	if err != nil {
		t.Fatal(err)
	}
	// os/exec would lose its child to the reaper. // T22
	ended := make(chan unix.WaitStatus, 1)
	if _, err := testReaper().start(func() (int, error) {
		return syscall.ForkExec(path, append([]string{tool}, strings.Fields(args)...), &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
	}, func(ws unix.WaitStatus, _ time.Time) { ended <- ws }); err != nil {
		t.Fatal(err)
	}
	if ws := <-ended; ws != 0 {
		t.Fatalf("%s %s: status %d", tool, args, ws.ExitStatus())
	}
}

// newNetns makes a network namespace, and leaves the test's thread in it: that ends
// with the test.
func newNetns(t *testing.T) int {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("these tests make network namespaces, run them as root: %v", err)
	}
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// moveTo moves a NIC of the thread's namespace to another.
func moveTo(t *testing.T, netns int, name string) net.Interface {
	t.Helper()
	nic, err := net.InterfaceByName(name)
	if err == nil {
		err = setLink(nic.Index, 0, attr32(unix.IFLA_NET_NS_FD, uint32(netns)))
	}
	if err != nil {
		t.Fatal(err)
	}
	return *nic
}

// onCable has a server and a NIC in network namespaces of their own. configure gives
// the NIC its address, as SetUpSandbox does.
func onCable(t *testing.T) (s *natnet.Server, d *dhcpLink, configure func(*lease)) {
	t.Helper()
	client := newNetns(t)
	newNetns(t)
	ip(t, "link add host type veth peer name nic")
	nic := moveTo(t, client, "nic")
	ip(t, "addr add "+natGateway.String()+" dev host")
	ip(t, "link set host up")
	s, err := natnet.Serve("host", natGateway, longLease)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if err := inNetns(client, func() error { return setLink(nic.Index, unix.IFF_UP, nil) }); err != nil {
		t.Fatal(err)
	}
	d, err = openDHCP(client, nic.Index, nic.HardwareAddr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.close)
	return s, d, func(l *lease) {
		t.Helper()
		if err := inNetns(client, func() error {
			return errors.Join(addAddress(nic.Index, l.address), addRoute(podRoute{Destination: l.address.Masked(), Source: l.address.Addr()}, nic.Index))
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// inNetns calls f on this thread, which comes back.
func inNetns(netns int, f func() error) error {
	own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(own)
	if err := unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
		return err
	}
	defer func() { _ = unix.Setns(own, unix.CLONE_NEWNET) }()
	return f()
}

func TestDHCPLease(t *testing.T) {
	s, d, configure := onCable(t)
	l, err := d.acquire(bound(t, acquireTimeout), netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	if l.address.String() != "192.168.64.2/24" || l.gateway != natGateway.Addr() || l.server != natGateway.Addr() ||
		l.seconds != uint32(longLease/time.Second) || len(l.serverMAC) != 6 {
		t.Errorf("lease %+v", l)
	}
	mac := d.mac.String()
	discovered := s.Heard("discover", mac)
	if discovered == 0 || s.Heard("request", mac) != 1 {
		t.Errorf("%d times discovered, %d requested", discovered, s.Heard("request", mac))
	}

	// A server that answers a renewal sends it to the address.
	s.Answer(natnet.Well, time.Hour)
	configure(l)
	renewed, err := d.renew(t.Context(), l, time.Second)
	if err != nil || renewed.seconds != 3600 || renewed.address != l.address {
		t.Fatalf("renewed: %+v, %v", renewed, err)
	}
	if s.Heard("renew", mac) != 1 || s.Heard("discover", mac) != discovered {
		t.Errorf("%d renewals, %d discoveries", s.Heard("renew", mac), s.Heard("discover", mac))
	}

	if !s.Held(mac) {
		t.Error("the server has no lease")
	}
	if err := d.release(renewed); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); s.Held(mac); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the release was not heard in 5 s")
		}
	}
}

// A server that has forgotten its leases gives the same address again, or the pod
// can't keep its own. // T48
func TestDHCPRenewal(t *testing.T) {
	s, d, configure := onCable(t)
	l, err := d.acquire(bound(t, acquireTimeout), netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	configure(l)
	for _, tt := range []struct {
		name  string
		mode  natnet.Mode
		class func(error) bool
		want  string
	}{
		{"silent", natnet.Silent, errdefs.IsUnavailable, "no answer"},
		{"garbage", natnet.Garbage, errdefs.IsUnavailable, "no usable answer"},
		{"another address", natnet.Other, errdefs.IsFailedPrecondition, "doesn't let the pod keep 192.168.64.2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.Answer(tt.mode, 0)
			start := time.Now()
			got, err := d.renew(t.Context(), l, time.Second)
			if got != nil || !tt.class(err) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%+v, %v", got, err)
			}
			if took := time.Since(start); took > 4*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
	s.Answer(natnet.Well, 0)
	if _, err := d.renew(t.Context(), l, time.Second); err != nil {
		t.Errorf("after the server's recovery: %v", err)
	}
}

// T42: no answer that makes sense is no address, and the error says what came.
func TestDHCPWithoutAnAnswer(t *testing.T) {
	s, d, _ := onCable(t)
	for _, tt := range []struct {
		name string
		mode natnet.Mode
		want string
	}{
		{"silent", natnet.Silent, "no answer to DISCOVER"},
		{"garbage", natnet.Garbage, "no usable answer to DISCOVER"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.Answer(tt.mode, 0)
			l, err := d.acquire(bound(t, 3*time.Second), netip.Addr{})
			if l != nil || !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%+v, %v", l, err)
			}
			if n := s.Heard("discover", d.mac.String()); n < 2 {
				t.Errorf("asked %d times", n)
			}
		})
	}
	s.Answer(natnet.Well, 0)
	if _, err := d.acquire(bound(t, acquireTimeout), netip.Addr{}); err != nil {
		t.Error(err)
	}
}

func bound(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func FuzzDHCPAnswer(f *testing.F) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	ask, err := dhcpv4.NewDiscovery(mac)
	if err != nil {
		f.Fatal(err)
	}
	ask.TransactionID = dhcpv4.TransactionID{1, 2, 3, 4}
	offer, err := dhcpv4.NewReplyFromRequest(ask, dhcpv4.WithYourIP(net.IPv4(192, 168, 64, 2)), dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
		dhcpv4.WithOption(dhcpv4.OptRouter(net.IPv4(192, 168, 64, 1))), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(192, 168, 64, 1))),
		dhcpv4.WithLeaseTime(3600), dhcpv4.WithMessageType(dhcpv4.MessageTypeOffer))
	if err != nil {
		f.Fatal(err)
	}
	packet := udpPacket(natGateway.Addr(), netip.AddrFrom4([4]byte{255, 255, 255, 255}), offer.ToBytes())
	packet[20], packet[21], packet[22], packet[23] = 0, dhcpServerPort, 0, dhcpClientPort
	if a, err := dhcpAnswer(packet, ask); err != nil {
		f.Fatal(err)
	} else if l, err := leaseOf(a, mac); err != nil || l.address.String() != "192.168.64.2/24" {
		f.Fatalf("%+v, %v", l, err)
	}
	f.Add(packet)
	f.Add(packet[:40])
	f.Add([]byte{0x4f})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, packet []byte) {
		a, err := dhcpAnswer(packet, ask)
		if err != nil {
			return
		}
		l, err := leaseOf(a, mac)
		if err != nil {
			return
		}
		if !l.address.Addr().Is4() || !l.address.Addr().IsGlobalUnicast() || !l.address.Contains(l.gateway) || l.seconds < shortestLease || !l.server.Is4() {
			t.Errorf("lease %+v", l)
		}
	})
}

// What is sent is what other implementations take.
func TestUDPPacket(t *testing.T) {
	b := udpPacket(netip.MustParseAddr("192.168.64.2"), natGateway.Addr(), []byte("odd"))
	if fold(checksum(0, b[:20])) != 0xffff {
		t.Error("the header's checksum")
	}
	if fold(checksum(checksum(checksum(0, b[12:20]), []byte{0, 17, b[24], b[25]}), b[20:])) != 0xffff {
		t.Error("the datagram's checksum")
	}
	if got, err := udpPayload(b, dhcpServerPort); err != nil || string(got) != "odd" {
		t.Errorf("%q, %v", got, err)
	}
}

// natPod is a sandbox with two NICs, as a pod on macOS has them.
type natPod struct {
	*host
	address netip.Addr
	netns   int
}

func newNATPod(t *testing.T, host, guest int, number string) *natPod {
	t.Helper()
	p := &natPod{host: newHost(t)}
	r := &api.SetUpSandboxRequest{Hostname: "pod" + number, PidMode: api.NamespaceMode_CONTAINER}
	for i, name := range []string{"eth0", "eth1"} {
		port, bridge := []string{"nat", "sw"}[i]+number, []string{"vznat", "vzsw"}[i]
		nic := net.Interface{}
		if err := inNetns(host, func() error {
			ip(t, "link add "+port+" type veth peer name nic")
			ip(t, "link set "+port+" master "+bridge)
			if i == 0 { // as the NAT keeps machines apart
				ip(t, "bridge link set dev "+port+" isolated on")
			}
			ip(t, "link set "+port+" up")
			nic = moveTo(t, guest, "nic")
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		r.Interfaces = append(r.Interfaces, &api.Interface{Name: name, Mac: nic.HardwareAddr.String(), Mtu: 1500, Dhcp: i == 0, DhcpPeers: i == 1})
		ip(t, "link set nic name n"+number+name) // the next pod's is "nic", too
	}
	// On this thread, which is in the guest's namespace as PID 1 is.
	resp, err := p.SetUpSandbox(p.ctx(), r)
	if err != nil {
		t.Fatal(err)
	}
	a, err := netip.ParsePrefix(resp.GetLease().GetAddress())
	if err != nil {
		t.Fatal(err)
	}
	p.address, p.netns = a.Addr(), int(p.sandbox.netns.Fd())
	serveIn(t, p.netns, p.address)
	return p
}

const natTestPort = 3000

// serveIn serves at an address: a client reads the address that it comes from.
func serveIn(t *testing.T, netns int, a netip.Addr) {
	t.Helper()
	if err := inNetns(netns, func() error {
		l, err := net.Listen("tcp", netip.AddrPortFrom(a, natTestPort).String())
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = c.Write([]byte(c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().String()))
				c.Close()
			}
		}()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// reach dials to from netns, once, and wants to be seen as from.
func reach(t *testing.T, netns int, from, to netip.Addr) {
	t.Helper()
	if err := inNetns(netns, func() error {
		// A first packet that gets lost is sent again after a second.
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(to, natTestPort).String(), 3*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(3 * time.Second))
		if b, err := io.ReadAll(c); err != nil || string(b) != from.String() {
			return fmt.Errorf("seen as %q, %v", b, err)
		}
		return nil
	}); err != nil {
		t.Errorf("from %v to %v: %v", from, to, err)
	}
}

// Pods have one address and two links: the host by the first, each other by the
// second, both ways, at once, and whatever the neighbours knew before. // T48
func TestPodsBehindNAT(t *testing.T) {
	for round := range 4 {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			host := newNetns(t)
			// A bridge without an address of its own takes the least of its ports', and
			// another one whenever a port comes or goes.
			ip(t, "link add vznat address 0a:99:00:00:00:01 type bridge")
			ip(t, "addr add "+natGateway.String()+" dev vznat")
			ip(t, "link set vznat up")
			s, err := natnet.Serve("vznat", natGateway, longLease)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			ip(t, "link add vzsw type bridge")
			ip(t, "link set vzsw up")
			serveIn(t, host, natGateway.Addr())
			guest := newNetns(t)
			// The host has had another machine with the second pod's address.
			second := natGateway.Addr().Next().Next()
			if err := inNetns(host, func() error {
				ip(t, "neigh replace "+second.String()+" lladdr 02:00:00:00:00:99 dev vznat nud reachable")
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			a := newNATPod(t, host, guest, "1")
			if err := inNetns(a.netns, func() error {
				ip(t, "neigh replace "+second.String()+" lladdr 02:00:00:00:00:99 dev eth1 nud reachable")
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			b := newNATPod(t, host, guest, "2")
			if b.address != second {
				t.Fatalf("the second pod has %v", b.address)
			}
			gateway := natGateway.Addr()
			reach(t, host, gateway, b.address)
			reach(t, a.netns, a.address, b.address)
			reach(t, b.netns, b.address, a.address)
			for _, p := range []*natPod{a, b} {
				reach(t, host, gateway, p.address)
				reach(t, p.netns, p.address, gateway)
			}
			if _, err := a.RenewLease(a.ctx(), &api.RenewLeaseRequest{}); err != nil {
				t.Errorf("renewal from the pod's namespace: %v", err)
			}
			if _, err := a.ReleaseLease(a.ctx(), &api.ReleaseLeaseRequest{}); err != nil {
				t.Error(err)
			}
		})
	}
}
