//go:build linux

package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
		id := p.create(t, "created", asRoot, freshLog, command("/bin/cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.low", "/sys/fs/cgroup/pids.max", "/proc/self/oom_score_adj"),
			limits(&resources{Unified: map[string]string{"memory.low": "4194304", "pids.max": "77"}}))
		if err := p.update(t, id, &resources{MemoryLimitInBytes: 48 << 20, OomScoreAdj: 55, Unified: map[string]string{"pids.max": "88"}}); err != nil {
			t.Fatal(err)
		}
		p.startContainer(t, id)
		st := p.waitExit(t, id, callTimeout)
		if got := readLog(t, st.GetLogPath()).stdout; got != "50331648\n4194304\n88\n55\n" {
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

// Runtime handlers are VM classes: their CPUs, memory, kernel, huge pages and
// bound of processes are the guest's (T28). A pod's limits and overhead make the
// VM larger (T4).
func TestRuntimeHandlers(t *testing.T) {
	n := suite.node
	st, err := n.Status(timeout(t, callTimeout), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, h := range st.GetRuntimeHandlers() {
		names = append(names, h.GetName())
	}
	if !slices.Equal(names, []string{"", "odd"}) {
		t.Errorf("runtime handlers %q", names)
	}

	cfg := podConfig(n, "odd")
	cfg.Linux.Resources = &resources{MemoryLimitInBytes: 256 << 20}
	cfg.Linux.Overhead = &resources{MemoryLimitInBytes: 32 << 20}
	boots.Add(1)
	p, err := n.runPodWith(t.Context(), cfg, "odd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.remove(t) })
	if got := p.sandbox(t, p.id).GetRuntimeHandler(); got != "odd" {
		t.Errorf("runtime handler %q", got)
	}
	huge := func(size string, mib uint64) option {
		return limits(&resources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: size, Limit: mib << 20}, {PageSize: "64KB"}}})
	}
	id := p.start(t, "looks", asRoot, command("/bin/sleep", "infinity"), huge("2MB", 4))
	info := p.output(t, id, "/bin/cat", "/proc/meminfo")
	number := func(text, name string) (n int) {
		for line := range strings.Lines(text) {
			if rest, ok := strings.CutPrefix(line, name+":"); ok {
				fmt.Sscan(rest, &n)
			}
		}
		return n
	}
	// 256 MiB of limits, 32 of overhead, 64 of reserve, 16 in huge pages; the
	// kernel takes some of it before it counts.
	if mib := number(info, "MemTotal") >> 10; mib < 320 || mib > 368 {
		t.Errorf("the guest has %d MiB", mib)
	}
	if n := number(info, "HugePages_Total"); n != 8 {
		t.Errorf("the guest has %d huge pages", n)
	}
	if got := p.output(t, id, "/bin/cat", "/sys/fs/cgroup/hugetlb.2MB.max"); got != "4194304\n" {
		t.Errorf("the container's bound of huge pages: %q", got)
	}
	if n := strings.Count(p.output(t, id, "/bin/cat", "/proc/cpuinfo"), "\nprocessor") + 1; n != 2 {
		t.Errorf("the guest has %d CPUs", n)
	}
	for _, c := range []struct {
		size string
		mib  uint64
		code codes.Code
	}{{"2MB", 32, codes.ResourceExhausted}, {"1GB", 1 << 10, codes.InvalidArgument}} {
		_, err := p.createContext(t.Context(), "refused", huge(c.size, c.mib))
		wantError(t, err, c.code, "hugepage_limits")
	}
	if err := p.update(t, id, &resources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 8 << 20}}}); err != nil {
		t.Error(err)
	}
	if got := p.output(t, id, "/bin/cat", "/sys/fs/cgroup/hugetlb.2MB.max"); got != "8388608\n" {
		t.Errorf("the container's bound of huge pages after an update: %q", got)
	}
	// The bound is the pod's: the agent and other pods don't feel it.
	if r := p.run(t, "forks", command("/bin/spawn-zombies", "60"), freshLog); r.code == 0 {
		t.Errorf("60 zombies in a pod of 48: %+v", r)
	}
	shared := sharedPodOf(t)
	if r := shared.run(t, "forks", command("/bin/spawn-zombies", "60"), freshLog); r.code != 0 {
		t.Errorf("60 zombies in a pod without a bound: %+v", r)
	}
	if got := p.output(t, id, "/bin/echo", "alive"); got != "alive\n" {
		t.Errorf("%q", got)
	}
}

