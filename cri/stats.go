package cri

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox"
	"github.com/cri-vz/cri-vz/sandbox/scratch"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// Resource usage is read in the guests when it is asked for and not kept: one
// call per VM, all at once, costs a listing less than the age of a cached answer
// would cost its readers. What is kept is the last CPU time of each container,
// because usage_nano_cores is a difference.
//
// A guest may answer anything. Time is the host's; counters are cut to what a VM
// of its size can have used; only containers that the host knows are looked up.

const (
	// statsTimeout is how long one pod may take to answer. A pod that doesn't is
	// left out of a listing: its shim finds out whether the guest is deaf (T12).
	statsTimeout = 2 * time.Second
	// statsAtOnce is how many pods are asked at one time.
	statsAtOnce = 64
	// cpuWindow is the shortest time over which usage_nano_cores is averaged.
	cpuWindow = time.Second
	// maxInterfaces is how many network interfaces of a pod are reported.
	maxInterfaces = 64
	// maxCounter bounds counters that nothing else bounds, so that sums and
	// conversions to signed numbers don't overflow.
	maxCounter = 1 << 53
	// maxPids is the kernel's PID_MAX_LIMIT.
	maxPids = 1 << 22
)

// sample is a pod's usage as its guest told it at a time of the host's.
type sample struct {
	pod  *sandbox.Pod
	at   time.Time
	resp *guestapi.StatsResponse
	vm   sandbox.Size
}

// samples asks pods for their usage, all at once. Those that are not ready or
// don't answer in time are left out. Open files are counted if they are wanted.
func samples(ctx context.Context, pods []*sandbox.Pod, files bool) []*sample {
	ready := slices.DeleteFunc(pods, func(p *sandbox.Pod) bool { return !p.Status().Ready })
	return askAll(ready, func(p *sandbox.Pod) *sample {
		s, err := sampleOf(ctx, p, files)
		if err != nil {
			klog.V(2).InfoS("No stats of a pod", "pod", p.ID(), "err", err)
		}
		return s
	})
}

// askAll asks up to statsAtOnce at one time, and returns the answers that are not
// nil in the order of those asked.
func askAll[T, A any](all []T, ask func(T) *A) []*A {
	answers := make([]*A, len(all))
	slots := make(chan struct{}, statsAtOnce)
	var wg sync.WaitGroup
	for i, one := range all {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			answers[i] = ask(one)
		})
	}
	wg.Wait()
	return slices.DeleteFunc(answers, func(a *A) bool { return a == nil })
}

func sampleOf(ctx context.Context, pod *sandbox.Pod, files bool) (*sample, error) {
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	resp, err := pod.Stats(ctx, files)
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("waited %v for the guest: %w", statsTimeout, context.DeadlineExceeded)
		}
		return nil, fmt.Errorf("stats of pod sandbox %s: %w", pod.ID(), err)
	}
	vm, err := pod.Size()
	if err != nil {
		vm = sandbox.Size{CPUs: 1 << 10, MemoryBytes: maxMemory} // of an older daemon's making
	}
	return &sample{pod: pod, at: time.Now(), resp: resp, vm: vm}, nil
}

// of is what the guest said of a container, or nil.
func (s *sample) of(id string) *guestapi.ContainerStats {
	for _, c := range s.resp.GetContainers() {
		if c.GetId() == id {
			return c
		}
	}
	return nil
}

