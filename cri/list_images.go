package cri

import (
	"context"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListImages implements the CRI call of that name.
func (s *Server) ListImages(_ context.Context, req *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	resp := &runtimeapi.ListImagesResponse{}
	if ref := req.GetFilter().GetImage().GetImage(); ref != "" {
		img, err := s.Images.Resolve(ref)
		switch {
		case errdefs.IsNotFound(err):
			return resp, nil
		case err != nil:
			return nil, err
		}
		resp.Images = append(resp.Images, imageMessage(img))
		return resp, nil
	}
	imgs, err := s.Images.List()
	if err != nil {
		return nil, err
	}
	for _, img := range imgs {
		resp.Images = append(resp.Images, imageMessage(img))
	}
	return resp, nil
}
