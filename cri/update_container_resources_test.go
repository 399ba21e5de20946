package cri

import (
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// T28: zero is unchanged, and only what changes goes to the guest.
func TestPlanUpdate(t *testing.T) {
	type R = runtimeapi.LinuxContainerResources
	now := &R{MemoryLimitInBytes: 100 << 20, MemorySwapLimitInBytes: 100 << 20, CpuQuota: 50000, CpuPeriod: 100000, CpuShares: 512,
		OomScoreAdj: 900, CpusetCpus: "0-3", Unified: map[string]string{"memory.low": "1", "memory.high": "2"}}
	with := func(edit func(*R)) *R {
		r := proto.CloneOf(now)
		edit(r)
		return r
	}
	for _, tt := range []struct {
		name                    string
		change, want            *R
		memory, cpu, oom, lines bool // in the guest
	}{
		{"nothing", &R{}, now, false, false, false, false},
		{"the CPU manager", &R{CpusetCpus: "2"}, with(func(r *R) { r.CpusetCpus = "2" }), false, false, false, false},
		{"shares", &R{CpuShares: 2}, with(func(r *R) { r.CpuShares = 2 }), false, true, false, false},
		{"quota alone keeps the period", &R{CpuQuota: 70000}, with(func(r *R) { r.CpuQuota = 70000 }), false, true, false, false},
		{"memory takes swap along", &R{MemoryLimitInBytes: 50 << 20}, with(func(r *R) { r.MemoryLimitInBytes, r.MemorySwapLimitInBytes = 50<<20, 50<<20 }), true, false, false, false},
		{"no memory limit", &R{MemoryLimitInBytes: -1}, with(func(r *R) { r.MemoryLimitInBytes, r.MemorySwapLimitInBytes = -1, 0 }), true, false, false, false},
		{"score", &R{OomScoreAdj: 5}, with(func(r *R) { r.OomScoreAdj = 5 }), false, false, true, false},
		{"one file", &R{Unified: map[string]string{"memory.low": "9"}}, with(func(r *R) { r.Unified["memory.low"] = "9" }), false, false, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u, err := planUpdate("linux", now, tt.change)
			if err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(u.Resources, tt.want) {
				t.Errorf("%v, want %v", u.Resources, tt.want)
			}
			if (u.Guest.Memory != nil) != tt.memory || (u.Guest.CPU != nil) != tt.cpu || (u.OOMScoreAdj != nil) != tt.oom || (u.Guest.Unified != nil) != tt.lines {
				t.Errorf("in the guest: %+v, score %v", u.Guest, u.OOMScoreAdj)
			}
			if tt.cpu && (*u.Guest.CPU.Quota != tt.want.CpuQuota || *u.Guest.CPU.Period != 100000) {
				t.Errorf("quota and period go together: %+v", u.Guest.CPU)
			}
		})
	}
	if _, err := planUpdate("linux", now, &R{MemorySwapLimitInBytes: 50 << 20}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("swap below the memory limit that holds: %v", err)
	}
	if u, err := planUpdate("linux", nil, &R{CpuShares: 5}); err != nil || u.Resources.GetCpuShares() != 5 {
		t.Errorf("a container without resources: %v, %v", u, err)
	}
}
