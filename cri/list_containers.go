package cri

import (
	"context"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListContainers implements the CRI call of that name.
func (s *Server) ListContainers(_ context.Context, req *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	f := req.GetFilter()
	resp := &runtimeapi.ListContainersResponse{}
	for _, c := range s.Pods.Containers() {
		cfg := c.Config()
		state := containerState(c.Status().Phase)
		switch {
		case !strings.HasPrefix(c.ID(), f.GetId()),
			!strings.HasPrefix(c.Pod().ID(), f.GetPodSandboxId()),
			f.GetState() != nil && f.GetState().GetState() != state,
			!matches(f.GetLabelSelector(), cfg.GetLabels()):
			continue
		}
		resp.Containers = append(resp.Containers, &runtimeapi.Container{
			Id:           c.ID(),
			PodSandboxId: c.Pod().ID(),
			Metadata:     cfg.GetMetadata(),
			Image:        cfg.GetImage(),
			ImageRef:     c.ImageRef(),
			ImageId:      c.ImageID(),
			State:        state,
			CreatedAt:    c.Status().CreatedAt,
			Labels:       cfg.GetLabels(),
			Annotations:  cfg.GetAnnotations(),
		})
	}
	return resp, nil
}
