package sandbox

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cri-vz/cri-vz/sandbox/shim"
)

// A pod that does nothing gives the host what it holds in caches, and has all of its
// memory when it wants it.
func TestIdlePodGivesMemoryBack(t *testing.T) {
	e := newVMEnv(t)
	testIdlePod(t, e)
}

// testIdlePod needs an environment without pods.
func testIdlePod(t *testing.T, e *env) {
	e.close()
	e.o.Classes = map[string]Class{"": {MemoryBytes: 384 << 20}}
	e.o.Timeouts.Idle = shim.Duration(4 * time.Second)
	e.open()
	p := e.run("idle")
	c := e.start(e.create(p, "cache", nil, "cache", "160"))
	await(t, "the file to be written", 60*time.Second, func() bool {
		b, _ := os.ReadFile(c.Status().LogPath)
		return strings.Contains(string(b), "cached")
	})
	peak := vmMemory(t, p)
	if peak < 200 {
		t.Fatalf("the VMM holds %d MiB: nothing to see", peak)
	}
	var now int
	defer func() { t.Logf("the VMM held %d MiB, and %d MiB after the pod was idle", peak, now) }()
	await(t, fmt.Sprintf("100 of %d MiB to come back", peak), 60*time.Second, func() bool {
		now = vmMemory(t, p)
		return now <= peak-100
	})
	// More than what the VM may hold now, and than a balloon would have left.
	if out, errOut, code := execIn(t, c, "/app", "use", "220"); code != 0 || out != "used\n" {
		t.Errorf("a process that uses 220 MiB after that: %q %q %d", out, errOut, code)
	}
}

// vmMemory is the resident memory of a pod's QEMU in MiB.
func vmMemory(t *testing.T, p *Pod) (mib int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", childOf(t, p.rec.Shim.PID, "qemu-system")))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "Rss:"); ok {
			_, _ = fmt.Sscan(rest, &mib)
		}
	}
	return mib >> 10
}
