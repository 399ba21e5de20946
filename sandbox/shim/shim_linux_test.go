package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/shim/shimtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// agentOf starts m and calls its agent, until the test ends.
func agentOf(t *testing.T, m *shimtest.Machine, patience time.Duration) *agent {
	t.Helper()
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Die(nil); m.WaitTasks() })
	conn, err := m.Dial(t.Context(), guestapi.PortControl)
	if err != nil {
		t.Fatal(err)
	}
	a := newAgent(conn, patience, func(string) {})
	t.Cleanup(a.close)
	return a
}

// rig is a shim that serves in this process, and a client of it.
type rig struct {
	t      *testing.T
	cfg    Config
	driver *shimtest.Driver
	conn   *ttrpc.Client
	shimapi.ShimClient
	served chan error
	cancel context.CancelFunc
}

func newRig(t *testing.T, d *shimtest.Driver, timeouts Timeouts, change ...func(*Config)) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "cvzshim")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := Config{
		ID: "pod1", PodDir: filepath.Join(dir, "pod"), RunDir: filepath.Join(dir, "run"),
		Kernel: "/k", Initrd: "/i", CPUs: 1, MemoryBytes: 1 << 20, Timeouts: timeouts,
	}
	for _, f := range change {
		f(&c)
	}
	for _, d := range []string{c.RunDir, filepath.Join(c.PodDir, VolumesDir), filepath.Join(c.PodDir, ContainersDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &rig{t: t, cfg: c, driver: d, served: make(chan error, 1), cancel: cancel}
	go func() { r.served <- Serve(ctx, c, d, nil) }()
	var conn net.Conn
	for range 500 {
		if conn, err = net.Dial("unix", filepath.Join(c.RunDir, shimapi.SocketControl)); err == nil {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	r.conn = ttrpc.NewClient(conn)
	r.ShimClient = shimapi.NewShimClient(r.conn)
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-r.served:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Error("Serve doesn't end")
		}
		r.conn.Close()
		for _, m := range d.Machines() {
			m.Die(nil)
			m.WaitTasks()
		}
	})
	return r
}

func (r *rig) ctx() context.Context { return r.t.Context() }

func (r *rig) boot() {
	r.t.Helper()
	if _, err := r.bootWith(&guestapi.SetUpSandboxRequest{Hostname: "h"}); err != nil {
		r.t.Fatalf("Boot: %v", err)
	}
}

func (r *rig) bootWith(sandbox *guestapi.SetUpSandboxRequest) (*shimapi.BootResponse, error) {
	r.t.Helper()
	if _, err := r.StartMachine(r.ctx(), &shimapi.StartMachineRequest{}); err != nil {
		return nil, err
	}
	return r.Boot(r.ctx(), &shimapi.BootRequest{Sandbox: sandbox})
}

func (r *rig) create(id string, change func(*shimapi.CreateContainerRequest), args ...string) {
	r.t.Helper()
	if err := r.tryCreate(id, change, args...); err != nil {
		r.t.Fatalf("CreateContainer: %v", err)
	}
}

func (r *rig) tryCreate(id string, change func(*shimapi.CreateContainerRequest), args ...string) error {
	spec, _ := json.Marshal(&specs.Spec{Process: &specs.Process{Args: append([]string{"/app"}, args...)}})
	req := &shimapi.CreateContainerRequest{
		Container: &guestapi.CreateContainerRequest{Id: id, Spec: spec},
		LogPath:   filepath.Join(r.cfg.PodDir, id+".log"),
	}
	if change != nil {
		change(req)
	}
	_, err := r.CreateContainer(r.ctx(), req)
	return err
}

func (r *rig) start(id string, args ...string) {
	r.t.Helper()
	r.create(id, nil, args...)
	if _, err := r.StartContainer(r.ctx(), &shimapi.StartContainerRequest{Id: id}); err != nil {
		r.t.Fatalf("StartContainer: %v", err)
	}
}

// watch calls f with each state until it returns true.
func (r *rig) watch(what string, bound time.Duration, f func(*shimapi.PodState) bool) *shimapi.PodState {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.ctx(), bound)
	defer cancel()
	w, err := r.Watch(ctx, &shimapi.WatchRequest{})
	if err != nil {
		r.t.Fatal(err)
	}
	var last *shimapi.PodState
	for {
		st, err := w.Recv()
		if err != nil {
			r.t.Fatalf("%s: not within %v: %v; last state %v", what, bound, err, last)
		}
		if last != nil && st.GetRevision() <= last.GetRevision() {
			r.t.Errorf("revision %d after %d", st.GetRevision(), last.GetRevision())
		}
		if last = st; f(st) {
			return st
		}
	}
}

