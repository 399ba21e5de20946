//go:build linux

package e2e_test

import (
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type resources = runtimeapi.LinuxContainerResources

func limits(r *resources) option {
	return func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = r }
}

func (n *node) update(t *testing.T, id string, r *resources) error {
	t.Helper()
	_, err := n.UpdateContainerResources(timeout(t, callTimeout), &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: r})
	return err
}

// T4, T28: limits change in the running container, all or none, within the VM's
// size; the status says what is in force, also after a restart of the daemon.
func TestUpdateContainerResources(t *testing.T) {
	p := sharedPodOf(t)
	id := p.start(t, "updated", asRoot, command("/bin/sleep", "infinity"), limits(&resources{
		MemoryLimitInBytes: 64 << 20, CpuQuota: 20000, CpuPeriod: 100000, CpuShares: 256, OomScoreAdj: 100,
	}))
	check := func(want *resources, memory, cpu, score string) {
		t.Helper()
		if got := p.container(t, id).GetResources().GetLinux(); !proto.Equal(got, want) {
			t.Errorf("status: %v, want %v", got, want)
		}
		got := p.output(t, id, "/bin/cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max", "/proc/self/oom_score_adj")
		if want := memory + "\n" + cpu + "\n" + score + "\n"; got != want {
			t.Errorf("in force: %q, want %q", got, want)
		}
	}
	now := &resources{MemoryLimitInBytes: 64 << 20, CpuQuota: 20000, CpuPeriod: 100000, CpuShares: 256, OomScoreAdj: 100}
	check(now, "67108864", "20000 100000", "100")

	if err := p.update(t, id, &resources{MemoryLimitInBytes: 128 << 20, OomScoreAdj: 200}); err != nil {
		t.Fatal(err)
	}
	now.MemoryLimitInBytes, now.OomScoreAdj = 128<<20, 200
	check(now, "134217728", "20000 100000", "200")

	for _, c := range []struct {
		name   string
		change *resources
		code   codes.Code
		word   string
	}{
		{"more memory than the VM has", &resources{MemoryLimitInBytes: 2 << 30, CpuQuota: 30000}, codes.ResourceExhausted, "2048 MiB"},
		{"a file that the kernel lacks", &resources{MemoryLimitInBytes: 32 << 20, Unified: map[string]string{"memory.nosuch": "1"}}, codes.InvalidArgument, "memory.nosuch"},
		{"less memory than it uses", &resources{MemoryLimitInBytes: 4096, CpuQuota: 30000}, codes.FailedPrecondition, "4096"},
		{"no period of the kernel's", &resources{CpuPeriod: 1}, codes.InvalidArgument, "linux.cpu_period"},
		{"huge pages", &resources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 2 << 20}}}, codes.InvalidArgument, "linux.hugepage_limits"},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantError(t, p.update(t, id, c.change), c.code, c.word)
			check(now, "134217728", "20000 100000", "200")
		})
	}

	suite.node.kill()
	if err := suite.node.start(); err != nil {
		t.Fatal(err)
	}
	check(now, "134217728", "20000 100000", "200")
	if err := p.update(t, id, &resources{CpuQuota: -1, MemoryLimitInBytes: -1}); err != nil {
		t.Fatal(err)
	}
	now.CpuQuota, now.MemoryLimitInBytes = -1, -1
	check(now, "max", "max 100000", "200")

	t.Run("before its start", func(t *testing.T) {
		id := p.create(t, "created", asRoot, freshLog, command("/bin/cat", "/sys/fs/cgroup/memory.max", "/proc/self/oom_score_adj"))
		if err := p.update(t, id, &resources{MemoryLimitInBytes: 48 << 20, OomScoreAdj: 77}); err != nil {
			t.Fatal(err)
		}
		p.startContainer(t, id)
		st := p.waitExit(t, id, callTimeout)
		if got := readLog(t, st.GetLogPath()).stdout; got != "50331648\n77\n" {
			t.Errorf("it ran with %q", got)
		}
		wantError(t, p.update(t, id, &resources{MemoryLimitInBytes: 64 << 20}), codes.FailedPrecondition, "has ended")
	})
}

// T4: a pod that needs a larger VM than it has is told so before its containers
// grow.
func TestUpdatePodSandboxResources(t *testing.T) {
	p := sharedPodOf(t)
	update := func(r, overhead *resources) error {
		_, err := p.UpdatePodSandboxResources(timeout(t, callTimeout), &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: p.id, Resources: r, Overhead: overhead})
		return err
	}
	if err := update(&resources{MemoryLimitInBytes: 300 << 20}, nil); err != nil {
		t.Error(err)
	}
	wantError(t, update(&resources{MemoryLimitInBytes: 2 << 30}, nil), codes.ResourceExhausted, "2048 MiB")
	wantError(t, update(nil, &resources{MemoryLimitInBytes: 300 << 20}), codes.ResourceExhausted, "600 MiB")
	wantError(t, update(&resources{MemoryLimitInBytes: -5}, nil), codes.InvalidArgument, "resources.memory_limit_in_bytes")
}
