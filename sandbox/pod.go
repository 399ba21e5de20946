package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/shim"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// Pod is one pod sandbox. Its methods may be called concurrently.
type Pod struct {
	pods      *Pods
	id        string
	dir, run  string
	createdAt int64

	// op is held by the one call that changes the pod as a whole.
	op chan struct{}

	host hostShare

	mu       sync.Mutex
	rec      *podRecord // written to disk by the holder of op only
	progress *progress  // of the start, if this daemon made it
	client   *client    // nil: no shim to talk to
	state    *shimapi.PodState
	changed  chan struct{} // closed and replaced whenever state changes
	lost     chan struct{} // closed when the client's watch has ended and what follows from it is done
	reason   string        // why there is no shim
	removed  bool
	ctrs     map[string]*Container
	// stoppedSaid: the sandbox's own stopped event is out.
	stoppedSaid bool
}

func newPod(p *Pods, rec *podRecord) *Pod {
	return &Pod{
		pods: p, id: rec.ID, dir: p.podDir(rec.ID), run: p.runDir(rec.ID), createdAt: rec.CreatedAt,
		op: make(chan struct{}, 1), host: newHostShare(), rec: rec, reason: rec.Reason,
		changed: make(chan struct{}), ctrs: make(map[string]*Container),
	}
}

// ID is the pod sandbox's id.
func (p *Pod) ID() string { return p.id }

// Config is what Run was given. It is not to be changed.
func (p *Pod) Config() *runtimeapi.PodSandboxConfig { return p.rec.config }

// Handler is the runtime handler that Run was given.
func (p *Pod) Handler() string { return p.rec.Handler }

// ConsolePath is the file with what the guest wrote to its console.
func (p *Pod) ConsolePath() string { return filepath.Join(p.dir, shim.ConsoleFile) }

// Status is a snapshot of the pod.
func (p *Pod) Status() PodStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := PodStatus{CreatedAt: p.createdAt, Steps: slices.Clone(p.rec.Steps), Reason: p.reasonLocked(), DiskError: p.state.GetDiskError()}
	if p.rec.Network != nil {
		s.Netns = p.rec.Network.Netns
	}
	if s.Ready = p.readyLocked(); s.Ready {
		s.IPs = addresses(p.rec.Network)
	}
	return s
}

func (p *Pod) readyLocked() bool {
	return p.rec.Phase == ready && p.client != nil && p.state.GetVm() == shimapi.VM_READY
}

func (p *Pod) reasonLocked() string {
	switch {
	case p.readyLocked():
		return ""
	case p.reason != "":
		return p.reason
	}
	return p.state.GetReason()
}

func (p *Pod) doneSteps() []Step {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := Step{Name: "ready", Last: true}
	if p.rec.Phase == creating {
		last.Name, last.Error = "failed", p.reason
	}
	return append(slices.Clone(p.rec.Steps), last)
}

// Containers returns the pod's containers.
func (p *Pod) Containers() []*Container {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]*Container, 0, len(p.ctrs))
	for _, c := range p.ctrs {
		list = append(list, c)
	}
	return list
}

// Stream opens a stream to a container or to a port on the pod's loopback; see
// [guestapi.Header]. With a container and no exec id it attaches to what runs.
// A refusal is errdefs.ErrFailedPrecondition with the guest's words. The caller
// closes the stream.
func (p *Pod) Stream(ctx context.Context, h guestapi.Header) (*guestapi.Stream, error) {
	if _, err := p.shimClient(); err != nil {
		return nil, err
	}
	s, err := openStream(ctx, p.run, h)
	if err != nil {
		return nil, fmt.Errorf("pod %s: %w", p.id, err)
	}
	return s, nil
}

// DataSocket is where [HandOver] finds the pod's shim.
func (p *Pod) DataSocket() string { return filepath.Join(p.run, shimapi.SocketData) }

// Stats asks the guest for the pod's and its containers' resource usage; for their
// open files, which take a while to count, if they are wanted.
func (p *Pod) Stats(ctx context.Context, files bool) (*guestapi.StatsResponse, error) {
	c, err := p.shimClient()
	if err != nil {
		return nil, err
	}
	return ask(ctx, c.Stats, &guestapi.StatsRequest{Files: files})
}

// shimClient is the connection to the shim, or why there is none.
func (p *Pod) shimClient() (*client, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.client != nil {
		return p.client, nil
	}
	return nil, fmt.Errorf("pod sandbox %s is not ready: %s: %w", p.id, p.reasonLocked(), errdefs.ErrFailedPrecondition)
}

// attach takes a connection to the shim into use and follows it.
func (p *Pod) attach(c *client, state *shimapi.PodState) {
	p.mu.Lock()
	p.client = c
	p.lost = make(chan struct{})
	lost := p.lost
	p.mu.Unlock()
	p.update(state)
	p.pods.tasks.Go(func() {
		defer close(lost)
		p.follow(c)
	})
}

