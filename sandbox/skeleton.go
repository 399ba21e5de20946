package sandbox

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

type Pods struct{}
type Pod struct{}
type Container struct{}
type Exec struct{}

func Open(ctx context.Context, o Options) (*Pods, error) { return nil, errdefs.ErrNotImplemented }
func (p *Pods) Close() error                             { return nil }
func (p *Pods) Run(ctx context.Context, cfg *runtimeapi.PodSandboxConfig, handler string) (*Pod, error) {
	return nil, errdefs.ErrNotImplemented
}
func (p *Pods) Get(idOrPrefix string) (*Pod, error)             { return nil, errdefs.ErrNotFound }
func (p *Pods) List() []*Pod                                    { return nil }
func (p *Pods) Container(idOrPrefix string) (*Container, error) { return nil, errdefs.ErrNotFound }
func (p *Pods) Containers() []*Container                        { return nil }
func (p *Pods) WatchSteps(ctx context.Context, meta *runtimeapi.PodSandboxMetadata) (<-chan Step, error) {
	return nil, errdefs.ErrNotImplemented
}

func (p *Pod) ID() string                           { return "" }
func (p *Pod) Config() *runtimeapi.PodSandboxConfig { return nil }
func (p *Pod) Handler() string                      { return "" }
func (p *Pod) Status() PodStatus                    { return PodStatus{} }
func (p *Pod) Containers() []*Container             { return nil }
func (p *Pod) Stop(ctx context.Context) error       { return nil }
func (p *Pod) Remove(ctx context.Context) error     { return nil }
func (p *Pod) ConsolePath() string                  { return "" }
func (p *Pod) Stream(ctx context.Context, h guestapi.Header) (*guestapi.Stream, error) {
	return nil, errdefs.ErrNotImplemented
}
func (p *Pod) CreateContainer(ctx context.Context, c CreateContainer) (*Container, error) {
	return nil, errdefs.ErrNotImplemented
}
func (p *Pod) Stats(ctx context.Context) (*guestapi.StatsResponse, error) {
	return nil, errdefs.ErrNotImplemented
}

func (c *Container) ID() string                                                { return "" }
func (c *Container) Pod() *Pod                                                 { return nil }
func (c *Container) Config() *runtimeapi.ContainerConfig                       { return nil }
func (c *Container) ImageID() string                                           { return "" }
func (c *Container) ImageRef() string                                          { return "" }
func (c *Container) Status() ContainerStatus                                   { return ContainerStatus{} }
func (c *Container) Start(ctx context.Context) error                           { return nil }
func (c *Container) Stop(ctx context.Context, grace time.Duration) error       { return nil }
func (c *Container) Remove(ctx context.Context) error                          { return nil }
func (c *Container) ReopenLog(ctx context.Context) error                       { return nil }
func (c *Container) Resize(ctx context.Context, width, height uint32) error    { return nil }
func (c *Container) Update(ctx context.Context, r *specs.LinuxResources) error { return nil }

// Exec starts a process; e.Id and e.ExecId are filled in.
func (c *Container) Exec(ctx context.Context, e *guestapi.ExecRequest) (*Exec, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Exec) ID() string { return "" }
func (e *Exec) Stream(ctx context.Context, kind guestapi.Kind) (*guestapi.Stream, error) {
	return nil, errdefs.ErrNotImplemented
}
func (e *Exec) Resize(ctx context.Context, width, height uint32) error { return nil }

// Wait returns the exit code.
func (e *Exec) Wait(ctx context.Context) (int32, error) { return 0, nil }

// Close kills the process if it runs, and forgets it.
func (e *Exec) Close() error { return nil }
