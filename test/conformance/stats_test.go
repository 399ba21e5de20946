//go:build linux

package conformance_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

// What a kubelet's stats need of the CRI: timestamps, usage_nano_cores, memory,
// and a writable layer on a file system of the host (T15, T41).
func TestStats(t *testing.T) {
	p := sharedPodOf(t)
	ctx := cri.Timeout(t, cri.CallTimeout)
	started := p.Start(t, "stats", cri.AsRoot, cri.Command("/bin/sleep", "infinity"), cri.MemoryLimit(64<<20))
	created := p.Create(t, "stats-created", cri.Command("/bin/sleep", "infinity"))
	exited := p.Start(t, "stats-exited", cri.Command("/bin/echo", "x"))
	p.WaitExit(t, exited, 30*time.Second)

	check := func(s *runtimeapi.ContainerStats) {
		t.Helper()
		now := time.Now()
		for name, at := range map[string]int64{
			"cpu": s.GetCpu().GetTimestamp(), "memory": s.GetMemory().GetTimestamp(), "writable layer": s.GetWritableLayer().GetTimestamp(), "swap": s.GetSwap().GetTimestamp(),
		} {
			if age := now.Sub(time.Unix(0, at)); age < 0 || age > 10*time.Second {
				t.Errorf("%s: the time is %v from the host's", name, age)
			}
		}
		if s.GetAttributes().GetId() != started || s.GetAttributes().GetMetadata().GetName() != "stats" || s.GetAttributes().GetLabels()["container"] != "stats" {
			t.Errorf("attributes: %v", s.GetAttributes())
		}
		m := s.GetMemory()
		if s.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 || s.GetCpu().GetUsageNanoCores() == nil ||
			m.GetWorkingSetBytes().GetValue() == 0 || m.GetRssBytes().GetValue() == 0 || m.GetUsageBytes().GetValue() < m.GetWorkingSetBytes().GetValue() ||
			m.GetAvailableBytes().GetValue()+m.GetWorkingSetBytes().GetValue() != 64<<20 || m.GetPageFaults().GetValue() == 0 || m.GetMajorPageFaults() == nil {
			t.Errorf("cpu %v, memory %v", s.GetCpu(), s.GetMemory())
		}
		if _, err := os.Stat(s.GetWritableLayer().GetFsId().GetMountpoint()); err != nil || s.GetWritableLayer().GetInodesUsed() == nil {
			t.Errorf("writable layer %v: %v", s.GetWritableLayer(), err)
		}
	}
	one := func(id string) *runtimeapi.ContainerStats {
		t.Helper()
		r, err := p.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
		if err != nil {
			t.Fatal(err)
		}
		return r.GetStats()
	}
	before := one(started)
	check(before)
	// 100 KB into the writable layer are seen to the block (T15).
	p.Output(t, started, "/bin/write", "/stats", strings.Repeat("x", 100_000))
	if n := int64(one(started).GetWritableLayer().GetUsedBytes().GetValue()) - int64(before.GetWritableLayer().GetUsedBytes().GetValue()); n < 100_000 || n > 120_000 {
		t.Errorf("100 KB written are %d bytes", n)
	}
	if one(exited).GetWritableLayer() == nil {
		t.Error("an exited container has no writable layer")
	}

	list := func(f *runtimeapi.ContainerStatsFilter) (ids []string) {
		t.Helper()
		r, err := p.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range r.GetStats() {
			if ids = append(ids, s.GetAttributes().GetId()); s.GetAttributes().GetId() == started {
				check(s)
			}
		}
		stream, err := p.StreamContainerStats(ctx, &runtimeapi.StreamContainerStatsRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		streamed := collect(t, stream.Recv, func(m *runtimeapi.StreamContainerStatsResponse) (ids []string) {
			for _, s := range m.GetContainerStats() {
				ids = append(ids, s.GetAttributes().GetId())
			}
			return
		})
		slices.Sort(ids)
		if slices.Sort(streamed); !slices.Equal(ids, streamed) {
			t.Errorf("listed %v, streamed %v", ids, streamed)
		}
		return ids
	}
	for _, f := range []*runtimeapi.ContainerStatsFilter{nil, {}, {PodSandboxId: p.ID}} {
		ids := list(f)
		if !slices.Contains(ids, started) || !slices.Contains(ids, created) || !slices.Contains(ids, p.Idle) || slices.Contains(ids, exited) {
			t.Errorf("filter %v: %v", f, ids)
		}
	}
	for _, f := range []*runtimeapi.ContainerStatsFilter{{Id: started}, {LabelSelector: map[string]string{"container": "stats"}}} {
		if ids := list(f); !slices.Equal(ids, []string{started}) {
			t.Errorf("filter %v: %v", f, ids)
		}
	}
	if ids := list(&runtimeapi.ContainerStatsFilter{LabelSelector: map[string]string{"container": "no"}}); len(ids) != 0 {
		t.Errorf("no container has the label: %v", ids)
	}
	_, err := p.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: "nothing"})
	cri.WantError(t, err, codes.NotFound, "nothing")
}

