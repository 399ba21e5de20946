package command

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/term"
)

// progress shows on a terminal what takes longer than a moment: one line,
// rewritten. Anything but a terminal gets nothing.
type progress struct {
	w   io.Writer
	tty bool

	mu    sync.Mutex
	start time.Time
	shown time.Time
	wrote bool
}

func newProgress(w io.Writer) *progress {
	f, ok := w.(*os.File)
	return &progress{w: w, tty: ok && term.IsTerminal(int(f.Fd())), start: time.Now()}
}

func (p *progress) update(what string, done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if !p.tty || now.Sub(p.start) < 300*time.Millisecond || now.Sub(p.shown) < 100*time.Millisecond {
		return
	}
	p.shown, p.wrote = now, true
	line := printable(what)
	switch {
	case total > 0:
		line += fmt.Sprintf("  %s of %s", humanBytes(done), humanBytes(total))
	case done > 0:
		line += "  " + humanBytes(done)
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s", line)
}

// follow shows what is being done, and for how long, until stop is called.
func (p *progress) follow(what string) (stop func()) {
	quit := make(chan struct{})
	var wg sync.WaitGroup
	if p.tty {
		began := time.Now()
		wg.Go(func() {
			tick := time.NewTicker(200 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
					p.update(fmt.Sprintf("  … %s  %d s", what, int(time.Since(began).Seconds())), 0, 0)
				case <-quit:
					return
				}
			}
		})
	}
	return sync.OnceFunc(func() {
		close(quit)
		wg.Wait()
		p.done()
	})
}

// above writes a line that stays.
func (p *progress) above(write func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wipe()
	write()
}

// done wipes the line.
func (p *progress) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wipe()
	p.tty = false
}

// wipe is called with mu held.
func (p *progress) wipe() {
	if p.wrote {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.wrote = false
	}
}

func humanBytes(n int64) string {
	const unit = 1000
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/unit, 0
	for f >= unit && i < 4 {
		f, i = f/unit, i+1
	}
	return fmt.Sprintf("%.1f %cB", f, "kMGTP"[i])
}
