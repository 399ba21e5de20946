package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// UpdatePodSandboxResources implements the CRI call of that name. The containers'
// limits are what holds them, so a pod's own have one effect: what would need a
// larger VM than it has is refused before any container grows (T4).
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
	err = pod.UpdateResources(ctx, mergeResources(resources, req.GetResources()), mergeResources(overhead, req.GetOverhead()))
	if err != nil {
		return nil, err
	}
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}
