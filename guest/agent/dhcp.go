//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/guest/api"
)

// The client of RFC 2131 that a pod's NIC behind macOS's NAT needs. Messages are the
// library's; the way they go is ours, because it is a packet socket: before there is
// an address no other can be answered, and afterwards no rule or route of a container
// is in the way.
const (
	// acquireTimeout bounds the first lease. macOS starts its server with the first
	// machine, which takes a second or two.
	acquireTimeout = 20 * time.Second
	// renewTimeout bounds each of the two ways to keep an address.
	renewTimeout = 4 * time.Second
	// firstRetry doubles until it is lastRetry. RFC 2131 begins with 4 s, for a
	// network with many clients and collisions; this one is a cable to the host.
	firstRetry = 500 * time.Millisecond
	lastRetry  = 4 * time.Second
	// shortestLease is what the host can still renew in time: it looks every 5 s.
	shortestLease = 10

	dhcpServerPort, dhcpClientPort = 67, 68
	maxPacket                      = 1500
)

// lease is what a server granted.
type lease struct {
	address netip.Prefix
	gateway netip.Addr
	seconds uint32
	server  netip.Addr
	// serverMAC is who sent it; nothing needs to be resolved to answer.
	serverMAC net.HardwareAddr
}

func (l *lease) api() *api.Lease {
	return &api.Lease{Address: l.address.String(), Gateway: l.gateway.String(), Seconds: l.seconds}
}

// leaseOf checks what a server says before anything is done with it.
func leaseOf(m *dhcpv4.DHCPv4, from net.HardwareAddr) (*lease, error) {
	l := &lease{serverMAC: from}
	l.address = netip.PrefixFrom(ipv4(m.YourIPAddr), -1)
	if a := l.address.Addr(); !a.IsGlobalUnicast() {
		return nil, fmt.Errorf("%v is no address for a pod", a)
	}
	mask := m.SubnetMask()
	ones, size := mask.Size()
	// A subnet of two addresses has no room for a pod and its gateway, and none is
	// larger than 10.0.0.0/8.
	if size != 32 || ones < 8 || ones > 30 {
		return nil, fmt.Errorf("%v is no subnet mask for a pod", mask)
	}
	l.address = netip.PrefixFrom(l.address.Addr(), ones)
	if routers := m.Router(); len(routers) > 0 {
		l.gateway = ipv4(routers[0])
	}
	if !l.address.Contains(l.gateway) || l.gateway == l.address.Addr() {
		return nil, fmt.Errorf("the gateway %v is not in the subnet of %v", l.gateway, l.address)
	}
	l.server = ipv4(m.ServerIdentifier())
	if !l.server.IsGlobalUnicast() {
		return nil, fmt.Errorf("the server's identifier is %v", l.server)
	}
	l.seconds = uint32(m.IPAddressLeaseTime(0) / time.Second)
	if l.seconds < shortestLease {
		return nil, fmt.Errorf("a lease of %d s can't be renewed in time", l.seconds)
	}
	return l, nil
}

// ipv4 is the zero Addr for what is none.
func ipv4(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip.To4())
	return a
}

// dhcpLink is a NIC in the network namespace of its socket.
type dhcpLink struct {
	fd    int
	index int
	mac   net.HardwareAddr
	// offered is what was asked for last: the server may have granted it, whatever
	// came back.
	offered *lease
}

// openDHCP makes the socket of a NIC in the caller's network namespace, or in netns.
func openDHCP(netns, index int, mac net.HardwareAddr) (*dhcpLink, error) {
	const kind = unix.SOCK_DGRAM // without the Ethernet header
	var fd int
	var err error
	if netns < 0 {
		fd, err = unix.Socket(unix.AF_PACKET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	} else {
		fd, err = socketIn(netns, unix.AF_PACKET, kind, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	// Protocol 0 receives nothing yet: first the filter, so that the pod's own
	// traffic doesn't fill the buffer.
	if err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &dhcpFilter); err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_IP), Ifindex: index})
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	return &dhcpLink{fd: fd, index: index, mac: mac}, nil
}

func (d *dhcpLink) close() { unix.Close(d.fd) }

// dhcpFilter passes whole UDP datagrams to dhcpClientPort.
var dhcpFilter = unix.SockFprog{Len: uint16(len(dhcpProgram)), Filter: &dhcpProgram[0]}

var dhcpProgram = [...]unix.SockFilter{
	{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 9},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_UDP, Jf: 6},
	{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 6},
	{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: 0x3fff, Jt: 4}, // a fragment
	{Code: unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH, K: 0},
	{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_IND, K: 2},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: dhcpClientPort, Jf: 1},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0x40000},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0},
}

func networkOrder(v uint16) uint16 { return bits.ReverseBytes16(v) }

var broadcastMAC = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// send sends a message from an address, or from none yet.
func (d *dhcpLink) send(m *dhcpv4.DHCPv4, from, to netip.Addr, mac net.HardwareAddr) error {
	sa := &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_IP), Ifindex: d.index, Halen: 6}
	copy(sa.Addr[:], mac)
	return unix.Sendto(d.fd, udpPacket(from, to, m.ToBytes()), 0, sa)
}