// update takes over a state of the shim's unless it is older than what is known.
func (p *Pod) update(state *shimapi.PodState) {
	p.mu.Lock()
	if p.state != nil && state.GetRevision() < p.state.GetRevision() {
		p.mu.Unlock()
		return
	}
	p.state = state
	for _, cs := range state.GetContainers() {
		if c := p.ctrs[cs.GetId()]; c != nil {
			c.updateLocked(cs)
		}
	}
	close(p.changed)
	p.changed = make(chan struct{})
	pr := p.progress
	// A sandbox has stopped after its containers, also for who follows events. Of
	// one whose end the shim doesn't tell, shimLost does.
	ended := state.GetVm() == shimapi.VM_GONE
	for _, c := range p.ctrs {
		ended = ended && c.state.GetPhase() != shimapi.Phase_RUNNING
	}
	p.mu.Unlock()
	if ended {
		p.emitStopped()
	}
	if pr != nil {
		pr.addShim(state.GetSteps())
	}
}

// refresh waits until the watch has seen that the VM is ready, so that whoever
// was told so reads it, too.
func (p *Pod) refresh(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, shimHello)
	defer cancel()
	for {
		p.mu.Lock()
		vm, reason, changed, lost := p.state.GetVm(), p.state.GetReason(), p.changed, p.lost
		p.mu.Unlock()
		switch vm {
		case shimapi.VM_READY:
			return nil
		case shimapi.VM_GONE:
			return fmt.Errorf("boot: the VM went away as soon as it was ready: %s: %w", reason, errdefs.ErrUnavailable)
		}
		select {
		case <-changed:
		case <-lost:
			return fmt.Errorf("boot: the shim went away: %w", errdefs.ErrUnavailable)
		case <-ctx.Done():
			return fmt.Errorf("boot: waited for the shim to say that the VM is ready: %w", ctx.Err())
		}
	}
}

// follow keeps the pod's state up to date until the shim is gone.
func (p *Pod) follow(c *client) {
	var err error
	for {
		var state *shimapi.PodState
		if state, err = c.watch.Recv(); err != nil {
			break
		}
		p.update(state)
	}
	select {
	case <-p.pods.closing:
		return
	default:
	}
	p.shimLost(c, err)
}

// shimLost takes over from a shim that is gone: the VM has died with it.
func (p *Pod) shimLost(c *client, err error) {
	c.close()
	p.mu.Lock()
	proc := p.rec.Shim
	if p.client == c {
		p.client = nil
	}
	if p.reason == "" && p.state.GetVm() != shimapi.VM_GONE {
		p.reason = "the pod's shim died, and the VM with it"
	}
	reason := p.reasonLocked()
	p.mu.Unlock()
	klog.InfoS("The pod's shim is gone", "pod", p.id, "reason", reason, "err", err)
	// A connection that broke while the shim lives is a shim nobody can talk to.
	ctx, cancel := context.WithTimeout(context.Background(), shimEnd)
	defer cancel()
	settle, settled := context.WithTimeout(ctx, time.Second)
	if proc.wait(settle) != nil {
		if err := proc.kill(ctx); err != nil {
			klog.ErrorS(err, "Killing a shim that doesn't answer", "pod", p.id)
		}
	}
	settled()
	p.settleContainers(reason)
	p.emitStopped()
}

// settleContainers gives containers that nobody saw ending their end (T10): on
// record, unless the shim's last act was to record a real one.
func (p *Pod) settleContainers(reason string) {
	p.mu.Lock()
	ctrs := make([]*Container, 0, len(p.ctrs))
	for _, c := range p.ctrs {
		ctrs = append(ctrs, c)
	}
	p.mu.Unlock()
	for _, c := range ctrs {
		state, err := shim.ReadStatus(c.dir)
		if err != nil {
			klog.ErrorS(err, "Reading a container's record", "pod", p.id, "container", c.id)
			state = c.last()
		}
		if state.GetPhase() == shimapi.Phase_RUNNING {
			state.Phase = shimapi.Phase_EXITED
			state.FinishedAt = time.Now().UnixNano()
			state.ExitCode = 255
			state.Reason, state.Message = shim.ReasonSandboxGone, reason
			if err := shim.WriteStatus(c.dir, state); err != nil && !errors.Is(err, os.ErrNotExist) {
				klog.ErrorS(err, "Writing a container's record", "pod", p.id, "container", c.id)
			}
		}
		p.mu.Lock()
		if old := c.state; old.GetPhase() != shimapi.Phase_EXITED {
			c.state = state
			c.emitPhase(old, state)
		}
		p.mu.Unlock()
	}
}

