package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PodSandboxStats implements the CRI call of that name: what the pod's VM has
// used inside, with its containers and network interfaces.
func (s *Server) PodSandboxStats(ctx context.Context, req *runtimeapi.PodSandboxStatsRequest) (*runtimeapi.PodSandboxStatsResponse, error) {
	pod, err := s.Pods.Get(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	sm, err := sampleOf(ctx, pod, false)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PodSandboxStatsResponse{Stats: s.podStats(sm)}, nil
}
