package cri

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxGrace keeps a grace period in seconds within what a time.Duration holds.
const maxGrace = 365 * 24 * 3600

// StopContainer implements the CRI call of that name. It is idempotent, also
// for a container that nobody knows, and never takes longer than the grace
// period and 2 s (T12).
func (s *Server) StopContainer(ctx context.Context, req *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	c, err := s.Pods.Container(req.GetContainerId())
	if err == nil {
		err = c.Stop(ctx, time.Duration(max(0, min(req.GetTimeout(), maxGrace)))*time.Second)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	return &runtimeapi.StopContainerResponse{}, nil
}
