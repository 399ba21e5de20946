package qemu

import (
	"fmt"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest"
)

// T7: the clock of a guest that is booted while the host is busy keeps the host's time.
// Without what its kernel is told, one in seven ran 20 to 50 times too fast.
func TestGuestClockOfABusyHost(t *testing.T) {
	stop := keepBusy(t, 2*runtime.NumCPU())
	m := vmmtest.Boot(t, mustNew(t, Options{Accel: AccelTCG}), guestFor(t, "amd64"))
	guest := vmmtest.Await(t, m)
	stop()

	cmdline := guest.Do(t, "read /proc/cmdline")
	if !slices.Contains(strings.Fields(cmdline), "crivz.emulated") {
		t.Errorf("the agent isn't told that the guest is emulated: %q", cmdline)
	}
	told := regexp.MustCompile(`tsc_early_khz=([0-9]+)`).FindStringSubmatch(cmdline)
	if told == nil {
		t.Fatal("the kernel isn't told how fast the host's counter is")
	}
	first := readTSC()
	clock := func() time.Time {
		nanos, err := strconv.ParseInt(guest.Do(t, "clock"), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return time.Unix(0, nanos)
	}
	host, before := time.Now(), clock()
	time.Sleep(time.Second)
	here, there := time.Since(host), clock().Sub(before)
	if rate := there.Seconds() / here.Seconds(); rate < 0.9 || rate > 1.1 {
		t.Errorf("the guest's clock went on by %v in %v", there, here)
	}
	last := readTSC()
	khz := float64(last.tsc-first.tsc) / float64(last.at.Sub(first.at)) * 1e6
	if n, err := strconv.ParseFloat(told[1], 64); err != nil || n < 0.999*khz || n > 1.001*khz {
		t.Errorf("the kernel is told %s kHz, %.0f were measured in a second", told[1], khz)
	}
}

// keepBusy has n processes want all processor time until stop is called.
func keepBusy(t *testing.T, n int) (stop func()) {
	t.Helper()
	var all []*exec.Cmd
	stop = func() {
		for _, c := range all {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
		all = nil
	}
	t.Cleanup(stop)
	runtime.LockOSThread() // Pdeathsig is about the thread
	for i := range n {
		c := exec.Command("/bin/sh", "-c", "while :; do :; done")
		c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := c.Start(); err != nil {
			t.Fatal(fmt.Errorf("process %d: %w", i, err))
		}
		all = append(all, c)
	}
	return stop
}