func (r *rig) awaitExit(id string) *shimapi.ContainerState {
	r.t.Helper()
	var c *shimapi.ContainerState
	r.watch("exit of "+id, 10*time.Second, func(st *shimapi.PodState) bool {
		c = containerIn(st, id)
		return c.GetPhase() == shimapi.Phase_EXITED
	})
	return c
}

func containerIn(st *shimapi.PodState, id string) *shimapi.ContainerState {
	for _, c := range st.GetContainers() {
		if c.GetId() == id {
			return c
		}
	}
	return nil
}

func (r *rig) stream(h guestapi.Header) (*guestapi.Stream, error) {
	conn, err := net.Dial("unix", filepath.Join(r.cfg.RunDir, shimapi.SocketData))
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return guestapi.Open(conn, h)
}

func ms(n int) Duration { return Duration(time.Duration(n) * time.Millisecond) }

func TestBoot(t *testing.T) {
	var got *guestapi.SetUpSandboxRequest
	r := newRig(t, &shimtest.Driver{Console: "hello\n", OnSetUp: func(s *guestapi.SetUpSandboxRequest) { got = s }}, Timeouts{})
	if _, err := r.Boot(r.ctx(), &shimapi.BootRequest{}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("Boot before StartMachine: %v", err)
	}
	r.boot()
	if got.GetHostname() != "h" || len(got.GetEntropy()) != 256 || bytes.Equal(got.GetEntropy(), make([]byte, 256)) ||
		time.Since(time.Unix(0, got.GetUnixNanos())).Abs() > 10*time.Second {
		t.Errorf("the agent got %v", got)
	}
	st := r.watch("ready", time.Second, func(st *shimapi.PodState) bool { return st.GetVm() == shimapi.VM_READY })
	var names []string
	for _, s := range st.GetSteps() {
		names = append(names, s.GetName())
	}
	if s := strings.Join(names, ", "); s != "vm start, kernel and agent, guest: mounts, sandbox set-up" {
		t.Errorf("steps %s", s)
	}
	if _, err := r.Boot(r.ctx(), &shimapi.BootRequest{}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("second Boot: %v", err)
	}
	if _, err := r.StartMachine(r.ctx(), &shimapi.StartMachineRequest{}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("second StartMachine: %v", err)
	}
	for _, s := range []string{shimapi.SocketControl, shimapi.SocketData} {
		if fi, err := os.Stat(filepath.Join(r.cfg.RunDir, s)); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("socket %s: %v, %v", s, fi.Mode(), err)
		}
	}
	if b, _ := os.ReadFile(filepath.Join(r.cfg.PodDir, ConsoleFile)); string(b) != "hello\n" {
		t.Errorf("console %q", b)
	}
}

// A VM that ends before Boot is called is no worse than one that ends in it.
func TestMachineEndsBeforeBoot(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	if _, err := r.StartMachine(r.ctx(), &shimapi.StartMachineRequest{}); err != nil {
		t.Fatal(err)
	}
	r.driver.Machines()[0].Die(errors.New("bang"))
	if _, err := r.Boot(r.ctx(), &shimapi.BootRequest{}); err != nil || len(r.driver.Machines()) != 2 {
		t.Errorf("%v after %d machines, want another one", err, len(r.driver.Machines()))
	}
}

