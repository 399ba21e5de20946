package sandbox

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// progress is how far a pod's start has come, for those who watch it.
type progress struct {
	mu       sync.Mutex
	steps    []Step
	shim     int // of the shim's steps, how many are in steps
	watchers int
	running  bool          // a Run owns it
	changed  chan struct{} // closed and replaced with every change
}

func newProgress() *progress { return &progress{changed: make(chan struct{})} }

func (p *progress) add(s Step) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.append(s)
}

// append is add with mu held.
func (p *progress) append(s Step) {
	p.steps = append(p.steps, s)
	close(p.changed)
	p.changed = make(chan struct{})
}

// addShim takes over the steps of the shim that are new.
func (p *progress) addShim(steps []*guestapi.Step) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ; p.shim < len(steps); p.shim++ {
		p.append(Step{Name: steps[p.shim].GetName(), Nanos: steps[p.shim].GetNanos()})
	}
}

func (p *progress) snapshot() []Step {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.steps)
}

// follow sends the steps to ch until the last, or ctx ends.
func (p *progress) follow(ctx context.Context, ch chan<- Step) {
	sent := 0
	for {
		p.mu.Lock()
		steps, changed := p.steps[sent:len(p.steps):len(p.steps)], p.changed
		p.mu.Unlock()
		for _, s := range steps {
			select {
			case ch <- s:
			case <-ctx.Done():
				return
			}
			if s.Last {
				return
			}
			sent++
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// undo is the inverse of a step.
type undo struct {
	name string
	f    func(context.Context) error
}

// starter runs the steps of a start and remembers their inverses.
type starter struct {
	pod      string
	progress *progress
	undos    []undo
}

// step does one named part of a start. inverse may be nil; it is run, too, when
// do itself fails, so that it must cope with half of do done.
func (s *starter) step(ctx context.Context, name string, do, inverse func(context.Context) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if inverse != nil {
		s.undos = append(s.undos, undo{name, inverse})
	}
	start := time.Now()
	if err := do(ctx); err != nil {
		// The failing step is the one whose name the error carries; a shim's
		// error names the shim's own step.
		if strings.HasPrefix(err.Error(), name+": ") {
			return err
		}
		return fmt.Errorf("%s: %w", name, err)
	}
	s.progress.add(Step{Name: name, Nanos: int64(time.Since(start))})
	klog.V(2).InfoS("Start-up step done", "pod", s.pod, "step", name, "duration", time.Since(start))
	return nil
}

// undoAll runs the inverses, the last step's first, whatever became of ctx, and
// returns what could not be undone.
func (s *starter) undoAll(ctx context.Context) []error {
	var errs []error
	for i, u := range slices.Backward(s.undos) {
		if i == 0 && len(errs) > 0 {
			// The first step is the record, which says what there is to undo: it
			// stays as long as anything does.
			break
		}
		uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		if err := u.f(uctx); err != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", u.name, err))
			klog.ErrorS(err, "Undoing a start-up step failed", "pod", s.pod, "step", u.name)
		}
		cancel()
	}
	s.undos = nil
	return errs
}
