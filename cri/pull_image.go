package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PullImage implements the CRI call of that name. The reference it answers is
// the image's id.
func (s *Server) PullImage(ctx context.Context, req *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	ref := req.GetImage().GetImage()
	if ref == "" {
		return nil, refuse("image", "is empty")
	}
	if err := s.checkHandler(req.GetImage().GetRuntimeHandler()); err != nil {
		return nil, err
	}
	img, err := s.Images.Pull(ctx, ref, req.GetAuth(), nil)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PullImageResponse{ImageRef: img.ID}, nil
}
