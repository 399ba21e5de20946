//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/test/natnet"
)

var natGateway = netip.MustParsePrefix("192.168.64.1/24")

const longLease = 24 * time.Hour

// onCable has a server and a NIC in network namespaces of their own.
//
// configure gives the NIC its address, as SetUpSandbox does.
func onCable(t *testing.T) (s *natnet.Server, d *dhcpLink, configure func(*lease)) {
	t.Helper()
	ip := func(args string) {
		t.Helper()
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
	}
	runtime.LockOSThread() // for good: the thread ends with the test
	var ns [2]int
	for i := range ns {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Fatalf("these tests make network namespaces, run them as root: %v", err)
		}
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		ns[i] = fd
	}
	// This thread is in the second, the server's.
	ip("link add host type veth peer name nic")
	nic, err := net.InterfaceByName("nic")
	if err != nil {
		t.Fatal(err)
	}
	if err := setLink(nic.Index, 0, attr32(unix.IFLA_NET_NS_FD, uint32(ns[0]))); err != nil {
		t.Fatal(err)
	}
	ip("addr add " + natGateway.String() + " dev host")
	ip("link set host up")
	s, err = natnet.Serve("host", natGateway, longLease)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if err := inNetns(ns[0], func() error { return setLink(nic.Index, unix.IFF_UP, nil) }); err != nil {
		t.Fatal(err)
	}
	d, err = openDHCP(ns[0], nic.Index, nic.HardwareAddr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.close)
	return s, d, func(l *lease) {
		t.Helper()
		if err := inNetns(ns[0], func() error {
			return errors.Join(addAddress(nic.Index, l.address), addRoute(podRoute{Destination: l.address.Masked(), Interface: "nic", Source: l.address.Addr()}))
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
