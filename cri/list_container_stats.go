package cri

import (
	"context"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/sandbox"
)

// ListContainerStats implements the CRI call of that name: stats of containers
// that have not ended. Containers of a pod that doesn't answer within
// [statsTimeout] are left out.
func (s *Server) ListContainerStats(ctx context.Context, req *runtimeapi.ListContainerStatsRequest) (*runtimeapi.ListContainerStatsResponse, error) {
	return &runtimeapi.ListContainerStatsResponse{Stats: s.listContainerStats(ctx, req.GetFilter())}, nil
}

func (s *Server) listContainerStats(ctx context.Context, f *runtimeapi.ContainerStatsFilter) []*runtimeapi.ContainerStats {
	keep := func(c *sandbox.Container) bool {
		return strings.HasPrefix(c.ID(), f.GetId()) && strings.HasPrefix(c.Pod().ID(), f.GetPodSandboxId()) &&
			matches(f.GetLabelSelector(), c.Config().GetLabels())
	}
	// Only guests that have such containers are asked.
	var pods []*sandbox.Pod
	asked := map[*sandbox.Pod]bool{}
	for _, c := range s.Pods.Containers() {
		if p := c.Pod(); !asked[p] && keep(c) {
			asked[p] = true
			pods = append(pods, p)
		}
	}
	var out []*runtimeapi.ContainerStats
	for _, sm := range samples(ctx, pods, false) {
		out = append(out, s.statsOf(sm, keep)...)
	}
	return out
}
