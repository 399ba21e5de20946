package imageservice

import (
	"sync"
	"sync/atomic"
	"time"
)

// meter reports progress from one goroutine.
type meter struct {
	report func(Progress)
	bytes  atomic.Int64
	layers atomic.Int64

	mu   sync.Mutex
	base Progress
	// flights that this operation waits for, perhaps begun by another.
	flights map[*flight]bool

	quit chan struct{}
	wg   sync.WaitGroup
	once sync.Once
}

// progressInterval is slow enough for a log and fast enough for a terminal.
const progressInterval = 200 * time.Millisecond

func newMeter(report func(Progress), base Progress) *meter {
	m := &meter{report: report, base: base, quit: make(chan struct{})}
	if report == nil {
		return m
	}
	m.wg.Go(func() {
		tick := time.NewTicker(progressInterval)
		defer tick.Stop()
		for {
			report(m.now())
			select {
			case <-tick.C:
			case <-m.quit:
				return
			}
		}
	})
	return m
}

func (m *meter) now() Progress {
	m.mu.Lock()
	p := m.base
	p.Bytes, p.Layers = m.bytes.Load(), int(m.layers.Load())
	for f := range m.flights {
		p.Bytes += f.done.Load()
	}
	m.mu.Unlock()
	if p.Total > 0 {
		p.Bytes = min(p.Bytes, p.Total)
	}
	return p
}

func (m *meter) add(n int64) { m.bytes.Add(n) }
func (m *meter) layerDone()  { m.layers.Add(1) }

func (m *meter) addLayers(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.base.LayersTotal += n
}

func (m *meter) follow(f *flight) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.flights == nil {
		m.flights = map[*flight]bool{}
	}
	m.flights[f] = true
}

func (m *meter) unfollow(f *flight) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.flights, f)
}

func (m *meter) expect(stage string, total int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.base.Stage, m.base.Total = stage, total
}

// stop ends the reports; it may be called twice.
func (m *meter) stop() {
	m.once.Do(func() { close(m.quit) })
	m.wg.Wait()
}

// done ends the reports with a last one.
func (m *meter) done() {
	m.stop()
	if m.report != nil {
		p := m.now()
		p.Stage = StageDone
		p.Bytes, p.Layers = p.Total, p.LayersTotal
		m.report(p)
	}
}
