package imageservice

import (
	"context"
	"sync"
	"sync/atomic"
)

// flightGroup runs one piece of work per key however many callers want it. The
// work has a context of its own, which ends when the last caller has gone.
//
// A flight never outlives its callers: the last one waits for it.
type flightGroup struct {
	mu sync.Mutex
	m  map[object]*flight
}

type flight struct {
	// done counts bytes, for progress reports.
	done    atomic.Int64
	waiters int // guarded by the group's mu
	cancel  context.CancelFunc
	ended   chan struct{}
	err     error // after ended
}

// do runs work for key, or joins the run that is under way and, should that one
// fail, tries work itself: the other caller's registry or credentials need not
// be this one's. started is told of each flight before it is waited for.
func (g *flightGroup) do(ctx, base context.Context, key object, started func(*flight), work func(context.Context, *flight) error) error {
	for {
		g.mu.Lock()
		f, joined := g.m[key]
		if !joined {
			fctx, cancel := context.WithCancel(base)
			f = &flight{cancel: cancel, ended: make(chan struct{})}
			if g.m == nil {
				g.m = map[object]*flight{}
			}
			g.m[key] = f
			go func() {
				f.err = work(fctx, f)
				cancel()
				g.forget(key, f)
				close(f.ended)
			}()
		}
		f.waiters++
		g.mu.Unlock()
		if started != nil {
			started(f)
		}
		select {
		case <-f.ended:
			g.leave(key, f)
			if f.err != nil && joined && ctx.Err() == nil {
				continue
			}
			return f.err
		case <-ctx.Done():
			if g.leave(key, f) {
				// The work was ours alone: see it end, so that nothing of it
				// remains when we return.
				<-f.ended
			}
			return ctx.Err()
		}
	}
}

// leave drops a waiter; the last one cancels the work and takes it off the map,
// so that a caller who comes now starts afresh.
func (g *flightGroup) leave(key object, f *flight) (last bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f.waiters--
	if f.waiters > 0 {
		return false
	}
	if g.m[key] == f {
		delete(g.m, key)
	}
	f.cancel()
	return true
}

func (g *flightGroup) forget(key object, f *flight) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.m[key] == f {
		delete(g.m, key)
	}
}
