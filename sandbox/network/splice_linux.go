package network

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	tapName   = "tap0"
	tunDevice = "/dev/net/tun"
	// IFF_VNET_HDR: each frame carries a virtio_net_hdr, so that checksum and
	// segmentation offload of the guest and of the veth reach each other.
	tapFlags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
)

// makeCable makes a pod's end of the cable. Runs in the namespace, first of all.
func makeCable() error {
	quietNetns()
	if err := createTap(); err != nil {
		return err
	}
	writeIPv6Conf(tapName+"/disable_ipv6", "1")
	return nil
}

// quietNetns keeps the kernel of a pod's namespace from speaking IPv6 of its
// own accord (router solicitations, autoconfigured addresses): the guest
// behind the same MAC does. Runs in the namespace, before it has interfaces.
func quietNetns() {
	for key, value := range map[string]string{
		"default/accept_ra":            "0",
		"default/autoconf":             "0",
		"default/router_solicitations": "0",
	} {
		writeIPv6Conf(key, value)
	}
}

// writeIPv6Conf is best effort: there may be no IPv6, and /proc/sys is
// read-only in some containers, which costs stray packets and nothing else.
func writeIPv6Conf(key, value string) {
	path := "/proc/sys/net/ipv6/conf/" + key
	err := os.WriteFile(path, []byte(value), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		klog.V(2).InfoS("Could not set a sysctl of a pod's network namespace", "path", path, "err", err)
	}
}

// splice joins the tap to the interface that CNI made, frame by frame and both
// ways. Runs in the pod's namespace.
//
// The interface keeps its addresses: the redirect takes every frame before the
// namespace's own stack sees it, so they answer nobody, but plugins read them
// back on DEL and CHECK (the bridge plugin finds the masquerading rules that it
// has to remove by them).
func splice() (netlink.Link, error) {
	veth, err := netlink.LinkByName(InterfaceName)
	if err != nil {
		return nil, fmt.Errorf("find the interface %s that CNI should have made: %w", InterfaceName, err)
	}
	tap, err := netlink.LinkByName(tapName)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", tapName, err)
	}
	if err := netlink.LinkSetMTU(tap, veth.Attrs().MTU); err != nil {
		return nil, fmt.Errorf("set MTU %d on %s: %w", veth.Attrs().MTU, tapName, err)
	}
	for _, dir := range [][2]netlink.Link{{veth, tap}, {tap, veth}} {
		if err := redirect(dir[0], dir[1]); err != nil {
			return nil, err
		}
	}
	// Up last: no frame goes astray before both directions are there.
	for _, l := range []netlink.Link{veth, tap} {
		if err := netlink.LinkSetUp(l); err != nil {
			return nil, fmt.Errorf("set %s up: %w", l.Attrs().Name, err)
		}
	}
	return veth, nil
}

// redirect sends every frame that arrives at one link out of another. u32
// because kernels for small VMs lack matchall and flower.
func redirect(from, to netlink.Link) error {
	handle := netlink.MakeHandle(0xffff, 0)
	err := netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from.Attrs().Index, Handle: handle, Parent: netlink.HANDLE_INGRESS,
	}})
	if err != nil {
		return fmt.Errorf("add ingress qdisc to %s (kernel module sch_ingress): %w", from.Attrs().Name, err)
	}
	action := netlink.NewMirredAction(to.Attrs().Index)
	action.MirredAction = netlink.TCA_EGRESS_REDIR
	err = netlink.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: from.Attrs().Index, Parent: handle, Priority: 1, Protocol: unix.ETH_P_ALL},
		Actions:     []netlink.Action{action}, // no selector: match all
	})
	if err != nil {
		return fmt.Errorf("redirect %s to %s (kernel modules cls_u32, act_mirred): %w", from.Attrs().Name, to.Attrs().Name, err)
	}
	return nil
}

// createTap makes the tap persistent, so that it waits for the VMM and
// outlives it; it dies with the namespace.
func createTap() error {
	f, err := attachTap()
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("make %s persistent: %w", tapName, err)
	}
	return nil
}

