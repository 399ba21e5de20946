//go:build linux && (amd64 || arm64)

package agent

import (
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestReaper: of 400 children that end at once, in 8 goroutines, no status is
// lost or given to another (T22: 24 of 200 were with os/exec beside a reaper).
func TestReaper(t *testing.T) {
	r := testReaper()
	type end struct{ want, got int }
	ends := make(chan end, 400)
	var all sync.WaitGroup
	for g := range 8 {
		all.Go(func() {
			for i := range 50 {
				want := (g*50 + i) % 256
				script := "exit " + string(rune('0'+want/100)) + string(rune('0'+want/10%10)) + string(rune('0'+want%10))
				_, err := r.start(func() (int, error) {
					return syscall.ForkExec(busybox, []string{"sh", "-c", script}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
				}, func(ws unix.WaitStatus, _ time.Time) { ends <- end{want, int(exitCode(ws))} })
				if err != nil {
					t.Error(err)
					ends <- end{}
				}
			}
		})
	}
	all.Wait()
	for i := range 400 {
		select {
		case e := <-ends:
			if e.want != e.got {
				t.Errorf("exit code %d, want %d", e.got, e.want)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("only %d of 400 ends were told within 20s", i)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.waiting) != 0 {
		t.Errorf("%d are still waited for", len(r.waiting))
	}
}

func TestExitCode(t *testing.T) {
	for _, c := range []struct {
		ws   unix.WaitStatus
		want int32
	}{{0, 0}, {7 << 8, 7}, {9, 137}, {15, 143}, {11 | 0x80, 139}} {
		if got := exitCode(c.ws); got != c.want {
			t.Errorf("status %#x: %d, want %d", c.ws, got, c.want)
		}
	}
}