// exchange sends m to everybody, again and again, until accept takes an answer, which
// may be from any server. It returns accept's error, or ctx's with what came instead.
func (d *dhcpLink) exchange(ctx context.Context, m *dhcpv4.DHCPv4, from netip.Addr, accept func(*dhcpv4.DHCPv4, net.HardwareAddr) (bool, error)) error {
	var refused error
	buf := make([]byte, maxPacket)
	for wait := firstRetry; ctx.Err() == nil; wait = min(2*wait, lastRetry) {
		// A link that has just come up may not take packets yet.
		if err := d.send(m, from, netip.AddrFrom4([4]byte{255, 255, 255, 255}), broadcastMAC); err != nil {
			refused = err
		}
		for until := time.Now().Add(wait); ctx.Err() == nil; {
			// 100 ms at a time, to see whether ctx has ended.
			left := time.Until(until)
			if left <= 0 {
				break
			}
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}}, int(min(left, 100*time.Millisecond).Milliseconds())+1)
			if err != nil && err != unix.EINTR {
				return err
			}
			n, sender, err := unix.Recvfrom(d.fd, buf, 0)
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				refused = err
				continue
			}
			answer, err := dhcpAnswer(buf[:n], m)
			if err != nil {
				refused = err
				continue
			}
			var mac net.HardwareAddr
			if ll, ok := sender.(*unix.SockaddrLinklayer); ok && ll.Halen == 6 {
				mac = net.HardwareAddr(ll.Addr[:6])
			}
			switch ok, err := accept(answer, mac); {
			case ok:
				return err
			case err != nil:
				refused = err
			}
		}
	}
	if refused != nil {
		return fmt.Errorf("no usable answer to %v: %w", m.MessageType(), refused)
	}
	return fmt.Errorf("no answer to %v", m.MessageType())
}

// dhcpAnswer parses what may be an answer to m.
func dhcpAnswer(packet []byte, m *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, error) {
	b, err := udpPayload(packet, dhcpClientPort)
	if err != nil {
		return nil, err
	}
	a, err := dhcpv4.FromBytes(b)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%d bytes that are no DHCP message: %w", len(b), err)
	case a.OpCode != dhcpv4.OpcodeBootReply || a.TransactionID != m.TransactionID || a.ClientHWAddr.String() != m.ClientHWAddr.String():
		return nil, errors.New("an answer to somebody else")
	}
	return a, nil
}

// acquire gets a lease, of the address want if that is one. After an error there is
// none.
func (d *dhcpLink) acquire(ctx context.Context, want netip.Addr) (*lease, error) {
	start := time.Now()
	for {
		l, err := d.tryAcquire(ctx, want)
		switch {
		case err == nil:
			return l, nil
		case ctx.Err() == nil && errors.Is(err, errNAK):
			// The offer was withdrawn: RFC 2131 begins anew.
			select {
			case <-time.After(firstRetry):
				continue
			case <-ctx.Done():
			}
		}
		return nil, unavailablef("%w in %v", err, time.Since(start).Round(100*time.Millisecond))
	}
}

var errNAK = errors.New("the server takes its offer back")

func (d *dhcpLink) tryAcquire(ctx context.Context, want netip.Addr) (*lease, error) {
	discover, err := dhcpv4.NewDiscovery(d.mac, dhcpv4.WithBroadcast(true))
	if err != nil {
		return nil, err
	}
	if want.IsValid() {
		discover.UpdateOption(dhcpv4.OptRequestedIPAddress(want.AsSlice()))
	}
	var offer *dhcpv4.DHCPv4
	var offered *lease
	if err := d.exchange(ctx, discover, netip.IPv4Unspecified(), func(m *dhcpv4.DHCPv4, from net.HardwareAddr) (bool, error) {
		if m.MessageType() != dhcpv4.MessageTypeOffer {
			return false, nil
		}
		l, err := leaseOf(m, from)
		if err == nil && want.IsValid() && l.address.Addr() != want {
			err = fmt.Errorf("%v is offered instead of %v", l.address.Addr(), want)
		}
		offer, offered = m, l
		return err == nil, err
	}); err != nil {
		return nil, err
	}
	d.offered = offered
	request, err := dhcpv4.NewRequestFromOffer(offer, dhcpv4.WithBroadcast(true))
	if err != nil {
		return nil, err
	}
	return d.request(ctx, request, netip.IPv4Unspecified(), ipv4(offer.YourIPAddr))
}

// request asks for one address and no other.
func (d *dhcpLink) request(ctx context.Context, m *dhcpv4.DHCPv4, from, want netip.Addr) (granted *lease, err error) {
	err = d.exchange(ctx, m, from, func(a *dhcpv4.DHCPv4, from net.HardwareAddr) (bool, error) {
		switch a.MessageType() {
		case dhcpv4.MessageTypeNak:
			return true, errNAK
		case dhcpv4.MessageTypeAck:
		default:
			return false, nil
		}
		l, err := leaseOf(a, from)
		if err == nil && l.address.Addr() != want {
			err = fmt.Errorf("%v is granted instead of %v", l.address.Addr(), want)
		}
		granted = l
		return err == nil, err
	})
	return granted, err
}

