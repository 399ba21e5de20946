package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/shim"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// Two Runs of one name at once: exactly one wins, and the other learns of whom.
func TestNameIsReservedOnce(t *testing.T) {
	e := newFakeEnv(t)
	var won atomic.Int32
	var winner atomic.Value
	var losers sync.Map
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			p, err := e.pods.Run(t.Context(), podConfig("one"), "")
			switch {
			case err == nil:
				won.Add(1)
				winner.Store(p.ID())
			case errdefs.IsAlreadyExists(err):
				losers.Store(i, err.Error())
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Fatalf("%d won", won.Load())
	}
	losers.Range(func(_, v any) bool {
		if !strings.Contains(v.(string), winner.Load().(string)) {
			t.Errorf("%q doesn't name the holder %s", v, winner.Load())
		}
		return true
	})
	p, err := e.pods.Get(winner.Load().(string)[:6])
	if err != nil {
		t.Fatal(err)
	}
	c := e.create(p, "c", nil, "sleep")
	_, err = p.CreateContainer(t.Context(), e.container("c", nil, "sleep"))
	if !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), c.ID()) {
		t.Errorf("a container's name twice: %v", err)
	}
	if err := c.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	e.create(p, "c", nil, "sleep") // free again
	if err := p.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := e.pods.Get(p.ID()); !errdefs.IsNotFound(err) {
		t.Errorf("Get after Remove: %v", err)
	}
	e.run("one") // free again
}

// Whatever fails, the error names the step and nothing is left.
func TestRunUndoes(t *testing.T) {
	tests := []struct {
		name   string
		break_ func(o *Options)
		want   string
	}{
		{"network", func(o *Options) { o.Network.(*fakeNetwork).fail = errors.New("no address left") }, "network: no address left"},
		{"NIC", func(o *Options) { o.Network.(*fakeNetwork).refuse = errors.New("no such plugin") }, "NIC: no such plugin"},
		{"no address (T42)", func(o *Options) { o.Network.(*fakeNetwork).none = true }, "network: the pod got no address"},
		{"scratch", func(o *Options) {
			o.Scratch = func(string) error { return syscall.ENOSPC }
		}, "scratch disk: no space left"},
		{"guest", func(o *Options) {
			o.Guest = func(string) (Guest, error) { return Guest{}, errors.New("no kernel") }
		}, "shim: guest image: no kernel"},
		{"shim command", func(o *Options) { o.ShimCommand = []string{"/no/such/program"} }, "shim: start /no/such/program"},
		{"shim dies", func(o *Options) { o.ShimCommand = []string{"/bin/sh", "-c", "echo oh no; exit 3"} }, "oh no"},
		{"memory (T4)", func(o *Options) { o.Classes = map[string]Class{"": {MemoryBytes: 1 << 50}} }, "resource exhausted"},
		{"boot", func(o *Options) { o.ShimCommand = append(o.ShimCommand[:1:1], "no-boot-shim") }, "kernel and agent"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := newFakeEnv(t)
			e.close()
			tt.break_(&e.o)
			e.open()
			_, err := e.pods.Run(t.Context(), podConfig("p"), "")
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			e.checkNothingLeft()
		})
	}
}

// The network is made while the kernel boots.
func TestRunConnectsDuringTheBoot(t *testing.T) {
	e := newFakeEnv(t)
	var order []string
	for _, s := range e.run("p").Status().Steps {
		if !strings.HasPrefix(s.Name, "guest: ") {
			order = append(order, s.Name)
		}
	}
	want := "record, cgroup, NIC, scratch disk, shim, vm start, network, kernel and agent, sandbox set-up"
	if got := strings.Join(order, ", "); !strings.HasPrefix(got, want) {
		t.Errorf("steps %s; want %s", got, want)
	}
}

// A start whose clean-up fails, too, is cured without a restart.
func TestCleanUpFails(t *testing.T) {
	e := newFakeEnv(t)
	e.breakCNI(errors.New("CNI is broken"))
	_, err := e.pods.Run(t.Context(), podConfig("p"), "")
	pods := e.pods.List()
	if err == nil || len(pods) != 1 || !strings.Contains(err.Error(), pods[0].ID()) {
		t.Fatalf("%v, pods %v", err, pods)
	}
	e.cure("p")
}

