package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox"
	"github.com/cri-vz/cri-vz/sandbox/scratch"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// The metrics have cAdvisor's names and units (KEP 2371), so that dashboards and
// alerts made for a kubelet's /metrics/cadvisor go on working. What the guest
// doesn't measure is not among them, rather than zero. The CRI carries whole
// numbers: seconds are rounded down.

// baseLabels are the keys of every metric's first labels. A pod's own metrics
// have an empty container and image, as cAdvisor's have.
var baseLabels = []string{"id", "name", "image", "container", "pod", "namespace"}

// metric is one cAdvisor metric; its values have a label value for each of its
// own label keys.
type metric struct {
	name, help string
	gauge      bool
	labels     []string
	of         func(metricSource) []metricValue
}

type metricValue struct {
	n      uint64
	labels []string
}

// metricSource is what a container's or a pod's metrics come from. usage is
// within bounds.
type metricSource struct {
	usage     *guestapi.ContainerStats
	resources *runtimeapi.LinuxContainerResources
	// container is nil for a pod as a whole, and interfaces for a container.
	container  *sandbox.Container
	interfaces []*guestapi.InterfaceStats
	// Inodes of the scratch disk.
	inodes, inodesFree uint64

	started int64
	seen    int64
}

// one is the metric of one number of the usage.
func one(f func(*guestapi.ContainerStats) uint64) func(metricSource) []metricValue {
	return func(m metricSource) []metricValue { return []metricValue{{n: f(m.usage)}} }
}

// seconds is the metric of a number of nanoseconds.
func seconds(f func(*guestapi.ContainerStats) uint64) func(metricSource) []metricValue {
	return func(m metricSource) []metricValue { return []metricValue{{n: f(m.usage) / 1e9}} }
}

// perInterface is a metric with one value for each of a pod's interfaces.
func perInterface(f func(*guestapi.InterfaceStats) uint64) func(metricSource) []metricValue {
	return func(m metricSource) []metricValue {
		var out []metricValue
		for _, i := range m.interfaces {
			out = append(out, metricValue{f(i), []string{i.GetName()}})
		}
		return out
	}
}

// scratchDevice is the label of the guest's disks, which are added up: what the pod's
// containers write to is its scratch disk.
const scratchDevice = "scratch"

// onDisk is a metric of the scratch disk, with its device's label.
func onDisk(f func(*guestapi.ContainerStats) uint64) func(metricSource) []metricValue {
	return func(m metricSource) []metricValue {
		return []metricValue{{f(m.usage), []string{scratchDevice}}}
	}
}

// ofContainer leaves a metric out for the pod as a whole.
func ofContainer(f func(metricSource) []metricValue) func(metricSource) []metricValue {
	return func(m metricSource) []metricValue {
		if m.container == nil {
			return nil
		}
		return f(m)
	}
}

// spec is a metric of a container's limits; those that are not set have none.
func spec(f func(*runtimeapi.LinuxContainerResources) int64) func(metricSource) []metricValue {
	return ofContainer(func(m metricSource) []metricValue {
		if n := f(m.resources); n > 0 {
			return []metricValue{{n: uint64(n)}}
		}
		return nil
	})
}

// pressure is a metric of the time that some or all tasks waited; there is none
// where the guest's kernel doesn't say.
func pressure(resource, kind string) func(metricSource) []metricValue {
	return func(m metricSource) []metricValue {
		for _, p := range m.usage.GetPressure() {
			if p.GetResource() == resource && p.GetKind() == kind {
				return []metricValue{{n: p.GetTotalUsec() / 1e6}}
			}
		}
		return nil
	}
}

// throttling leaves a metric out where there is no CPU limit.
func throttling(f func(*guestapi.ContainerStats) uint64) func(metricSource) []metricValue {
	return func(m metricSource) []metricValue {
		if m.usage.GetCpuPeriods() == 0 {
			return nil
		}
		return []metricValue{{n: f(m.usage)}}
	}
}

var (
	onInterface = []string{"interface"}
	onDevice    = []string{"device"}
)

