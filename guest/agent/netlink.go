//go:build linux && (amd64 || arm64)

package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// podInterface is a NIC in the pod's network namespace.
type podInterface struct {
	Index     int              `json:"index"`
	Name      string           `json:"name"`
	SetMAC    net.HardwareAddr `json:"setMAC,omitempty"`
	MTU       uint32           `json:"mtu,omitempty"`
	Addresses []netip.Prefix   `json:"addresses,omitempty"`

	mac net.HardwareAddr // PID 1's: what it was found by
}

// podRoute has an invalid Gateway for a destination that is on the link.
type podRoute struct {
	Destination netip.Prefix `json:"destination"`
	Gateway     netip.Addr   `json:"gateway"`
	Interface   string       `json:"interface,omitempty"`
	Metric      uint32       `json:"metric,omitempty"`
	Source      netip.Addr   `json:"source"`
}

// maxLinks bounds the search for a NIC: guests have two and the kernel's own devices.
const maxLinks = 64

// linkByMAC finds a NIC of the caller's network namespace. It asks for one after the
// other (netdevice(7)): a list of all with all that there is to know of them takes an
// emulated guest 20 ms.
func linkByMAC(mac string) (net.Interface, error) {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		return net.Interface{}, invalidf("interface: %w", err)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return net.Interface{}, os.NewSyscallError("netlink socket", err)
	}
	defer unix.Close(fd)
	var have []string
	for index := 1; index <= maxLinks; index++ {
		// struct ifreq: the name, and a union that is an index or a struct sockaddr.
		var r struct {
			name  [unix.IFNAMSIZ]byte
			union [24]byte
		}
		binary.NativeEndian.PutUint32(r.union[:], uint32(index))
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGIFNAME, uintptr(unsafe.Pointer(&r))); e != 0 {
			continue // no such index
		}
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGIFHWADDR, uintptr(unsafe.Pointer(&r))); e != 0 {
			return net.Interface{}, os.NewSyscallError("ioctl(SIOCGIFHWADDR)", e)
		}
		l := net.Interface{Index: index, Name: unix.ByteSliceToString(r.name[:]), HardwareAddr: bytes.Clone(r.union[2:8])}
		if bytes.Equal(l.HardwareAddr, hw) {
			return l, nil
		}
		have = append(have, l.Name+" "+l.HardwareAddr.String())
	}
	return net.Interface{}, notFoundf("no network interface with address %s in the guest (has %q)", hw, have)
}

// moveLink moves a NIC into the network namespace of a process.
func moveLink(index, pid int) error {
	return setLink(index, 0, attr32(unix.IFLA_NET_NS_PID, uint32(pid)))
}

// setLoopback brings the caller's lo up; its addresses come by themselves.
func setLoopback() error {
	const lo = 1 // LOOPBACK_IFINDEX of Linux's net_namespace.h
	return setLink(lo, unix.IFF_UP, nil)
}

func setUpInterfaces(interfaces []podInterface) error {
	if err := setLoopback(); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	for _, i := range interfaces {
		var attrs []byte
		attrs = append(attrs, attribute(unix.IFLA_IFNAME, append([]byte(i.Name), 0))...)
		if i.MTU != 0 {
			attrs = append(attrs, attr32(unix.IFLA_MTU, i.MTU)...)
		}
		if i.SetMAC != nil {
			attrs = append(attrs, attribute(unix.IFLA_ADDRESS, i.SetMAC)...)
		}
		if err := setLink(i.Index, 0, attrs); err != nil {
			return fmt.Errorf("interface %s: set name, MTU %d and MAC %q: %w", i.Name, i.MTU, i.SetMAC, err)
		}
		// Addresses first: the link comes up with them, and IPv6 makes none of
		// its own before accept_ra could be turned off by a sysctl.
		for _, a := range i.Addresses {
			if err := addAddress(i.Index, a); err != nil {
				return fmt.Errorf("interface %s: add address %s: %w", i.Name, a, err)
			}
		}
		if err := setLink(i.Index, unix.IFF_UP, nil); err != nil {
			return fmt.Errorf("bring %s up: %w", i.Name, err)
		}
	}
	return nil
}

func setUpRoutes(routes []podRoute, interfaces []podInterface) error {
	for _, r := range routes {
		i := slices.IndexFunc(interfaces, func(in podInterface) bool { return in.Name == r.Interface })
		if i < 0 {
			return notFoundf("route to %s: the pod has no interface %q", r.Destination, r.Interface)
		}
		if err := addRoute(r, interfaces[i].Index); err != nil {
			return fmt.Errorf("add route to %s by way of %s: %w", r.Destination, r.Gateway, err)
		}
	}
	return nil
}