// breakCNI lets networks neither be made nor be removed; nil mends that.
func (e *env) breakCNI(err error) {
	nw := e.o.Network.(*fakeNetwork)
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.fail, nw.down = err, err
}

// cure removes the one pod, of that name, which could not be undone while CNI was
// broken.
func (e *env) cure(name string) {
	e.t.Helper()
	p := e.pods.List()[0]
	if s := p.Status(); s.Ready || !strings.Contains(s.Reason, "CNI is broken") {
		e.t.Errorf("%+v", s)
	}
	if err := p.Remove(e.t.Context()); err == nil {
		e.t.Error("Remove succeeded while CNI was broken")
	}
	e.breakCNI(nil)
	if err := p.Remove(e.t.Context()); err != nil {
		e.t.Error(err)
	}
	e.checkNothingLeft()
	e.run(name)
}

// T10: what a daemon that starts can't undo is a pod that can be removed later,
// without another start.
func TestOpenCannotUndo(t *testing.T) {
	for _, left := range []phase{creating, removing} {
		t.Run(string(left), func(t *testing.T) {
			e := newFakeEnv(t)
			p := e.run("half")
			e.close()
			rec, err := readPodRecord(p.dir)
			if err != nil {
				t.Fatal(err)
			}
			rec.Phase, rec.Cgroups = left, nil // made, but not yet on record
			if err := rec.write(p.dir); err != nil {
				t.Fatal(err)
			}
			e.breakCNI(errors.New("CNI is broken"))
			e.open()
			if n := len(e.pods.List()); n != 1 {
				t.Fatalf("%d pods", n)
			}
			if _, err := e.pods.Run(t.Context(), podConfig("half"), ""); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), p.ID()) {
				t.Errorf("its name: %v", err)
			}
			e.cure("half")
		})
	}
}

// A pod that is removed while a container is made in it takes the container along.
func TestRemoveWhileAContainerIsMade(t *testing.T) {
	e := newFakeEnv(t)
	p := e.run("p")
	e.pods.mu.Lock() // the container's name and the pod's end wait for this
	created, removed := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := p.CreateContainer(context.Background(), e.container("c", nil, "sleep"))
		created <- err
	}()
	time.Sleep(50 * time.Millisecond) // it found the pod ready
	go func() { removed <- p.Remove(context.Background()) }()
	await(t, "the pod's files to go", 10*time.Second, func() bool {
		_, err := os.Stat(p.dir)
		return os.IsNotExist(err)
	})
	e.pods.mu.Unlock()
	if err := <-created; !errdefs.IsFailedPrecondition(err) {
		t.Errorf("CreateContainer: %v", err)
	}
	if err := <-removed; err != nil {
		t.Error(err)
	}
	e.checkNothingLeft()
}

// A caller that vanishes, which ttrpc tells nobody, leaves no container that only the
// guest knows of.
func TestCreateIsCancelled(t *testing.T) {
	e := newFakeEnv(t)
	p := e.run("p")
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := p.CreateContainer(ctx, e.container("c", nil, "made-late")); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond) // the guest has made it by now
	p.mu.Lock()
	left := p.state.GetContainers()
	p.mu.Unlock()
	if len(left) != 0 {
		t.Errorf("the shim has %v", left)
	}
	e.create(p, "c", nil, "sleep") // its name is free
}

// A container whose start is under way, and was given up by its caller, is one that
// Stop stops.
func TestStopWhileItStarts(t *testing.T) {
	e := newFakeEnv(t)
	p := e.run("p")
	c := e.create(p, "c", nil, "late")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := c.Start(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Start: %v", err)
	}
	if err := c.Stop(t.Context(), 5*time.Second); err != nil {
		t.Fatal(err)
	}
	if st := c.Status(); st.Phase != shimapi.Phase_EXITED || st.ExitCode != 7 {
		t.Errorf("after Stop: %+v", st)
	}
	// One that nobody starts is not waited for, and can be started afterwards.
	other := e.create(p, "other", nil, "sleep")
	if err := other.Stop(t.Context(), time.Minute); err != nil {
		t.Error(err)
	}
	e.start(other)
}