// usage is g within the bounds of the VM: in time since, and never nil.
func (s *sample) usage(g *guestapi.ContainerStats, since int64) *guestapi.ContainerStats {
	memory := uint64(max(s.vm.MemoryBytes, 0)) * 2 // the reserve is the guest's, too
	elapsed := max(s.at.UnixNano()-since, 0)
	cpu := uint64(min(float64(elapsed)*float64(max(s.vm.CPUs, 1)), maxCounter))
	u := &guestapi.ContainerStats{
		Id:                    g.GetId(),
		CpuUsageNanos:         min(g.GetCpuUsageNanos(), cpu),
		CpuUserNanos:          min(g.GetCpuUserNanos(), cpu),
		CpuSystemNanos:        min(g.GetCpuSystemNanos(), cpu),
		CpuPeriods:            min(g.GetCpuPeriods(), maxCounter),
		CpuThrottledPeriods:   min(g.GetCpuThrottledPeriods(), maxCounter),
		CpuThrottledNanos:     min(g.GetCpuThrottledNanos(), maxCounter),
		MemoryUsageBytes:      min(g.GetMemoryUsageBytes(), memory),
		MemoryWorkingSetBytes: min(g.GetMemoryWorkingSetBytes(), memory),
		MemoryRssBytes:        min(g.GetMemoryRssBytes(), memory),
		MemoryCacheBytes:      min(g.GetMemoryCacheBytes(), memory),
		MemoryMappedFileBytes: min(g.GetMemoryMappedFileBytes(), memory),
		MemoryMaxUsageBytes:   min(g.GetMemoryMaxUsageBytes(), memory),
		MemoryFailures:        min(g.GetMemoryFailures(), maxCounter),
		PageFaults:            min(g.GetPageFaults(), maxCounter),
		MajorPageFaults:       min(g.GetMajorPageFaults(), maxCounter),
		OomKills:              min(g.GetOomKills(), maxCounter),
		SwapUsageBytes:        min(g.GetSwapUsageBytes(), maxMemory),
		SwapAvailableBytes:    min(g.GetSwapAvailableBytes(), maxMemory),
		Pids:                  min(g.GetPids(), maxPids),
		PidsMax:               min(g.GetPidsMax(), maxPids),
		Processes:             min(g.GetProcesses(), maxPids),
		WritableBytes:         min(g.GetWritableBytes(), uint64(scratch.Size)),
		WritableInodes:        min(g.GetWritableInodes(), uint64(scratch.Size)/scratch.BlockSize),
		ReadBytes:             min(g.GetReadBytes(), maxCounter),
		Reads:                 min(g.GetReads(), maxCounter),
		WrittenBytes:          min(g.GetWrittenBytes(), maxCounter),
		Writes:                min(g.GetWrites(), maxCounter),
		MemoryKernelBytes:     min(g.GetMemoryKernelBytes(), memory),
		Files:                 min(g.GetFiles(), maxCounter),
		Sockets:               min(g.GetSockets(), maxCounter),
		FilesLimit:            min(g.GetFilesLimit(), maxCounter),
	}
	for _, resource := range []string{"cpu", "memory", "io"} {
		for _, kind := range []string{"some", "full"} {
			for _, p := range g.GetPressure() {
				if p.GetResource() == resource && p.GetKind() == kind {
					u.Pressure = append(u.Pressure, &guestapi.Pressure{
						Resource: resource, Kind: kind,
						Avg10: percent(p.GetAvg10()), Avg60: percent(p.GetAvg60()), Avg300: percent(p.GetAvg300()),
						TotalUsec: min(p.GetTotalUsec(), uint64(elapsed)/1000),
					})
					break
				}
			}
		}
	}
	return u
}

// percent is f within 0 to 100; what is no number is 0.
func percent(f float64) float64 {
	if math.IsNaN(f) {
		return 0
	}
	return min(max(f, 0), 100)
}

// interfaces are the pod's network interfaces with names that Linux allows, each
// once, eth0 first if it is there.
func (s *sample) interfaces() []*guestapi.InterfaceStats {
	var out []*guestapi.InterfaceStats
	seen := map[string]bool{}
	for _, i := range s.resp.GetInterfaces() {
		name := i.GetName()
		if len(out) == maxInterfaces {
			break
		}
		if seen[name] || !interfaceName(name) {
			continue
		}
		seen[name] = true
		i = &guestapi.InterfaceStats{
			Name:    name,
			RxBytes: min(i.GetRxBytes(), maxCounter), RxPackets: min(i.GetRxPackets(), maxCounter),
			RxErrors: min(i.GetRxErrors(), maxCounter), RxDropped: min(i.GetRxDropped(), maxCounter),
			TxBytes: min(i.GetTxBytes(), maxCounter), TxPackets: min(i.GetTxPackets(), maxCounter),
			TxErrors: min(i.GetTxErrors(), maxCounter), TxDropped: min(i.GetTxDropped(), maxCounter),
		}
		if name == defaultInterface {
			out = append([]*guestapi.InterfaceStats{i}, out...)
		} else {
			out = append(out, i)
		}
	}
	return out
}

// defaultInterface is what CNI calls the pod's first interface.
const defaultInterface = "eth0"