func setLink(index int, flags uint32, attrs []byte) error {
	m := unix.IfInfomsg{Family: unix.AF_UNSPEC, Index: int32(index), Flags: flags, Change: flags}
	return netlink(unix.RTM_NEWLINK, unix.NLM_F_ACK, bytesOf(&m), attrs)
}

func addAddress(index int, p netip.Prefix) error {
	m := unix.IfAddrmsg{Family: family(p.Addr()), Prefixlen: uint8(p.Bits()), Index: uint32(index)}
	ip := p.Addr().AsSlice()
	attrs := append(attribute(unix.IFA_LOCAL, ip), attribute(unix.IFA_ADDRESS, ip)...)
	// The host says which routes there are: where every packet goes to a gateway,
	// the subnet is not on the link.
	flags := uint32(unix.IFA_F_NOPREFIXROUTE)
	if p.Addr().Is6() {
		// The host gave the address out: nobody else can have it, and duplicate
		// detection would keep it unusable for a second.
		flags |= unix.IFA_F_NODAD
	}
	attrs = append(attrs, attr32(unix.IFA_FLAGS, flags)...)
	if p.Addr().Is4() && p.Bits() < 31 {
		broadcast := p.Masked().Addr().As4()
		host := binary.BigEndian.Uint32(broadcast[:]) | uint32(1)<<(32-p.Bits()) - 1
		attrs = append(attrs, attribute(unix.IFA_BROADCAST, binary.BigEndian.AppendUint32(nil, host))...)
	}
	return netlink(unix.RTM_NEWADDR, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_REPLACE, bytesOf(&m), attrs)
}

func addRoute(r podRoute, index int) error {
	m := unix.RtMsg{
		Family:   family(r.Destination.Addr()),
		Dst_len:  uint8(r.Destination.Bits()),
		Table:    unix.RT_TABLE_MAIN,
		Protocol: unix.RTPROT_STATIC,
		Scope:    unix.RT_SCOPE_LINK,
		Type:     unix.RTN_UNICAST,
	}
	var attrs []byte
	if r.Destination.Bits() > 0 {
		attrs = attribute(unix.RTA_DST, r.Destination.Masked().Addr().AsSlice())
	}
	if r.Gateway.IsValid() {
		m.Scope = unix.RT_SCOPE_UNIVERSE
		// Gateways outside the address's subnet are usual (/32 addresses).
		m.Flags = unix.RTNH_F_ONLINK
		if gateway := r.Gateway.AsSlice(); family(r.Gateway) == m.Family {
			attrs = append(attrs, attribute(unix.RTA_GATEWAY, gateway)...)
		} else { // IPv4 by way of an IPv6 neighbour
			via := binary.NativeEndian.AppendUint16(nil, uint16(family(r.Gateway)))
			attrs = append(attrs, attribute(unix.RTA_VIA, append(via, gateway...))...)
		}
	}
	if r.Source.IsValid() {
		attrs = append(attrs, attribute(unix.RTA_PREFSRC, r.Source.AsSlice())...)
	}
	attrs = append(attrs, attr32(unix.RTA_OIF, uint32(index))...)
	if r.Metric != 0 {
		attrs = append(attrs, attr32(unix.RTA_PRIORITY, r.Metric)...)
	}
	err := netlink(unix.RTM_NEWROUTE, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL, bytesOf(&m), attrs)
	if errors.Is(err, unix.EEXIST) {
		// The address brought it, or the host named it twice.
		return nil
	}
	return err
}

func family(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func bytesOf[T any](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

func attribute(typ uint16, value []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func attr32(typ uint16, v uint32) []byte {
	return attribute(typ, binary.NativeEndian.AppendUint32(nil, v))
}

var netlinkSeq atomic.Uint32

// netlink sends one rtnetlink request in the calling thread's network namespace
// and waits for its acknowledgement.
func netlink(typ, flags uint16, body, attrs []byte) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return os.NewSyscallError("netlink socket", err)
	}
	defer unix.Close(fd)
	// The kernel answers at once; the bound is for a kernel that doesn't.
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
	seq := netlinkSeq.Add(1)
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)+len(attrs)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags|unix.NLM_F_REQUEST)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(append(b, body...), attrs...)
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("netlink send", err)
	}
	answer := make([]byte, 8192)
	for {
		n, _, err := unix.Recvfrom(fd, answer, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("netlink receive", err)
		}
		if n < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint32(answer[8:]) != seq {
			continue
		}
		if binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
			continue
		}
		if code := int32(binary.NativeEndian.Uint32(answer[unix.NLMSG_HDRLEN:])); code != 0 {
			return unix.Errno(-code)
		}
		return nil
	}
}
