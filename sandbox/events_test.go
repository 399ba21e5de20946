package sandbox

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

func eventPods(t *testing.T) (*Pods, *Container) {
	t.Helper()
	p := &Pods{closing: make(chan struct{})}
	pod := newPod(p, &podRecord{ID: "0123456789abcdef", Phase: ready})
	c := newContainer(pod, &containerRecord{ID: "c"})
	pod.ctrs["c"] = c
	return p, c
}

// The events of a container follow from its states, also where a state was never
// seen, and come once.
func TestEventsOfAContainer(t *testing.T) {
	const started, stopped = runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT
	running := &shimapi.ContainerState{Revision: 1, Phase: shimapi.Phase_RUNNING, StartedAt: 1}
	exited := &shimapi.ContainerState{Revision: 2, Phase: shimapi.Phase_EXITED, StartedAt: 1}
	for name, tc := range map[string]struct {
		states []*shimapi.ContainerState
		want   []runtimeapi.ContainerEventType
	}{
		"all seen":      {[]*shimapi.ContainerState{running, running, exited, exited}, []runtimeapi.ContainerEventType{started, stopped}},
		"a short life":  {[]*shimapi.ContainerState{exited, running}, []runtimeapi.ContainerEventType{started, stopped}},
		"never started": {[]*shimapi.ContainerState{{Revision: 1, Phase: shimapi.Phase_EXITED}}, []runtimeapi.ContainerEventType{stopped}},
	} {
		t.Run(name, func(t *testing.T) {
			p, c := eventPods(t)
			f := p.FollowEvents()
			defer f.Close()
			for _, s := range tc.states {
				c.update(s)
			}
			for range 2 {
				c.pod.emitStopped()
			}
			enough := errors.New("enough")
			var got []runtimeapi.ContainerEventType
			err := f.Each(t.Context(), func(ev Event) error {
				if ev.ID == c.pod.id {
					return enough
				}
				if ev.ID != "c" || ev.Pod != c.pod || ev.At == 0 {
					t.Errorf("event %+v", ev)
				}
				got = append(got, ev.Type)
				return nil
			})
			if !errors.Is(err, enough) || !slices.Equal(got, tc.want) || len(f.queue) != 0 {
				t.Errorf("events %v, %d more, %v, want %v", got, len(f.queue), err, tc.want)
			}
		})
	}
}

// A follower that doesn't take its events is cut off; nobody waits for it, and
// the others get theirs.
func TestSlowFollower(t *testing.T) {
	p, c := eventPods(t)
	slow, other := p.FollowEvents(), p.FollowEvents()
	defer slow.Close()
	defer other.Close()
	block := make(chan struct{})
	cut := make(chan error, 1)
	began := make(chan struct{}, 1)
	go func() {
		cut <- slow.Each(t.Context(), func(Event) error { began <- struct{}{}; <-block; return errors.New("too late") })
	}()
	c.pod.pods.events.emit(0, c.pod, "c")
	<-began
	<-other.queue
	for range eventQueue + 1 {
		p.events.emit(0, c.pod, "c")
		<-other.queue
	}
	select {
	case err := <-cut:
		if !errdefs.IsResourceExhausted(err) {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("the slow follower is not cut off")
	}
	close(block)
	close(p.closing)
	if err := other.Each(t.Context(), func(Event) error { return nil }); !errdefs.IsUnavailable(err) {
		t.Errorf("after Close: %v", err)
	}
}
