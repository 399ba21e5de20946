package sandbox

import (
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// T4, T28: updates are on record when they are in force, and what the VM can't
// hold changes nothing.
func TestUpdateResources(t *testing.T) {
	e := newFakeEnv(t)
	p := e.run("p")
	c := e.create(p, "c", func(cc *CreateContainer) {
		cc.Config.Linux = &runtimeapi.LinuxContainerConfig{Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 19}}
	}, "sleep")
	to := func(r *runtimeapi.LinuxContainerResources) func(*runtimeapi.LinuxContainerResources) (*Update, error) {
		return func(*runtimeapi.LinuxContainerResources) (*Update, error) {
			return &Update{Resources: r, Guest: &specs.LinuxResources{}}, nil
		}
	}
	podTo := func(r *runtimeapi.LinuxContainerResources) func(_, overhead *runtimeapi.LinuxContainerResources) (*Update, *runtimeapi.LinuxContainerResources, error) {
		return func(_, overhead *runtimeapi.LinuxContainerResources) (*Update, *runtimeapi.LinuxContainerResources, error) {
			return &Update{Resources: r, Guest: &specs.LinuxResources{}}, overhead, nil
		}
	}
	next := &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 20, CpuShares: 100}
	if err := c.UpdateResources(t.Context(), to(next)); err != nil {
		t.Fatal(err)
	}
	if err := c.UpdateResources(t.Context(), to(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1<<20 + 1})); !errdefs.IsResourceExhausted(err) {
		t.Errorf("more memory than the VM has: %v", err)
	}
	if err := p.UpdateResources(t.Context(), podTo(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 21})); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a larger VM: %v", err)
	}
	pod := &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 20, CpuShares: 7}
	if err := p.UpdateResources(t.Context(), podTo(pod)); err != nil {
		t.Error(err)
	}
	check := func(c *Container) {
		t.Helper()
		if got := c.Resources(); !proto.Equal(got, next) {
			t.Errorf("resources %v, want %v", got, next)
		}
		if got, _ := c.Pod().Resources(); !proto.Equal(got, pod) {
			t.Errorf("the pod's resources %v, want %v", got, pod)
		}
		if got := c.Config().GetLinux().GetResources().GetMemoryLimitInBytes(); got != 1<<19 {
			t.Errorf("the configuration was changed: %d", got)
		}
	}
	check(c)
	e.close()
	e.open()
	again, err := e.pods.Container(c.ID())
	if err != nil {
		t.Fatal(err)
	}
	check(again)
	if s, err := again.Pod().Size(); s != (Size{CPUs: 1, MemoryBytes: 1 << 20}) || err != nil {
		t.Errorf("size %+v, %v", s, err)
	}
	if err := again.Pod().Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := again.UpdateResources(t.Context(), to(next)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("an update in a stopped pod: %v", err)
	}
	check(again)
}

// A container that is removed asks for nothing of the host any more, whoever
// waited to update it.
func TestUpdateOfARemovedContainer(t *testing.T) {
	e := newFakeEnv(t)
	p := e.run("p")
	c := e.create(p, "c", nil, "sleep")
	if err := c.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	err := c.UpdateResources(t.Context(), func(*runtimeapi.LinuxContainerResources) (*Update, error) {
		return &Update{Resources: &runtimeapi.LinuxContainerResources{OomScoreAdj: -500}, Guest: &specs.LinuxResources{}}, nil
	})
	if !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if len(p.host.asked) != 0 {
		t.Errorf("it still asks for %v", p.host.asked)
	}
}