func (e *env) checkNothingLeft() {
	e.t.Helper()
	for _, dir := range []string{filepath.Join(e.o.Root, "pods"), e.o.Run} {
		if left, err := os.ReadDir(dir); len(left) != 0 || err != nil {
			e.t.Errorf("left in %s: %v, %v", dir, left, err)
		}
	}
	if ids, _ := e.o.Network.Pods(); len(ids) != 0 {
		e.t.Errorf("networks left: %v", ids)
	}
	if left := processesWith(e.t, e.o.Root); len(left) != 0 {
		e.t.Errorf("processes left: %q", left)
	}
	if len(e.pods.List()) != 0 || len(e.pods.names) != 0 {
		e.t.Errorf("pods left: %v, names %v", e.pods.List(), e.pods.names)
	}
}

func TestRunRefuses(t *testing.T) {
	e := newFakeEnv(t)
	for name, f := range map[string]func(*runtimeapi.PodSandboxConfig) string{
		"no name":         func(c *runtimeapi.PodSandboxConfig) string { c.Metadata.Name = ""; return "" },
		"unknown handler": func(*runtimeapi.PodSandboxConfig) string { return "kata" },
		"cgroup outside":  func(c *runtimeapi.PodSandboxConfig) string { c.Linux.CgroupParent = "/a/../../b"; return "" },
		"memory": func(c *runtimeapi.PodSandboxConfig) string {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: -1}
			return ""
		},
	} {
		cfg := podConfig("x")
		handler := f(cfg)
		if _, err := e.pods.Run(t.Context(), cfg, handler); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	e.checkNothingLeft()
}

// A caller that gives up leaves nothing behind.
func TestRunCancelled(t *testing.T) {
	e := newFakeEnv(t)
	e.close()
	e.o.ShimCommand = append(e.o.ShimCommand[:1:1], "no-boot-shim")
	e.o.Timeouts = shim.Timeouts{BootStall: shim.Duration(time.Minute)}
	e.open()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := e.pods.Run(ctx, podConfig("p"), ""); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if took := time.Since(start); took > 8*time.Second {
		t.Errorf("took %v", took)
	}
	e.checkNothingLeft()
}

// A pod that becomes ready while the daemon ends doesn't keep it from ending.
func TestCloseWhileAPodBecomesReady(t *testing.T) {
	e := newFakeEnv(t)
	e.close()
	e.o.ShimCommand = append(e.o.ShimCommand[:1:1], "slow-boot-shim")
	e.open()
	cfg := podConfig("p")
	steps, err := e.pods.WatchSteps(t.Context(), cfg.GetMetadata())
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() {
		_, err := e.pods.Run(context.Background(), cfg, "")
		ran <- err
	}()
	for s := range steps {
		if s.Name == "shim" {
			break // it boots now, for more than BootStall
		}
	}
	closed := make(chan error, 1)
	go func() { closed <- e.pods.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Close waits for a pod that it doesn't know")
	}
	if err := <-ran; err != nil {
		t.Error(err)
	}
	e.pods = nil
	e.open()
	if list := e.pods.List(); len(list) != 1 || !list[0].Status().Ready {
		t.Errorf("the next daemon has %d pods", len(list))
	}
}

// T10: a daemon that was killed half-way has its pod undone by the next one.
func TestOpenUndoesHalfMadePods(t *testing.T) {
	e := newFakeEnv(t)
	p := e.run("half")
	proc := p.rec.Shim
	e.close()
	rec, err := readPodRecord(p.dir)
	if err != nil {
		t.Fatal(err)
	}
	rec.Phase = creating
	if err := rec.write(p.dir); err != nil {
		t.Fatal(err)
	}
	// And one whose record was never written.
	bare := strings.Repeat("ab", 32)
	if err := os.MkdirAll(filepath.Join(e.o.Root, "pods", bare, shim.VolumesDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(e.o.Run, bare[:shortID]), 0o700); err != nil {
		t.Fatal(err)
	}
	e.open()
	if proc.alive() {
		t.Error("the half-made pod's shim lives")
	}
	e.checkNothingLeft()
	e.run("half")
}

// T10: many half-made pods are undone at one time; run with the race detector.
func TestOpenUndoesManyHalfMadePods(t *testing.T) {
	e := newFakeEnv(t)
	e.close()
	for i := range 32 {
		id := newID(func(string) bool { return false })
		dir := filepath.Join(e.o.Root, "pods", id)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		rec := &podRecord{ID: id, Phase: removing, config: podConfig("half-" + strconv.Itoa(i))}
		if err := rec.write(dir); err != nil {
			t.Fatal(err)
		}
	}
	e.open()
	e.checkNothingLeft()
}

func TestSecondOpenIsRefused(t *testing.T) {
	e := newFakeEnv(t)
	if _, err := Open(t.Context(), e.o); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), e.o.Root) {
		t.Errorf("%v", err)
	}
}

