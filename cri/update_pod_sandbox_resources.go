package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
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
	// As in an update of a container, zero is unchanged.
	resources, overhead := pod.Resources()
	u, err := planUpdate("resources", resources, req.GetResources())
	if err != nil {
		return nil, err
	}
	if err := pod.UpdateResources(ctx, u, mergeResources(overhead, req.GetOverhead())); err != nil {
		return nil, err
	}
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}
