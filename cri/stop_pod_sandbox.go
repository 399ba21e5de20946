package cri

import (
	"context"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// StopPodSandbox implements the CRI call of that name. It is idempotent: a
// sandbox that is stopped or unknown is not an error. When it returns, the VM,
// its helpers and its mounts are gone (T34).
func (s *Server) StopPodSandbox(ctx context.Context, req *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	pod, err := s.Pods.Get(req.GetPodSandboxId())
	if err == nil {
		err = pod.Stop(ctx)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	return &runtimeapi.StopPodSandboxResponse{}, nil
}