func TestBootFails(t *testing.T) {
	tests := []struct {
		name     string
		driver   *shimtest.Driver
		timeouts Timeouts
		want     []string
		machines int
	}{
		{"no progress, twice (T7)", &shimtest.Driver{Hang: 2, Console: "dying\x1b[31m\nlast words\n"}, Timeouts{BootStall: ms(200)},
			[]string{"kernel and agent", "neither wrote to its console nor used its CPU", `dying\x1b[31m | last words`}, 2},
		{"busy for ever (T7)", &shimtest.Driver{Hang: 2, Busy: true}, Timeouts{BootStall: ms(200), Boot: ms(2500)},
			[]string{"kernel and agent", "wrote nothing"}, 2},
		{"garbage", &shimtest.Driver{Garbage: []byte("HTTP/1.1 400 Bad Request\r\n\r\n")}, Timeouts{Agent: ms(500)},
			[]string{"kernel and agent", "hello"}, 1},
		{"zeroes", &shimtest.Driver{Garbage: make([]byte, 4096)}, Timeouts{Agent: ms(500)},
			[]string{"kernel and agent", "hello"}, 1},
		{"another version", &shimtest.Driver{Version: 99}, Timeouts{},
			[]string{"version 99", "rebuild the guest image"}, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, tt.driver, tt.timeouts)
			start := time.Now()
			_, err := r.bootWith(nil)
			if err == nil {
				t.Fatal("Boot succeeded")
			}
			for _, w := range tt.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q lacks %q", err, w)
				}
			}
			if took := time.Since(start); took > 8*time.Second {
				t.Errorf("took %v", took)
			}
			ms := r.driver.Machines()
			if len(ms) != tt.machines {
				t.Errorf("%d machines, want %d", len(ms), tt.machines)
			}
			for _, m := range ms {
				select {
				case <-m.Done():
				default:
					t.Error("a machine lives on")
				}
			}
			r.watch("gone", time.Second, func(st *shimapi.PodState) bool { return st.GetVm() == shimapi.VM_GONE })
		})
	}
}

// T7: a boot that stalls once is tried again with a fresh VM.
func TestBootRetry(t *testing.T) {
	r := newRig(t, &shimtest.Driver{Hang: 1}, Timeouts{BootStall: ms(200)})
	r.boot()
	if n := len(r.driver.Machines()); n != 2 {
		t.Errorf("%d machines", n)
	}
	st := r.watch("ready", time.Second, func(*shimapi.PodState) bool { return true })
	if s := fmt.Sprint(st.GetSteps()); !strings.Contains(s, "boot again") {
		t.Errorf("steps %s", s)
	}
}

// T7: a guest whose clock runs too fast says at once that it is too late; the next
// VM may be better.
func TestBootRetryAfterLateSetUp(t *testing.T) {
	r := newRig(t, &shimtest.Driver{LateSetUps: 1}, Timeouts{})
	r.boot()
	if n := len(r.driver.Machines()); n != 2 {
		t.Errorf("%d machines", n)
	}
}

// T7: so does a guest whose set-up was in time, but took far longer by its own clock:
// StartContainer would fail in it, each time.
func TestBootRetryAfterAFastClock(t *testing.T) {
	r := newRig(t, &shimtest.Driver{FastClocks: 1}, Timeouts{})
	r.boot()
	if n := len(r.driver.Machines()); n != 2 {
		t.Errorf("%d machines", n)
	}
	for _, c := range []struct {
		name  string
		nanos []int64
		took  time.Duration
		want  bool
	}{
		{"right", []int64{60e6, 30e6}, 100 * time.Millisecond, true},
		{"short steps", []int64{90e6}, time.Millisecond, true},
		{"15 times too fast", []int64{700e6, 600e6}, 100 * time.Millisecond, false},
		{"nonsense", []int64{math.MaxInt64, math.MaxInt64}, time.Second, false},
		{"negative", []int64{math.MinInt64}, time.Second, true},
	} {
		var steps []*guestapi.Step
		for _, n := range c.nanos {
			steps = append(steps, &guestapi.Step{Nanos: n})
		}
		if err := checkClock(steps, c.took); (err == nil) != c.want || err != nil && !errors.Is(err, errStalled) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// T10: whoever learns of an exit finds it on record.
func TestExitIsOnRecordFirst(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	r.boot()
	for i := range 20 {
		id := fmt.Sprintf("c%d", i)
		r.start(id, "exit", "42")
		st := r.awaitExit(id)
		rec, err := ReadStatus(filepath.Join(r.cfg.PodDir, ContainersDir, id))
		if err != nil || rec.GetPhase() != shimapi.Phase_EXITED || rec.GetExitCode() != 42 {
			t.Fatalf("record %v, %v", rec, err)
		}
		if st.GetExitCode() != 42 || st.GetReason() != ReasonError || st.GetFinishedAt() < st.GetStartedAt() || st.GetUser().GetUid() != 7 {
			t.Errorf("state %v", st)
		}
	}
}

func TestContainerErrors(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	if err := r.tryCreate("early", nil, "sleep"); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("create before boot: %v", err)
	}
	r.boot()
	for _, id := range []string{"", "..", "a/b", strings.Repeat("x", 200)} {
		if err := r.tryCreate(id, nil, "sleep"); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			t.Errorf("id %q: %v", id, err)
		}
	}
	if err := r.tryCreate("l", func(c *shimapi.CreateContainerRequest) { c.Container.Layers = []string{"../x"} }, "sleep"); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("layer outside: %v", err)
	}
	err := r.tryCreate("no", nil, "refuse")
	if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) || strings.ContainsAny(err.Error(), "\x1b\n") {
		t.Errorf("the guest's refusal: %q", err)
	}
	r.create("no", nil, "sleep") // the id is free again
	if err := r.tryCreate("no", nil, "sleep"); !errdefs.IsAlreadyExists(errgrpc.ToNative(err)) {
		t.Errorf("taken id: %v", err)
	}
	r.create("m", nil, "missing")
	if _, err := r.StartContainer(r.ctx(), &shimapi.StartContainerRequest{Id: "m"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("missing command: %v", err)
	}
	if st := r.awaitExit("m"); st.GetReason() != ReasonStartError || st.GetExitCode() != 128 {
		t.Errorf("state %v", st)
	}
	for _, id := range []string{"m", "nobody"} {
		if _, err := r.StartContainer(r.ctx(), &shimapi.StartContainerRequest{Id: id}); err == nil {
			t.Errorf("Start of %s succeeded", id)
		}
		for range 2 {
			if _, err := r.RemoveContainer(r.ctx(), &shimapi.RemoveContainerRequest{Id: id}); err != nil {
				t.Errorf("Remove of %s: %v", id, err)
			}
		}
	}
	if st, err := r.StopContainer(r.ctx(), &shimapi.StopContainerRequest{Id: "no"}); err != nil || st.GetPhase() != shimapi.Phase_CREATED {
		t.Errorf("Stop of a created one: %v, %v", st, err)
	}
}

