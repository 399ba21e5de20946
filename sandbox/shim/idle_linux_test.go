package shim

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/shim/shimtest"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// ballooned is a machine whose guest's free memory follows its balloon.
type ballooned struct {
	*shimtest.Machine
	err error

	mu      sync.Mutex
	targets []int64
}

func (b *ballooned) SetMemory(_ context.Context, bytes int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.targets = append(b.targets, bytes)
	return b.err
}

func TestWatchIdle(t *testing.T) {
	const size = 1 << 30
	d := &shimtest.Driver{}
	vm, err := d.New(t.Context(), vmm.Config{})
	if err != nil {
		t.Fatal(err)
	}
	m := &ballooned{Machine: vm.(*shimtest.Machine)}
	// What the guest would have free with all of its memory, what is in its caches,
	// and what its containers have used of the CPU.
	var free, cached, cpu uint64
	var drops int
	m.OnMemory = func(r *guestapi.MemoryRequest) *guestapi.MemoryResponse {
		m.mu.Lock()
		defer m.mu.Unlock()
		if r.GetDropCaches() {
			drops++
			free, cached = free+cached, 0
		}
		now := free
		if len(m.targets) > 0 {
			now -= uint64(size - m.targets[len(m.targets)-1])
		}
		return &guestapi.MemoryResponse{FreeBytes: now, AvailableBytes: now + cached, CpuUsageNanos: cpu}
	}
	set := func(f, c uint64) { m.mu.Lock(); free, cached, drops, m.targets = f, c, 0, nil; m.mu.Unlock() }
	a := agentOf(t, m.Machine, 5*time.Second)
	s := &Shim{cfg: Config{MemoryBytes: size}, gone: make(chan struct{})}
	looks := make(chan time.Time)
	done := make(chan struct{})
	go func() { s.watchIdle(a, m, looks); close(done) }()
	// look returns when what the look before has led to is done.
	look := func(n int, use uint64) {
		for range n {
			looks <- time.Time{}
			m.mu.Lock()
			cpu += use
			m.mu.Unlock()
		}
	}
	want := func(what string, wantDrops int, targets ...int64) {
		t.Helper()
		looks <- time.Time{}
		m.mu.Lock()
		defer m.mu.Unlock()
		if drops != wantDrops || !slices.Equal(m.targets, targets) {
			t.Errorf("%s: caches dropped %d times, balloon set to %v; want %d, %v", what, drops, m.targets, wantDrops, targets)
		}
	}
	const busy = uint64(time.Hour)

	set(100<<20, 300<<20)
	look(2, busy)
	look(idleLooks-1, 0)
	want("not idle for long", 0)
	look(1, 0)
	want("idle", 1, size-300<<20, size)
	look(2*idleLooks, 0)
	want("idle for longer", 1, size-300<<20, size)
	set(100<<20, 10<<20)
	look(2, busy)
	look(idleLooks+1, 0)
	want("little to give", 0, size-36<<20, size)
	set(70<<20, 10<<20)
	look(2, busy)
	look(idleLooks+1, 0)
	want("nothing to give", 0)
	m.mu.Lock()
	m.err = errors.New("as planned")
	m.mu.Unlock()
	set(1<<62, 0) // a hostile guest has no more than its VM
	look(2, busy)
	look(idleLooks+1, 0)
	look(2, 0)
	// A balloon that fails may be inflated later all the same: the pod gets its memory
	// back until that works, and not again.
	tries := func() int {
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.targets) < 3 || m.targets[0] != size/4 || slices.ContainsFunc(m.targets[1:], func(n int64) bool { return n != size }) {
			t.Errorf("a balloon that fails is set to %v", m.targets)
		}
		return len(m.targets)
	}
	tries()
	m.mu.Lock()
	m.err = nil
	m.mu.Unlock()
	look(2, 0) // it works with the first of them at the latest
	n := tries()
	look(3, 0)
	if got := tries(); got != n {
		t.Errorf("a balloon that works again is set %d times more", got-n)
	}
	close(s.gone)
	<-done
}
