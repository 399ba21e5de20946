package shim

import (
	"testing"
	"time"

	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/shim/shimtest"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

func TestClockDue(t *testing.T) {
	begin := hostTime{wall: time.Unix(1_700_000_000, 0), mono: time.Hour}
	after := func(h hostTime, wall, mono time.Duration) hostTime {
		return hostTime{wall: h.wall.Add(wall), mono: h.mono + mono}
	}
	slow := begin
	for range 100 {
		slow = after(slow, clockEvery+10*time.Millisecond, clockEvery)
	}
	for _, tt := range []struct {
		name            string
		told, last, now hostTime
		want            bool
	}{
		{"nothing happened", begin, begin, after(begin, clockEvery, clockEvery), false},
		{"a busy host is late", begin, begin, after(begin, 9*time.Second, 9*time.Second), false},
		{"the host slept for an hour", begin, begin, after(begin, time.Hour+clockEvery, clockEvery), true},
		{"the host slept for a second", begin, begin, after(begin, time.Second+clockEvery, clockEvery), true},
		{"the clock was set back", begin, begin, after(begin, clockEvery-time.Minute, clockEvery), true},
		{"the clock was adjusted a little", begin, begin, after(begin, clockEvery+100*time.Millisecond, clockEvery), false},
		{"the shim was frozen", begin, begin, after(begin, time.Minute, time.Minute), true},
		{"small steps add up", begin, after(slow, -clockEvery, -clockEvery), slow, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := clockDue(tt.told, tt.last, tt.now); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
	now := hostClock(time.Now().Add(-time.Minute))
	if (now.mono-time.Minute).Abs() > 10*time.Second || time.Since(now.wall).Abs() > 10*time.Second {
		t.Errorf("the host's time is %+v", now)
	}
}

// A guest gets the time once after each sleep, and again as long as it doesn't come
// through.
func TestWatchClock(t *testing.T) {
	d := &shimtest.Driver{}
	vm, err := d.New(t.Context(), vmm.Config{})
	if err != nil {
		t.Fatal(err)
	}
	m := vm.(*shimtest.Machine)
	a := agentOf(t, m, time.Second)

	s := &Shim{gone: make(chan struct{}), changed: make(chan struct{}), vm: shimapi.VM_READY}
	now := hostTime{wall: time.Unix(1_700_000_000, 0)}
	var slow time.Duration // what the next answer takes
	asked := make(chan hostTime)
	clock := func() hostTime { return <-asked }
	looks := make(chan time.Time)
	done := make(chan struct{})
	go func() { s.watchClock(a, looks, clock); close(done) }()
	asked <- now
	// look has the host's clocks go on by so much until the next look.
	look := func(wall, mono time.Duration) {
		now.wall, now.mono = now.wall.Add(wall), now.mono+mono
		looks <- time.Time{}
		asked <- now
	}
	answered := func() { now.wall, now.mono = now.wall.Add(slow), now.mono+slow; asked <- now }

	look(clockEvery, clockEvery)
	look(clockEvery, clockEvery)
	if got := m.Clock.Load(); got != 0 {
		t.Errorf("the clock was set to %d for no reason", got)
	}
	look(time.Hour, clockEvery)
	slept := now.wall.UnixNano()
	slow = 2 * clockBound
	answered()
	if got := m.Clock.Load(); got != slept {
		t.Errorf("after a sleep the clock is %d, want %d", got, slept)
	}
	// That was late, so it is not enough.
	slow = 0
	look(clockEvery, clockEvery)
	again := now.wall.UnixNano()
	answered()
	if got := m.Clock.Load(); got != again {
		t.Errorf("after a late answer the clock is %d, want %d", got, again)
	}
	m.Clock.Store(0)
	look(clockEvery, clockEvery)
	look(clockEvery, clockEvery)
	if got := m.Clock.Load(); got != 0 {
		t.Errorf("the clock was set to %d once more", got)
	}
	close(s.gone)
	<-done
}