// A guest's answer can't make a record that nobody can read any more.
func TestHostileUser(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	r.boot()
	if err := r.tryCreate("c", nil, "many-groups"); err == nil {
		t.Error("the container was made")
	}
	r.create("c", nil) // nothing of it is left
	if _, err := ReadStatus(filepath.Join(r.cfg.PodDir, ContainersDir, "c")); err != nil {
		t.Error(err)
	}
}

func TestStopContainer(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	r.boot()
	r.start("polite", "sleep")
	st, err := r.StopContainer(r.ctx(), &shimapi.StopContainerRequest{Id: "polite", GraceNanos: int64(10 * time.Second)})
	if err != nil || st.GetExitCode() != 7 {
		t.Errorf("%v, %v", st, err)
	}
	r.start("stubborn", "stubborn")
	start := time.Now()
	var wg sync.WaitGroup
	for range 8 { // all at once
		wg.Go(func() {
			st, err := r.StopContainer(r.ctx(), &shimapi.StopContainerRequest{Id: "stubborn", GraceNanos: int64(200 * time.Millisecond)})
			if err != nil || st.GetExitCode() != 137 {
				t.Errorf("%v, %v", st, err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
	if st, err := r.StopContainer(r.ctx(), &shimapi.StopContainerRequest{Id: "stubborn"}); err != nil || st.GetExitCode() != 137 {
		t.Errorf("Stop of an exited one: %v, %v", st, err)
	}
}

// T35: what the guest couldn't write back of a container's volumes, its status says.
func TestEndWithSomethingAmiss(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	r.boot()
	r.start("a", "unsynced")
	if st := r.awaitExit("a"); st.GetExitCode() != 0 || st.GetReason() != ReasonCompleted || st.GetMessage() != `not written back\x1b[31m` {
		t.Errorf("%v", st)
	}
}

// T12: Stop always stops: past grace + 2 s the VM is killed.
func TestStopKillsTheVM(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		t.Run(fmt.Sprintf("deaf %v", deaf), func(t *testing.T) {
			r := newRig(t, &shimtest.Driver{}, Timeouts{Kill: ms(300)})
			r.boot()
			arg := "undead"
			if deaf {
				arg = "sleep"
			}
			r.start("a", arg)
			r.start("b", "sleep")
			if deaf {
				r.driver.Machines()[0].GoDeaf()
			}
			start := time.Now()
			st, err := r.StopContainer(r.ctx(), &shimapi.StopContainerRequest{Id: "a", GraceNanos: int64(200 * time.Millisecond)})
			// T12: how its process ended nobody saw.
			if err != nil || st.GetExitCode() != 255 || st.GetReason() != ReasonSandboxGone || !strings.Contains(st.GetMessage(), "didn't end within") {
				t.Errorf("%v, %v", st, err)
			}
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("took %v", took)
			}
			if st := r.awaitExit("b"); st.GetExitCode() != 255 || st.GetReason() != ReasonSandboxGone || !strings.Contains(st.GetMessage(), "container a") {
				t.Errorf("the other container: %v", st)
			}
		})
	}
}

// T12: an agent that leaves a call and then a question unanswered is a dead VM.
func TestDeafAgent(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{Agent: ms(300)})
	r.boot()
	r.start("a", "sleep")
	r.driver.Machines()[0].GoDeaf()
	start := time.Now()
	_, err := r.Stats(r.ctx(), &guestapi.StatsRequest{})
	if err == nil {
		t.Error("Stats succeeded")
	}
	if st := r.awaitExit("a"); st.GetExitCode() != 255 || !strings.Contains(st.GetMessage(), "not answered") {
		t.Errorf("state %v", st)
	}
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("took %v", took)
	}
}

// T12: so is one that breaks off, or says what nobody understands, after it was sane:
// a pod whose agent can't be reached any more must not stay ready.
func TestAgentGoesMad(t *testing.T) {
	for _, tt := range []struct {
		name string
		mad  func(*shimtest.Machine)
		want string
	}{
		{"hangs up", (*shimtest.Machine).HangUp, "connection to the guest agent broke"},
		{"babbles", func(m *shimtest.Machine) { m.Babble([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) }, "not answered"},
		{"says zeroes", func(m *shimtest.Machine) { m.Babble(make([]byte, 1000)); m.GoDeaf() }, "not answered"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, &shimtest.Driver{}, Timeouts{Agent: ms(300)})
			r.boot()
			tt.mad(r.driver.Machines()[0])
			if tt.want == "not answered" { // whoever asks next finds out
				if _, err := r.Stats(r.ctx(), &guestapi.StatsRequest{}); err == nil {
					t.Error("Stats succeeded")
				}
			}
			st := r.watch("gone", 3*time.Second, func(st *shimapi.PodState) bool { return st.GetVm() == shimapi.VM_GONE })
			if !strings.Contains(st.GetReason(), tt.want) {
				t.Errorf("reason %q, want %q", st.GetReason(), tt.want)
			}
			select {
			case <-r.driver.Machines()[0].Done():
			case <-time.After(2 * time.Second):
				t.Error("its VM lives")
			}
		})
	}
}