// Close and Open: all is as it was, also what ended in between.
func TestRestart(t *testing.T) {
	e := newFakeEnv(t)
	p := e.run("p")
	running := e.start(e.create(p, "running", nil, "sleep"))
	done := e.start(e.create(p, "done", nil, "exit", "9"))
	created := e.create(p, "created", nil, "sleep")
	await(t, "exit", 5*time.Second, exited(done))
	before := map[string]ContainerStatus{}
	for _, c := range []*Container{running, done, created} {
		before[c.ID()] = c.Status()
	}
	e.close()
	e.open()
	if got := len(e.pods.Containers()); got != 3 {
		t.Fatalf("%d containers", got)
	}
	for _, c := range e.pods.Containers() {
		got, want := c.Status(), before[c.ID()]
		got.User, want.User = nil, nil
		if got != want {
			t.Errorf("%s: %+v, before %+v", c.Config().GetMetadata().GetName(), got, want)
		}
	}
	p2 := e.pods.List()[0]
	if s := p2.Status(); !s.Ready || len(s.IPs) != 1 || s.CreatedAt != p.Status().CreatedAt || len(s.Steps) == 0 {
		t.Errorf("%+v", s)
	}
	if _, err := e.pods.Run(t.Context(), podConfig("p"), ""); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the name after a restart: %v", err)
	}
	c, err := e.pods.Container(created.ID())
	if err != nil {
		t.Fatal(err)
	}
	e.start(c)
	if out, _, code := execIn(t, c, "/app", "echo", "x"); out != "x\n" || code != 0 {
		t.Errorf("%q %d", out, code)
	}
}

// T10, T11: shim killed while there is no daemon, and a reboot, after which the
// run directory is gone, too.
func TestShimDiesWithoutDaemon(t *testing.T) {
	for _, reboot := range []bool{false, true} {
		e := newFakeEnv(t)
		p := e.run("p")
		running := e.start(e.create(p, "running", nil, "sleep"))
		done := e.start(e.create(p, "done", nil, "exit", "9"))
		await(t, "exit", 5*time.Second, exited(done))
		e.close()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if err := p.rec.Shim.kill(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
		if reboot {
			if err := os.RemoveAll(e.o.Run); err != nil {
				t.Fatal(err)
			}
		}
		e.open()
		p2 := e.pods.List()[0]
		if s := p2.Status(); s.Ready || !strings.Contains(s.Reason, "shim") {
			t.Errorf("%+v", s)
		}
		c, err := e.pods.Container(running.ID())
		if err != nil {
			t.Fatal(err)
		}
		if s := c.Status(); s.Phase != shimapi.Phase_EXITED || s.ExitCode != 255 || s.Reason != shim.ReasonSandboxGone {
			t.Errorf("%+v", s)
		}
		if d, _ := e.pods.Container(done.ID()); d.Status().ExitCode != 9 {
			t.Errorf("a real exit code was overwritten: %+v", d.Status())
		}
		if _, err := p2.CreateContainer(t.Context(), e.container("late", nil, "sleep")); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("create in a dead pod: %v", err)
		}
		if err := p2.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if err := p2.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		e.checkNothingLeft()
	}
}

// kill -9 of the shim under a running daemon: known within 2 s.
func TestShimDies(t *testing.T) {
	e := newFakeEnv(t)
	p := e.run("p")
	c := e.start(e.create(p, "c", nil, "sleep"))
	if err := syscall.Kill(p.rec.Shim.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, "NotReady and exited", 2*time.Second, func() bool { return !p.Status().Ready && exited(c)() })
	if s := c.Status(); s.ExitCode != 255 || s.Reason != shim.ReasonSandboxGone {
		t.Errorf("%+v", s)
	}
	if err := c.Stop(t.Context(), time.Second); err != nil {
		t.Error(err)
	}
	if err := c.Start(t.Context()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Start in a dead pod: %v", err)
	}
	if _, err := p.Stream(t.Context(), guestapi.Header{Kind: guestapi.Port, Port: 7}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Stream of a dead pod: %v", err)
	}
	if err := c.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// Stop and Remove from everywhere at once.
func TestStopAndRemoveConcurrently(t *testing.T) {
	e := newFakeEnv(t)
	p := e.run("p")
	c := e.start(e.create(p, "c", nil, "stubborn"))
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			var err error
			switch i % 4 {
			case 0:
				err = p.Stop(t.Context())
			case 1:
				err = p.Remove(t.Context())
			case 2:
				err = c.Stop(t.Context(), 100*time.Millisecond)
			case 3:
				err = c.Remove(t.Context())
			}
			if err != nil && !errdefs.IsFailedPrecondition(err) {
				t.Errorf("%d: %v", i%4, err)
			}
		})
	}
	wg.Wait()
	e.checkNothingLeft()
}

