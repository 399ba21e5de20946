package cri

import (
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox"
	"github.com/cri-vz/cri-vz/sandbox/scratch"
)

// hostile is what a guest could answer that wants to harm whoever adds it up:
// every number at its largest.
func hostile() *guestapi.ContainerStats {
	g := &guestapi.ContainerStats{}
	fields := g.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		if f := fields.Get(i); f.Kind() == protoreflect.Uint64Kind {
			g.ProtoReflect().Set(f, protoreflect.ValueOfUint64(math.MaxUint64))
		}
	}
	for range 1000 {
		for _, resource := range []string{"cpu", "memory", "io", strings.Repeat("x", 1<<10)} {
			g.Pressure = append(g.Pressure, &guestapi.Pressure{
				Resource: resource, Kind: "some", Avg10: math.NaN(), Avg60: math.Inf(-1), Avg300: math.Inf(1), TotalUsec: math.MaxUint64,
			})
		}
	}
	return g
}

// T16: a guest's numbers stay within what its VM can have used, whatever they are.
func TestStatsOfAHostileGuest(t *testing.T) {
	at := time.Now()
	sm := &sample{at: at, vm: sandbox.Size{CPUs: 2, MemoryBytes: 512 << 20}}
	u := sm.usage(hostile(), at.Add(-10*time.Second).UnixNano())
	fields := u.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		if f := fields.Get(i); f.Kind() == protoreflect.Uint64Kind && u.ProtoReflect().Get(f).Uint() > maxCounter {
			t.Errorf("%s = %d", f.Name(), u.ProtoReflect().Get(f).Uint())
		}
	}
	for name, got := range map[string][2]uint64{
		"cpu":      {u.GetCpuUsageNanos(), 20e9},
		"memory":   {u.GetMemoryWorkingSetBytes(), 1 << 30},
		"writable": {u.GetWritableBytes(), uint64(scratch.Size)},
		"pids":     {u.GetPids(), maxPids},
	} {
		if got[0] != got[1] {
			t.Errorf("%s: %d, want the bound %d", name, got[0], got[1])
		}
	}
	if len(u.GetPressure()) != 3 {
		t.Errorf("%d pressure entries, want one for each resource", len(u.GetPressure()))
	}
	for _, p := range u.GetPressure() {
		if p.GetAvg10() != 0 || p.GetAvg60() != 0 || p.GetAvg300() != 100 || p.GetTotalUsec() != 10e6 {
			t.Errorf("pressure %v", p)
		}
	}
	if psi(u, "cpu").GetSome().GetTotal() != 10e9 {
		t.Errorf("psi %v: not in nanoseconds", psi(u, "cpu"))
	}
	var srv Server
	srv.cpuUsage("c", &guestapi.ContainerStats{}, &sample{at: at.Add(-time.Second), vm: sm.vm}, 0)
	if c := srv.cpuUsage("c", u, sm, 0); c.GetUsageNanoCores().GetValue() != 2e9 {
		t.Errorf("%v: more than the VM's 2 CPUs", c.GetUsageNanoCores())
	}
	// A guest with a clock of its own, or none: nothing has run for a negative time.
	if u := sm.usage(hostile(), at.Add(time.Hour).UnixNano()); u.GetCpuUsageNanos() != 0 {
		t.Errorf("%d ns of CPU time in less than no time", u.GetCpuUsageNanos())
	}
	if u := sm.usage(nil, 0); u == nil || psi(u, "cpu") != nil || ioUsage(u, at) != nil {
		t.Errorf("a guest that says nothing: %v", u)
	}
}

