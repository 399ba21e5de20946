//go:build linux

// Package natnet plays, on Linux, the NAT that macOS keeps virtual machines behind: a
// bridge whose ports reach the host and not each other, and a DHCP server on it that
// tells what it was asked and can misbehave. It promises nothing of the world behind
// the NAT: there is none.
package natnet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"
)

// Mode is how the server answers.
type Mode int

// Modes of a server.
const (
	Well    Mode = iota
	Silent       // it hears and says nothing
	Garbage      // what it says is no DHCP, or makes no sense
	Other        // it doesn't know leases any more, and grants every one another address
)

// Server is a DHCP server. Its methods may be called concurrently.
type Server struct {
	conn   net.PacketConn
	subnet netip.Prefix // of the gateway's address
	done   chan struct{}

	mu     sync.Mutex
	mode   Mode
	lease  time.Duration
	owners map[netip.Addr]string // of addresses, by MAC
	held   map[string]bool       // MACs whose lease was not released
	heard  map[string]int
	next   netip.Addr
}

// Bridge makes the bridge of that name in this process's network namespace, with the
// gateway's address, and serves DHCP on it. The namespace's end is the bridge's.
func Bridge(name string, gateway netip.Prefix, lease time.Duration) (*Server, error) {
	for _, args := range []string{
		// Of its own accord a bridge takes the least address of its ports for its own,
		// and the gateway would become another one whenever a machine comes or goes.
		"link add " + name + " address 0a:99:00:00:00:01 type bridge",
		"addr add " + gateway.String() + " dev " + name,
		"link set " + name + " up",
		"link set lo up",
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
	}
	return Serve(name, gateway, lease)
}

// Serve serves DHCP on a link of the calling thread's network namespace.
func Serve(link string, gateway netip.Prefix, lease time.Duration) (*Server, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			err = errors.Join(unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, link),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1))
		})
		return errors.Join(err, cerr)
	}}
	conn, err := lc.ListenPacket(context.Background(), "udp4", ":67")
	if err != nil {
		return nil, fmt.Errorf("DHCP server: %w", err)
	}
	s := &Server{
		conn: conn, subnet: gateway, lease: lease, done: make(chan struct{}), next: gateway.Addr().Next(),
		owners: map[netip.Addr]string{}, held: map[string]bool{}, heard: map[string]int{},
	}
	go s.serve()
	return s, nil
}

// Close ends the server.
func (s *Server) Close() error {
	err := s.conn.Close()
	<-s.done
	return err
}

// Answer has the server answer in that mode, with leases of that length, from now on;
// 0 is the length that there was.
func (s *Server) Answer(m Mode, lease time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mode, s.lease = m, cmp.Or(lease, s.lease)
}

// Heard is how many messages of that kind came from a MAC address, or from all: kinds
// are discover, request, renew, release.
func (s *Server) Heard(kind, mac string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.heard[kind+" "+mac]
}

// MAC is who has, or had last, an address.
func (s *Server) MAC(a netip.Addr) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.owners[a]
}

// Held says whether a MAC address has a lease that was not released.
func (s *Server) Held(mac string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held[mac]
}

func (s *Server) serve() {
	defer close(s.done)
	buf := make([]byte, 1500)
	for {
		n, _, err := s.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		m, err := dhcpv4.FromBytes(buf[:n])
		if err != nil {
			continue
		}
		for _, b := range s.answer(m) {
			to := net.IPv4bcast
			if !m.IsBroadcast() && !m.ClientIPAddr.IsUnspecified() {
				to = m.ClientIPAddr
			}
			_, _ = s.conn.WriteTo(b, &net.UDPAddr{IP: to, Port: 68})
		}
	}
}

func (s *Server) answer(m *dhcpv4.DHCPv4) [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	mac := m.ClientHWAddr.String()
	kind := strings.ToLower(m.MessageType().String())
	if m.MessageType() == dhcpv4.MessageTypeRequest && !m.ClientIPAddr.IsUnspecified() {
		kind = "renew"
	}
	s.heard[kind+" "+mac]++
	s.heard[kind+" "]++
	if kind == "release" {
		delete(s.held, mac)
		return nil
	}
	if s.mode == Silent {
		return nil
	}
	reply, err := dhcpv4.NewReplyFromRequest(m, dhcpv4.WithOption(dhcpv4.OptServerIdentifier(s.subnet.Addr().AsSlice())))
	if err != nil {
		return nil
	}
	mask := net.CIDRMask(s.subnet.Bits(), 32)
	for _, o := range []dhcpv4.Option{dhcpv4.OptSubnetMask(mask), dhcpv4.OptRouter(s.subnet.Addr().AsSlice()), dhcpv4.OptIPAddressLeaseTime(s.lease)} {
		reply.UpdateOption(o)
	}
	reply.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeOffer))
	if m.MessageType() == dhcpv4.MessageTypeRequest {
		reply.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeAck))
	}
	if s.mode == Garbage {
		return s.garbage(reply)
	}
	a := s.addressOf(mac)
	if s.mode == Other {
		if kind == "renew" {
			reply.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeNak))
			return [][]byte{reply.ToBytes()}
		}
		a = a.Next()
	}
	reply.YourIPAddr = a.AsSlice()
	if m.MessageType() == dhcpv4.MessageTypeRequest {
		s.held[mac] = true
	}
	return [][]byte{reply.ToBytes()}
}

// garbage is what a client must not believe: noise, half a message, and offers of
// addresses that are none, with masks, gateways and times that make no sense.
func (s *Server) garbage(reply *dhcpv4.DHCPv4) [][]byte {
	good := s.subnet.Addr().Next().AsSlice()
	whole := reply.ToBytes()
	out := [][]byte{[]byte("no DHCP at all"), whole[:len(whole)/2], make([]byte, 1200)}
	for _, wrong := range []func(){
		func() { reply.YourIPAddr = net.IPv4(127, 0, 0, 1) },
		func() { reply.YourIPAddr = net.IPv4(224, 0, 0, 1) },
		func() { reply.YourIPAddr = good; reply.UpdateOption(dhcpv4.OptSubnetMask(net.IPMask{255, 0, 255, 0})) },
		func() {
			reply.UpdateOption(dhcpv4.OptSubnetMask(net.CIDRMask(24, 32)))
			reply.UpdateOption(dhcpv4.OptRouter(net.IPv4(192, 0, 2, 1)))
		},
		func() {
			reply.UpdateOption(dhcpv4.OptRouter(s.subnet.Addr().AsSlice()))
			reply.UpdateOption(dhcpv4.OptIPAddressLeaseTime(0))
		},
	} {
		wrong()
		out = append(out, reply.ToBytes())
	}
	return out
}

// addressOf gives a MAC address the address that it had, or the next one.
func (s *Server) addressOf(mac string) netip.Addr {
	for a, m := range s.owners {
		if m == mac {
			return a
		}
	}
	a := s.next
	s.owners[a], s.next = mac, a.Next()
	return a
}
