package cri

import (
	"fmt"
	"maps"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Bounds of the kernel's cpu controller, in microseconds (cgroup-v2.rst).
const (
	minCPUPeriod = 1_000
	maxCPUPeriod = 1_000_000
	minCPUQuota  = 1_000
)

// maxMemory is more than any host has, and far below where sums overflow.
const maxMemory = 1 << 44

// checkResources refuses numbers that the guest could not carry out, so that
// the error names the CRI's field and not a file of a cgroup.
func checkResources(at string, r *runtimeapi.LinuxContainerResources) error {
	memory, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	switch {
	case memory < -1 || memory > maxMemory:
		return refuse(at+".memory_limit_in_bytes", fmt.Sprintf("%d is neither -1 (no limit) nor in 0 to %d", memory, maxMemory))
	case swap < -1 || swap > maxMemory:
		return refuse(at+".memory_swap_limit_in_bytes", fmt.Sprintf("%d is neither -1 (no limit) nor in 0 to %d", swap, maxMemory))
	case swap > 0 && (memory < 0 || swap < memory):
		return refuse(at+".memory_swap_limit_in_bytes", fmt.Sprintf("%d is below the memory limit, which it includes", swap))
	}
	if p := r.GetCpuPeriod(); p != 0 && (p < minCPUPeriod || p > maxCPUPeriod) {
		return refuse(at+".cpu_period", fmt.Sprintf("%d µs are not in %d to %d", p, minCPUPeriod, maxCPUPeriod))
	}
	if q := r.GetCpuQuota(); q > 0 && q < minCPUQuota || q > maxMemory {
		return refuse(at+".cpu_quota", fmt.Sprintf("%d µs are not in %d to %d", q, minCPUQuota, maxMemory))
	}
	if r.GetCpuShares() < 0 {
		return refuse(at+".cpu_shares", fmt.Sprintf("%d is negative", r.GetCpuShares()))
	}
	if adj := r.GetOomScoreAdj(); adj < -1000 || adj > 1000 {
		return refuse(at+".oom_score_adj", fmt.Sprintf("%d is not in -1000 to 1000", adj))
	}
	for name := range r.GetUnified() {
		if !strings.Contains(name, ".") || strings.ContainsAny(name, "/\x00\n") || strings.HasPrefix(name, "cgroup.") {
			return refuse(at+".unified", fmt.Sprintf("%q is not the name of a controller's file", name))
		}
	}
	return nil
}

// linuxResources is r in OCI's terms. What is not specified is left out.
func linuxResources(r *runtimeapi.LinuxContainerResources) *specs.LinuxResources {
	cpu, memory := &specs.LinuxCPU{}, &specs.LinuxMemory{}
	if v := r.GetCpuShares(); v > 0 {
		shares := uint64(v)
		cpu.Shares = &shares
	}
	if v := r.GetCpuQuota(); v != 0 {
		cpu.Quota = &v
	}
	if v := r.GetCpuPeriod(); v > 0 {
		period := uint64(v)
		cpu.Period = &period
	}
	if v := r.GetMemoryLimitInBytes(); v != 0 {
		memory.Limit = &v
		if s := r.GetMemorySwapLimitInBytes(); s != 0 {
			memory.Swap = &s
		}
	}
	res := &specs.LinuxResources{CPU: cpu, Memory: memory, Unified: maps.Clone(r.GetUnified())}
	for _, h := range r.GetHugepageLimits() {
		res.HugepageLimits = append(res.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: h.GetPageSize(), Limit: h.GetLimit()})
	}
	return res
}