// interfaceName tells whether the kernel would take the name (dev_valid_name),
// and a terminal, too.
func interfaceName(s string) bool {
	if s == "" || len(s) > 15 || s == "." || s == ".." {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' || r == ':' })
}

// cpuRates turns CPU times into usage_nano_cores. The zero value is ready.
type cpuRates struct {
	mu   sync.Mutex
	last map[string]*cpuRate // by container or pod id
	// pruned is when those that nobody asks for any more were dropped.
	pruned time.Time
}

type cpuRate struct {
	nanos uint64
	at    time.Time
	cores uint64 // nano cores up to then
}

// cpuForget is how long the rate of something that nobody asks for is kept.
const cpuForget = 10 * time.Minute

// nanoCores is the usage since the call before, but at least over cpuWindow; at
// first, since the thing was started.
func (r *cpuRates) nanoCores(id string, nanos uint64, at time.Time, started int64) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last == nil {
		r.last = make(map[string]*cpuRate)
	}
	if at.Sub(r.pruned) > cpuForget {
		r.pruned = at
		for k, v := range r.last {
			if at.Sub(v.at) > cpuForget {
				delete(r.last, k)
			}
		}
	}
	last := r.last[id]
	switch {
	case last == nil:
		last = &cpuRate{cores: rate(nanos, at.UnixNano()-started)}
		r.last[id] = last
	case at.Sub(last.at) < cpuWindow:
		return last.cores
	case nanos < last.nanos: // a counter that runs backwards is not the kernel's
		last.cores = 0
	default:
		last.cores = rate(nanos-last.nanos, at.Sub(last.at).Nanoseconds())
	}
	last.nanos, last.at = nanos, at
	return last.cores
}

// rate is nanoseconds of CPU time per second.
func rate(nanos uint64, elapsed int64) uint64 {
	if elapsed <= 0 {
		return 0
	}
	return uint64(float64(nanos) / float64(elapsed) * 1e9)
}

func value(n uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: n} }

// cpuUsage is no more at any time than what the VM has.
func (s *Server) cpuUsage(id string, u *guestapi.ContainerStats, sm *sample, started int64) *runtimeapi.CpuUsage {
	return &runtimeapi.CpuUsage{
		Timestamp:            sm.at.UnixNano(),
		UsageCoreNanoSeconds: value(u.GetCpuUsageNanos()),
		UsageNanoCores:       value(min(s.rates.nanoCores(id, u.GetCpuUsageNanos(), sm.at, started), uint64(max(sm.vm.CPUs, 1))*1e9)),
		Psi:                  psi(u, "cpu"),
	}
}

// memoryUsage has available_bytes where there is a limit to be below.
func memoryUsage(u *guestapi.ContainerStats, at time.Time, limit int64) *runtimeapi.MemoryUsage {
	m := &runtimeapi.MemoryUsage{
		Timestamp:       at.UnixNano(),
		WorkingSetBytes: value(u.GetMemoryWorkingSetBytes()),
		UsageBytes:      value(u.GetMemoryUsageBytes()),
		RssBytes:        value(u.GetMemoryRssBytes()),
		PageFaults:      value(u.GetPageFaults() - min(u.GetPageFaults(), u.GetMajorPageFaults())),
		MajorPageFaults: value(u.GetMajorPageFaults()),
		Psi:             psi(u, "memory"),
	}
	if limit > 0 {
		m.AvailableBytes = value(uint64(limit) - min(uint64(limit), u.GetMemoryWorkingSetBytes()))
	}
	return m
}

func ioUsage(u *guestapi.ContainerStats, at time.Time) *runtimeapi.IoUsage {
	p := psi(u, "io")
	if p == nil {
		return nil
	}
	return &runtimeapi.IoUsage{Timestamp: at.UnixNano(), Psi: p}
}

// psi is nil where the guest's kernel has no pressure stall information.
func psi(u *guestapi.ContainerStats, resource string) *runtimeapi.PsiStats {
	var out *runtimeapi.PsiStats
	for _, p := range u.GetPressure() {
		if p.GetResource() != resource {
			continue
		}
		if out == nil {
			out = &runtimeapi.PsiStats{Some: &runtimeapi.PsiData{}, Full: &runtimeapi.PsiData{}}
		}
		d := &runtimeapi.PsiData{Total: p.GetTotalUsec() * 1000, Avg10: p.GetAvg10(), Avg60: p.GetAvg60(), Avg300: p.GetAvg300()}
		if p.GetKind() == "full" {
			out.Full = d
		} else {
			out.Some = d
		}
	}
	return out
}

