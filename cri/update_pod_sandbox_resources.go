package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/sandbox"
)

// UpdatePodSandboxResources implements the CRI call of that name. Its limits hold
// the pod's containers together, besides each one's own; what would need a larger VM
// than the pod has is refused (T4). The overhead is on record.
func (s *Server) UpdatePodSandboxResources(ctx context.Context, req *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	for field, r := range map[string]*runtimeapi.LinuxContainerResources{"resources": req.GetResources(), "overhead": req.GetOverhead()} {
		if err := checkResources(field, r); err != nil {
			return nil, err
		}
	}
	pod, err := s.Pods.Get(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	type limits = *runtimeapi.LinuxContainerResources
	err = pod.UpdateResources(ctx, func(resources, overhead limits) (*sandbox.Update, limits, error) {
		// As in an update of a container, zero is unchanged.
		u, err := planUpdate("resources", resources, req.GetResources())
		return u, mergeResources(overhead, req.GetOverhead()), err
	})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}
