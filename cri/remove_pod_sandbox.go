package cri

import (
	"context"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RemovePodSandbox implements the CRI call of that name. It is idempotent;
// running containers are ended first.
func (s *Server) RemovePodSandbox(ctx context.Context, req *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	pod, err := s.Pods.Get(req.GetPodSandboxId())
	if err == nil {
		err = pod.Remove(ctx)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}