// Guests are asked at one time, so that a listing takes as long as the slowest,
// and one that has no answer costs its own place alone.
func TestGuestsAreAskedAtOnce(t *testing.T) {
	pods := make([]int, 30)
	for i := range pods {
		pods[i] = i
	}
	began := time.Now()
	got := askAll(pods, func(i int) *int {
		time.Sleep(100 * time.Millisecond)
		if i%10 == 3 {
			return nil
		}
		return &i
	})
	if took := time.Since(began); took > time.Second {
		t.Errorf("30 guests took %v", took)
	}
	if len(got) != 27 || !slices.IsSortedFunc(got, func(a, b *int) int { return *a - *b }) {
		t.Errorf("%d answers, or out of order", len(got))
	}
	if most := len(askAll(make([]int, 5*statsAtOnce), func(i int) *int { return &i })); most != 5*statsAtOnce {
		t.Errorf("%d answers of %d", most, 5*statsAtOnce)
	}
}

func TestInterfacesOfAHostileGuest(t *testing.T) {
	resp := &guestapi.StatsResponse{}
	for _, name := range []string{"", "lo:1", "a/b", "..", "x y", "\x1b[2J", "\xff", strings.Repeat("n", 16), "net1", "eth0", "net1"} {
		resp.Interfaces = append(resp.Interfaces, &guestapi.InterfaceStats{Name: name, RxBytes: math.MaxUint64})
	}
	for i := range 1000 {
		resp.Interfaces = append(resp.Interfaces, &guestapi.InterfaceStats{Name: "v" + string(rune('a'+i%26)) + string(rune('a'+i/26%26))})
	}
	got := (&sample{resp: resp}).interfaces()
	if len(got) != maxInterfaces || got[0].GetName() != "eth0" || got[1].GetName() != "net1" {
		t.Errorf("%d interfaces, %v, ...", len(got), got[:2])
	}
	if got[0].GetRxBytes() != maxCounter {
		t.Errorf("%d bytes", got[0].GetRxBytes())
	}
	names := map[string]bool{}
	for _, i := range got {
		if names[i.GetName()] {
			t.Errorf("%q twice: its metrics would break the scrape", i.GetName())
		}
		names[i.GetName()] = true
	}
}

func TestNanoCores(t *testing.T) {
	var r cpuRates
	start := time.Unix(1000, 0)
	at := func(s float64) time.Time { return start.Add(time.Duration(s * 1e9)) }
	for _, tc := range []struct {
		name  string
		nanos uint64
		at    time.Time
		want  uint64
	}{
		{name: "first: since the start", nanos: 5e9, at: at(10), want: 5e8},
		{name: "over the window", nanos: 7e9, at: at(12), want: 1e9},
		{name: "too soon: as before", nanos: 9e9, at: at(12.5), want: 1e9},
		{name: "backwards", nanos: 1, at: at(14), want: 0},
		{name: "on", nanos: 1 + 1e9, at: at(18), want: 25e7},
	} {
		if got := r.nanoCores("c", tc.nanos, tc.at, start.UnixNano()); got != tc.want {
			t.Errorf("%s: %d, want %d", tc.name, got, tc.want)
		}
	}
	r.nanoCores("other", 0, at(2000), start.UnixNano())
	if len(r.last) != 1 {
		t.Errorf("%d rates are kept: the old ones too", len(r.last))
	}
	if got := (&cpuRates{}).nanoCores("future", 5, at(0), at(1).UnixNano()); got != 0 {
		t.Errorf("started after now: %d", got)
	}
}

// Each item is sent once, in messages of at least one and of a bounded size.
func TestPortions(t *testing.T) {
	item := func(n int) *runtimeapi.Container { return &runtimeapi.Container{Id: strings.Repeat("x", n)} }
	for name, items := range map[string][]*runtimeapi.Container{
		"none": nil, "one": {item(1)}, "many": slices.Repeat([]*runtimeapi.Container{item(10)}, 1001),
		"large ones": slices.Repeat([]*runtimeapi.Container{item(400 << 10)}, 7), "huge ones": slices.Repeat([]*runtimeapi.Container{item(3 << 20)}, 3),
	} {
		var got []*runtimeapi.Container
		err := portions(items, func(p []*runtimeapi.Container) error {
			if n := proto.Size(&runtimeapi.StreamContainersResponse{Containers: p}); len(p) == 0 || len(p) > portionItems || len(p) > 1 && n > portionBytes+1<<10 {
				t.Errorf("%s: a message of %d items, %d bytes", name, len(p), n)
			}
			got = append(got, p...)
			return nil
		})
		if err != nil || !slices.Equal(got, items) {
			t.Errorf("%s: %d of %d items, %v", name, len(got), len(items), err)
		}
	}
}

