package sandbox

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// Update is a change of a container's or a pod's limits that was worked out.
type Update struct {
	// Resources are the limits once the update is done.
	Resources *runtimeapi.LinuxContainerResources
	// Guest is what the guest carries out; zero fields stay as they are there.
	Guest *specs.LinuxResources
	// OOMScoreAdj, if not nil, is the new one of the container's processes; a pod has none.
	OOMScoreAdj *int32
}

// Resources are the limits in force: those of CreateContainer's Config, and what
// has been updated since. They are not to be changed.
func (c *Container) Resources() *runtimeapi.LinuxContainerResources {
	c.pod.mu.Lock()
	defer c.pod.mu.Unlock()
	return c.resourcesLocked()
}

func (c *Container) resourcesLocked() *runtimeapi.LinuxContainerResources {
	if c.rec.resources != nil {
		return c.rec.resources
	}
	return c.rec.config.GetLinux().GetResources()
}

// UpdateResources changes the limits of a container that hasn't ended: all, in
// the guest and on record, or none. work is called with those in force, one call
// at a time. Limits that grow past the pod's VM are errdefs.ErrResourceExhausted.
func (c *Container) UpdateResources(ctx context.Context, work func(now *runtimeapi.LinuxContainerResources) (*Update, error)) error {
	select {
	case c.op <- struct{}{}:
		defer func() { <-c.op }()
	case <-ctx.Done():
		return fmt.Errorf("update container %s: waited for another call on it to end: %w", c.id, ctx.Err())
	}
	c.pod.mu.Lock()
	now, removed := c.resourcesLocked(), c.removed
	c.pod.mu.Unlock()
	if removed { // while this waited
		return fmt.Errorf("update container %s: %w", c.id, errdefs.ErrNotFound)
	}
	u, err := work(now)
	if err != nil {
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	if err := c.pod.rec.Size.checkHugepages(u.Resources); err != nil {
		return fmt.Errorf("update container %s: linux.%w", c.id, err)
	}
	if err := c.pod.holds(now, u.Resources); err != nil {
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	client, err := c.pod.shimClient()
	if err != nil {
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	b, err := json.Marshal(u.Guest)
	if err != nil {
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	if err := c.pod.askHost(ctx, "linux", c.id, u.Resources); err != nil {
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	if _, err := ask(ctx, client.UpdateContainer, &guestapi.UpdateContainerRequest{Id: c.id, Resources: b, OomScoreAdj: u.OOMScoreAdj}); err != nil {
		uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		if herr := c.pod.askHost(uctx, "linux", c.id, now); herr != nil {
			klog.ErrorS(herr, "Undoing a failed update", "pod", c.pod.id, "container", c.id)
		}
		return fmt.Errorf("update container %s: %w", c.id, err)
	}
	// On record only now: a record of limits that are not in force would tell a
	// kubelet that it is done. Should the daemon die before this is written, the
	// kubelet sees the old ones and asks again.
	c.pod.mu.Lock()
	c.rec.resources, c.rec.Resources = proto.CloneOf(u.Resources), nil
	rec := *c.rec
	c.pod.mu.Unlock()
	if err := rec.write(c.dir); err != nil {
		return fmt.Errorf("update container %s: the new limits are in force, but not on record: %w", c.id, err)
	}
	return nil
}

// holds checks that what grows from now to next fits into the pod's VM, whose
// size is fixed (T4). A VM with all of the host's CPUs holds any number of them.
func (p *Pod) holds(now, next *runtimeapi.LinuxContainerResources) error {
	vm, err := p.Size()
	if err != nil {
		return err
	}
	if m := next.GetMemoryLimitInBytes(); m > now.GetMemoryLimitInBytes() && now.GetMemoryLimitInBytes() >= 0 && m > vm.MemoryBytes {
		return fmt.Errorf("a memory limit of %d MiB is more than the %d MiB of the pod's VM, which keeps its size: %w", m>>20, vm.MemoryBytes>>20, errdefs.ErrResourceExhausted)
	}
	if cpus := milliCPUs(next); cpus > milliCPUs(now) && cpus > int64(vm.CPUs)*1000 && vm.CPUs < runtime.NumCPU() {
		return fmt.Errorf("a limit of %.3g CPUs is more than the %d of the pod's VM, which keeps its size: %w", float64(cpus)/1000, vm.CPUs, errdefs.ErrResourceExhausted)
	}
	return nil
}

// Size is what a pod's VM has for its containers.
type Size struct {
	CPUs        int
	MemoryBytes int64 // without the reserve of the guest's kernel and agent
	// HugepageBytes are set aside in huge pages, besides MemoryBytes.
	HugepageBytes int64 `json:",omitempty"`
}

// Size is the VM's, which doesn't change while the pod lives.
func (p *Pod) Size() (Size, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rec.Size == (Size{}) {
		return Size{}, fmt.Errorf("pod sandbox %s: an older daemon made it and didn't record the size of its VM: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	return p.rec.Size, nil
}

// Resources are the pod's as a whole and what it has on top of its containers':
// those of Run's configuration, or what UpdateResources has made of them.
func (p *Pod) Resources() (resources, overhead *runtimeapi.LinuxContainerResources) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.resourcesLocked()
}

func (p *Pod) resourcesLocked() (resources, overhead *runtimeapi.LinuxContainerResources) {
	l := p.rec.config.GetLinux()
	resources, overhead = l.GetResources(), l.GetOverhead()
	if p.rec.resources != nil {
		resources = p.rec.resources
	}
	if p.rec.overhead != nil {
		overhead = p.rec.overhead
	}
	return resources, overhead
}

// UpdateResources changes the limits of all the pod's containers together, in the
// guest and on record, and the overhead on record. work is called with those in force,
// one call at a time. What needs a larger VM is errdefs.ErrResourceExhausted and
// changes nothing (T4).
func (p *Pod) UpdateResources(ctx context.Context, work func(resources, overhead *runtimeapi.LinuxContainerResources) (*Update, *runtimeapi.LinuxContainerResources, error)) error {
	release, err := p.acquire(ctx, "update")
	if err != nil {
		return err
	}
	defer release()
	client, err := p.shimClient()
	if err != nil {
		return err
	}
	wasResources, wasOverhead := p.Resources()
	u, overhead, err := work(wasResources, wasOverhead)
	if err != nil {
		return fmt.Errorf("update pod %s: %w", p.id, err)
	}
	if err := p.holds(sum(wasResources, wasOverhead), sum(u.Resources, overhead)); err != nil {
		return fmt.Errorf("update pod %s: %w", p.id, err)
	}
	b, err := json.Marshal(u.Guest)
	if err != nil {
		return fmt.Errorf("update pod %s: %w", p.id, err)
	}
	if _, err := ask(ctx, client.UpdateContainer, &guestapi.UpdateContainerRequest{Resources: b}); err != nil {
		return fmt.Errorf("update pod %s: %w", p.id, err)
	}
	p.mu.Lock()
	p.rec.resources, p.rec.Resources = proto.CloneOf(u.Resources), nil
	p.rec.overhead, p.rec.Overhead = proto.CloneOf(overhead), nil
	rec := *p.rec
	p.mu.Unlock()
	if err := rec.write(p.dir); err != nil {
		return fmt.Errorf("update pod %s: the new limits are in force, but not on record: %w", p.id, err)
	}
	return nil
}

// sum adds limits of memory and CPU.
func sum(a, b *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	const period = 1e6
	return &runtimeapi.LinuxContainerResources{
		MemoryLimitInBytes: max(a.GetMemoryLimitInBytes(), 0) + max(b.GetMemoryLimitInBytes(), 0),
		CpuQuota:           (milliCPUs(a) + milliCPUs(b)) * (period / 1000),
		CpuPeriod:          period,
	}
}

// milliCPUs is the CPU limit, 0 for none.
func milliCPUs(r *runtimeapi.LinuxContainerResources) int64 {
	q, p := r.GetCpuQuota(), r.GetCpuPeriod()
	if q <= 0 {
		return 0
	}
	if p <= 0 {
		p = 100_000 // the kernel's default
	}
	// A thousand times what any host has is still far from an overflow.
	return min(q, 1<<40) * 1000 / p
}

// marshalResources is a record's form of r.
func marshalResources(raw *json.RawMessage, r *runtimeapi.LinuxContainerResources) error {
	if r == nil || *raw != nil {
		return nil
	}
	b, err := protojson.Marshal(r)
	*raw = b
	return err
}

// parseResources is the inverse: nil for what isn't there.
func parseResources(raw json.RawMessage) (*runtimeapi.LinuxContainerResources, error) {
	if raw == nil {
		return nil, nil
	}
	r := &runtimeapi.LinuxContainerResources{}
	return r, parseConfig(raw, r)
}
