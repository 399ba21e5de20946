//go:build linux && (amd64 || arm64)

package agent

import (
	"testing"
	"testing/synctest"
	"time"
)

// The rest of the boot waits for the sandbox's set-up, unless nobody asks for that
// or somebody, be it the set-up itself, needs the boot.
func TestRestOfTheBootWaitsForSetUp(t *testing.T) {
	for _, test := range []struct {
		name string
		act  func(*Agent)
		want time.Duration
	}{
		{"nobody asks", func(*Agent) {}, setUpFirst},
		{"set up", func(a *Agent) {
			close(a.setUpBegun)
			time.Sleep(time.Second)
			close(a.setUpEnded)
			time.Sleep(10 * time.Millisecond)
			a.sent()
			a.sent()
		}, time.Second + 10*time.Millisecond},
		{"set up for a host that has hung up", func(a *Agent) {
			close(a.setUpBegun)
			close(a.setUpEnded)
		}, answerWithin},
		{"set-up needs the boot", func(a *Agent) {
			close(a.setUpBegun)
			time.Sleep(10 * time.Millisecond)
			a.wantBooted()
			a.wantBooted()
		}, 10 * time.Millisecond},
		{"no set-up, and the boot is needed", func(a *Agent) { a.wantBooted() }, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAgent(guestPaths, nil)
				go test.act(a)
				start := time.Now()
				if err := awaitSetUp(&bootState{Agent: a}); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(start); took != test.want {
					t.Errorf("it took %v, want %v", took, test.want)
				}
			})
		})
	}
}
