package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/shim"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// Container is one container of a pod. Its methods may be called concurrently.
type Container struct {
	pod   *Pod
	id    string
	dir   string
	rec   *containerRecord
	execs atomic.Uint64

	// op is held by the one call that creates or removes it.
	op chan struct{}

	state   *shimapi.ContainerState // guarded by pod.mu; never nil
	removed bool                    // guarded by pod.mu
}

func newContainer(p *Pod, rec *containerRecord) *Container {
	return &Container{
		pod: p, id: rec.ID, dir: filepath.Join(p.dir, shim.ContainersDir, rec.ID), rec: rec,
		op:    make(chan struct{}, 1),
		state: &shimapi.ContainerState{Id: rec.ID, CreatedAt: rec.CreatedAt},
	}
}

// ID is the container's id.
func (c *Container) ID() string { return c.id }

// Pod is the container's pod sandbox.
func (c *Container) Pod() *Pod { return c.pod }

// Config is what CreateContainer was given. It is not to be changed.
func (c *Container) Config() *runtimeapi.ContainerConfig { return c.rec.config }

// ImageID is what CreateContainer was given.
func (c *Container) ImageID() string { return c.rec.ImageID }

// ImageRef is what CreateContainer was given.
func (c *Container) ImageRef() string { return c.rec.ImageRef }

// Status is a snapshot of the container.
func (c *Container) Status() ContainerStatus {
	s := c.last()
	return ContainerStatus{
		Phase: s.GetPhase(), CreatedAt: c.rec.CreatedAt, StartedAt: s.GetStartedAt(), FinishedAt: s.GetFinishedAt(),
		ExitCode: s.GetExitCode(), Reason: s.GetReason(), Message: s.GetMessage(), User: s.GetUser(),
		LogPath: c.rec.LogPath, LogLinesDropped: s.GetLogLinesDropped(),
	}
}

// last is a copy of the last state known.
func (c *Container) last() *shimapi.ContainerState {
	c.pod.mu.Lock()
	defer c.pod.mu.Unlock()
	return proto.CloneOf(c.state)
}

// update takes over what an answer of the shim said of the container.
func (c *Container) update(s *shimapi.ContainerState) {
	c.pod.mu.Lock()
	defer c.pod.mu.Unlock()
	c.updateLocked(s)
}

// updateLocked never goes back: not to an older revision, and not from exited.
func (c *Container) updateLocked(s *shimapi.ContainerState) {
	if s != nil && s.GetRevision() >= c.state.GetRevision() && s.GetPhase() >= c.state.GetPhase() {
		old := c.state
		c.state = s
		c.emitPhase(old, s)
	}
}

