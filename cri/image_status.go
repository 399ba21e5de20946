package cri

import (
	"context"
	"encoding/json"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/imageservice"
)

// ImageStatus implements the CRI call of that name: an image that isn't there
// is an empty answer, not an error.
func (s *Server) ImageStatus(_ context.Context, req *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	if req.GetImage().GetImage() == "" {
		return nil, refuse("image", "is empty")
	}
	img, err := s.Images.Resolve(req.GetImage().GetImage())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ImageStatusResponse{Image: imageMessage(img)}
	if req.GetVerbose() {
		b, err := json.Marshal(map[string]any{"imageSpec": img.Config})
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"info": string(b)}
	}
	return resp, nil
}

func imageMessage(img imageservice.Image) *runtimeapi.Image {
	m := &runtimeapi.Image{
		Id:          img.ID,
		RepoTags:    img.RepoTags,
		RepoDigests: img.RepoDigests,
		Size:        img.Size,
		Pinned:      img.Pinned,
		Spec:        &runtimeapi.ImageSpec{Image: img.ID},
	}
	user, _, _ := strings.Cut(img.Config.Config.User, ":")
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		m.Uid = &runtimeapi.Int64Value{Value: uid}
	} else {
		m.Username = user
	}
	return m
}