// containerStats translates what the guest said of a container.
func (s *Server) containerStats(c *sandbox.Container, g *guestapi.ContainerStats, sm *sample) *runtimeapi.ContainerStats {
	cfg, st := c.Config(), c.Status()
	u, at := sm.usage(g, st.CreatedAt), sm.at
	return &runtimeapi.ContainerStats{
		Attributes: &runtimeapi.ContainerAttributes{
			Id: c.ID(), Metadata: cfg.GetMetadata(), Labels: cfg.GetLabels(), Annotations: cfg.GetAnnotations(),
		},
		Cpu:    s.cpuUsage(c.ID(), u, sm, max(st.StartedAt, st.CreatedAt)),
		Memory: memoryUsage(u, at, c.Resources().GetMemoryLimitInBytes()),
		WritableLayer: &runtimeapi.FilesystemUsage{
			Timestamp: at.UnixNano(),
			// The pods' scratch disks lie on the images' file system. The guest's
			// own mount point would break the stats of the whole node (T41).
			FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: s.ImageRoot},
			UsedBytes:  value(u.GetWritableBytes()),
			InodesUsed: value(u.GetWritableInodes()),
		},
		Swap: &runtimeapi.SwapUsage{
			Timestamp:          at.UnixNano(),
			SwapUsageBytes:     value(u.GetSwapUsageBytes()),
			SwapAvailableBytes: value(u.GetSwapAvailableBytes()),
		},
		Io: ioUsage(u, at),
	}
}

// statsOf are the stats of a sample's containers that keep picks.
func (s *Server) statsOf(sm *sample, keep func(*sandbox.Container) bool) []*runtimeapi.ContainerStats {
	var out []*runtimeapi.ContainerStats
	for _, c := range sm.pod.Containers() {
		if c.Status().Phase == shimapi.Phase_EXITED || !keep(c) {
			continue
		}
		if g := sm.of(c.ID()); g != nil {
			out = append(out, s.containerStats(c, g, sm))
		}
	}
	return out
}

// podStats translates a sample.
func (s *Server) podStats(sm *sample) *runtimeapi.PodSandboxStats {
	cfg, created := sm.pod.Config(), sm.pod.Status().CreatedAt
	u := sm.usage(sm.resp.GetPod(), created)
	linux := &runtimeapi.LinuxPodSandboxStats{
		Cpu:        s.cpuUsage(sm.pod.ID(), u, sm, created),
		Memory:     memoryUsage(u, sm.at, sm.vm.MemoryBytes),
		Network:    &runtimeapi.NetworkUsage{Timestamp: sm.at.UnixNano()},
		Process:    &runtimeapi.ProcessUsage{Timestamp: sm.at.UnixNano(), ProcessCount: value(u.GetProcesses())},
		Containers: s.statsOf(sm, func(*sandbox.Container) bool { return true }),
		Io:         ioUsage(u, sm.at),
	}
	for _, i := range sm.interfaces() {
		usage := &runtimeapi.NetworkInterfaceUsage{
			Name:    i.GetName(),
			RxBytes: value(i.GetRxBytes()), RxErrors: value(i.GetRxErrors()),
			TxBytes: value(i.GetTxBytes()), TxErrors: value(i.GetTxErrors()),
		}
		if i.GetName() == defaultInterface {
			linux.Network.DefaultInterface = usage
		} else {
			linux.Network.Interfaces = append(linux.Network.Interfaces, usage)
		}
	}
	return &runtimeapi.PodSandboxStats{
		Attributes: &runtimeapi.PodSandboxAttributes{
			Id: sm.pod.ID(), Metadata: cfg.GetMetadata(), Labels: cfg.GetLabels(), Annotations: cfg.GetAnnotations(),
		},
		Linux: linux,
	}
}

// errNoStats is for a container that is known to the host alone.
func errNoStats(c *sandbox.Container) error {
	return fmt.Errorf("stats of container %s: the guest has none of it, it is %v: %w", c.ID(), c.Status().Phase, errdefs.ErrFailedPrecondition)
}
