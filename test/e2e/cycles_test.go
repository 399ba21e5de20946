//go:build linux

package e2e_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// make test-long takes 200 (T46).
var (
	cycles   = flag.Int("cycles", 4, "how many pods TestPodCycles runs and removes")
	restarts = flag.Int("restarts", 10, "how often TestRestartsOfAContainer starts it anew")
)

// The daemon holds nothing of a pod that is gone: goroutines, descriptors and
// memory are flat however many there were.
func TestPodCycles(t *testing.T) {
	cycle := func(t *testing.T, name string) {
		p, err := suite.node.runPod(t.Context(), podConfig(suite.node, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.remove(t) })
		id := p.start(t, name, asRoot, command("/bin/tcp-echo", "7000"))
		waitForLog(t, p.container(t, id).GetLogPath(), "listening")
		if got := p.output(t, id, "/bin/echo", name); got != name+"\n" {
			t.Errorf("exec: %q", got)
		}
		c, err := p.cri.Forward(t).Dial(7000)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.Exchange([]byte(name)); err != nil || string(got) != name {
			t.Errorf("forward: %q, %v", got, err)
		}
	}
	// Two at a time, as long as there is work. No name comes twice: its log would tell
	// that the former server listens.
	run := func(round string, n int) {
		var last atomic.Int64
		t.Run("pods", func(t *testing.T) { // ends with its parallel parts
			for w := range 2 {
				t.Run(fmt.Sprint(w), func(t *testing.T) {
					t.Parallel()
					for i := last.Add(1); i <= int64(n); i = last.Add(1) {
						t.Run(fmt.Sprint(i), func(t *testing.T) { cycle(t, fmt.Sprintf("cycle-%s-%d", round, i)) })
					}
				})
			}
		})
	}
	before := suite.node.footprint(t, func() { run("before", 2) })
	after := suite.node.footprint(t, func() { run("after", *cycles) })
	t.Logf("after 2 pods: %+v; after %d more, of a daemon started anew: %+v", before, *cycles, after)
	// Room for what the runtime of Go keeps: idle descriptors of epoll, a worker of
	// a timer.
	if after.goroutines > before.goroutines+5 || after.descriptors > before.descriptors+5 {
		t.Errorf("after 2 pods %+v, after %d more %+v", before, *cycles, after)
	}
}

// T38: however often a container of a pod is started anew, the pod holds no more of it:
// not its files in virtiofsd and the shim, not its mounts, not its layers' loop
// devices.
func TestRestartsOfAContainer(t *testing.T) {
	p := sharedPodOf(t)
	dir := filepath.Join(suite.base, "restarted")
	if err := os.Mkdir(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	restart := func(n int) {
		t.Helper()
		for i := range n {
			id := p.create(t, "restarted", asRoot, command("/bin/write", fmt.Sprintf("/data/%d", i), "x"),
				mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/data"}), mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/ro", Readonly: true}))
			p.startContainer(t, id)
			if st := p.waitExit(t, id, 30*time.Second); st.GetExitCode() != 0 {
				t.Fatalf("restart %d: %v", i, st)
			}
			p.removeContainer(t, id)
		}
	}
	held := func() map[string]int {
		t.Helper()
		shim, err := shimOf(p.id)
		if err != nil {
			t.Fatal(err)
		}
		n := map[string]int{"loop devices": strings.Count(p.output(t, p.idle, "/bin/ls", "/sys/block"), "loop")}
		for _, q := range append(descendants(shim.PID), shim) {
			if q.State == 'Z' {
				continue
			}
			dir := filepath.Join("/proc", strconv.Itoa(q.PID))
			fds, err := os.ReadDir(filepath.Join(dir, "fd"))
			mounts, merr := os.ReadFile(filepath.Join(dir, "mountinfo"))
			if err := errors.Join(err, merr); err != nil {
				t.Fatal(err)
			}
			n["descriptors of "+q.Name] += len(fds)
			n["mounts of "+q.Name] += strings.Count(string(mounts), "\n")
		}
		return n
	}
	restart(4)
	before := held()
	restart(*restarts)
	// A stream's last descriptor may be there for a moment.
	eventually(t, 10*time.Second, "the pod to hold what it did", func() error {
		after := held()
		for what, n := range after {
			if n > before[what]+2 {
				return fmt.Errorf("%d %s after %d restarts, %d before", n, what, *restarts, before[what])
			}
		}
		t.Logf("before %v, after %v", before, after)
		return nil
	})
}

// footprint is what a daemon holds.
type footprint struct {
	goroutines, descriptors, threads int
	pss                              int // KiB
}

// footprint starts the daemon anew, calls work, and returns what the daemon then
// holds; to say how many goroutines there are, the daemon is killed and started
// anew once more.
func (n *node) footprint(t *testing.T, work func()) (f footprint) {
	t.Helper()
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	work()
	// Connections of clients end a little later than the calls.
	time.Sleep(time.Second)
	dir := filepath.Join("/proc", strconv.Itoa(n.daemon.PID()))
	for what, count := range map[string]*int{"fd": &f.descriptors, "task": &f.threads} {
		entries, err := os.ReadDir(filepath.Join(dir, what))
		if err != nil {
			t.Fatal(err)
		}
		*count = len(entries)
	}
	smaps, err := os.ReadFile(filepath.Join(dir, "smaps_rollup"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(smaps)) {
		if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
			f.pss, _ = strconv.Atoi(strings.Fields(rest)[0])
		}
	}
	info, err := os.Stat(n.log)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(n.daemon.PID(), syscall.SIGQUIT); err != nil { // Go prints all stacks and exits
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "the end of the daemon", func() error {
		if !n.daemon.Ended() {
			return fmt.Errorf("it runs")
		}
		return nil
	})
	stacks, err := n.daemon.LogSince(info.Size())
	if err != nil {
		t.Fatal(err)
	}
	f.goroutines = strings.Count(stacks, "\ngoroutine ")
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	return f
}
