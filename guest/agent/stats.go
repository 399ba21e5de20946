//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/guest/api"
)

// Stats reads the cgroups of the named containers, or of all; named ones that
// don't exist are left out.
func (a *Agent) Stats(ctx context.Context, r *api.StatsRequest) (*api.StatsResponse, error) {
	if err := a.require(ctx, "cgroup"); err != nil {
		return nil, err
	}
	sb, err := a.pod()
	if err != nil {
		return nil, err
	}
	var list []*ctr
	a.mu.Lock()
	if len(r.Ids) == 0 {
		for _, c := range a.containers {
			list = append(list, c)
		}
	}
	for _, id := range r.Ids {
		if c := a.containers[id]; c != nil {
			list = append(list, c)
		}
	}
	a.mu.Unlock()
	out := &api.StatsResponse{UnixNanos: time.Now().UnixNano(), Pod: cgroup(filepath.Join(a.paths.cgroup, "pod")).stats()}
	for _, c := range list {
		c.mu.Lock()
		ready := c.state != creating && c.state != removing
		c.mu.Unlock()
		if !ready {
			continue
		}
		s := c.cgroup.stats()
		s.Id = c.id
		if s.WritableBytes, s.WritableInodes, err = c.writable.usage(); err != nil {
			a.log.Debugf("container %s: %v", c.id, err)
		}
		if r.Files {
			c.cgroup.countFiles(ctx, s)
			out.Pod.Files += s.Files
			out.Pod.Sockets += s.Sockets
		}
		out.Containers = append(out.Containers, s)
	}
	// The process's view is its network namespace's.
	counters, err := os.ReadFile(sb.proc + "/net/dev")
	if err != nil {
		return nil, fmt.Errorf("network counters of the pod: %w", err)
	}
	out.Interfaces = parseNetDev(string(counters))
	var fs unix.Statfs_t
	if err := unix.Statfs(a.paths.scratch, &fs); err == nil {
		out.ScratchInodes, out.ScratchInodesFree = fs.Files, fs.Ffree
	}
	return out, nil
}

// maxFiles is how many descriptors of a process are looked at: what a process has
// open must not keep the agent busy.
const maxFiles = 1 << 14

// countFiles adds up what the cgroup's processes have open. Who ends meanwhile has
// nothing open.
func (c cgroup) countFiles(ctx context.Context, s *api.ContainerStats) {
	_ = c.walk(func(dir cgroup) error {
		for _, pid := range dir.procs() {
			if err := ctx.Err(); err != nil {
				return err
			}
			files, sockets := openFiles(filepath.Join("/proc", strconv.Itoa(pid), "fd"))
			s.Files += files
			s.Sockets += sockets
			var limit unix.Rlimit
			if s.FilesLimit == 0 && unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit) == nil {
				s.FilesLimit = limit.Cur
			}
		}
		return nil
	})
}

func openFiles(dir string) (files, sockets uint64) {
	d, err := os.Open(dir)
	if err != nil {
		return 0, 0
	}
	defer d.Close()
	names, _ := d.Readdirnames(maxFiles)
	for _, name := range names {
		if to, err := os.Readlink(filepath.Join(dir, name)); err == nil && strings.HasPrefix(to, "socket:") {
			sockets++
		}
	}
	return uint64(len(names)), sockets
}

func (c cgroup) stats() *api.ContainerStats {
	cpu := c.flat("cpu.stat")
	s := &api.ContainerStats{
		CpuUsageNanos: cpu["usage_usec"] * 1000, CpuUserNanos: cpu["user_usec"] * 1000, CpuSystemNanos: cpu["system_usec"] * 1000,
		CpuPeriods: cpu["nr_periods"], CpuThrottledPeriods: cpu["nr_throttled"], CpuThrottledNanos: cpu["throttled_usec"] * 1000,
	}
	s.MemoryUsageBytes, _ = c.number("memory.current")
	m := c.flat("memory.stat")
	s.MemoryRssBytes, s.PageFaults, s.MajorPageFaults = m["anon"], m["pgfault"], m["pgmajfault"]
	s.MemoryCacheBytes, s.MemoryMappedFileBytes, s.MemoryKernelBytes = m["file"], m["file_mapped"], m["kernel"]
	s.MemoryMaxUsageBytes, _ = c.number("memory.peak")
	// As kubelet's: what the kernel could not simply drop.
	s.MemoryWorkingSetBytes = s.MemoryUsageBytes - min(s.MemoryUsageBytes, m["inactive_file"])
	if limit, ok := c.number("memory.max"); ok {
		s.MemoryAvailableBytes = limit - min(limit, s.MemoryWorkingSetBytes)
	}
	s.Pids, _ = c.number("pids.current")
	s.PidsMax, _ = c.number("pids.max")
	_ = c.walk(func(dir cgroup) error { s.Processes += uint64(len(dir.procs())); return nil })
	s.SwapUsageBytes, _ = c.number("memory.swap.current")
	if limit, ok := c.number("memory.swap.max"); ok {
		s.SwapAvailableBytes = limit - min(limit, s.SwapUsageBytes)
	}
	events := c.flat("memory.events")
	s.OomKills, s.MemoryFailures = events["oom_kill"], events["max"]
	if text, err := c.read("io.stat"); err == nil {
		s.ReadBytes, s.Reads, s.WrittenBytes, s.Writes = parseIOStat(text)
	}
	for _, resource := range []string{"cpu", "memory", "io"} {
		if text, err := c.read(resource + ".pressure"); err == nil {
			s.Pressure = append(s.Pressure, parsePressure(resource, text)...)
		}
	}
	return s
}

// parsePressure reads the kernel's PSI format:
// "some avg10=0.00 avg60=0.00 avg300=0.00 total=0".
func parsePressure(resource, text string) []*api.Pressure {
	var out []*api.Pressure
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) != 5 {
			continue
		}
		p := &api.Pressure{Resource: resource, Kind: f[0]}
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			n, err := strconv.ParseFloat(v, 64)
			if err != nil {
				continue
			}
			switch k {
			case "avg10":
				p.Avg10 = n
			case "avg60":
				p.Avg60 = n
			case "avg300":
				p.Avg300 = n
			case "total":
				p.TotalUsec, _ = strconv.ParseUint(v, 10, 64)
			}
		}
		out = append(out, p)
	}
	return out
}

// parseIOStat sums up the devices of the kernel's io.stat:
// "7:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0".
func parseIOStat(text string) (readBytes, reads, writtenBytes, writes uint64) {
	for f := range strings.FieldsSeq(text) {
		k, v, _ := strings.Cut(f, "=")
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			continue
		}
		switch k {
		case "rbytes":
			readBytes += n
		case "rios":
			reads += n
		case "wbytes":
			writtenBytes += n
		case "wios":
			writes += n
		}
	}
	return
}

// parseNetDev reads /proc/net/dev; lo is left out.
func parseNetDev(text string) []*api.InterfaceStats {
	var out []*api.InterfaceStats
	for line := range strings.Lines(text) {
		name, rest, ok := strings.Cut(line, ":")
		f := strings.Fields(rest)
		if name = strings.TrimSpace(name); !ok || len(f) < 16 || name == "lo" {
			continue
		}
		n := func(i int) uint64 {
			v, _ := strconv.ParseUint(f[i], 10, 64)
			return v
		}
		out = append(out, &api.InterfaceStats{
			Name:    name,
			RxBytes: n(0), RxPackets: n(1), RxErrors: n(2), RxDropped: n(3),
			TxBytes: n(8), TxPackets: n(9), TxErrors: n(10), TxDropped: n(11),
		})
	}
	return out
}
