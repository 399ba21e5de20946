//go:build linux

package e2e_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A host that sleeps takes its shims and VMs along, and the clocks of the guests stand
// still. Here only the shim stops, and the guest's clock is put back by a container.
func TestClockAfterSleep(t *testing.T) {
	p := newPod(t, podConfig(suite.node, "sleeper"))
	id := p.start(t, "clock", asRoot, privileged, command("/bin/sleep", "infinity"))
	behind := func(args ...string) time.Duration {
		t.Helper()
		out := p.output(t, id, append([]string{"/app/web", "clock"}, args...)...)
		nanos, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return time.Since(time.Unix(0, nanos))
	}
	if got := behind(); got.Abs() > 10*time.Second {
		t.Errorf("the clock of a new pod is %v behind", got)
	}
	if got := behind("-1h"); got < time.Hour-10*time.Second {
		t.Fatalf("the clock is %v behind after it was put back by an hour", got)
	}
	shim, err := shimOf(p.id)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(shim.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(16 * time.Second)
	if err := unix.Kill(shim.PID, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "the guest to have the time", func() error {
		if got := behind(); got.Abs() > 10*time.Second {
			return fmt.Errorf("its clock is %v behind", got)
		}
		return nil
	})
}