func TestLookUp(t *testing.T) {
	all := map[string]int{"abc": 1, "abd": 2, "x": 3}
	for _, tt := range []struct {
		id    string
		want  int
		check func(error) bool
	}{
		{"abc", 1, nil}, {"x", 3, nil}, {"abd", 2, nil},
		{"ab", 0, errdefs.IsInvalidArgument}, {"y", 0, errdefs.IsNotFound}, {"", 0, errdefs.IsInvalidArgument},
	} {
		got, err := lookUp("pod", tt.id, all)
		if got != tt.want || (err == nil) != (tt.check == nil) || err != nil && !tt.check(err) {
			t.Errorf("%q: %d, %v", tt.id, got, err)
		}
	}
}

func TestCgroupNames(t *testing.T) {
	for _, tt := range []struct{ parent, want string }{
		{"", "/cri-vz/cri-vz-x"},
		{"/kubepods/pod1", "/kubepods/pod1/cri-vz-x"},
		{"kubepods-burstable-pod1.slice", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-vz-x.scope"},
		{"/kubepods.slice/kubepods-pod1.slice", "/kubepods.slice/kubepods-pod1.slice/cri-vz-x.scope"},
	} {
		if got, err := cgroupNames("cri-vz", tt.parent, "x"); got != tt.want || err != nil {
			t.Errorf("%q: %q, %v", tt.parent, got, err)
		}
	}
	for _, bad := range []string{"../x", "/a/../b", "a\n", strings.Repeat("x", 2000)} {
		if _, err := cgroupNames("cri-vz", bad, "x"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.20q: %v", bad, err)
		}
	}
}

// T5
func TestCgroupParent(t *testing.T) {
	const mine, none = "/kubepods/pod1", ""
	for _, tt := range []struct {
		name            string
		charge          Charge
		limit, overhead int64
		want            string
	}{
		{"no limit", ChargeAuto, 0, 0, mine},
		{"a limit that the VM would outgrow", ChargeAuto, 64 * mib, 0, none},
		{"too little overhead", ChargeAuto, 64 * mib, 100 * mib, none},
		{"an overhead that pays for the VM", ChargeAuto, 64 * mib, 320 * mib, mine},
		{"pod", ChargePod, 64 * mib, 0, mine},
		{"own", ChargeOwn, 0, 0, none},
	} {
		cfg := podConfig("x")
		cfg.Linux.CgroupParent = mine
		cfg.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: tt.limit}
		cfg.Linux.Overhead = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: tt.overhead}
		if got := cgroupParent(tt.charge, cfg); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// T4
func TestSizeOf(t *testing.T) {
	limits := func(mem, quota, period int64) *runtimeapi.PodSandboxConfig {
		c := podConfig("x")
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: mem, CpuQuota: quota, CpuPeriod: period}
		return c
	}
	overhead := func(c *runtimeapi.PodSandboxConfig) *runtimeapi.PodSandboxConfig {
		c.Linux.Overhead = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 100 * mib, CpuQuota: 25000, CpuPeriod: 100000}
		return c
	}
	for _, tt := range []struct {
		name  string
		class Class
		cfg   *runtimeapi.PodSandboxConfig
		want  Size
	}{
		{"defaults", Class{}, podConfig("x"), Size{CPUs: 1, MemoryBytes: 512 * mib}},
		{"class is more", Class{CPUs: 4, MemoryBytes: 2048 * mib}, limits(100*mib, 100000, 100000), Size{CPUs: 4, MemoryBytes: 2048 * mib}},
		{"limits are more", Class{CPUs: 1, MemoryBytes: 128 * mib}, limits(1024*mib+1, 250000, 100000), Size{CPUs: 3, MemoryBytes: 1025 * mib}},
		{"no period", Class{}, limits(0, 200000, 0), Size{CPUs: 2, MemoryBytes: 512 * mib}},
		{"overhead on top of the class", Class{MemoryBytes: 512 * mib}, overhead(limits(100*mib, 0, 0)), Size{CPUs: 2, MemoryBytes: 612 * mib}},
		{"overhead on top of limits", Class{MemoryBytes: 512 * mib}, overhead(limits(1024*mib, 150000, 100000)), Size{CPUs: 2, MemoryBytes: 1124 * mib}},
	} {
		got, reserve, err := sizeOf(tt.class, 8, tt.cfg)
		if got != tt.want || reserve != 64*mib || err != nil {
			t.Errorf("%s: %+v, %d, %v, want %+v", tt.name, got, reserve, err, tt.want)
		}
	}
	huge := limits(0, 0, 0)
	huge.Linux.Resources.HugepageLimits = []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 * mib}, {PageSize: "1GB"}}
	if _, _, err := sizeOf(Class{}, 8, huge); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "hugepage_limits") { // T28
		t.Errorf("huge pages of a class that has none: %v", err)
	}
	if got, _, err := sizeOf(Class{HugepageBytes: 4 * mib}, 8, huge); got.HugepageBytes != 4*mib || err != nil {
		t.Errorf("huge pages: %+v, %v", got, err)
	}
	if _, _, err := sizeOf(Class{HugepageBytes: 2 * mib}, 8, huge); !errdefs.IsResourceExhausted(err) {
		t.Errorf("more huge pages than the class has: %v", err)
	}
	if got := (Size{HugepageBytes: 4 * mib}).cmdline(); got != " default_hugepagesz=2M hugepagesz=2M hugepages=2" {
		t.Errorf("command line %q", got)
	}
	if _, _, err := sizeOf(Class{}, 8, limits(1<<50, 0, 0)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a petabyte: %v", err)
	}
	if got, _, err := sizeOf(Class{}, 8, limits(0, 1<<40, 1000)); got.CPUs != 8 || err != nil {
		t.Errorf("a billion CPUs: %+v, %v", got, err)
	}
}