// CreateContainer makes a container in a ready pod. A name that is taken is
// errdefs.ErrAlreadyExists and names the holder. After an error nothing of the
// container is left.
func (p *Pod) CreateContainer(ctx context.Context, cc CreateContainer) (_ *Container, err error) {
	meta := cc.Config.GetMetadata()
	if meta.GetName() == "" {
		return nil, fmt.Errorf("create container: its metadata has no name: %w", errdefs.ErrInvalidArgument)
	}
	p.mu.Lock()
	isReady, reason := p.readyLocked(), p.reasonLocked()
	p.mu.Unlock()
	if !isReady {
		return nil, fmt.Errorf("create container %s: pod sandbox %s is not ready: %s: %w", meta.GetName(), p.id, reason, errdefs.ErrFailedPrecondition)
	}
	client, err := p.shimClient()
	if err != nil {
		return nil, err
	}
	// Not Size: a pod of an older daemon has none on record, and no huge pages.
	if err := p.rec.Size.checkHugepages(cc.Config.GetLinux().GetResources()); err != nil {
		return nil, fmt.Errorf("create container %s: config.linux.resources.%w", meta.GetName(), err)
	}
	id, err := p.pods.reserveContainer(p.id, meta)
	if err != nil {
		return nil, err
	}
	c := newContainer(p, &containerRecord{
		ID: id, Creating: true, config: proto.CloneOf(cc.Config),
		ImageID: cc.ImageID, ImageRef: cc.ImageRef, LogPath: cc.LogPath, Signal: cc.StopSignal,
		CreatedAt: time.Now().UnixNano(),
	})
	defer func() {
		if err != nil {
			c.releaseHost()
			if rerr := os.RemoveAll(c.dir); rerr != nil {
				klog.ErrorS(rerr, "Undoing a failed create", "pod", p.id, "container", id)
			}
			p.pods.unreserveContainer(p.id, meta)
			err = fmt.Errorf("create container %s: %w", meta.GetName(), err)
		}
	}()
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("pod sandbox %s was removed meanwhile: %w", p.id, errdefs.ErrFailedPrecondition)
		}
		return nil, err
	}
	if err := c.rec.write(c.dir); err != nil {
		return nil, err
	}
	req, err := c.request(&cc)
	if err != nil {
		return nil, err
	}
	if err := p.askHost(ctx, "config.linux.resources", id, c.Resources()); err != nil {
		return nil, err
	}
	resp, err := ask(ctx, client.CreateContainer, req)
	if err != nil {
		// The shim undoes a create whose caller went away, but the answer may
		// have been on its way.
		uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		if _, rerr := ask(uctx, client.RemoveContainer, &shimapi.RemoveContainerRequest{Id: id}); rerr != nil {
			klog.ErrorS(rerr, "Undoing a failed create", "pod", p.id, "container", id)
		}
		return nil, err
	}
	c.state = resp.GetState()
	c.rec.Creating = false
	if err := c.rec.write(c.dir); err != nil {
		uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		_, _ = ask(uctx, client.RemoveContainer, &shimapi.RemoveContainerRequest{Id: id})
		return nil, err
	}
	// Both locks, so that a Remove of the pod takes all of the container along or
	// comes before all of it.
	p.pods.mu.Lock()
	p.mu.Lock()
	defer p.pods.mu.Unlock()
	defer p.mu.Unlock()
	if p.removed {
		return nil, fmt.Errorf("pod sandbox %s was removed meanwhile: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	p.ctrs[id] = c
	p.pods.events.emit(runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT, p, id)
	for _, cs := range p.state.GetContainers() {
		if cs.GetId() == id {
			c.updateLocked(cs)
		}
	}
	p.pods.containers[id] = c
	return c, nil
}

// request is what the shim gets: layers linked, volumes under names that are the
// pod's.
func (c *Container) request(cc *CreateContainer) (*shimapi.CreateContainerRequest, error) {
	var layers []string
	if cc.Layers != nil {
		var err error
		if layers, err = cc.Layers(filepath.Join(c.pod.dir, shim.LayersDir)); err != nil {
			return nil, fmt.Errorf("layers: %w", err)
		}
	}
	if cc.Spec == nil {
		return nil, fmt.Errorf("no spec: %w", errdefs.ErrInvalidArgument)
	}
	prefix := c.id[:shortID] + "-"
	names := make(map[string]bool)
	files := make(map[string]bool)
	emptyDirs := make(map[string]*specs.Mount)
	var volumes []*shimapi.Volume
	for _, v := range cc.Volumes {
		if names[v.GetName()] {
			return nil, fmt.Errorf("two volumes are named %q: %w", v.GetName(), errdefs.ErrInvalidArgument)
		}
		names[v.GetName()] = true
		if !c.pod.pods.o.Driver.KeepsOwners() {
			m, err := guestEmptyDir(c.pod.rec.config.GetMetadata().GetUid(), v)
			if err != nil {
				return nil, err
			}
			if m != nil {
				emptyDirs[v.GetName()] = m
				continue
			}
		}
		// Where there are no mounts, a single file is in a directory of its own.
		if st, err := os.Stat(v.GetHostPath()); c.pod.pods.o.Driver.Name == shim.DriverVZ && err == nil {
			files[v.GetName()] = st.Mode().IsRegular()
		}
		v = proto.CloneOf(v)
		v.Name = prefix + v.GetName()
		volumes = append(volumes, v)
	}
	spec := *cc.Spec
	spec.Mounts = append([]specs.Mount(nil), spec.Mounts...)
	for i, m := range spec.Mounts {
		if name, ok := strings.CutPrefix(m.Source, guestapi.VolumeScheme); ok {
			if !names[name] {
				return nil, fmt.Errorf("mount %s is of volume %q, which is not among the volumes: %w", m.Destination, name, errdefs.ErrInvalidArgument)
			}
			if e := emptyDirs[name]; e != nil {
				spec.Mounts[i].Type, spec.Mounts[i].Source = e.Type, e.Source
				spec.Mounts[i].Options = slices.Concat(m.Options, e.Options)
				continue
			}
			spec.Mounts[i].Source = guestapi.VolumeScheme + prefix + name
			if files[name] {
				spec.Mounts[i].Source += "/" + shim.LinkedFile
			}
		}
	}
	b, err := json.Marshal(&spec)
	if err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	// Beside the spec, which an agent of an older daemon's goes by, and only where
	// the spec would change it.
	var env [][]byte
	if p := spec.Process; p != nil && slices.ContainsFunc(p.Env, func(s string) bool { return !utf8.ValidString(s) }) {
		for _, s := range p.Env {
			env = append(env, []byte(s))
		}
	}
	return &shimapi.CreateContainerRequest{
		Container: &guestapi.CreateContainerRequest{
			Id: c.id, Spec: b, Layers: layers, User: cc.User,
			PidMode: cc.PidMode, PidTarget: cc.PidTarget,
			Stdin: cc.Stdin, StdinOnce: cc.StdinOnce, Tty: cc.TTY, Env: env,
		},
		Volumes: volumes, LogPath: cc.LogPath, Tty: cc.TTY,
	}, nil
}

func (p *Pods) reserveContainer(pod string, meta *runtimeapi.ContainerMetadata) (string, error) {
	key := containerKey(pod, meta)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return "", errClosed
	}
	if holder, ok := p.ctrNames[key]; ok {
		return "", fmt.Errorf("container name %s (attempt %d) in pod %s is reserved by container %s: %w", meta.GetName(), meta.GetAttempt(), pod, holder, errdefs.ErrAlreadyExists)
	}
	id := newID(func(string) bool { return false })
	p.ctrNames[key] = id
	return id, nil
}