// renew asks for more time, as in the rebinding state: every server may answer. A
// server that has forgotten the lease keeps silent or refuses, and is asked for the
// same address anew; each of the two has so long.
func (d *dhcpLink) renew(ctx context.Context, old *lease, each time.Duration) (*lease, error) {
	self := old.address.Addr()
	m, err := dhcpv4.New(dhcpv4.WithHwAddr(d.mac), dhcpv4.WithMessageType(dhcpv4.MessageTypeRequest), dhcpv4.WithClientIP(self.AsSlice()),
		dhcpv4.WithRequestedOptions(dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter))
	if err != nil {
		return nil, err
	}
	rctx, cancel := context.WithTimeout(ctx, each)
	l, err := d.request(rctx, m, self, self)
	cancel()
	if err != nil {
		nak := errors.Is(err, errNAK)
		actx, cancel := context.WithTimeout(ctx, each)
		defer cancel()
		var again error
		if l, again = d.acquire(actx, self); again != nil {
			err = fmt.Errorf("%w; then %w", err, again)
			if nak {
				return nil, preconditionf("the DHCP server doesn't let the pod keep %v: %w", self, err)
			}
			return nil, unavailablef("renew the lease of %v: %w", self, err)
		}
	}
	if l.address != old.address || l.gateway != old.gateway {
		return nil, preconditionf("the DHCP server renews %v, gateway %v, as %v, gateway %v", old.address, old.gateway, l.address, l.gateway)
	}
	return l, nil
}

// release says that the address isn't needed any more.
func (d *dhcpLink) release(l *lease) error {
	self := l.address.Addr()
	m, err := dhcpv4.New(dhcpv4.WithHwAddr(d.mac), dhcpv4.WithMessageType(dhcpv4.MessageTypeRelease), dhcpv4.WithClientIP(self.AsSlice()),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(l.server.AsSlice())))
	if err != nil {
		return err
	}
	mac := l.serverMAC
	if mac == nil {
		mac = broadcastMAC
	}
	return d.send(m, self, l.server, mac)
}

// udpPacket is an IPv4 packet from the DHCP client's port to the server's.
func udpPacket(from, to netip.Addr, payload []byte) []byte {
	const ipHeader, udpHeader = 20, 8
	b := make([]byte, ipHeader+udpHeader, ipHeader+udpHeader+len(payload))
	b = append(b, payload...)
	b[0] = 4<<4 | ipHeader/4
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	b[8], b[9] = 64, unix.IPPROTO_UDP
	copy(b[12:], from.AsSlice())
	copy(b[16:], to.AsSlice())
	udp := b[ipHeader:]
	binary.BigEndian.PutUint16(udp, dhcpClientPort)
	binary.BigEndian.PutUint16(udp[2:], dhcpServerPort)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	pseudo := checksum(checksum(0, b[12:20]), []byte{0, unix.IPPROTO_UDP, udp[4], udp[5]})
	sum := ^fold(checksum(pseudo, udp))
	if sum == 0 {
		sum = 0xffff // 0 means none
	}
	binary.BigEndian.PutUint16(udp[6:], sum)
	binary.BigEndian.PutUint16(b[10:], ^fold(checksum(0, b[:ipHeader])))
	return b
}

func checksum(sum uint32, b []byte) uint32 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	return sum
}

func fold(sum uint32) uint16 {
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// udpPayload unpacks an IPv4 packet with a UDP datagram to port. The checksums are
// not looked at: a host that hands packets to a machine leaves them to the hardware,
// which isn't there.
func udpPayload(packet []byte, port uint16) ([]byte, error) {
	errShort := fmt.Errorf("%d bytes that are no UDP datagram", len(packet))
	if len(packet) < 20 || packet[0]>>4 != 4 {
		return nil, errShort
	}
	header, total := int(packet[0]&0xf)*4, int(binary.BigEndian.Uint16(packet[2:]))
	if header < 20 || total > len(packet) || total < header+8 || packet[9] != unix.IPPROTO_UDP {
		return nil, errShort
	}
	udp := packet[header:total]
	size := int(binary.BigEndian.Uint16(udp[4:]))
	if size < 8 || size > len(udp) || binary.BigEndian.Uint16(udp[2:]) != port {
		return nil, errShort
	}
	return udp[8:size], nil
}

// announce tells who is on the link of a NIC that an address is now the NIC's
// (RFC 5227, section 3): the host, or another pod, may have it in mind as that of a
// pod that is gone.
func announce(netns, index int, mac net.HardwareAddr, a netip.Addr) error {
	fd, err := socketIn(netns, unix.AF_PACKET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	b := []byte{0, 1, 8, 0, 6, 4, 0, 1} // Ethernet, IPv4, their lengths, request
	b = append(append(b, mac...), a.AsSlice()...)
	b = append(append(b, make([]byte, 6)...), a.AsSlice()...)
	to := &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ARP), Ifindex: index, Halen: 6}
	copy(to.Addr[:], broadcastMAC)
	return unix.Sendto(fd, b, 0, to)
}