var metrics = []metric{
	{name: "container_cpu_usage_seconds_total", help: "CPU time consumed, in seconds.", labels: []string{"cpu"}, of: func(m metricSource) []metricValue {
		return []metricValue{{m.usage.GetCpuUsageNanos() / 1e9, []string{"total"}}}
	}},
	{name: "container_cpu_user_seconds_total", help: "CPU time consumed in user mode, in seconds.", of: seconds((*guestapi.ContainerStats).GetCpuUserNanos)},
	{name: "container_cpu_system_seconds_total", help: "CPU time consumed in the guest's kernel, in seconds.", of: seconds((*guestapi.ContainerStats).GetCpuSystemNanos)},
	{name: "container_cpu_cfs_periods_total", help: "Periods of the CPU limit that have passed.", of: throttling((*guestapi.ContainerStats).GetCpuPeriods)},
	{name: "container_cpu_cfs_throttled_periods_total", help: "Periods in which the CPU limit was reached.", of: throttling((*guestapi.ContainerStats).GetCpuThrottledPeriods)},
	{name: "container_cpu_cfs_throttled_seconds_total", help: "Time held back by the CPU limit, in seconds.", of: throttling(func(u *guestapi.ContainerStats) uint64 { return u.GetCpuThrottledNanos() / 1e9 })},

	{name: "container_memory_usage_bytes", help: "Memory in use, whenever it was last accessed.", gauge: true, of: one((*guestapi.ContainerStats).GetMemoryUsageBytes)},
	{name: "container_memory_working_set_bytes", help: "Memory in use without the inactive page cache.", gauge: true, of: one((*guestapi.ContainerStats).GetMemoryWorkingSetBytes)},
	{name: "container_memory_max_usage_bytes", help: "The most memory that was in use.", gauge: true, of: one((*guestapi.ContainerStats).GetMemoryMaxUsageBytes)},
	{name: "container_memory_rss", help: "Anonymous memory in use, in bytes.", gauge: true, of: one((*guestapi.ContainerStats).GetMemoryRssBytes)},
	{name: "container_memory_cache", help: "Page cache, in bytes.", gauge: true, of: one((*guestapi.ContainerStats).GetMemoryCacheBytes)},
	{name: "container_memory_mapped_file", help: "Memory mapped files, in bytes.", gauge: true, of: one((*guestapi.ContainerStats).GetMemoryMappedFileBytes)},
	{name: "container_memory_kernel_usage", help: "Memory of the guest's kernel for it, in bytes.", gauge: true, of: one((*guestapi.ContainerStats).GetMemoryKernelBytes)},
	{name: "container_memory_swap", help: "Swap in use, in bytes.", gauge: true, of: one((*guestapi.ContainerStats).GetSwapUsageBytes)},
	{name: "container_memory_failcnt", help: "How often usage was about to pass the memory limit.", of: one((*guestapi.ContainerStats).GetMemoryFailures)},
	{name: "container_memory_failures_total", help: "Page faults.", labels: []string{"failure_type", "scope"}, of: func(m metricSource) []metricValue {
		return []metricValue{
			{m.usage.GetPageFaults(), []string{"pgfault", "hierarchy"}},
			{m.usage.GetMajorPageFaults(), []string{"pgmajfault", "hierarchy"}},
		}
	}},
	{name: "container_oom_events_total", help: "Processes that the guest's OOM killer has ended.", of: one((*guestapi.ContainerStats).GetOomKills)},

	{name: "container_fs_usage_bytes", help: "The writable layer's size.", gauge: true, labels: onDevice, of: ofContainer(onDisk((*guestapi.ContainerStats).GetWritableBytes))},
	{name: "container_fs_limit_bytes", help: "The size of the pod's scratch disk.", gauge: true, labels: onDevice, of: ofContainer(onDisk(func(*guestapi.ContainerStats) uint64 { return uint64(scratch.Size) }))},
	{name: "container_fs_inodes_total", help: "The inodes of the pod's scratch disk.", gauge: true, labels: onDevice, of: ofContainer(func(m metricSource) []metricValue {
		return []metricValue{{m.inodes, []string{scratchDevice}}}
	})},
	{name: "container_fs_inodes_free", help: "The free inodes of the pod's scratch disk.", gauge: true, labels: onDevice, of: ofContainer(func(m metricSource) []metricValue {
		return []metricValue{{m.inodesFree, []string{scratchDevice}}}
	})},
	{name: "container_blkio_device_usage_total", help: "Bytes read from and written to the guest's disks.", labels: []string{"device", "major", "minor", "operation"}, of: func(m metricSource) []metricValue {
		return []metricValue{
			{m.usage.GetReadBytes(), []string{scratchDevice, "", "", "Read"}},
			{m.usage.GetWrittenBytes(), []string{scratchDevice, "", "", "Write"}},
		}
	}},
	{name: "container_fs_reads_bytes_total", help: "Bytes read from the guest's disks.", labels: onDevice, of: onDisk((*guestapi.ContainerStats).GetReadBytes)},
	{name: "container_fs_reads_total", help: "Reads from the guest's disks.", labels: onDevice, of: onDisk((*guestapi.ContainerStats).GetReads)},
	{name: "container_fs_writes_bytes_total", help: "Bytes written to the guest's disks.", labels: onDevice, of: onDisk((*guestapi.ContainerStats).GetWrittenBytes)},
	{name: "container_fs_writes_total", help: "Writes to the guest's disks.", labels: onDevice, of: onDisk((*guestapi.ContainerStats).GetWrites)},

	{name: "container_network_receive_bytes_total", help: "Bytes received.", labels: onInterface, of: perInterface((*guestapi.InterfaceStats).GetRxBytes)},
	{name: "container_network_receive_packets_total", help: "Packets received.", labels: onInterface, of: perInterface((*guestapi.InterfaceStats).GetRxPackets)},
	{name: "container_network_receive_packets_dropped_total", help: "Packets dropped while receiving.", labels: onInterface, of: perInterface((*guestapi.InterfaceStats).GetRxDropped)},
	{name: "container_network_receive_errors_total", help: "Errors while receiving.", labels: onInterface, of: perInterface((*guestapi.InterfaceStats).GetRxErrors)},
	{name: "container_network_transmit_bytes_total", help: "Bytes sent.", labels: onInterface, of: perInterface((*guestapi.InterfaceStats).GetTxBytes)},
	{name: "container_network_transmit_packets_total", help: "Packets sent.", labels: onInterface, of: perInterface((*guestapi.InterfaceStats).GetTxPackets)},
	{name: "container_network_transmit_packets_dropped_total", help: "Packets dropped while sending.", labels: onInterface, of: perInterface((*guestapi.InterfaceStats).GetTxDropped)},
	{name: "container_network_transmit_errors_total", help: "Errors while sending.", labels: onInterface, of: perInterface((*guestapi.InterfaceStats).GetTxErrors)},

	{name: "container_processes", help: "Processes that run.", gauge: true, of: one((*guestapi.ContainerStats).GetProcesses)},
	{name: "container_threads", help: "Threads that run.", gauge: true, of: one((*guestapi.ContainerStats).GetPids)},
	{name: "container_threads_max", help: "The limit of threads; 0 is none.", gauge: true, of: one((*guestapi.ContainerStats).GetPidsMax)},
	{name: "container_file_descriptors", help: "Open files.", gauge: true, of: one((*guestapi.ContainerStats).GetFiles)},
	{name: "container_sockets", help: "Open files that are sockets.", gauge: true, of: one((*guestapi.ContainerStats).GetSockets)},
	{name: "container_ulimits_soft", help: "Limits that processes may raise.", gauge: true, labels: []string{"ulimit"}, of: ofContainer(func(m metricSource) []metricValue {
		if m.usage.GetFilesLimit() == 0 { // nothing runs
			return nil
		}
		return []metricValue{{m.usage.GetFilesLimit(), []string{"max_open_files"}}}
	})},

	{name: "container_pressure_cpu_waiting_seconds_total", help: "Time in which some tasks waited for a CPU, in seconds.", of: pressure("cpu", "some")},
	{name: "container_pressure_cpu_stalled_seconds_total", help: "Time in which all tasks waited for a CPU, in seconds.", of: pressure("cpu", "full")},
	{name: "container_pressure_memory_waiting_seconds_total", help: "Time in which some tasks waited for memory, in seconds.", of: pressure("memory", "some")},
	{name: "container_pressure_memory_stalled_seconds_total", help: "Time in which all tasks waited for memory, in seconds.", of: pressure("memory", "full")},
	{name: "container_pressure_io_waiting_seconds_total", help: "Time in which some tasks waited for I/O, in seconds.", of: pressure("io", "some")},
	{name: "container_pressure_io_stalled_seconds_total", help: "Time in which all tasks waited for I/O, in seconds.", of: pressure("io", "full")},

	{name: "container_spec_cpu_period", help: "The period of the CPU limit, in microseconds.", gauge: true, of: spec((*runtimeapi.LinuxContainerResources).GetCpuPeriod)},
	{name: "container_spec_cpu_quota", help: "The CPU limit in each period, in microseconds.", gauge: true, of: spec((*runtimeapi.LinuxContainerResources).GetCpuQuota)},
	{name: "container_spec_cpu_shares", help: "The CPU shares.", gauge: true, of: spec((*runtimeapi.LinuxContainerResources).GetCpuShares)},
	{name: "container_spec_memory_limit_bytes", help: "The memory limit.", gauge: true, of: spec((*runtimeapi.LinuxContainerResources).GetMemoryLimitInBytes)},
	{name: "container_spec_memory_swap_limit_bytes", help: "The limit of memory and swap.", gauge: true, of: spec((*runtimeapi.LinuxContainerResources).GetMemorySwapLimitInBytes)},

	{name: "container_start_time_seconds", help: "When it was started, in seconds of Unix time.", gauge: true, of: func(m metricSource) []metricValue {
		if m.started <= 0 {
			return nil
		}
		return []metricValue{{n: uint64(m.started) / 1e9}}
	}},
	{name: "container_last_seen", help: "When this was measured, in seconds of Unix time.", gauge: true, of: func(m metricSource) []metricValue {
		return []metricValue{{n: uint64(m.seen) / 1e9}}
	}},
}

