package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ContainerStats implements the CRI call of that name. A container that has
// ended has stats for as long as its pod lives, its writable layer's above all.
func (s *Server) ContainerStats(ctx context.Context, req *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	c, err := s.Pods.Container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	sm, err := sampleOf(ctx, c.Pod(), false)
	if err != nil {
		return nil, err
	}
	g := sm.of(c.ID())
	if g == nil {
		return nil, errNoStats(c)
	}
	return &runtimeapi.ContainerStatsResponse{Stats: s.containerStats(c, g, sm)}, nil
}