// collect reads a stream of lists to its end.
func collect[M, I any](t *testing.T, recv func() (M, error), items func(M) []I) (all []I) {
	t.Helper()
	for {
		m, err := recv()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		list := items(m)
		if len(list) == 0 {
			t.Error("a message without items")
		}
		all = append(all, list...)
	}
}

func TestPodSandboxStatsAndMetrics(t *testing.T) {
	p := sharedPodOf(t)
	ctx := cri.Timeout(t, cri.CallTimeout)
	pods := func() map[string]*runtimeapi.PodSandboxStats {
		t.Helper()
		r, err := p.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{LabelSelector: map[string]string{"pod": "shared-pod"}}})
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]*runtimeapi.PodSandboxStats{}
		for _, s := range r.GetStats() {
			m[s.GetAttributes().GetId()] = s
		}
		return m
	}
	r, err := p.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.ID})
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]*runtimeapi.PodSandboxStats{"one": r.GetStats(), "list": pods()[p.ID]} {
		l := s.GetLinux()
		if s.GetAttributes().GetMetadata().GetName() != "shared-pod" || l.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 ||
			l.GetMemory().GetWorkingSetBytes().GetValue() == 0 || l.GetMemory().GetAvailableBytes().GetValue() == 0 ||
			l.GetProcess().GetProcessCount().GetValue() == 0 || l.GetNetwork().GetTimestamp() == 0 || l.GetNetwork().GetDefaultInterface().GetName() != "eth0" ||
			!slices.ContainsFunc(l.GetContainers(), func(c *runtimeapi.ContainerStats) bool { return c.GetAttributes().GetId() == p.Idle }) {
			t.Errorf("%s: %v", name, s)
		}
	}
	if len(pods()) != 1 {
		t.Errorf("%d pods have the label", len(pods()))
	}

	descs, err := p.ListMetricDescriptors(ctx, &runtimeapi.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string][]string{}
	for _, d := range descs.GetDescriptors() {
		keys[d.GetName()] = d.GetLabelKeys()
	}
	metrics, err := p.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]uint64{}
	for _, pod := range metrics.GetPodMetrics() {
		all := slices.Clone(pod.GetMetrics())
		for _, c := range pod.GetContainerMetrics() {
			all = append(all, c.GetMetrics()...)
		}
		for _, m := range all {
			labels := map[string]string{}
			if len(keys[m.GetName()]) != len(m.GetLabelValues()) {
				t.Fatalf("%v: keys %v", m, keys[m.GetName()])
			}
			for i, k := range keys[m.GetName()] {
				labels[k] = m.GetLabelValues()[i]
			}
			if labels["pod"] == "shared-pod" {
				found[fmt.Sprintf("%s{container=%q,interface=%q}", m.GetName(), labels["container"], labels["interface"])] = m.GetValue().GetValue()
			}
		}
	}
	for _, want := range []string{
		`container_memory_working_set_bytes{container="idle",interface=""}`, `container_cpu_usage_seconds_total{container="idle",interface=""}`,
		`container_memory_working_set_bytes{container="",interface=""}`, `container_network_receive_bytes_total{container="",interface="eth0"}`,
		`container_start_time_seconds{container="idle",interface=""}`, `container_processes{container="idle",interface=""}`,
		`container_memory_kernel_usage{container="idle",interface=""}`, `container_file_descriptors{container="idle",interface=""}`,
		`container_fs_inodes_free{container="idle",interface=""}`, `container_fs_inodes_total{container="idle",interface=""}`,
		`container_ulimits_soft{container="idle",interface=""}`,
	} {
		if found[want] == 0 && !strings.Contains(want, "_seconds_total") && !strings.Contains(want, "_bytes_total") {
			t.Errorf("there is no %s, or it is 0", want)
		}
	}
	stream, err := p.StreamPodSandboxMetrics(ctx, &runtimeapi.StreamPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(collect(t, stream.Recv, (*runtimeapi.StreamPodSandboxMetricsResponse).GetPodSandboxMetrics)); n != len(metrics.GetPodMetrics()) {
		t.Errorf("%d pods streamed, %d listed", n, len(metrics.GetPodMetrics()))
	}
}

func TestUpdateRuntimeConfig(t *testing.T) {
	update := func(cidr string) error {
		_, err := suite.UpdateRuntimeConfig(cri.Timeout(t, cri.CallTimeout), &runtimeapi.UpdateRuntimeConfigRequest{
			RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: cidr}},
		})
		return err
	}
	for _, cidr := range []string{"", "10.1.0.0/16", "10.1.0.0/16,fd00::/64"} {
		if err := update(cidr); err != nil {
			t.Errorf("%q: %v", cidr, err)
		}
	}
	cri.WantError(t, update("10.1.0.0"), codes.InvalidArgument, "pod_cidr")
}