// T28: a cpuset's numbers are the host's, and the threads of the VM's CPUs run
// there; the VM's processes are as dear to the host's OOM killer as the
// container that is worth most.
func TestCpusetsAndScoresOnTheHost(t *testing.T) {
	p := newPod(t, podConfig(suite.node, "pinned"))
	var own unix.CPUSet
	if err := unix.SchedGetaffinity(0, &own); err != nil {
		t.Fatal(err)
	}
	last := 1023
	for !own.IsSet(last) {
		last--
	}
	check := func(when string, pinned bool, score string) {
		t.Helper()
		found := 0
		for _, proc := range processes() {
			if !strings.HasPrefix(proc.Name, "qemu-system") || !strings.Contains(proc.Command, p.id) {
				continue
			}
			found++
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", proc.PID))
			if got := strings.TrimSpace(string(b)); err != nil || got != score {
				t.Errorf("%s: score of the VMM is %s, want %s (%v)", when, got, score, err)
			}
			tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", proc.PID))
			n := 0
			for _, task := range tasks {
				var set unix.CPUSet
				tid, _ := strconv.Atoi(filepath.Base(task))
				if unix.SchedGetaffinity(tid, &set) == nil && set.Count() == 1 && set.IsSet(last) {
					n++
				}
			}
			if want := map[bool]int{true: 1}[pinned]; n != want && own.Count() > 1 {
				t.Errorf("%s: %d threads run on CPU %d alone, want %d", when, n, last, want)
			}
		}
		if found != 1 {
			t.Errorf("%s: %d VMMs of the pod", when, found)
		}
	}
	sleep := command("/bin/sleep", "infinity")
	p.start(t, "free", asRoot, sleep, limits(&resources{OomScoreAdj: 900}))
	check("one container", false, "900")
	// Not below 0, for which not every root has the privilege.
	id := p.start(t, "exclusive", asRoot, sleep, limits(&resources{OomScoreAdj: 100}))
	check("two containers", false, "100")
	// As the kubelet's CPU manager does it: nothing else is specified.
	if err := p.update(t, id, &resources{CpusetCpus: strconv.Itoa(last)}); err != nil {
		t.Fatal(err)
	}
	check("pinned", true, "100")
	wantError(t, p.update(t, id, &resources{CpusetCpus: "1023", MemoryLimitInBytes: 64 << 20}), codes.InvalidArgument, "linux.cpuset_cpus", "1023")
	wantError(t, p.update(t, id, &resources{CpusetCpus: "x"}), codes.InvalidArgument, "linux.cpuset_cpus")
	if got := p.container(t, id).GetResources().GetLinux(); got.GetCpusetCpus() != strconv.Itoa(last) || got.GetMemoryLimitInBytes() != 0 || got.GetOomScoreAdj() != 100 {
		t.Errorf("status: %v", got)
	}
	check("after a refusal", true, "100")
	_, err := p.createContext(t.Context(), "nowhere", limits(&resources{CpusetCpus: "1023"}))
	wantError(t, err, codes.InvalidArgument, "config.linux.resources.cpuset_cpus")
	suite.node.kill()
	if err := suite.node.start(); err != nil {
		t.Fatal(err)
	}
	check("after a restart of the daemon", true, "100")
	p.removeContainer(t, id)
	check("removed", false, "900")
}

// T4: a pod that the host's memory can't hold is refused before anything of it
// is made.
func TestAdmission(t *testing.T) {
	cfg := podConfig(suite.node, "huge")
	cfg.Linux.Resources = &resources{MemoryLimitInBytes: 8 << 40}
	began := time.Now()
	_, err := suite.node.RunPodSandbox(timeout(t, callTimeout), &runtimeapi.RunPodSandboxRequest{Config: cfg})
	wantError(t, err, codes.ResourceExhausted, "MiB available")
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
}

// T4: the balloon reports free pages from boot, so what containers no longer use
// is the host's again.
func TestFreedMemoryIsTheHosts(t *testing.T) {
	cfg := podConfig(suite.node, "frees")
	cfg.Linux.Resources = &resources{MemoryLimitInBytes: 512 << 20}
	p := newPod(t, cfg)
	held := func() (mib int) {
		for _, proc := range processes() {
			if !strings.HasPrefix(proc.Name, "qemu-system") || !strings.Contains(proc.Command, p.id) {
				continue
			}
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", proc.PID))
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(b)) {
				if rest, ok := strings.CutPrefix(line, "Rss:"); ok {
					fmt.Sscan(rest, &mib)
				}
			}
		}
		return mib >> 10
	}
	before := held()
	id := p.start(t, "eats", command("/bin/oom"), limits(&resources{MemoryLimitInBytes: 300 << 20}))
	peak := before
	eventually(t, 60*time.Second, "end of the container", func() error {
		peak = max(peak, held())
		if st := p.container(t, id); st.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("it is %v", st.GetState())
		}
		return nil
	})
	if peak < before+200 {
		t.Fatalf("the VMM held %d MiB before and %d MiB at most: nothing to see", before, peak)
	}
	// The guest reports what is free in large blocks; what is left in smaller ones
	// stays.
	eventually(t, 60*time.Second, "the memory to come back", func() error {
		if now := held(); now > (before+peak)/2 {
			return fmt.Errorf("the VMM holds %d MiB; %d before, %d at most", now, before, peak)
		}
		return nil
	})
}
