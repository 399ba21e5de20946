package shim

import (
	"context"
	"time"

	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

const (
	// clockEvery is how soon after the host wakes up its guests have the time. A
	// look costs nothing that an idle pod would notice.
	clockEvery = 5 * time.Second
	// clockBound is the error of a guest's clock that is not worth a message, and
	// how long one may take and still bring the time.
	clockBound = 500 * time.Millisecond
	// clockLate is by how much a look is late when the host wasn't just busy: this
	// process was frozen, and its VM probably with it.
	clockLate = 5 * time.Second
)

// hostTime is the host's time by both its clocks. While the host sleeps the wall
// clock goes on and the monotonic one, on Linux and on macOS, doesn't.
type hostTime struct {
	wall time.Time
	mono time.Duration // since some point in this process's life
}

// hostClock starts at begin.
func hostClock(begin time.Time) hostTime {
	now := time.Now()
	return hostTime{wall: now.Round(0), mono: now.Sub(begin)}
}

// clockDue reports whether a guest that had the right time at told, and was looked
// after at last, needs it again: the host slept, or was set, or stopped this process.
func clockDue(told, last, now hostTime) bool {
	step := now.wall.Sub(told.wall) - (now.mono - told.mono)
	return step.Abs() > clockBound || now.mono-last.mono > clockEvery+clockLate
}

// watchClock gives the guest the time whenever it may have lost it, until the VM is
// gone. A guest's clock stands still while its host sleeps.
func (s *Shim) watchClock(a *agent, looks <-chan time.Time, clock func() hostTime) {
	told := clock()
	last, due := told, false
	for {
		select {
		case <-looks:
		case <-s.gone:
			return
		}
		now := clock()
		due = due || clockDue(told, last, now)
		last = now
		if !due {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*a.patience)
		_, err := call(ctx, a, "set clock", a.SetClock, &guestapi.SetClockRequest{UnixNanos: now.wall.UnixNano()})
		cancel()
		last = clock()
		switch took := last.mono - now.mono; {
		case err != nil:
			klog.ErrorS(err, "The guest's clock may be wrong", "pod", s.cfg.ID)
		case took <= clockBound:
			klog.InfoS("The guest has the host's time again", "pod", s.cfg.ID, "lag", took)
			told, due = now, false
		}
		// Else the message brought the past: the next look sends another.
	}
}
