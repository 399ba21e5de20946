package shim

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/shim/shimtest"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

func testLease(seconds uint32) *guestapi.Lease {
	return &guestapi.Lease{Address: "192.168.64.2/24", Gateway: "192.168.64.1", Seconds: seconds}
}

var dhcpSandbox = &guestapi.SetUpSandboxRequest{Interfaces: []*guestapi.Interface{{Name: "eth0", Mac: "0a:76:00:00:00:01", Dhcp: true}}}

// T42: a guest that says nothing of an address, or nonsense, has none.
func TestCheckLease(t *testing.T) {
	for _, tt := range []struct {
		name string
		l    *guestapi.Lease
		want string // in the error
	}{
		{"good", testLease(60), ""},
		{"none", nil, "rebuild the guest image"},
		{"no address", &guestapi.Lease{Gateway: "192.168.64.1", Seconds: 60}, "reports the address"},
		{"no prefix", &guestapi.Lease{Address: "192.168.64.2", Gateway: "192.168.64.1", Seconds: 60}, "reports the address"},
		{"loopback", &guestapi.Lease{Address: "127.0.0.1/8", Gateway: "127.0.0.2", Seconds: 60}, "no IPv4 address of a machine"},
		{"IPv6", &guestapi.Lease{Address: "fd00::2/64", Gateway: "fd00::1", Seconds: 60}, "no IPv4 address of a machine"},
		{"a gateway elsewhere", &guestapi.Lease{Address: "192.168.64.2/24", Gateway: "192.0.2.1", Seconds: 60}, "reports the gateway"},
		{"its own gateway", &guestapi.Lease{Address: "192.168.64.2/24", Gateway: "192.168.64.2", Seconds: 60}, "reports the gateway"},
		{"escape sequences", &guestapi.Lease{Address: "\x1b[2J", Gateway: "192.168.64.1", Seconds: 60}, "reports the address"},
		{"over", testLease(0), "is over"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := checkLease(tt.l)
			if (err == nil) != (tt.want == "") || err != nil && (!strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\x1b")) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// leaseRig is a watchLease whose clock and looks are the test's.
type leaseRig struct {
	t       *testing.T
	s       *Shim
	now     atomic.Pointer[hostTime]
	looks   chan time.Time
	renewed atomic.Int64
	answer  atomic.Pointer[error]
	done    chan struct{}
}

func newLeaseRig(t *testing.T, seconds uint32) *leaseRig {
	r := &leaseRig{t: t, looks: make(chan time.Time), done: make(chan struct{})}
	begin := hostTime{wall: time.Unix(1_700_000_000, 0)}
	r.now.Store(&begin)
	d := &shimtest.Driver{OnRenew: func() (*guestapi.Lease, error) {
		r.renewed.Add(1)
		if e := r.answer.Load(); e != nil {
			return nil, *e
		}
		return testLease(seconds), nil
	}}
	vm, err := d.New(t.Context(), vmm.Config{})
	if err != nil {
		t.Fatal(err)
	}
	a := agentOf(t, vm.(*shimtest.Machine), time.Second)
	r.s = &Shim{gone: make(chan struct{}), changed: make(chan struct{}), vm: shimapi.VM_READY}
	go func() {
		r.s.watchLease(a, testLease(seconds), begin, r.looks, func() hostTime { return *r.now.Load() })
		close(r.done)
	}()
	r.look() // it has begun
	return r
}

// pass has the host's clocks go on until the next look, and returns how often the
// lease was renewed by it.
func (r *leaseRig) pass(wall, mono time.Duration) int64 {
	r.t.Helper()
	before := r.renewed.Load()
	now := *r.now.Load()
	now.wall, now.mono = now.wall.Add(wall), now.mono+mono
	r.now.Store(&now)
	r.look()
	r.look() // at the same time: the first one is over
	return r.renewed.Load() - before
}

// look begins when the look before it is over.
func (r *leaseRig) look() {
	select {
	case r.looks <- time.Time{}:
	case <-r.done:
	}
}

func (r *leaseRig) end() {
	r.s.vmGone("the test is over")
	<-r.done
}

// T48: a lease is renewed when half of it is over, and after every sleep.
func TestWatchLease(t *testing.T) {
	r := newLeaseRig(t, 3600)
	defer r.end()
	for range 3 {
		if n := r.pass(clockEvery, clockEvery); n != 0 {
			t.Fatalf("%d renewals for no reason", n)
		}
	}
	if n := r.pass(10*time.Minute, clockEvery); n != 1 {
		t.Errorf("%d renewals after a sleep, want 1", n)
	}
	if n := r.pass(clockEvery, clockEvery); n != 0 {
		t.Errorf("%d more renewals", n)
	}
	// Looks come every clockEvery: a jump of both clocks is a shim that was frozen,
	// which is a reason of its own.
	var n int64
	for elapsed := time.Duration(0); elapsed < 29*time.Minute; elapsed += clockEvery {
		r.pass(clockEvery, clockEvery)
	}
	if n = r.renewed.Load(); n != 1 {
		t.Fatalf("%d renewals before half of it was over, want 1", n)
	}
	for range 2 * time.Minute / clockEvery {
		if r.pass(clockEvery, clockEvery) == 1 {
			return
		}
	}
	t.Error("no renewal when half of it was over")
}

// A server that is silent is asked again, at most once a minute, until the lease is
// over and a minute has passed in which the host was awake.
func TestWatchLeaseSilence(t *testing.T) {
	r := newLeaseRig(t, 3600)
	silent := status.Error(codes.Unavailable, "no answer")
	r.answer.Store(&silent)
	if n := r.pass(2*time.Hour, clockEvery); n != 1 { // the lease ran out in a sleep
		t.Errorf("%d attempts after a sleep", n)
	}
	if reason, gone := r.reason(); gone {
		t.Fatalf("ended at once: %s", reason)
	}
	for range 2 * time.Minute / clockEvery {
		r.pass(clockEvery, clockEvery)
		if reason, gone := r.reason(); gone {
			if n := r.renewed.Load(); n < 3 || !strings.Contains(reason, "can't keep its address 192.168.64.2/24") || !strings.Contains(reason, "no answer") {
				t.Errorf("after %d attempts: %s", n, reason)
			}
			<-r.done
			return
		}
	}
	r.end()
	t.Error("the pod is ready without a lease")
}

// A server that comes back in time is no end.
func TestWatchLeaseRecovers(t *testing.T) {
	r := newLeaseRig(t, 3600)
	defer r.end()
	silent := status.Error(codes.Unavailable, "no answer")
	r.answer.Store(&silent)
	r.pass(2*time.Hour, clockEvery)
	r.answer.Store(nil)
	for range 2 * time.Minute / clockEvery {
		r.pass(clockEvery, clockEvery)
	}
	if reason, gone := r.reason(); gone {
		t.Errorf("ended: %s", reason)
	}
}

func TestWatchLeaseRefused(t *testing.T) {
	r := newLeaseRig(t, 3600)
	refused := status.Error(codes.FailedPrecondition, "another address")
	r.answer.Store(&refused)
	r.pass(time.Hour, clockEvery)
	<-r.done
	if reason, gone := r.reason(); !gone || !strings.Contains(reason, "another address") {
		t.Errorf("gone: %v: %s", gone, reason)
	}
}

func (r *leaseRig) reason() (string, bool) {
	state, _ := r.s.state()
	return state.GetReason(), state.GetVm() == shimapi.VM_GONE
}

// lastState is what a daemon that stops the pod has heard of it in the end.
func (r *rig) lastState() (last *shimapi.PodState) {
	r.t.Helper()
	w, err := r.Watch(r.ctx(), &shimapi.WatchRequest{})
	if err != nil {
		r.t.Fatal(err)
	}
	if last, err = w.Recv(); err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.Stop(r.ctx(), &shimapi.StopRequest{}); err != nil {
		r.t.Fatal(err)
	}
	for {
		s, err := w.Recv()
		if err != nil {
			return last
		}
		last = s
	}
}

// What Boot tells of the lease, and the state of its end.
func TestLeaseOfAPod(t *testing.T) {
	d := &shimtest.Driver{Lease: testLease(60)}
	r := newRig(t, d, Timeouts{})
	resp, err := r.bootWith(dhcpSandbox)
	if err != nil || resp.GetLease().GetAddress() != "192.168.64.2/24" {
		t.Fatalf("%v, %v", resp, err)
	}
	r.watch("a lease", 10*time.Second, func(s *shimapi.PodState) bool { return s.GetLeased() })
	if last := r.lastState(); last.GetLeased() || !d.Machines()[0].Released.Load() {
		t.Errorf("%v, released: %v", last, d.Machines()[0].Released.Load())
	}
}

// A VM that ends by itself takes its lease along.
func TestLeaseOfAPodThatDied(t *testing.T) {
	d := &shimtest.Driver{Lease: testLease(60)}
	r := newRig(t, d, Timeouts{})
	if _, err := r.bootWith(dhcpSandbox); err != nil {
		t.Fatal(err)
	}
	d.Machines()[0].Die(nil)
	if last := r.lastState(); !last.GetLeased() {
		t.Errorf("%v", last)
	}
}

func TestBootWithoutALease(t *testing.T) {
	d := &shimtest.Driver{}
	r := newRig(t, d, Timeouts{})
	_, err := r.bootWith(dhcpSandbox)
	if err = errgrpc.ToNative(err); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "rebuild the guest image") {
		t.Errorf("%v", err)
	}
	if last := r.lastState(); last.GetLeased() || !d.Machines()[0].Released.Load() {
		t.Errorf("what the guest may have got: %v", last)
	}
}