func (p *Pods) unreserveContainer(pod string, meta *runtimeapi.ContainerMetadata) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.ctrNames, containerKey(pod, meta))
}

// Start runs the created container's process. An error of the guest's, a missing
// command for one, ends the container with reason StartError.
func (c *Container) Start(ctx context.Context) error {
	client, err := c.pod.shimClient()
	if err != nil {
		return fmt.Errorf("start container %s: %w", c.id, err)
	}
	state, err := ask(ctx, client.StartContainer, &shimapi.StartContainerRequest{Id: c.id})
	if err != nil {
		// A command that can't be run has ended the container, and the next
		// Status must say so; that news comes over the watch, not with the error.
		c.awaitStartError(ctx)
		return fmt.Errorf("start container %s: %w", c.id, err)
	}
	c.update(state)
	return nil
}

// startErrorBound is how long a failed Start waits for the shim's own account of
// it; the two leave the shim at the same moment.
const startErrorBound = time.Second

func (c *Container) awaitStartError(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, startErrorBound)
	defer cancel()
	for {
		c.pod.mu.Lock()
		phase, changed := c.state.GetPhase(), c.pod.changed
		c.pod.mu.Unlock()
		if phase != shimapi.Phase_CREATED {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// Stop ends the container's process: its stop signal, the grace period, SIGKILL.
// Past grace + 2 s the pod's VM is killed (T12), so Stop always stops. A
// container that doesn't run is no error; one whose start is under way is waited
// for as long.
func (c *Container) Stop(ctx context.Context, grace time.Duration) error {
	if c.last().GetPhase() == shimapi.Phase_EXITED {
		return nil
	}
	client, err := c.pod.shimClient()
	if err != nil {
		return c.awaitEnd(ctx) // the shim's death is its end, if not yet on record
	}
	state, err := ask(ctx, client.StopContainer, &shimapi.StopContainerRequest{Id: c.id, GraceNanos: int64(grace), Signal: c.rec.Signal})
	if err != nil {
		if errdefs.IsUnavailable(err) {
			return c.awaitEnd(ctx)
		}
		return fmt.Errorf("stop container %s: %w", c.id, err)
	}
	c.update(state)
	return nil
}

// awaitEnd waits until a container whose shim died is settled.
func (c *Container) awaitEnd(ctx context.Context) error {
	c.pod.mu.Lock()
	lost := c.pod.lost
	c.pod.mu.Unlock()
	if lost != nil {
		select {
		case <-lost:
		case <-ctx.Done():
			return fmt.Errorf("stop container %s: waited for its shim's end: %w", c.id, ctx.Err())
		}
	}
	return nil
}

// Remove removes the container, killing it if it runs. Calling it again is fine.
func (c *Container) Remove(ctx context.Context) error {
	select {
	case c.op <- struct{}{}:
		defer func() { <-c.op }()
	case <-ctx.Done():
		return fmt.Errorf("remove container %s: waited for another call on it to end: %w", c.id, ctx.Err())
	}
	c.pod.mu.Lock()
	removed := c.removed
	client := c.pod.client
	c.pod.mu.Unlock()
	if removed {
		return nil
	}
	if client != nil {
		if _, err := ask(ctx, client.RemoveContainer, &shimapi.RemoveContainerRequest{Id: c.id}); err != nil && !errdefs.IsUnavailable(err) {
			return fmt.Errorf("remove container %s: %w", c.id, err)
		}
	}
	c.releaseHost()
	if err := os.RemoveAll(c.dir); err != nil {
		return fmt.Errorf("remove container %s: %w", c.id, err)
	}
	c.pod.mu.Lock()
	c.removed = true
	delete(c.pod.ctrs, c.id)
	c.pod.pods.events.emit(runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT, c.pod, c.id)
	c.pod.mu.Unlock()
	p := c.pod.pods
	p.mu.Lock()
	delete(p.containers, c.id)
	delete(p.ctrNames, containerKey(c.pod.id, c.rec.config.GetMetadata()))
	p.mu.Unlock()
	return nil
}

// ReopenLog makes the shim open the log file anew, after a rotation.
func (c *Container) ReopenLog(ctx context.Context) error {
	client, err := c.pod.shimClient()
	if err != nil {
		return fmt.Errorf("reopen log of container %s: %w", c.id, err)
	}
	if _, err := ask(ctx, client.ReopenLog, &shimapi.ReopenLogRequest{Id: c.id}); err != nil {
		return fmt.Errorf("reopen log: %w", err)
	}
	return nil
}

// Resize sets the size of the container's terminal.
func (c *Container) Resize(ctx context.Context, width, height uint32) error {
	return c.resize(ctx, "", width, height)
}

func (c *Container) resize(ctx context.Context, exec string, width, height uint32) error {
	client, err := c.pod.shimClient()
	if err != nil {
		return err
	}
	_, err = ask(ctx, client.ResizePty, &guestapi.ResizePtyRequest{Id: c.id, ExecId: exec, Width: width, Height: height})
	return err
}
