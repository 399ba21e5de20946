package criclient

import (
	"context"
	"fmt"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pod is a pod sandbox.
type Pod struct {
	*Client
	ID     string
	Config *runtimeapi.PodSandboxConfig
	Image  string // of containers that don't name one
}

// RunPod runs a pod sandbox; handler may be empty. The caller removes it.
func (c *Client) RunPod(ctx context.Context, cfg *runtimeapi.PodSandboxConfig, handler string) (*Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	r, err := c.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handler})
	if err != nil {
		return nil, err
	}
	c.boots.Add(1)
	return &Pod{Client: c, ID: r.GetPodSandboxId(), Config: cfg}, nil
}

// Remove stops and removes the pod.
func (p *Pod) Remove(t *testing.T) {
	t.Helper()
	ctx := Timeout(t, CallTimeout)
	if _, err := p.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		t.Errorf("stop pod %s: %v", p.Config.GetMetadata().GetName(), err)
	}
	if _, err := p.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		t.Errorf("remove pod %s: %v", p.Config.GetMetadata().GetName(), err)
	}
}

// Option changes a container's config.
type Option func(*runtimeapi.ContainerConfig)

// Command replaces the image's entrypoint and arguments.
func Command(args ...string) Option {
	return func(c *runtimeapi.ContainerConfig) { c.Command = args }
}

// Args replaces the image's arguments.
func Args(args ...string) Option { return func(c *runtimeapi.ContainerConfig) { c.Args = args } }

// Env adds an environment variable.
func Env(key, value string) Option {
	return func(c *runtimeapi.ContainerConfig) {
		c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: key, Value: []byte(value)})
	}
}

// Image replaces the pod's image.
func Image(ref string) Option {
	return func(c *runtimeapi.ContainerConfig) { c.Image = &runtimeapi.ImageSpec{Image: ref} }
}

// Attempt numbers the container, as a kubelet does with restarts.
func Attempt(n uint32) Option {
	return func(c *runtimeapi.ContainerConfig) {
		c.Metadata.Attempt = n
		c.LogPath = fmt.Sprintf("%s-%d.log", c.GetMetadata().GetName(), n)
	}
}

// Security changes the security context.
func Security(f func(*runtimeapi.LinuxContainerSecurityContext)) Option {
	return func(c *runtimeapi.ContainerConfig) { f(c.Linux.SecurityContext) }
}

// AsRoot runs as user 0, whatever the image says.
func AsRoot(c *runtimeapi.ContainerConfig) {
	c.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{}
}

// Privileged is the security context's field.
func Privileged(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.Privileged = true }

// Resources changes the limits.
func Resources(r *runtimeapi.LinuxContainerResources) Option {
	return func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = r }
}

// MemoryLimit is the limit in bytes.
func MemoryLimit(bytes int64) Option {
	return Resources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: bytes})
}

// Mount adds a mount.
func Mount(m *runtimeapi.Mount) Option {
	return func(c *runtimeapi.ContainerConfig) { c.Mounts = append(c.Mounts, m) }
}

// Pid sets the mode of the pid namespace; target is a container's id, for mode
// TARGET.
func Pid(mode runtimeapi.NamespaceMode, target string) Option {
	return Security(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: mode, TargetId: target}
	})
}

// FreshLog gives each container of a name a log of its own.
func FreshLog(c *runtimeapi.ContainerConfig) {
	c.LogPath = fmt.Sprintf("%s-%d.log", c.GetMetadata().GetName(), time.Now().UnixNano())
}

// ContainerConfig is a container of that name, which is also its log's and that
// of its label "container". It runs the pod's image.
func (p *Pod) ContainerConfig(name string, options ...Option) *runtimeapi.ContainerConfig {
	c := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: p.Image},
		LogPath:  name + ".log",
		Labels:   map[string]string{"container": name},
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			// A container's namespaces are as its pod's unless it says otherwise.
			NamespaceOptions: &runtimeapi.NamespaceOption{
				Pid:           p.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid(),
				UsernsOptions: p.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions(),
			},
		}},
	}
	for _, o := range options {
		o(c)
	}
	return c
}

// CreateContext creates a container; the caller removes it.
func (p *Pod) CreateContext(ctx context.Context, name string, options ...Option) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	r, err := p.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.ID, Config: p.ContainerConfig(name, options...), SandboxConfig: p.Config})
	return r.GetContainerId(), err
}

// CreateAndStart creates and starts a container; the caller removes it. The id is
// there if only the start failed.
func (p *Pod) CreateAndStart(ctx context.Context, name string, options ...Option) (string, error) {
	id, err := p.CreateContext(ctx, name, options...)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	_, err = p.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	return id, err
}

// Create creates a container for one test.
func (p *Pod) Create(t *testing.T, name string, options ...Option) string {
	t.Helper()
	id, err := p.CreateContext(t.Context(), name, options...)
	if err != nil {
		t.Fatalf("create container %s: %v", name, err)
	}
	t.Cleanup(func() { p.RemoveByID(t, id) })
	return id
}

// Start creates and starts a container for one test.
func (p *Pod) Start(t *testing.T, name string, options ...Option) string {
	t.Helper()
	id := p.Create(t, name, options...)
	p.StartByID(t, id)
	return id
}

// Run runs a container to its end.
func (p *Pod) Run(t *testing.T, name string, options ...Option) Result {
	t.Helper()
	id := p.Start(t, name, options...)
	st := p.WaitExit(t, id, 30*time.Second)
	r := ReadLog(t, st.GetLogPath())
	r.Code = st.GetExitCode()
	return r
}