// What kubelet's collector asks of metrics: each has a descriptor with as many
// label keys as it has values, and no series comes twice.
func TestMetrics(t *testing.T) {
	descs, err := (&Server{}).ListMetricDescriptors(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string][]string{}
	for _, d := range descs.GetDescriptors() {
		if _, twice := keys[d.GetName()]; twice || d.GetHelp() == "" {
			t.Errorf("descriptor %v: twice, or without help", d)
		}
		keys[d.GetName()] = d.GetLabelKeys()
	}
	at := time.Now()
	sm := &sample{at: at, vm: sandbox.Size{CPUs: 1, MemoryBytes: 1 << 30}, resp: &guestapi.StatsResponse{
		Interfaces: []*guestapi.InterfaceStats{{Name: "eth0"}, {Name: "net1"}},
	}}
	read := map[string]bool{}
	for kind, from := range map[string]metricSource{
		"pod":       {usage: sm.usage(hostile(), 0), interfaces: sm.interfaces(), started: 1e9, seen: at.UnixNano()},
		"container": {usage: sm.usage(hostile(), 0), container: &sandbox.Container{}, started: 1e9, resources: &runtimeapi.LinuxContainerResources{CpuPeriod: 1, CpuQuota: 2, CpuShares: 3, MemoryLimitInBytes: 4, MemorySwapLimitInBytes: 5}},
	} {
		series := map[string]bool{}
		for _, m := range readMetrics(from, make([]string, len(baseLabels))) {
			k, ok := keys[m.GetName()]
			id := m.GetName() + strings.Join(m.GetLabelValues(), ",")
			if !ok || len(k) != len(m.GetLabelValues()) || series[id] {
				t.Errorf("%s: %v: label keys %v", kind, m, k)
			}
			series[id], read[m.GetName()] = true, true
		}
	}
	// What kubelets give with cAdvisor, and so what dashboards and critest's next
	// version look for, but for what the CRI has no field for or cgroup v2 no figure.
	for _, name := range strings.Fields(`blkio_device_usage_total cpu_cfs_periods_total
		cpu_cfs_throttled_periods_total cpu_cfs_throttled_seconds_total cpu_system_seconds_total cpu_usage_seconds_total
		cpu_user_seconds_total file_descriptors fs_inodes_free fs_inodes_total fs_limit_bytes fs_reads_bytes_total
		fs_reads_total fs_usage_bytes fs_writes_bytes_total fs_writes_total last_seen memory_cache memory_failcnt
		memory_failures_total memory_kernel_usage memory_mapped_file memory_max_usage_bytes memory_rss memory_swap
		memory_usage_bytes memory_working_set_bytes network_receive_bytes_total network_receive_errors_total
		network_receive_packets_dropped_total network_receive_packets_total network_transmit_bytes_total
		network_transmit_errors_total network_transmit_packets_dropped_total network_transmit_packets_total
		oom_events_total pressure_cpu_stalled_seconds_total pressure_cpu_waiting_seconds_total
		pressure_io_stalled_seconds_total pressure_io_waiting_seconds_total pressure_memory_stalled_seconds_total
		pressure_memory_waiting_seconds_total processes sockets spec_cpu_period spec_cpu_quota spec_cpu_shares
		spec_memory_limit_bytes spec_memory_swap_limit_bytes start_time_seconds threads threads_max ulimits_soft`) {
		if keys["container_"+name] == nil {
			t.Errorf("there is no container_%s", name)
		}
	}
	for name := range keys {
		// A kernel that says "some" alone has no "full".
		if !read[name] && !strings.Contains(name, "_stalled_") {
			t.Errorf("nothing has the metric %s", name)
		}
	}
}