func TestVMDies(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		want string
	}{{"crash", errors.New("qemu was killed by signal 9\x1b"), `killed by signal 9\x1b`}, {"power-off", nil, "powered itself off"}} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, &shimtest.Driver{}, Timeouts{})
			r.boot()
			r.start("a", "sleep")
			r.start("done", "exit", "3")
			r.awaitExit("done")
			r.driver.Machines()[0].Die(tt.err)
			st := r.watch("gone", 2*time.Second, func(st *shimapi.PodState) bool {
				return st.GetVm() == shimapi.VM_GONE && containerIn(st, "a").GetPhase() == shimapi.Phase_EXITED
			})
			if !strings.Contains(st.GetReason(), tt.want) {
				t.Errorf("reason %q", st.GetReason())
			}
			if c := containerIn(st, "a"); c.GetExitCode() != 255 || c.GetReason() != ReasonSandboxGone {
				t.Errorf("container %v", c)
			}
			// T10
			if c := containerIn(st, "done"); c.GetExitCode() != 3 || c.GetReason() != ReasonError {
				t.Errorf("a real exit code was overwritten: %v", c)
			}
			if err := r.tryCreate("late", nil, "sleep"); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
				t.Errorf("create in a dead VM: %v", err)
			}
			if _, err := r.Stop(r.ctx(), &shimapi.StopRequest{}); err != nil {
				t.Errorf("Stop: %v", err)
			}
		})
	}
}