// ListMetricDescriptors implements the CRI call of that name. The list never
// changes while the daemon runs.
func (s *Server) ListMetricDescriptors(context.Context, *runtimeapi.ListMetricDescriptorsRequest) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	resp := &runtimeapi.ListMetricDescriptorsResponse{}
	for _, m := range metrics {
		resp.Descriptors = append(resp.Descriptors, &runtimeapi.MetricDescriptor{
			Name: m.name, Help: m.help, LabelKeys: append(baseLabels[:len(baseLabels):len(baseLabels)], m.labels...),
		})
	}
	return resp, nil
}

// ListPodSandboxMetrics implements the CRI call of that name, for pods that are
// ready and answer within [statsTimeout].
func (s *Server) ListPodSandboxMetrics(ctx context.Context, _ *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	return &runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: s.listPodMetrics(ctx)}, nil
}

func (s *Server) listPodMetrics(ctx context.Context) []*runtimeapi.PodSandboxMetrics {
	var out []*runtimeapi.PodSandboxMetrics
	for _, sm := range samples(ctx, s.Pods.List(), true) {
		out = append(out, podMetrics(sm))
	}
	return out
}

func podMetrics(sm *sample) *runtimeapi.PodSandboxMetrics {
	meta, created := sm.pod.Config().GetMetadata(), sm.pod.Status().CreatedAt
	pod := &runtimeapi.PodSandboxMetrics{PodSandboxId: sm.pod.ID()}
	pod.Metrics = readMetrics(metricSource{
		usage: sm.usage(sm.resp.GetPod(), created), interfaces: sm.interfaces(), started: created, seen: sm.at.UnixNano(),
	}, []string{sm.pod.ID(), sm.pod.ID(), "", "", meta.GetName(), meta.GetNamespace()})
	for _, c := range sm.pod.Containers() {
		st, g := c.Status(), sm.of(c.ID())
		if st.Phase == shimapi.Phase_EXITED || g == nil {
			continue
		}
		cfg := c.Config()
		pod.ContainerMetrics = append(pod.ContainerMetrics, &runtimeapi.ContainerMetrics{
			ContainerId: c.ID(),
			Metrics: readMetrics(metricSource{
				usage: sm.usage(g, st.CreatedAt), resources: c.Resources(), container: c, started: st.StartedAt, seen: sm.at.UnixNano(),
				inodes: min(sm.resp.GetScratchInodes(), maxCounter), inodesFree: min(sm.resp.GetScratchInodesFree(), maxCounter),
			}, []string{c.ID(), c.ID(), cfg.GetImage().GetImage(), cfg.GetMetadata().GetName(), meta.GetName(), meta.GetNamespace()}),
		})
	}
	return pod
}

func readMetrics(from metricSource, labels []string) []*runtimeapi.Metric {
	var out []*runtimeapi.Metric
	for _, m := range metrics {
		kind := runtimeapi.MetricType_COUNTER
		if m.gauge {
			kind = runtimeapi.MetricType_GAUGE
		}
		for _, v := range m.of(from) {
			// No timestamp: it was read for this answer.
			out = append(out, &runtimeapi.Metric{
				Name: m.name, MetricType: kind, Value: value(v.n),
				LabelValues: append(labels[:len(labels):len(labels)], v.labels...),
			})
		}
	}
	return out
}
