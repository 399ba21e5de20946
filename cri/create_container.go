package cri

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/imageservice"
	"github.com/cri-vz/cri-vz/sandbox"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
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
	if cfg, err = s.resolveImageMounts(cfg, t.spec.Mounts); err != nil {
		return nil, err
	}
	if t.pidTarget != "" {
		if t.pidTarget, err = s.pidTarget(pod, t.pidTarget); err != nil {
			return nil, err
		}
	}
	c, err := pod.CreateContainer(ctx, sandbox.CreateContainer{
		Config:   cfg,
		ImageID:  img.ID,
		ImageRef: digestedRef(img, cfg.GetImage()),
		Spec:     t.spec,
		User:     t.user,
		Layers: func(dir string) ([]string, error) {
			if err := s.linkImageMounts(ctx, t.spec.Mounts, dir); err != nil {
				return nil, err
			}
			return s.linkLayers(ctx, img.ID, dir)
		},
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

// imageName is the image's name as its user knows it. A kubelet asks for the id
// that it got from PullImage, and gives the name besides.
func imageName(spec *runtimeapi.ImageSpec) string {
	if name, err := imageservice.NormalizeReference(spec.GetUserSpecifiedImage()); err == nil {
		return name
	}
	return spec.GetImage()
}

// digestedRef is the name of an image's content in a registry, which the CRI calls
// image_ref: in the repository that the user named, if the image came from there.
// One that came from no registry has only its id.
func digestedRef(img imageservice.Image, spec *runtimeapi.ImageSpec) string {
	if len(img.RepoDigests) == 0 {
		return img.ID
	}
	if name, err := imageservice.NormalizeReference(imageName(spec)); err == nil {
		if slices.Contains(img.RepoDigests, name) {
			return name
		}
		for _, d := range img.RepoDigests {
			if repository, _, _ := strings.Cut(d, "@"); strings.HasPrefix(name, repository+":") {
				return d
			}
		}
	}
	return img.RepoDigests[0]
}

// resolveImageMounts puts ids into the mounts that name images, and into a copy of
// the config, for the container's status.
func (s *Server) resolveImageMounts(cfg *runtimeapi.ContainerConfig, mounts []specs.Mount) (*runtimeapi.ContainerConfig, error) {
	ids := map[string]string{}
	for i := range mounts {
		m := &mounts[i]
		if m.Type != guestapi.ImageMount {
			continue
		}
		img, err := s.Images.Resolve(m.Source)
		if err != nil {
			return nil, fmt.Errorf("mount at %s: %w", m.Destination, err)
		}
		ids[m.Source], m.Source = img.ID, img.ID
	}
	cfg = proto.CloneOf(cfg)
	for _, m := range cfg.GetMounts() {
		if m.GetImage() != nil {
			m.Image.ImageRef = ids[m.Image.GetImage()]
		}
	}
	return cfg, nil
}

// linkImageMounts makes the images that mounts name available in dir, from where
// they outlive the images, and tells the guest of what layers they are.
func (s *Server) linkImageMounts(ctx context.Context, mounts []specs.Mount, dir string) error {
	for i := range mounts {
		m := &mounts[i]
		if m.Type != guestapi.ImageMount {
			continue
		}
		layers, err := s.linkLayers(ctx, m.Source, dir)
		if err != nil {
			return fmt.Errorf("mount at %s: %w", m.Destination, err)
		}
		for _, l := range layers {
			m.Options = append(m.Options, guestapi.ImageLayer+l)
		}
	}
	return nil
}

func (s *Server) linkLayers(ctx context.Context, refOrID, dir string) ([]string, error) {
	layers, err := s.Images.Use(ctx, refOrID, dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(layers))
	for i, l := range layers {
		names[i] = filepath.Base(l.Path)
	}
	return names, nil
}

// pidTarget finds the container whose pid namespace another one of the same pod
// joins (T27).
func (s *Server) pidTarget(pod *sandbox.Pod, id string) (string, error) {
	const field = "config.linux.security_context.namespace_options.target_id"
	c, err := s.Pods.Container(id)
	switch {
	case err != nil:
		return "", fmt.Errorf("%s: %w", field, err)
	case c.Pod() != pod:
		return "", refuse(field, fmt.Sprintf("container %s is in another pod", c.ID()))
	case c.Status().Phase != shimapi.Phase_RUNNING:
		return "", fmt.Errorf("%s: container %s is not running: %w", field, c.ID(), errdefs.ErrFailedPrecondition)
	}
	return c.ID(), nil
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
