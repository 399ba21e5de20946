//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/guest/api"
)

// dhcp is the pod's NIC whose address is leased.
type dhcp struct {
	index int
	mac   net.HardwareAddr

	mu    sync.Mutex // guards what follows
	lease *lease
	busy  bool
}

// startDHCP leases the address of the i-th interface and writes into the request and
// the setup what the host would have said of an address that it gave out itself. The
// NIC is in the guest's own network namespace, and no container is there yet.
//
// The subnet is on two links where there is a second NIC for the other pods: the
// host's NAT lets a machine reach nobody but the host. Then the gateway has a route
// of its own, and the kernel's checks on the way back are off.
func startDHCP(ctx context.Context, r *api.SetUpSandboxRequest, setup *podSetup, i int) (*dhcp, error) {
	link, err := linkByMAC(r.Interfaces[i].Mac)
	if err != nil {
		return nil, err
	}
	if err := setLink(link.Index, unix.IFF_UP, nil); err != nil {
		return nil, fmt.Errorf("bring %s up: %w", link.Name, err)
	}
	socket, err := openDHCP(-1, link.Index, link.HardwareAddr)
	if err != nil {
		return nil, err
	}
	defer socket.close()
	ctx, cancel := context.WithTimeout(ctx, acquireTimeout)
	defer cancel()
	l, err := socket.acquire(ctx, netip.Addr{})
	d := &dhcp{index: link.Index, mac: link.HardwareAddr, lease: socket.offered}
	if err != nil {
		return d, fmt.Errorf("the host's DHCP server gives the pod no address: %w; see that it runs and that no firewall keeps it from answering (macOS: allow /usr/libexec/bootpd)", err)
	}
	eth := &setup.Interfaces[i]
	eth.Addresses = []netip.Prefix{l.address}
	r.Interfaces[i].Addresses = []string{l.address.String()}
	self, others := l.address.Addr(), eth.Name
	for j, in := range r.Interfaces {
		if in.DhcpPeers {
			others = setup.Interfaces[j].Name
		}
	}
	setup.Routes = append([]podRoute{
		{Destination: netip.PrefixFrom(l.gateway, 32), Interface: eth.Name, Source: self},
		{Destination: l.address.Masked(), Interface: others, Source: self},
		{Destination: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Gateway: l.gateway, Interface: eth.Name, Source: self},
	}, setup.Routes...)
	for _, name := range []string{"all", eth.Name, others} {
		if _, ok := r.Sysctls["net.ipv4.conf."+name+".rp_filter"]; !ok {
			setup.Sysctls["net.ipv4.conf."+name+".rp_filter"] = "0"
		}
	}
	d.lease = l
	return d, nil
}

// announceAfter are the pauses before each announcement but the first. A link that has just come up
// drops what is sent until the kernel's link watch has seen it, and says nothing, and so
// does a bridge's port on its other side: one announcement alone is lost now and then,
// and whoever has the address in mind as another's doesn't reach the pod for as long as
// that lasts.
var announceAfter = []time.Duration{100 * time.Millisecond, 400 * time.Millisecond, 1500 * time.Millisecond}

// announce says on every link of the pod whose the address is now: once, and again in
// the background.
func (d *dhcp) announce(netns *os.File, setup *podSetup, failed func(error)) error {
	self := d.lease.address.Addr()
	say := func() error {
		for _, in := range setup.Interfaces {
			if err := announce(int(netns.Fd()), in.Index, in.mac, self); err != nil {
				return fmt.Errorf("%s: %w", in.Name, err)
			}
		}
		return nil
	}
	go func() {
		for _, pause := range announceAfter {
			time.Sleep(pause)
			if err := say(); err != nil {
				failed(err)
			}
		}
	}()
	return say()
}

// take is the lease, if there is one, for one caller at a time until done.
func (d *dhcp) take() (l *lease, done func(*lease), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.busy {
		return nil, nil, unavailablef("the lease of the pod's address is being renewed")
	}
	d.busy = true
	return d.lease, func(l *lease) {
		d.mu.Lock()
		d.lease, d.busy = l, false
		d.mu.Unlock()
	}, nil
}

// RenewLease takes 2 * renewTimeout at most.
func (a *Agent) RenewLease(ctx context.Context, _ *api.RenewLeaseRequest) (*api.RenewLeaseResponse, error) {
	sb, err := a.pod()
	if err != nil {
		return nil, err
	}
	if sb.dhcp == nil {
		return nil, preconditionf("the host gave the pod its address, not a DHCP server")
	}
	old, done, err := sb.dhcp.take()
	if err != nil {
		return nil, err
	}
	l := old
	defer func() { done(l) }()
	if old == nil {
		return nil, preconditionf("the lease of the pod's address was released")
	}
	socket, err := openDHCP(int(sb.netns.Fd()), sb.dhcp.index, sb.dhcp.mac)
	if err != nil {
		return nil, err
	}
	defer socket.close()
	renewed, err := socket.renew(ctx, old, renewTimeout)
	if err != nil {
		return nil, err
	}
	l = renewed
	return &api.RenewLeaseResponse{Lease: l.api()}, nil
}

// ReleaseLease may be called again.
func (a *Agent) ReleaseLease(context.Context, *api.ReleaseLeaseRequest) (*api.ReleaseLeaseResponse, error) {
	a.mu.Lock()
	sb := a.sandbox
	a.mu.Unlock()
	if sb == nil || !isDone(a.setUpEnded) {
		return nil, preconditionf("the sandbox has not been set up")
	}
	if sb.dhcp == nil {
		return &api.ReleaseLeaseResponse{}, nil
	}
	l, done, err := sb.dhcp.take()
	if err != nil {
		return nil, err
	}
	defer func() { done(l) }()
	if l == nil {
		return &api.ReleaseLeaseResponse{}, nil
	}
	netns := -1 // where the NIC is when the set-up didn't come far
	if sb.netns != nil {
		netns = int(sb.netns.Fd())
	}
	socket, err := openDHCP(netns, sb.dhcp.index, sb.dhcp.mac)
	if err == nil {
		err = socket.release(l)
		socket.close()
	}
	if err != nil {
		return nil, fmt.Errorf("release %v: %w", l.address, err)
	}
	l = nil
	return &api.ReleaseLeaseResponse{}, nil
}
