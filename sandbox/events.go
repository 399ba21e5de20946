package sandbox

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// Event is a step in the life of a container, or of a pod sandbox, which has
// events like a container's with its own id.
type Event struct {
	Type runtimeapi.ContainerEventType
	Pod  *Pod
	ID   string // the container's or the pod's
	At   int64  // unix nanoseconds
}

// eventQueue is how many events a follower may be behind: a node's worth of pods
// coming and going at once.
const eventQueue = 4096

// events tells followers what happens to the pods. The zero value is ready.
type events struct {
	mu        sync.Mutex
	followers map[*Follower]struct{}
}

// Follower is somebody who is told of events. Close must be called.
type Follower struct {
	pods  *Pods
	queue chan Event
	cut   chan struct{} // closed when it lagged
}

// emit never waits: a follower whose queue is full is cut off.
func (e *events) emit(t runtimeapi.ContainerEventType, p *Pod, id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	ev := Event{Type: t, Pod: p, ID: id, At: time.Now().UnixNano()}
	for f := range e.followers {
		select {
		case f.queue <- ev:
		default:
			delete(e.followers, f)
			close(f.cut)
		}
	}
}

// FollowEvents begins to collect events for a follower.
func (p *Pods) FollowEvents() *Follower {
	f := &Follower{pods: p, queue: make(chan Event, eventQueue), cut: make(chan struct{})}
	e := &p.events
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.followers == nil {
		e.followers = make(map[*Follower]struct{})
	}
	e.followers[f] = struct{}{}
	return f
}

// Close ends the collecting. Calling it again is fine.
func (f *Follower) Close() {
	f.pods.events.mu.Lock()
	defer f.pods.events.mu.Unlock()
	delete(f.pods.events.followers, f)
}

// Each calls take for every event since FollowEvents, in order, one at a time. It
// returns take's error, ctx's, errdefs.ErrUnavailable when the pods are closed,
// or errdefs.ErrResourceExhausted when take was too slow and events were lost; in
// the last three cases a call of take may still be going on. It is called once.
func (f *Follower) Each(ctx context.Context, take func(Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, 1)
	go func() {
		for {
			select {
			case ev := <-f.queue:
				if err := take(ev); err != nil {
					failed <- err
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-f.pods.closing:
		return errClosed
	case <-f.cut:
		return fmt.Errorf("follow events: %d are not taken yet and there were more: list the containers and follow again: %w", eventQueue, errdefs.ErrResourceExhausted)
	}
}

// emitPhase tells what a container's new state means, with pod.mu held. A
// container whose start nobody saw has started all the same.
func (c *Container) emitPhase(old, now *shimapi.ContainerState) {
	if c.pod.ctrs[c.id] != c {
		return // not yet, or no more, anybody's
	}
	e := &c.pod.pods.events
	if old.GetPhase() < shimapi.Phase_RUNNING && now.GetStartedAt() != 0 {
		e.emit(runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT, c.pod, c.id)
	}
	if old.GetPhase() < shimapi.Phase_EXITED && now.GetPhase() == shimapi.Phase_EXITED {
		e.emit(runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, c.pod, c.id)
	}
}

// emitStopped tells once that a sandbox which was ready is so no more.
func (p *Pod) emitStopped() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rec.Phase == creating || p.stoppedSaid {
		return
	}
	p.stoppedSaid = true
	p.pods.events.emit(runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, p, p.id)
}
