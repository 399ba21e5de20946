package cri

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/imageservice"
	"github.com/cri-vz/cri-vz/sandbox"
)

// CreateContainer implements the CRI call of that name.
func (s *Server) CreateContainer(ctx context.Context, req *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	cfg := req.GetConfig()
	switch {
	case cfg == nil:
		return nil, refuse("config", "is missing")
	case cfg.GetMetadata().GetName() == "":
		return nil, refuse("config.metadata.name", "is empty")
	case cfg.GetImage().GetImage() == "":
		return nil, refuse("config.image", "is empty")
	case cfg.GetWindows() != nil:
		return nil, refuse("config.windows", "containers run Linux")
	}
	pod, err := s.Pods.Get(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if st := pod.Status(); !st.Ready {
		return nil, fmt.Errorf("pod sandbox %s is not ready (%s): start a new one: %w", pod.ID(), st.Reason, errdefs.ErrFailedPrecondition)
	}
	img, err := s.Images.Resolve(cfg.GetImage().GetImage())
	if err != nil {
		return nil, fmt.Errorf("image of container %q: %w", cfg.GetMetadata().GetName(), err)
	}
	logPath, err := containerLogPath(pod.Config().GetLogDirectory(), cfg.GetLogPath())
	if err != nil {
		return nil, err
	}
	if logPath != "" {
		if err := makeLogDirectory("config.log_path", filepath.Dir(logPath)); err != nil {
			return nil, err
		}
	}
	t, err := translate(pod.Config(), cfg, &img.Config)
	if err != nil {
		return nil, err
	}
	c, err := pod.CreateContainer(ctx, sandbox.CreateContainer{
		Config:     cfg,
		ImageID:    img.ID,
		ImageRef:   img.ID,
		Spec:       t.spec,
		User:       t.user,
		Layers:     func(dir string) ([]string, error) { return s.linkLayers(ctx, img, dir) },
		Volumes:    t.volumes,
		PidMode:    t.pidMode,
		PidTarget:  t.pidTarget,
		Stdin:      cfg.GetStdin(),
		StdinOnce:  cfg.GetStdinOnce(),
		TTY:        cfg.GetTty(),
		StopSignal: t.stopSignal,
		LogPath:    logPath,
	})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: c.ID()}, nil
}

func (s *Server) linkLayers(ctx context.Context, img imageservice.Image, dir string) ([]string, error) {
	layers, err := s.Images.Use(ctx, img.ID, dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(layers))
	for i, l := range layers {
		names[i] = filepath.Base(l.Path)
	}
	return names, nil
}

// containerLogPath joins the two halves of a log's path that the CRI keeps
// apart; the second one must not lead out of the first.
func containerLogPath(dir, path string) (string, error) {
	switch {
	case dir == "" || path == "":
		return "", nil
	case !filepath.IsLocal(path):
		return "", refuse("config.log_path", fmt.Sprintf("%q leads out of the pod's log directory", path))
	}
	return filepath.Join(dir, path), nil
}
