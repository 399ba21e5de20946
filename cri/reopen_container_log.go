package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// ReopenContainerLog implements the CRI call of that name: when it returns, the
// log file exists again and gets every line from now on.
func (s *Server) ReopenContainerLog(ctx context.Context, req *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	c, err := s.Pods.Container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if c.Status().Phase != shimapi.Phase_RUNNING {
		return nil, fmt.Errorf("container %s is not running, its log is closed: %w", c.ID(), errdefs.ErrFailedPrecondition)
	}
	if err := c.ReopenLog(ctx); err != nil {
		return nil, err
	}
	return &runtimeapi.ReopenContainerLogResponse{}, nil
}