// killShim ends the shim, and so everything of the pod that runs. Idempotent.
func (p *Pod) killShim(ctx context.Context) error {
	p.mu.Lock()
	c, lost, proc := p.client, p.lost, p.rec.Shim
	p.mu.Unlock()
	if c != nil {
		sctx, cancel := context.WithTimeout(ctx, shimStop)
		_, err := ask(sctx, c.Stop, &shimapi.StopRequest{})
		cancel()
		// An answer that was cut off by the shim's end is an answer.
		if err == nil || errdefs.IsUnavailable(err) {
			wctx, cancel := context.WithTimeout(ctx, shimEnd)
			err = proc.wait(wctx)
			cancel()
		}
		if err != nil {
			klog.ErrorS(err, "The shim doesn't stop the pod and is killed", "pod", p.id)
		}
	}
	// The shim's children get SIGKILL when it dies; the cgroup's sweep is for
	// those that didn't.
	if err := proc.kill(ctx); err != nil {
		return err
	}
	if lost != nil {
		select {
		case <-lost:
		case <-p.pods.closing:
		case <-ctx.Done():
			return fmt.Errorf("pod %s: waited for the shim's connection to end: %w", p.id, ctx.Err())
		}
	}
	return nil
}

// tearDownNetwork is for a pod whose shim is gone.
func (p *Pod) tearDownNetwork(ctx context.Context) error {
	p.mu.Lock()
	// Of a pod that this daemon made and whose shim told nothing, no guest ran.
	over := p.state == nil && p.progress != nil || p.state != nil && !p.state.GetLeased()
	p.mu.Unlock()
	if nw, ok := p.pods.o.Network.(leases); ok && over {
		if err := nw.Released(p.id); err != nil {
			return err
		}
	}
	return p.pods.o.Network.TearDown(ctx, p.id)
}

// Stop ends the pod and returns when its VM, its helpers, its mounts and its
// network are gone (T34). It has no grace period: containers that should have
// one are stopped before. Calling it again, or for a pod that died, is fine.
func (p *Pod) Stop(ctx context.Context) error {
	release, err := p.acquire(ctx, "stop")
	if err != nil {
		return err
	}
	defer release()
	return p.stop(ctx)
}

func (p *Pod) acquire(ctx context.Context, what string) (func(), error) {
	start := time.Now()
	select {
	case p.op <- struct{}{}:
		return func() { <-p.op }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%s pod %s: waited %v for another call on it to end: %w", what, p.id, time.Since(start).Round(time.Millisecond), ctx.Err())
	}
}

// stop is Stop for the holder of op.
func (p *Pod) stop(ctx context.Context) error {
	p.mu.Lock()
	done := p.removed || p.rec.Phase == stopped || p.rec.Phase == removing
	p.mu.Unlock()
	if done {
		return nil
	}
	// What was begun is finished whatever becomes of the caller.
	ctx = context.WithoutCancel(ctx)
	kctx, cancel := context.WithTimeout(ctx, undoTimeout)
	defer cancel()
	if err := p.killShim(kctx); err != nil {
		return fmt.Errorf("stop pod %s: %w", p.id, err)
	}
	p.mu.Lock()
	cgroups := p.rec.Cgroups
	if p.reason == "" {
		p.reason = "the pod was stopped"
	}
	reason := p.reason
	p.mu.Unlock()
	if err := removeCgroups(kctx, cgroups); err != nil {
		return fmt.Errorf("stop pod %s: %w", p.id, err)
	}
	p.settleContainers(reason)
	if err := os.RemoveAll(p.run); err != nil {
		return fmt.Errorf("stop pod %s: %w", p.id, err)
	}
	nctx, ncancel := context.WithTimeout(ctx, tearDown)
	defer ncancel()
	if err := p.tearDownNetwork(nctx); err != nil {
		return fmt.Errorf("stop pod %s: its VM is gone, its network is not: %w", p.id, err)
	}
	p.emitStopped()
	return p.setPhase(stopped)
}

// setPhase puts a new phase on record.
func (p *Pod) setPhase(ph phase) error {
	p.mu.Lock()
	p.rec.Phase = ph
	p.rec.Reason = p.reason
	rec := *p.rec
	p.mu.Unlock()
	if err := rec.write(p.dir); err != nil {
		return fmt.Errorf("pod %s: %w", p.id, err)
	}
	return nil
}

// Remove stops the pod if need be and removes all that is left of it, its
// containers included. Calling it again is fine.
func (p *Pod) Remove(ctx context.Context) error {
	release, err := p.acquire(ctx, "remove")
	if err != nil {
		return err
	}
	defer release()
	p.mu.Lock()
	removed := p.removed
	p.mu.Unlock()
	if removed {
		return nil
	}
	if err := p.stop(ctx); err != nil {
		return err
	}
	// A record that is gone is one that an earlier Remove took away.
	if err := p.setPhase(removing); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := removeFiles(p.dir, p.run); err != nil {
		return fmt.Errorf("remove pod %s: %w", p.id, err)
	}
	p.mu.Lock()
	p.removed = true
	p.mu.Unlock()
	p.pods.forget(p)
	return nil
}

// forget takes a pod and its containers out of the books.
func (p *Pods) forget(pod *Pod) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.pods, pod.id)
	if key := podKey(pod.rec.config.GetMetadata()); p.names[key] == pod.id {
		delete(p.names, key)
	}
	for id, c := range p.containers {
		if c.pod == pod {
			delete(p.containers, id)
			delete(p.ctrNames, containerKey(pod.id, c.rec.config.GetMetadata()))
			p.events.emit(runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT, pod, id)
		}
	}
	p.events.emit(runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT, pod, pod.id)
}