// attachTap opens the namespace's tap, making it if need be.
func attachTap() (*os.File, error) {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s (modprobe tun; in a container pass the device in): %w", tunDevice, err)
	}
	ifr, err := unix.NewIfreq(tapName)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	ifr.SetUint16(tapFlags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		if err == unix.EBUSY {
			return nil, fmt.Errorf("attach to %s: another VMM has it open: %w", tapName, errdefs.ErrAlreadyExists)
		}
		return nil, fmt.Errorf("attach to %s: %w", tapName, err)
	}
	// Only now: the file must be pollable when the runtime looks at it, and a
	// tun file without a device is not.
	return os.NewFile(uintptr(fd), tapName), nil
}

// linkRoutes reads the routes of the pod's interface. The kernel's table and
// not the CNI result's is the truth: plugins make routes (to a gateway outside
// the subnet, say) that their results don't mention.
func linkRoutes(link netlink.Link) ([]Route, error) {
	list, err := netlink.RouteList(link, netlink.FAMILY_ALL) // main table
	if err != nil {
		return nil, fmt.Errorf("list routes of %s: %w", link.Attrs().Name, err)
	}
	var routes []Route
	for _, r := range list {
		route := Route{OnLink: r.Flags&int(netlink.FLAG_ONLINK) != 0, Metric: r.Priority}
		gw := r.Gw
		if via, ok := r.Via.(*netlink.Via); ok && gw == nil {
			gw = via.Addr // IPv4 by way of an IPv6 gateway
		}
		if len(gw) > 0 {
			route.Gateway, _ = netip.AddrFromSlice(gw)
			route.Gateway = route.Gateway.Unmap()
		}
		if len(r.Src) > 0 {
			route.Source, _ = netip.AddrFromSlice(r.Src)
			route.Source = route.Source.Unmap()
		}
		switch {
		case r.Dst != nil:
			route.Destination, err = prefixOf(*r.Dst)
			if err != nil {
				return nil, fmt.Errorf("route of %s: %w", link.Attrs().Name, err)
			}
		case r.Family == unix.AF_INET6:
			route.Destination = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		default:
			route.Destination = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		// The guest's kernel makes these by itself.
		if a := route.Destination.Addr(); a.IsLinkLocalUnicast() && a.Is6() || a.IsMulticast() {
			continue
		}
		routes = append(routes, route)
	}
	// A gateway has to be reachable before a route by way of it is accepted.
	slices.SortStableFunc(routes, func(a, b Route) int {
		if a.Gateway.IsValid() != b.Gateway.IsValid() {
			if b.Gateway.IsValid() {
				return -1
			}
			return 1
		}
		return cmp.Compare(b.Destination.Bits(), a.Destination.Bits())
	})
	return routes, nil
}

func prefixOf(n net.IPNet) (netip.Prefix, error) {
	ip := n.IP
	if v4 := ip.To4(); v4 != nil && len(n.Mask) == net.IPv4len {
		ip = v4
	}
	a, ok := netip.AddrFromSlice(ip)
	ones, bits := n.Mask.Size()
	if !ok || bits != a.BitLen() {
		return netip.Prefix{}, fmt.Errorf("address %s is malformed: %w", n.String(), errdefs.ErrInvalidArgument)
	}
	return netip.PrefixFrom(a, ones), nil
}

// makeStandIn gives a namespace an interface with the pod's name and addresses.
// A plugin's DEL learns from it what to clean up when the pod's own namespace
// is gone. Runs in the namespace.
func makeStandIn(addrs []netip.Prefix) error {
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: InterfaceName}, PeerName: "peer"}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("create stand-in %s: %w", InterfaceName, err)
	}
	for _, p := range addrs {
		err := netlink.AddrAdd(veth, &netlink.Addr{
			IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
			Flags: unix.IFA_F_NODAD,
		})
		if err != nil {
			return fmt.Errorf("add %s to stand-in %s: %w", p, InterfaceName, err)
		}
	}
	return nil
}
