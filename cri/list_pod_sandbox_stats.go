package cri

import (
	"context"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/sandbox"
)

// ListPodSandboxStats implements the CRI call of that name. Pods that are not
// ready have no stats, and one that doesn't answer within [statsTimeout] is left
// out.
func (s *Server) ListPodSandboxStats(ctx context.Context, req *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	return &runtimeapi.ListPodSandboxStatsResponse{Stats: s.listPodStats(ctx, req.GetFilter())}, nil
}

func (s *Server) listPodStats(ctx context.Context, f *runtimeapi.PodSandboxStatsFilter) []*runtimeapi.PodSandboxStats {
	var pods []*sandbox.Pod
	for _, p := range s.Pods.List() {
		if strings.HasPrefix(p.ID(), f.GetId()) && matches(f.GetLabelSelector(), p.Config().GetLabels()) {
			pods = append(pods, p)
		}
	}
	var out []*runtimeapi.PodSandboxStats
	for _, sm := range samples(ctx, pods, false) {
		out = append(out, s.podStats(sm))
	}
	return out
}
