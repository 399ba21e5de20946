package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Version implements the CRI call of that name.
func (s *Server) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version:           "0.1.0", // of the version message itself, as the kubelet expects it
		RuntimeName:       RuntimeName,
		RuntimeVersion:    s.Options.Version,
		RuntimeApiVersion: "v1",
	}, nil
}
