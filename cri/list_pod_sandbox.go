package cri

import (
	"context"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListPodSandbox implements the CRI call of that name.
func (s *Server) ListPodSandbox(_ context.Context, req *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	f := req.GetFilter()
	resp := &runtimeapi.ListPodSandboxResponse{}
	for _, pod := range s.Pods.List() {
		st, cfg := pod.Status(), pod.Config()
		state := podState(st)
		switch {
		case !strings.HasPrefix(pod.ID(), f.GetId()),
			f.GetState() != nil && f.GetState().GetState() != state,
			!matches(f.GetLabelSelector(), cfg.GetLabels()):
			continue
		}
		resp.Items = append(resp.Items, &runtimeapi.PodSandbox{
			Id:             pod.ID(),
			Metadata:       cfg.GetMetadata(),
			State:          state,
			CreatedAt:      st.CreatedAt,
			Labels:         cfg.GetLabels(),
			Annotations:    cfg.GetAnnotations(),
			RuntimeHandler: pod.Handler(),
		})
	}
	return resp, nil
}

// matches tells whether labels has every pair of the selector.
func matches(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}
