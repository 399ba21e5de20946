package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/sandbox"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// UpdateContainerResources implements the CRI call of that name: fields that are
// not specified stay as they are, and either all of the others change or none
// (T28). Once it returns, ContainerStatus shows the limits in force.
func (s *Server) UpdateContainerResources(ctx context.Context, req *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	if req.GetWindows() != nil {
		return nil, refuse("windows", "containers run Linux")
	}
	if err := checkResources("linux", req.GetLinux()); err != nil {
		return nil, err
	}
	c, err := s.Pods.Container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if c.Status().Phase == shimapi.Phase_EXITED {
		return nil, fmt.Errorf("container %s has ended: %w", c.ID(), errdefs.ErrFailedPrecondition)
	}
	err = c.UpdateResources(ctx, func(now *runtimeapi.LinuxContainerResources) (*sandbox.Update, error) {
		return planUpdate("linux", now, req.GetLinux())
	})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.UpdateContainerResourcesResponse{}, nil
}

// planUpdate works out a change of limits; at names the request's field.
func planUpdate(at string, now, change *runtimeapi.LinuxContainerResources) (*sandbox.Update, error) {
	next := mergeResources(now, change)
	if err := checkResources(at, next); err != nil {
		return nil, err
	}
	u := &sandbox.Update{Resources: next, Guest: &specs.LinuxResources{Unified: change.GetUnified()}}
	// Limits that the kernel keeps in one file go there together.
	all := linuxResources(next)
	if change.GetMemoryLimitInBytes() != 0 || change.GetMemorySwapLimitInBytes() != 0 {
		u.Guest.Memory = all.Memory
		check := true
		u.Guest.Memory.CheckBeforeUpdate = &check
	}
	if change.GetCpuPeriod() != 0 || change.GetCpuQuota() != 0 || change.GetCpuShares() != 0 {
		u.Guest.CPU = all.CPU
	}
	if len(change.GetHugepageLimits()) > 0 {
		u.Guest.HugepageLimits = all.HugepageLimits
	}
	if change.GetOomScoreAdj() != 0 {
		adj := int32(next.GetOomScoreAdj())
		u.OOMScoreAdj = &adj
	}
	return u, nil
}

// mergeResources is now with what change specifies.
func mergeResources(now, change *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	next := proto.CloneOf(now)
	if next == nil {
		next = &runtimeapi.LinuxContainerResources{}
	}
	proto.Merge(next, change)
	// Merge appends lists; here the page size is a key.
	next.HugepageLimits = nil
	for _, list := range [][]*runtimeapi.HugepageLimit{now.GetHugepageLimits(), change.GetHugepageLimits()} {
		for _, h := range list {
			next.HugepageLimits = setHugepages(next.HugepageLimits, h)
		}
	}
	// A swap limit is that of memory and swap: it moves with the memory's.
	if was := now.GetMemorySwapLimitInBytes(); was > 0 && change.GetMemoryLimitInBytes() > 0 && change.GetMemorySwapLimitInBytes() == 0 {
		next.MemorySwapLimitInBytes = change.GetMemoryLimitInBytes() + was - now.GetMemoryLimitInBytes()
	} else if change.GetMemoryLimitInBytes() < 0 && change.GetMemorySwapLimitInBytes() == 0 {
		next.MemorySwapLimitInBytes = 0
	}
	return next
}

func setHugepages(list []*runtimeapi.HugepageLimit, h *runtimeapi.HugepageLimit) []*runtimeapi.HugepageLimit {
	for i := range list {
		if list[i].GetPageSize() == h.GetPageSize() {
			list[i] = proto.CloneOf(h)
			return list
		}
	}
	return append(list, proto.CloneOf(h))
}