func TestStop(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		t.Run(fmt.Sprintf("deaf %v", deaf), func(t *testing.T) {
			r := newRig(t, &shimtest.Driver{}, Timeouts{Kill: ms(500)})
			r.boot()
			r.start("a", "stubborn")
			if deaf {
				r.driver.Machines()[0].GoDeaf()
			}
			start := time.Now()
			if _, err := r.Stop(r.ctx(), &shimapi.StopRequest{}); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("took %v", took)
			}
			if rec, err := ReadStatus(filepath.Join(r.cfg.PodDir, ContainersDir, "a")); err != nil || rec.GetPhase() != shimapi.Phase_EXITED || rec.GetExitCode() != 137 {
				t.Errorf("record %v, %v", rec, err)
			}
			select {
			case err := <-r.served:
				r.served <- err
			case <-time.After(5 * time.Second):
				t.Error("the shim doesn't end")
			}
			if left, _ := os.ReadDir(r.cfg.RunDir); len(left) != 1 || left[0].Name() != "vm" {
				t.Errorf("left in the run directory: %v", left)
			}
		})
	}
}

func TestAttach(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	r.boot()
	r.create("cat", func(c *shimapi.CreateContainerRequest) { c.Container.Stdin, c.Container.StdinOnce = true, true }, "cat")
	if _, err := r.stream(guestapi.Header{Kind: guestapi.Stdout, Container: "cat"}); err == nil {
		t.Error("attached to what doesn't run")
	}
	if _, err := r.StartContainer(r.ctx(), &shimapi.StartContainerRequest{Id: "cat"}); err != nil {
		t.Fatal(err)
	}
	var outs [2]*guestapi.Stream
	for i := range outs { // two clients see the same
		var err error
		if outs[i], err = r.stream(guestapi.Header{Kind: guestapi.Stdout, Container: "cat"}); err != nil {
			t.Fatal(err)
		}
		defer outs[i].Close()
	}
	if _, err := r.stream(guestapi.Header{Kind: guestapi.Terminal, Container: "cat"}); err == nil {
		t.Error("a terminal where there is none")
	}
	in, err := r.stream(guestapi.Header{Kind: guestapi.Stdin, Container: "cat"})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	_, _ = io.WriteString(in, "typed\n")
	_ = in.CloseWrite()
	for i, o := range outs {
		if b, err := io.ReadAll(o); string(b) != "typed\n" || err != nil {
			t.Errorf("client %d: %q, %v", i, b, err)
		}
	}
	r.awaitExit("cat")
	if b, _ := os.ReadFile(filepath.Join(r.cfg.PodDir, "cat.log")); !bytes.Contains(b, []byte(" stdout F typed\n")) {
		t.Errorf("log %q", b)
	}
}

func TestAttachTerminal(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	r.boot()
	r.create("tty", func(c *shimapi.CreateContainerRequest) {
		c.Container.Stdin, c.Container.Tty, c.Tty = true, true, true
	}, "cat")
	if _, err := r.StartContainer(r.ctx(), &shimapi.StartContainerRequest{Id: "tty"}); err != nil {
		t.Fatal(err)
	}
	s, err := r.stream(guestapi.Header{Kind: guestapi.Terminal, Container: "tty"})
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(s, "ls\n")
	b := make([]byte, 3)
	if _, err := io.ReadFull(s, b); err != nil || string(b) != "ls\n" {
		t.Errorf("%q, %v", b, err)
	}
	s.Close() // the client vanishes, the container goes on
	if _, err := r.StopContainer(r.ctx(), &shimapi.StopContainerRequest{Id: "tty"}); err != nil {
		t.Fatal(err)
	}
}

// T18: an attach client that lags is disconnected, the container goes on.
func TestSlowAttachClient(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	r.boot()
	r.create("flood", func(c *shimapi.CreateContainerRequest) { c.LogPath = "" }, "flood")
	if _, err := r.StartContainer(r.ctx(), &shimapi.StartContainerRequest{Id: "flood"}); err != nil {
		t.Fatal(err)
	}
	slow, err := r.stream(guestapi.Header{Kind: guestapi.Stdout, Container: "flood"})
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	fast, err := r.stream(guestapi.Header{Kind: guestapi.Stdout, Container: "flood"})
	if err != nil {
		t.Fatal(err)
	}
	defer fast.Close()
	if _, err := io.CopyN(io.Discard, fast, 8<<20); err != nil {
		t.Errorf("the client that keeps up: %v", err)
	}
	_ = slow.Conn().SetReadDeadline(time.Now().Add(15 * time.Second))
	if n, err := io.Copy(io.Discard, readerOnly{slow}); err == nil || n > 6<<20 {
		t.Errorf("the slow client got %d bytes and %v", n, err)
	}
	if _, err := r.StopContainer(r.ctx(), &shimapi.StopContainerRequest{Id: "flood", GraceNanos: int64(time.Second)}); err != nil {
		t.Fatal(err)
	}
}

