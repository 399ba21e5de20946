package shim

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

const (
	// idleLooks is how often the pod is looked at in the time that makes it idle.
	idleLooks = 4
	// idleShare of one CPU is what idle containers use: timers, health checks.
	idleShare = 0.02
	// worthwhile is the least memory to take the trouble for.
	worthwhile = 16 << 20
	// leastFree is what the balloon leaves for whatever wakes up while it is
	// inflated, if a quarter of what is free isn't more.
	leastFree = 64 << 20
	// squeezeTime bounds how long the balloon is inflated, and squeezeLook is how
	// often the guest is asked meanwhile whether it is, or has woken up.
	squeezeTime = 5 * time.Second
	squeezeLook = 100 * time.Millisecond
)

// watchIdle gives the host the memory that an idle pod has no use for, once each time
// that it becomes idle, until the VM is gone. The pod loses nothing but caches: what
// was taken is there again as soon as it is touched.
func (s *Shim) watchIdle(a *agent, m vmm.Machine, looks <-chan time.Time) {
	var used uint64 // CPU time, at the last look
	var at time.Time
	quiet, done := 0, false
	inflated := false
	for {
		select {
		case <-looks:
		case <-s.gone:
			return
		}
		inflated = inflated && !s.deflate(m)
		mem, err := a.memory(false)
		if errdefs.IsNotImplemented(err) {
			return // a guest image of an earlier build
		}
		if err != nil {
			continue // whoever needs an answer finds out what that means
		}
		now := time.Now()
		idle := mem.CpuUsageNanos-min(used, mem.CpuUsageNanos) <= uint64(idleShare*float64(now.Sub(at)))
		used, at = mem.CpuUsageNanos, now
		if !idle {
			quiet, done = 0, false
			continue
		}
		if quiet++; quiet < idleLooks || done {
			continue
		}
		done = true
		if inflated, err = reclaim(a, m, s.cfg.MemoryBytes, mem); err != nil {
			klog.ErrorS(err, "Giving an idle pod's memory back", "pod", s.cfg.ID)
		}
		inflated = inflated && !s.deflate(m)
	}
}

// deflate lets the pod have all of its memory again, and tells whether it may.
func (s *Shim) deflate(m vmm.Machine) bool {
	ctx, cancel := context.WithTimeout(context.Background(), squeezeTime)
	defer cancel()
	err := m.(vmm.MemorySetter).SetMemory(ctx, s.cfg.MemoryBytes)
	if err != nil {
		klog.ErrorS(err, "An idle pod may lack the memory in its balloon until the next look", "pod", s.cfg.ID)
	}
	return err == nil
}

// memory asks the guest what it has to spare. An answer that is late is of no use.
func (a *agent) memory(drop bool) (*guestapi.MemoryResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), a.patience)
	defer cancel()
	return bounded(ctx, "memory", a.Memory, &guestapi.MemoryRequest{DropCaches: drop})
}

// reclaim has the guest drop its caches. Where the host doesn't learn what is free
// from then on, a balloon takes it, until the caller deflates it: in any case after
// inflated, also when that failed.
func reclaim(a *agent, m vmm.Machine, size int64, mem *guestapi.MemoryResponse) (inflated bool, err error) {
	setter, ok := m.(vmm.MemorySetter)
	if cached := mem.AvailableBytes - min(mem.FreeBytes, mem.AvailableBytes); cached >= worthwhile {
		if mem, err = a.memory(true); err != nil {
			return false, err
		}
	} else if !ok {
		return false, nil
	}
	free := int64(min(mem.FreeBytes, uint64(size))) // a guest may say anything
	take := free - max(leastFree, free/4)
	take -= take % (1 << 20)
	if !ok || take < worthwhile {
		return false, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), squeezeTime)
	defer cancel()
	if err := setter.SetMemory(ctx, size-take); err != nil {
		return true, err // it may come through late
	}
	squeeze(ctx, a, mem, take)
	return true, nil
}

// squeeze waits until the balloon has taken what it was told to, the containers wake
// up, or ctx ends.
func squeeze(ctx context.Context, a *agent, before *guestapi.MemoryResponse, take int64) {
	for {
		select {
		case <-time.After(squeezeLook):
		case <-ctx.Done():
			return
		}
		mem, err := a.memory(false)
		woke := err == nil && mem.CpuUsageNanos-min(before.CpuUsageNanos, mem.CpuUsageNanos) > uint64(squeezeLook/2)
		// What was freed meanwhile is no reason to wait for the rest of it.
		if err != nil || woke || mem.FreeBytes+uint64(take)*15/16 <= before.FreeBytes {
			return
		}
	}
}