// T13
func TestProcess(t *testing.T) {
	start, _, err := startTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if !(process{PID: os.Getpid(), Start: start}).alive() {
		t.Error("this process is dead")
	}
	if (process{PID: os.Getpid(), Start: start + 1}).alive() || (process{}).alive() {
		t.Error("somebody else's pid counts as alive")
	}
	// A zombie answers kill -0.
	cmd := exec.Command("/bin/true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait() //nolint:errcheck // what it ended with is not the point
	var zombie bool
	await(t, "the end of a child", 5*time.Second, func() bool {
		start, zombie, err = startTime(cmd.Process.Pid)
		return zombie || err != nil
	})
	if err != nil || syscall.Kill(cmd.Process.Pid, 0) != nil {
		t.Fatalf("no zombie: %v", err)
	}
	if (process{PID: cmd.Process.Pid, Start: start}).alive() {
		t.Error("a zombie counts as alive")
	}
}

// T7: a VM boots when fewer others do than Options.Boots says. Who waits for its turn
// has that among its steps, and can give up.
func TestBootsAtOnceAreLimited(t *testing.T) {
	e := newFakeEnv(t)
	if got := cap(e.pods.boots); got != e.o.Boots {
		t.Fatalf("%d VMs may boot at one time, want %d", got, e.o.Boots)
	}
	for range e.o.Boots {
		e.pods.boots <- struct{}{} // others
	}
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() {
		_, err := e.pods.Run(ctx, podConfig("impatient"), "")
		failed <- err
	}()
	type result struct {
		pod *Pod
		err error
	}
	ran := make(chan result, 1)
	go func() {
		p, err := e.pods.Run(t.Context(), podConfig("patient"), "")
		ran <- result{p, err}
	}()
	// Both shims are there; neither VM is.
	await(t, "two shims", 20*time.Second, func() bool {
		sockets, _ := filepath.Glob(filepath.Join(e.o.Run, "*", shimapi.SocketControl))
		return len(sockets) == 2
	})
	time.Sleep(500 * time.Millisecond)
	cancel()
	if err := <-failed; err == nil || !strings.Contains(err.Error(), "for other boots to end") {
		t.Errorf("who gave up: %v", err)
	}
	select {
	case r := <-ran:
		t.Fatalf("it did not wait for its turn: %v", r.err)
	default:
	}
	<-e.pods.boots // one of the others is done
	r := <-ran
	if r.err != nil {
		t.Fatal(r.err)
	}
	if !slices.ContainsFunc(r.pod.Status().Steps, func(s Step) bool { return s.Name == "wait for other boots" && s.Nanos > 0 }) {
		t.Errorf("steps %v", r.pod.Status().Steps)
	}
	if got := len(e.pods.boots); got != e.o.Boots-1 {
		t.Errorf("%d of %d boots are under way after the last one", got, e.o.Boots)
	}
}

// T12: what ends a pod's network has a bound, also where its caller has none.
func TestTearDownIsBounded(t *testing.T) {
	e := newFakeEnv(t)
	p := e.run("p")
	if err := p.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	nw := e.o.Network.(*fakeNetwork)
	nw.mu.Lock()
	defer nw.mu.Unlock()
	if nw.bound <= 0 || nw.bound > tearDown {
		t.Errorf("the network had %v to be torn down, want %v at most", nw.bound, tearDown)
	}
}

// T10: a record of another schema is told by its number, and a later build's fields
// within a schema are passed over.
func TestRecordsOfOtherBuilds(t *testing.T) {
	const fields = `"id":"a","phase":"ready","config":{"metadata":{"name":"x"},"fieldOfALaterBuild":1},"fieldOfALaterBuild":1}`
	if _, err := parsePodRecord([]byte(fmt.Sprintf(`{"schema":%d,%s`, recordSchema, fields))); err != nil {
		t.Error(err)
	}
	for _, schema := range []int{0, recordSchema + 1} {
		_, err := parsePodRecord([]byte(fmt.Sprintf(`{"schema":%d,%s`, schema, fields)))
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), fmt.Sprintf("schema %d, this build knows %d", schema, recordSchema)) {
			t.Errorf("schema %d: %v", schema, err)
		}
	}
}