type readerOnly struct{ io.Reader }

func TestForwardedPorts(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	r.boot()
	var wg sync.WaitGroup
	for i := range 80 {
		wg.Go(func() {
			s, err := r.stream(guestapi.Header{Kind: guestapi.Port, Port: 7})
			if err != nil {
				t.Errorf("%d: %v", i, err)
				return
			}
			defer s.Close()
			if i%4 == 3 { // vanishes in the middle; goleak sees what stays
				_, _ = s.Write(make([]byte, 1<<16))
				return
			}
			msg := strings.Repeat(fmt.Sprint(i), 50_000)
			go func() {
				_, _ = io.WriteString(s, msg)
				_ = s.CloseWrite()
			}()
			if b, err := io.ReadAll(s); string(b) != msg || err != nil {
				t.Errorf("%d: %d of %d bytes, %v", i, len(b), len(msg), err)
			}
		})
	}
	wg.Wait()
	var refused *guestapi.ResetError
	if _, err := r.stream(guestapi.Header{Kind: guestapi.Port, Port: 8}); !errors.As(err, &refused) || !strings.Contains(refused.Reason, "port 8") {
		t.Errorf("nobody listens: %v", err)
	}
	// Garbage on the data socket ends that connection and nothing else.
	conn, err := net.Dial("unix", filepath.Join(r.cfg.RunDir, shimapi.SocketData))
	if err != nil {
		t.Fatal(err)
	}
	_, _ = conn.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
	_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after garbage: %v", err)
	}
	conn.Close()
}

func TestReopenLog(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	r.boot()
	r.start("a", "sleep")
	path := filepath.Join(r.cfg.PodDir, "a.log")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ReopenLog(r.ctx(), &shimapi.ReopenLogRequest{Id: "a"}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
	if _, err := r.StopContainer(r.ctx(), &shimapi.StopContainerRequest{Id: "a"}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ReopenLog(r.ctx(), &shimapi.ReopenLogRequest{Id: "a"}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("of an exited container: %v", err)
	}
}

// T14
func TestLongRunDir(t *testing.T) {
	err := CheckRunDir("/" + strings.Repeat("x", 120))
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "shorter run directory") {
		t.Errorf("%v", err)
	}
}

func TestConsoleIsCapped(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	c, err := openConsole(path)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(c.w, "first line\n")
	line := []byte(strings.Repeat("m", 1023) + "\n")
	for range 5000 {
		if _, err := c.w.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	_, _ = io.WriteString(c.w, "last line\n")
	c.close()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > consoleMax || !bytes.HasPrefix(b, []byte("first line\n")) || !bytes.HasSuffix(b, []byte("last line\n")) || !bytes.Contains(b, []byte(consoleCut)) {
		t.Errorf("%d bytes, %q ... %q", len(b), b[:20], b[len(b)-20:])
	}
	if !strings.HasSuffix(c.lastLines(), "last line") {
		t.Errorf("%q", c.lastLines())
	}
}

func FuzzStatus(f *testing.F) {
	f.Add([]byte(`{"id":"a","phase":"EXITED","exitCode":3}`))
	f.Add([]byte(`{"id":1,"phase":99,"x":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = parseStatus(b) })
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"schema":1,"id":"a","podDir":"/p","runDir":"/r","kernel":"/k","initrd":"/i","cpus":1,"memoryBytes":1,"timeouts":{"boot":"1s"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := parseConfig("f", b); err == nil && (c.CPUs < 1 || c.Timeouts.Boot <= 0) {
			t.Fatalf("%+v", c)
		}
	})
}

// T28: a driver that can't pin says so, and pods without cpusets don't notice.
func TestAdjustMachine(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	r.boot()
	if _, err := r.AdjustMachine(r.ctx(), &shimapi.AdjustMachineRequest{OomScoreAdj: 5}); err != nil {
		t.Error(err)
	}
	if _, err := r.AdjustMachine(r.ctx(), &shimapi.AdjustMachineRequest{Cpus: []uint32{0}}); !errdefs.IsNotImplemented(errgrpc.ToNative(err)) {
		t.Errorf("a machine that can't be pinned: %v", err)
	}
}
