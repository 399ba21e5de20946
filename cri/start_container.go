package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// StartContainer implements the CRI call of that name. A command that can't be
// run is its error, and the container is Exited afterwards.
func (s *Server) StartContainer(ctx context.Context, req *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	c, err := s.Pods.Container(req.GetContainerId())
	if err == nil {
		err = c.Start(ctx)
	}
	if err != nil {
		return nil, err
	}
	return &runtimeapi.StartContainerResponse{}, nil
}
