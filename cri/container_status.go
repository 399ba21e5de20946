package cri

import (
	"context"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/sandbox"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// ContainerStatus implements the CRI call of that name.
func (s *Server) ContainerStatus(_ context.Context, req *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	c, err := s.Pods.Container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ContainerStatusResponse{Status: containerStatus(c)}
	if req.GetVerbose() {
		if resp.Info, err = verboseInfo(containerInfo{SandboxID: c.Pod().ID()}); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

func containerStatus(c *sandbox.Container) *runtimeapi.ContainerStatus {
	st, cfg := c.Status(), c.Config()
	image := proto.CloneOf(cfg.GetImage())
	if image != nil {
		image.Image = imageName(image)
	}
	status := &runtimeapi.ContainerStatus{
		Id:          c.ID(),
		Metadata:    cfg.GetMetadata(),
		State:       containerState(st.Phase),
		CreatedAt:   st.CreatedAt,
		StartedAt:   st.StartedAt,
		FinishedAt:  st.FinishedAt,
		ExitCode:    st.ExitCode,
		Image:       image,
		ImageRef:    c.ImageRef(),
		ImageId:     c.ImageID(),
		Reason:      st.Reason,
		Message:     st.Message,
		Labels:      cfg.GetLabels(),
		Annotations: cfg.GetAnnotations(),
		Mounts:      cfg.GetMounts(),
		LogPath:     st.LogPath,
		StopSignal:  cfg.GetStopSignal(),
		Resources:   &runtimeapi.ContainerResources{Linux: c.Resources()},
	}
	if u := st.User; u != nil {
		user := &runtimeapi.LinuxContainerUser{Uid: int64(u.GetUid()), Gid: int64(u.GetGid())}
		for _, g := range u.GetSupplementalGroups() {
			user.SupplementalGroups = append(user.SupplementalGroups, int64(g))
		}
		status.User = &runtimeapi.ContainerUser{Linux: user}
	}
	return status
}

func containerState(p shimapi.Phase) runtimeapi.ContainerState {
	switch p {
	case shimapi.Phase_CREATED:
		return runtimeapi.ContainerState_CONTAINER_CREATED
	case shimapi.Phase_RUNNING:
		return runtimeapi.ContainerState_CONTAINER_RUNNING
	case shimapi.Phase_EXITED:
		return runtimeapi.ContainerState_CONTAINER_EXITED
	}
	return runtimeapi.ContainerState_CONTAINER_UNKNOWN
}
