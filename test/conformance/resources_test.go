//go:build linux

package conformance_test

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

func TestUpdateContainerResources(t *testing.T) {
	p := sharedPodOf(t)
	id := p.Start(t, "updated", cri.AsRoot, cri.Command("/bin/sleep", "infinity"), cri.Resources(&runtimeapi.LinuxContainerResources{
		MemoryLimitInBytes: 64 << 20, CpuPeriod: 100_000, CpuQuota: 20_000,
	}))
	wantLimits(t, p.Pod, id, 64<<20, 20_000)
	if _, err := p.UpdateContainerResources(cri.Timeout(t, cri.CallTimeout), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 96 << 20},
	}); err != nil {
		t.Fatal(err)
	}
	wantLimits(t, p.Pod, id, 96<<20, 20_000) // what the update leaves out stays (T28)
	_, err := p.UpdateContainerResources(cri.Timeout(t, cri.CallTimeout), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: "nothing", Linux: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 96 << 20},
	})
	cri.WantError(t, err, codes.NotFound)
}

// wantLimits checks what the status says is in force.
func wantLimits(t *testing.T, p *cri.Pod, id string, memory, quota int64) {
	t.Helper()
	if r := p.Container(t, id).GetResources().GetLinux(); r.GetMemoryLimitInBytes() != memory || r.GetCpuQuota() != quota {
		t.Errorf("in force %v, want %d bytes and a quota of %d", r, memory, quota)
	}
}

func TestUpdatePodSandboxResources(t *testing.T) {
	p := sharedPodOf(t)
	update := func(memory int64) error {
		_, err := p.UpdatePodSandboxResources(cri.Timeout(t, cri.CallTimeout), &runtimeapi.UpdatePodSandboxResourcesRequest{
			PodSandboxId: p.ID, Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: memory},
		})
		return err
	}
	if err := update(128 << 20); err != nil {
		t.Error(err)
	}
	t.Run("it holds the containers together, as long as it is in force", func(t *testing.T) { // T28
		if suite.daemon == nil {
			t.Skip("others leave that to the node's cgroups")
		}
		p := newPod(t, podConfig("limited"))
		id := p.Start(t, "idle", cri.Command("/bin/sleep", "infinity"))
		update := func(memory int64) error {
			_, err := p.UpdatePodSandboxResources(cri.Timeout(t, cri.CallTimeout), &runtimeapi.UpdatePodSandboxResourcesRequest{
				PodSandboxId: p.ID, Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: memory},
			})
			return err
		}
		cri.WantError(t, update(4096), codes.FailedPrecondition, "can't be taken back")
		for limit, holds := range map[int64]bool{48 << 20: false, 112 << 20: true} {
			if err := update(limit); err != nil {
				t.Fatal(err)
			}
			r := p.Run(t, fmt.Sprintf("eats-%d", limit), cri.Command("/bin/oom"))
			if r.Code != 137 || strings.Contains(r.Stdout, "holding 64 MiB") != holds {
				t.Errorf("with a limit of %d bytes: %+v", limit, r)
			}
		}
		if r := p.Do(t, id, "/bin/echo", "alive"); r.Code != 0 {
			t.Errorf("the pod's other container: %+v", r)
		}
	})
	t.Run("what the pod's VM does not have is refused", func(t *testing.T) { // T4
		if suite.daemon == nil {
			t.Skip("a promise of pods with a size of their own")
		}
		cri.WantError(t, update(1<<40), codes.ResourceExhausted)
	})
}
