package shim

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

const (
	// leaseGrace is how long a server may stay silent once a lease has run out: the
	// host has perhaps just woken up, and its NAT with it.
	leaseGrace = time.Minute
	// leaseRetry is how often a lease is renewed that could not be, at most.
	leaseRetry = time.Minute
	// releaseBound is what a pod's end waits for its address to be given back, which
	// takes one packet.
	releaseBound = 500 * time.Millisecond
)

func usesDHCP(r *guestapi.SetUpSandboxRequest) bool {
	for _, i := range r.GetInterfaces() {
		if i.GetDhcp() {
			return true
		}
	}
	return false
}

// checkLease looks at what a guest says that it got: a pod without an address is not
// ready (T42), and one with any address could be anybody.
func checkLease(l *guestapi.Lease) error {
	if l == nil {
		return fmt.Errorf("the guest's agent reports no address, it is older than this build: rebuild the guest image: %w", errdefs.ErrFailedPrecondition)
	}
	a, err := netip.ParsePrefix(l.GetAddress())
	if err == nil && (!a.Addr().Is4() || !a.Addr().IsGlobalUnicast()) {
		err = fmt.Errorf("it is no IPv4 address of a machine")
	}
	if err != nil {
		return fmt.Errorf("the guest's agent reports the address %s: %w", escape(l.GetAddress(), 64), err)
	}
	if g, err := netip.ParseAddr(l.GetGateway()); err != nil || !a.Contains(g) || g == a.Addr() {
		return fmt.Errorf("the guest's agent reports the gateway %s of %v", escape(l.GetGateway(), 64), a)
	}
	if l.GetSeconds() == 0 {
		return fmt.Errorf("the guest's agent reports that its lease of %v is over", a)
	}
	return nil
}

// watchLease renews the lease of the pod's address when half of it is over by the
// host's clock, and whenever the host has slept, until the VM is gone (T48). A pod
// that can't keep its address is ended: it would be ready without one (T42).
func (s *Shim) watchLease(a *agent, lease *guestapi.Lease, granted hostTime, looks <-chan time.Time, clock func() hostTime) {
	told := clock()
	last := told
	var due bool
	var retry, failing time.Duration // by the monotonic clock; failing since, or 0
	for {
		select {
		case <-looks:
		case <-s.gone:
			return
		}
		now := clock()
		if clockDue(told, last, now) {
			told, due, retry = now, true, 0
		}
		last = now
		life := time.Duration(lease.GetSeconds()) * time.Second
		age := now.wall.Sub(granted.wall)
		if due = due || age >= life/2; !due || now.mono < retry {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*a.patience)
		resp, err := call(ctx, a, "renew lease", a.RenewLease, &guestapi.RenewLeaseRequest{})
		cancel()
		last = clock()
		if err == nil {
			if got := resp.GetLease(); got.GetAddress() != lease.GetAddress() || got.GetSeconds() == 0 {
				err = fmt.Errorf("the guest's agent reports the address %s instead of %s: %w", escape(got.GetAddress(), 64), lease.GetAddress(), errdefs.ErrFailedPrecondition)
			}
		}
		if err == nil {
			lease, granted, due, failing, retry = resp.GetLease(), now, false, 0, 0
			klog.InfoS("The lease of the pod's address was renewed", "pod", s.cfg.ID, "address", lease.GetAddress(), "seconds", lease.GetSeconds())
			continue
		}
		if failing == 0 {
			failing = now.mono
		}
		if errdefs.IsFailedPrecondition(err) || age >= life && last.mono-failing >= leaseGrace {
			s.killVM(fmt.Sprintf("the pod can't keep its address %s: %v", lease.GetAddress(), err))
			return
		}
		klog.ErrorS(err, "The lease of the pod's address was not renewed", "pod", s.cfg.ID, "address", lease.GetAddress(), "left", life-age)
		retry = last.mono + min(max((life-age)/8, clockEvery), leaseRetry)
	}
}

// releaseLease has the guest give its address back, so that another pod can have it.
func (s *Shim) releaseLease(a *agent) {
	s.mu.Lock()
	leased := s.leased
	s.mu.Unlock()
	if !leased {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), releaseBound)
	defer cancel()
	if _, err := bounded(ctx, "release lease", a.ReleaseLease, &guestapi.ReleaseLeaseRequest{}); err != nil {
		klog.ErrorS(err, "The lease of the pod's address lives on", "pod", s.cfg.ID)
		return
	}
	s.change(func() { s.leased = false })
}