// shimOfVersion is a shim that says which version of the API it speaks.
type shimOfVersion struct {
	shimapi.ShimService
	version uint32
}

func (s shimOfVersion) Hello(context.Context, *shimapi.HelloRequest) (*shimapi.HelloResponse, error) {
	return &shimapi.HelloResponse{Version: s.version}, nil
}

func (s shimOfVersion) Watch(ctx context.Context, _ *shimapi.WatchRequest, stream shimapi.Shim_WatchServer) error {
	err := stream.Send(&shimapi.PodState{Vm: shimapi.VM_READY})
	<-ctx.Done()
	return err
}

// T10: a daemon talks to its own build's shims and to those of the one before, and to
// no others.
func TestShimsOfOtherBuilds(t *testing.T) {
	for _, tt := range []struct {
		version uint32
		ok      bool
	}{{shimapi.Version, true}, {shimapi.Version - 1, true}, {shimapi.Version + 1, false}, {shimapi.Version + 2, false}} {
		run := shortTemp(t)
		l, err := net.Listen("unix", filepath.Join(run, shimapi.SocketControl))
		if err != nil {
			t.Fatal(err)
		}
		server, err := ttrpc.NewServer()
		if err != nil {
			t.Fatal(err)
		}
		shimapi.RegisterShimService(server, shimOfVersion{version: tt.version})
		done := make(chan error, 1)
		go func() { done <- server.Serve(context.Background(), l) }()
		c, state, err := connect(t.Context(), run)
		if err == nil {
			c.close()
		}
		if tt.ok && (err != nil || state.GetVm() != shimapi.VM_READY) || !tt.ok && (!errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), fmt.Sprint("version ", tt.version))) {
			t.Errorf("a shim of version %d: %v, %v", tt.version, state, err)
		}
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		<-done
	}
}

func FuzzPodRecord(f *testing.F) {
	f.Add([]byte(`{"schema":1,"id":"a","phase":"ready","config":{"metadata":{"name":"x"}},"shim":{"pid":1,"start":2}}`))
	f.Add([]byte(`{"schema":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := parsePodRecord(b); err == nil && r.config.GetMetadata() == nil {
			t.Fatal("no metadata")
		}
	})
}

func FuzzContainerRecord(f *testing.F) {
	f.Add([]byte(`{"schema":1,"id":"a","config":{"metadata":{"name":"x"}}}`))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = parseContainerRecord(b) })
}
