//go:build linux

package guest_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestPod takes a pod through its life on both architectures.
func TestPod(t *testing.T) {
	for _, arch := range []string{"amd64", "arm64"} {
		t.Run(arch, func(t *testing.T) {
			v := boot(t, options{arch: arch})
			layers := v.probeImage(arch)
			v.sandbox(api.NamespaceMode_CONTAINER)
			hello, err := v.agent.Hello(v.ctx(), &api.HelloRequest{})
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range hello.Boot {
				t.Logf("boot: %s %v", s.Name, time.Duration(s.Nanos))
				if strings.Contains(s.Name, "failed") {
					t.Errorf("boot: %s", s.Name)
				}
			}
			t.Logf("features: %v, memory %d", hello.Features, hello.MemoryBytes)
			v.serve("main", "3000", layers)
			for _, c := range []struct {
				name string
				test func(*testing.T, *vm, []string)
			}{
				{"Identity", testIdentity},
				{"Files", testFiles},
				{"Batch", testBatch},
				{"Exec", testExec},
				{"ExecKill", testExecKill},
				{"Port", testPort},
				{"ExitCodes", testExitCodes},
				{"CommandNotFound", testCommandNotFound},
				{"Stdin", testStdin},
				{"StdinReattach", testStdinReattach},
				{"Terminal", testTerminal},
				{"BackPressure", testBackPressure},
				{"Orphans", testOrphans},
				{"LeftBehind", testLeftBehind},
				{"OOM", testOOM},
				{"Update", testUpdate},
				{"Volumes", testVolumes},
				{"ImageVolume", testImageVolume},
				{"Target", testTarget},
				{"GuestRoot", testGuestRoot},
				{"BadRequests", testBadRequests},
				{"Devices", testDevices},
				{"Clock", testClock},
				{"Modules", testModules},
				{"Vsock", testVsock},
				{"Restarts", testRestarts},
				{"Stats", testStats},
				{"NothingLeft", testNothingLeft},
			} {
				t.Run(c.name, func(t *testing.T) {
					w := *v
					w.t = t
					c.test(t, &w, layers)
				})
			}
			start := time.Now()
			_, _ = v.agent.Shutdown(v.ctx(), &api.ShutdownRequest{})
			select {
			case <-v.gone:
				t.Logf("shutdown: %v", time.Since(start))
			case <-time.After(10 * time.Second):
				t.Error("the VM is still there 10s after Shutdown")
			}
		})
	}
}

// serve starts a container that listens on port 3000 and stays.
func (v *vm) serve(id, port string, layers []string) {
	v.t.Helper()
	start := time.Now()
	if _, err := v.create(&api.CreateContainerRequest{
		Id: id, Layers: layers, PidMode: api.NamespaceMode_CONTAINER, User: &api.User{Name: "alice"},
	}, spec("serve", port)); err != nil {
		v.t.Fatal(err)
	}
	v.t.Logf("create: %v", time.Since(start))
	out, err := v.stream(api.Header{Kind: api.Stdout, Container: id})
	if err != nil {
		v.t.Fatal(err)
	}
	start = time.Now()
	if _, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: id}); err != nil {
		v.t.Fatal(err)
	}
	v.t.Logf("start: %v", time.Since(start))
	v.first(out, "listening\n")
	out.Close()
}

// run creates, starts and removes a container and returns its output.
func (v *vm) run(r *api.CreateContainerRequest, s *specs.Spec) (string, *api.WaitResponse) {
	v.t.Helper()
	if _, err := v.create(r, s); err != nil {
		v.t.Fatal(err)
	}
	out, errs := v.output(api.Stdout, r.Id, ""), v.output(api.Stderr, r.Id, "")
	if _, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: r.Id}); err != nil {
		v.t.Fatal(err)
	}
	w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: r.Id})
	if err != nil {
		v.t.Fatal(err)
	}
	text := out() + errs()
	v.remove(r.Id)
	return text, w
}

func (v *vm) remove(id string) {
	v.t.Helper()
	for range 2 { // idempotent
		if _, err := v.agent.RemoveContainer(v.ctx(), &api.RemoveContainerRequest{Id: id}); err != nil {
			v.t.Error(err)
		}
	}
}

func request(id string, layers []string) *api.CreateContainerRequest {
	return &api.CreateContainerRequest{Id: id, Layers: layers, PidMode: api.NamespaceMode_CONTAINER}
}

func wantCode(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want %v with %q", err, code, text)
	}
}

func testIdentity(t *testing.T, v *vm, _ []string) {
	got, code := v.exec("main", "id", "/probe", "id")
	if code != 0 {
		t.Errorf("exit code %d: %s", code, got)
	}
	wantContains(t, "id", got, "uid 1000 gid 1000", "50", "host pod-one")
	got, _ = v.exec("main", "env", "/probe", "env")
	wantContains(t, "env", got, "COLOUR=blue", "HOME=/home/alice")
}

func testFiles(t *testing.T, v *vm, _ []string) {
	got, _ := v.exec("main", "ls", "/probe", "ls", "/")
	if strings.Contains(got, "lost+found") {
		t.Errorf("lost+found of a layer shows: %q", got)
	}
	wantContains(t, "root", got, "probe\n", "home\n")
	got, _ = v.exec("main", "read", "/probe", "read", "/file", "/etc/resolv.conf", "/etc/hosts", "/etc/hostname",
		"/proc/sys/net/core/somaxconn", "/proc/sys/net/ipv4/ping_group_range", "/proc/self/cgroup", "/proc/net/route")
	wantContains(t, "files", got, "above", "nameserver 10.0.2.3", "options ndots:5", "10.0.2.15\tpod-one", "192.0.2.9\tdb", "1234",
		"0\t2147483647", "0::/", "0202000A") // gateway 10.0.2.2
	// T26
	got, _ = v.exec("main", "mounts", "/probe", "read", "/proc/mounts")
	wantContains(t, "mounts", got, "/dev/shm tmpfs rw,nosuid,nodev,noexec,relatime,size=65536k", "mqueue /dev/mqueue", "sysfs /sys sysfs ro")
}

// In an emulated guest no process interrupts another: neither the container's nor
// what is executed in it.
func testBatch(t *testing.T, v *vm, _ []string) {
	got, _ := v.exec("main", "stat", "/probe", "read", "/proc/1/stat", "/proc/self/stat")
	policies := 0
	for line := range strings.Lines(got) {
		f := strings.Fields(line[strings.LastIndexByte(line, ')')+1:]) // from the third field on
		if len(f) < 39 {
			t.Fatalf("not a stat: %q", line)
		}
		if policies++; f[38] != strconv.Itoa(unix.SCHED_BATCH) {
			t.Errorf("scheduling policy %s, want %d: %q", f[38], unix.SCHED_BATCH, line)
		}
	}
	if policies != 2 {
		t.Errorf("%d processes in %q", policies, got)
	}
}

func testExec(t *testing.T, v *vm, _ []string) {
	start := time.Now()
	got, code := v.exec("main", "echo", "/probe", "echo", "hello")
	if got != "hello\n" || code != 0 {
		t.Errorf("got %q and %d", got, code)
	}
	t.Logf("exec: %v", time.Since(start))
	if _, code = v.exec("main", "exit", "/probe", "exit", "7"); code != 7 {
		t.Errorf("exit code %d, want 7", code)
	}
	_, err := v.agent.Exec(v.ctx(), &api.ExecRequest{Id: "main", ExecId: "none", Args: []string{"nosuch"}})
	wantCode(t, err, codes.NotFound, "executable file not found in $PATH")
	// Many at once, none lost (T22).
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			if got, code := v.exec("main", fmt.Sprint("p", i), "/probe", "echo", fmt.Sprint(i)); got != fmt.Sprintln(i) || code != 0 {
				t.Errorf("exec %d: %q, %d", i, got, code)
			}
		})
	}
	all.Wait()
}

func testExecKill(t *testing.T, v *vm, _ []string) {
	if _, err := v.agent.Exec(v.ctx(), &api.ExecRequest{Id: "main", ExecId: "long", Args: []string{"/probe", "sleep", "1h"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := v.agent.Signal(v.ctx(), &api.SignalRequest{Id: "main", ExecId: "long", Signal: 9}); err != nil {
		t.Fatal(err)
	}
	w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "main", ExecId: "long"})
	if err != nil || w.ExitCode != 137 {
		t.Errorf("got %v, %v; want 137", w, err)
	}
	if _, err := v.agent.RemoveExec(v.ctx(), &api.RemoveExecRequest{Id: "main", ExecId: "long"}); err != nil {
		t.Error(err)
	}
	// A running one is killed by its removal.
	if _, err := v.agent.Exec(v.ctx(), &api.ExecRequest{Id: "main", ExecId: "long", Args: []string{"/probe", "sleep", "1h"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := v.agent.RemoveExec(v.ctx(), &api.RemoveExecRequest{Id: "main", ExecId: "long"}); err != nil {
		t.Error(err)
	}
	got, _ := v.exec("main", "ls", "/probe", "ls", "/sys/fs/cgroup")
	if strings.Contains(got, "exec-long") {
		t.Errorf("cgroup of the exec is left: %s", got)
	}
}

func testPort(t *testing.T, v *vm, _ []string) {
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			s, err := v.stream(api.Header{Kind: api.Port, Port: 3000})
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			sent := bytes.Repeat([]byte(fmt.Sprint(i)), 100_000)
			go func() {
				_, _ = s.Write(sent)
				_ = s.CloseWrite()
			}()
			got, err := io.ReadAll(s)
			// The server says bye only after it has seen the half-close.
			if err != nil || !bytes.Equal(got, append(sent, "bye"...)) {
				t.Errorf("connection %d: %d bytes, %v", i, len(got), err)
			}
		})
	}
	all.Wait()
	_, err := v.stream(api.Header{Kind: api.Port, Port: 3001})
	wantReset(t, err, "nothing listens on port 3001 of the pod")
}

func testExitCodes(t *testing.T, v *vm, layers []string) {
	if _, w := v.run(request("exits", layers), spec("exit", "3")); w.ExitCode != 3 || w.OomKilled {
		t.Errorf("got %v", w)
	}
	// The id is free again.
	if got, w := v.run(request("exits", layers), spec("complain", "bad")); got != "bad\n" || w.ExitCode != 0 {
		t.Errorf("got %q, %v", got, w)
	}
	if _, err := v.create(request("sleeps", layers), spec("sleep", "1h")); err != nil {
		t.Fatal(err)
	}
	_, err := v.agent.Exec(v.ctx(), &api.ExecRequest{Id: "sleeps", ExecId: "e", Args: []string{"/probe", "id"}})
	wantCode(t, err, codes.FailedPrecondition, "not running")
	if _, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: "sleeps"}); err != nil {
		t.Fatal(err)
	}
	_, err = v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: "sleeps"})
	wantCode(t, err, codes.FailedPrecondition, "running")
	time.Sleep(500 * time.Millisecond) // until it catches the signal
	if _, err := v.agent.Signal(v.ctx(), &api.SignalRequest{Id: "sleeps", Signal: 15}); err != nil {
		t.Fatal(err)
	}
	w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "sleeps"})
	if err != nil || w.ExitCode != 42 {
		t.Errorf("got %v, %v; want 42", w, err)
	}
	_, err = v.agent.Exec(v.ctx(), &api.ExecRequest{Id: "sleeps", ExecId: "e", Args: []string{"/probe", "id"}})
	wantCode(t, err, codes.FailedPrecondition, "stopped")
	if _, err := v.agent.Signal(v.ctx(), &api.SignalRequest{Id: "sleeps", Signal: 15}); err != nil {
		t.Errorf("signal to an ended process: %v", err)
	}
	v.remove("sleeps")
}

func testCommandNotFound(t *testing.T, v *vm, layers []string) {
	s := spec()
	s.Process.Args = []string{"nosuch"}
	if _, err := v.create(request("nosuch", layers), s); err != nil {
		t.Fatal(err)
	}
	_, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: "nosuch"})
	wantCode(t, err, codes.NotFound, "executable file not found in $PATH")
	w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "nosuch"})
	if err != nil || w.ExitCode != 127 {
		t.Errorf("got %v, %v; want 127", w, err)
	}
	v.remove("nosuch")
}

func testStdin(t *testing.T, v *vm, layers []string) {
	r := request("cat", layers)
	r.Stdin, r.StdinOnce = true, true
	if _, err := v.create(r, spec("cat")); err != nil {
		t.Fatal(err)
	}
	in, err := v.stream(api.Header{Kind: api.Stdin, Container: "cat"})
	if err != nil {
		t.Fatal(err)
	}
	out := v.output(api.Stdout, "cat", "")
	if _, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: "cat"}); err != nil {
		t.Fatal(err)
	}
	sent := strings.Repeat("0123456789", 50_000)
	_, _ = in.Write([]byte(sent))
	_ = in.CloseWrite()
	w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "cat"})
	if err != nil || w.ExitCode != 0 {
		t.Errorf("got %v, %v", w, err)
	}
	if got := out(); got != sent {
		t.Errorf("%d bytes came back of %d", len(got), len(sent))
	}
	in.Close()
	v.remove("cat")
}

func testStdinReattach(t *testing.T, v *vm, layers []string) {
	r := request("cat2", layers)
	r.Stdin = true
	if _, err := v.create(r, spec("cat")); err != nil {
		t.Fatal(err)
	}
	out, err := v.stream(api.Header{Kind: api.Stdout, Container: "cat2"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: "cat2"}); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		in, err := v.stream(api.Header{Kind: api.Stdin, Container: "cat2"})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(in, "line %d\n", i)
		v.first(out, fmt.Sprintf("line %d\n", i))
		switch i {
		case 0:
			_ = in.CloseWrite() // without stdin_once this ends the stream only
		case 1:
			in.Close() // a broken connection
		case 2:
			defer in.Close() // the next one takes its place
		}
	}
	in, err := v.stream(api.Header{Kind: api.Stdin, Container: "cat2"})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	fmt.Fprintln(in, "last")
	v.first(out, "last\n")
	// Output streams too: one that breaks loses nothing that was not sent.
	out.Close()
	time.Sleep(200 * time.Millisecond)
	fmt.Fprintln(in, "again")
	out, err = v.stream(api.Header{Kind: api.Stdout, Container: "cat2"})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	v.first(out, "again\n")
	if _, err := v.agent.Signal(v.ctx(), &api.SignalRequest{Id: "cat2", Signal: 9, All: true}); err != nil {
		t.Fatal(err)
	}
	if w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "cat2"}); err != nil || w.ExitCode != 137 {
		t.Errorf("got %v, %v", w, err)
	}
	v.remove("cat2")
}

func testTerminal(t *testing.T, v *vm, layers []string) {
	r := request("tty", layers)
	r.Tty, r.Stdin = true, true
	if _, err := v.create(r, spec("tty")); err != nil {
		t.Fatal(err)
	}
	s, err := v.stream(api.Header{Kind: api.Terminal, Container: "tty"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, err = v.stream(api.Header{Kind: api.Stdout, Container: "tty"})
	wantReset(t, err, "terminal")
	if _, err := v.agent.ResizePty(v.ctx(), &api.ResizePtyRequest{Id: "tty", Width: 100, Height: 30}); err != nil {
		t.Error(err)
	}
	if _, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: "tty"}); err != nil {
		t.Fatal(err)
	}
	v.first(s, "console is there, and /dev/pts/0")
	fmt.Fprint(s, "typed\n")
	b, err := io.ReadAll(s)
	if err != nil {
		t.Error(err)
	}
	wantContains(t, "terminal", string(b), `read "typed\n"`)
	v.remove("tty")

	if _, err := v.agent.Exec(v.ctx(), &api.ExecRequest{Id: "main", ExecId: "tty", Args: []string{"/probe", "id"}, Tty: true, Stdin: true}); err != nil {
		t.Fatal(err)
	}
	wantContains(t, "exec -t", v.output(api.Terminal, "main", "tty")(), "uid 1000", "\r\n")
	if _, err := v.agent.RemoveExec(v.ctx(), &api.RemoveExecRequest{Id: "main", ExecId: "tty"}); err != nil {
		t.Error(err)
	}
	// The terminal is one of the container's own.
	if _, err := v.agent.Exec(v.ctx(), &api.ExecRequest{Id: "main", ExecId: "tty", Args: []string{"/probe", "ttyname"}, Tty: true}); err != nil {
		t.Fatal(err)
	}
	wantContains(t, "ttyname", v.output(api.Terminal, "main", "tty")(), "/dev/pts/0 true")
	if _, err := v.agent.RemoveExec(v.ctx(), &api.RemoveExecRequest{Id: "main", ExecId: "tty"}); err != nil {
		t.Error(err)
	}
}

// The host sets the guest's clock after it has slept.
func testClock(t *testing.T, v *vm, _ []string) {
	set := func(at time.Time) {
		t.Helper()
		if _, err := v.agent.SetClock(v.ctx(), &api.SetClockRequest{UnixNanos: at.UnixNano()}); err != nil {
			t.Fatal(err)
		}
	}
	off := func() time.Duration {
		t.Helper()
		st, err := v.agent.Stats(v.ctx(), &api.StatsRequest{Files: true})
		if err != nil {
			t.Fatal(err)
		}
		return time.Until(time.Unix(0, st.UnixNanos))
	}
	for _, by := range []time.Duration{-time.Hour, time.Hour, 0} {
		set(time.Now().Add(by))
		if got := off(); (got - by).Abs() > 5*time.Second {
			t.Errorf("set to be %v off, the clock is %v off", by, got)
		}
	}
	_, err := v.agent.SetClock(v.ctx(), &api.SetClockRequest{})
	wantCode(t, err, codes.InvalidArgument, "is no time")
}

// testModules: the kernel loads what a container needs, by way of the agent.
func testModules(t *testing.T, v *vm, _ []string) {
	const netfilter = "12"
	if got, code := v.exec("main", "socket", "/probe", "socket", netfilter); code != 0 {
		t.Errorf("netfilter socket: %s", got)
	}
}

// testVsock: a container can't speak to the agent.
func testVsock(t *testing.T, v *vm, _ []string) {
	got, code := v.exec("main", "vsock", "/probe", "vsock")
	t.Logf("%s", got)
	if code != 0 {
		t.Error("the agent's sockets are open to containers")
	}
}

// testRestarts: one container, again and again (T38).
func testRestarts(t *testing.T, v *vm, layers []string) {
	start := time.Now()
	for i := range 40 {
		if got, w := v.run(request("again", layers), spec("echo", "x")); got != "x\n" || w.ExitCode != 0 {
			t.Fatalf("restart %d: %q, %v", i, got, w)
		}
	}
	t.Logf("%v each", time.Since(start)/40)
}

// testBackPressure: what nobody reads stays with the process (T17).
func testBackPressure(t *testing.T, v *vm, layers []string) {
	if _, err := v.create(request("flood", layers), spec("flood", "8")); err != nil {
		t.Fatal(err)
	}
	if _, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: "flood"}); err != nil {
		t.Fatal(err)
	}
	s, err := v.stream(api.Header{Kind: api.Stdout, Container: "flood"})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	if got, code := v.exec("main", "beside", "/probe", "echo", "alive"); got != "alive\n" || code != 0 {
		t.Errorf("exec beside a stalled stream: %q, %d", got, code)
	}
	n, err := io.Copy(io.Discard, s)
	if n != 8<<20 || err != nil {
		t.Errorf("got %d bytes, %v", n, err)
	}
	s.Close()
	if w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "flood"}); err != nil || w.ExitCode != 0 {
		t.Errorf("got %v, %v", w, err)
	}
	v.remove("flood")
}

func testOrphans(t *testing.T, v *vm, layers []string) {
	if got, w := v.run(request("orphans", layers), spec("orphans", "50")); w.ExitCode != 0 {
		t.Errorf("got %q, %v", got, w)
	}
}

// testLeftBehind: a child that keeps the streams does not hold Wait up.
func testLeftBehind(t *testing.T, v *vm, layers []string) {
	start := time.Now()
	if got, w := v.run(request("left", layers), spec("spawn", "sleep", "1h")); w.ExitCode != 0 || got != "spawned\n" {
		t.Errorf("got %q, %v", got, w)
	}
	t.Logf("container: %v", time.Since(start))
	if _, err := v.agent.Exec(v.ctx(), &api.ExecRequest{Id: "main", ExecId: "left", Args: []string{"/probe", "spawn", "sleep", "1h"}}); err != nil {
		t.Fatal(err)
	}
	s, err := v.stream(api.Header{Kind: api.Stdout, Container: "main", Exec: "left"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	v.first(s, "spawned\n")
	start = time.Now()
	if w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "main", ExecId: "left"}); err != nil || w.ExitCode != 0 {
		t.Errorf("got %v, %v", w, err)
	}
	if d := time.Since(start); d > 4*time.Second {
		t.Errorf("Wait took %v", d)
	}
	// The child lives on, as it would under runc.
	if _, err := v.agent.RemoveExec(v.ctx(), &api.RemoveExecRequest{Id: "main", ExecId: "left"}); err != nil {
		t.Error(err)
	}
	stats, err := v.agent.Stats(v.ctx(), &api.StatsRequest{Ids: []string{"main"}})
	if err != nil {
		t.Fatal(err)
	}
	if n := stats.Containers[0].Pids; n < 6 {
		t.Errorf("%d threads in the container: the child is gone", n)
	}
}

func testOOM(t *testing.T, v *vm, layers []string) {
	limit := int64(64 << 20)
	s := spec("eat")
	s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	_, w := v.run(request("oom", layers), s)
	if w.ExitCode != 137 || !w.OomKilled {
		t.Errorf("got %v, want 137 and oom_killed", w)
	}
}

func testUpdate(t *testing.T, v *vm, _ []string) {
	update := func(json string) error {
		_, err := v.agent.UpdateContainer(v.ctx(), &api.UpdateContainerRequest{Id: "main", Resources: []byte(json)})
		return err
	}
	if err := update(`{"memory":{"limit":134217728},"cpu":{"shares":512,"quota":50000,"period":100000},"pids":{"limit":500}}`); err != nil {
		t.Fatal(err)
	}
	got, _ := v.exec("main", "limits", "/probe", "read", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/pids.max")
	wantContains(t, "limits", got, "134217728\n50000 100000\n500\n")
	// All or none (T28).
	if err := update(`{"memory":{"limit":268435456},"unified":{"memory.nosuch":"1"}}`); err == nil {
		t.Error("an unknown limit was accepted")
	}
	if got, _ = v.exec("main", "limits", "/probe", "read", "/sys/fs/cgroup/memory.max"); got != "134217728\n" {
		t.Errorf("memory.max is %q after a failed update", got)
	}
	if err := update(`{"memory":{"limit":-1},"cpu":{"quota":-1}}`); err != nil {
		t.Error(err)
	}
	// A limit that would end the container is refused, and it lives.
	wantCode(t, update(`{"memory":{"limit":4096,"checkBeforeUpdate":true}}`), codes.FailedPrecondition, "4096")
	if got, _ = v.exec("main", "limits", "/probe", "read", "/sys/fs/cgroup/memory.max"); got != "max\n" {
		t.Errorf("memory.max is %q after a refused update", got)
	}
	adj := int32(321)
	if _, err := v.agent.UpdateContainer(v.ctx(), &api.UpdateContainerRequest{Id: "main", Resources: []byte(`{}`), OomScoreAdj: &adj}); err != nil {
		t.Error(err)
	}
	for _, who := range []string{"1", "self"} { // the container's own process, and execs to come
		if got, _ = v.exec("main", "score", "/probe", "read", "/proc/"+who+"/oom_score_adj"); got != "321\n" {
			t.Errorf("oom_score_adj of process %s is %q", who, got)
		}
	}
}

func testVolumes(t *testing.T, v *vm, layers []string) {
	dir := filepath.Join(v.vols, "data")
	if err := os.Mkdir(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"data/in": "from the host", "single": "one file", "secret": "not yours"} {
		if err := os.WriteFile(filepath.Join(v.vols, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../secret", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	s := spec("read", "/data/in", "/single")
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/data", Source: "volume://data", Options: []string{"rbind", "rw"}},
		specs.Mount{Destination: "/single", Source: "volume://single", Options: []string{"rbind", "ro"}})
	if got, w := v.run(request("vol", layers), s); got != "from the hostone file" || w.ExitCode != 0 {
		t.Errorf("got %q, %v", got, w)
	}
	s.Process.Args = []string{"/probe", "write", "/data/out", "from the guest"}
	if got, w := v.run(request("vol", layers), s); w.ExitCode != 0 {
		t.Errorf("got %q, %v", got, w)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "out")); string(b) != "from the guest" {
		t.Errorf("got %q, %v", b, err)
	}
	s.Process.Args = []string{"/probe", "write", "/single", "no"}
	if got, w := v.run(request("vol", layers), s); w.ExitCode == 0 || !strings.Contains(got, "read-only file system") {
		t.Errorf("got %q, %v", got, w)
	}
	// A link in a volume, which a container may have made, does not lead out of it.
	s = spec("id")
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Source: "volume://data/link", Options: []string{"rbind"}})
	_, err := v.create(request("vol", layers), s)
	wantCode(t, err, codes.NotFound, "volume://data/link")
	for _, bad := range []string{"volume://", "volume://../layers", "/etc", "agent://../pod/hosts"} {
		s.Mounts[len(s.Mounts)-1].Source = bad
		s.Mounts[len(s.Mounts)-1].Type = "bind"
		_, err := v.create(request("vol", layers), s)
		if err == nil {
			t.Errorf("source %q was accepted", bad)
			v.remove("vol")
		}
	}
}

func testImageVolume(t *testing.T, v *vm, layers []string) {
	s := spec("read", "/img/file", "/sub/passwd")
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/img", Type: "image", Options: []string{"layer=base.ext4", "layer=top.ext4"}},
		specs.Mount{Destination: "/sub", Type: "image", Options: []string{"layer=base.ext4", "subpath=etc"}})
	got, w := v.run(request("img", layers), s)
	if w.ExitCode != 0 {
		t.Errorf("got %v", w)
	}
	wantContains(t, "image volume", got, "above", "alice")
	s.Process.Args = []string{"/probe", "write", "/img/file", "no"}
	if got, w := v.run(request("img", layers), s); w.ExitCode == 0 || !strings.Contains(got, "read-only file system") {
		t.Errorf("got %q, %v", got, w)
	}
}

// testTarget: a debug container in another's pid namespace (T27).
func testTarget(t *testing.T, v *vm, layers []string) {
	r := request("debug", layers)
	r.PidMode, r.PidTarget = api.NamespaceMode_TARGET, "main"
	got, w := v.run(r, spec("read", "/proc/1/cmdline"))
	if w.ExitCode != 0 || !strings.Contains(got, "serve") {
		t.Errorf("got %q, %v", got, w)
	}
}

// testGuestRoot: the guest's own root is a tmpfs that nobody writes to, so that
// the agent's program can't be replaced by way of /proc (T20).
func testGuestRoot(t *testing.T, v *vm, layers []string) {
	r := request("root", layers)
	r.PidMode = api.NamespaceMode_NODE
	got, w := v.run(r, spec("read", "/proc/1/mountinfo"))
	for line := range strings.Lines(got) {
		if f := strings.Fields(line); len(f) > 5 && f[4] == "/" {
			if !strings.Contains(line, " - tmpfs ") || !strings.HasPrefix(f[5], "ro") {
				t.Errorf("the guest's root is %q", line)
			}
			// T25
			if got, w := v.run(r, spec("read", "/proc/1/oom_score_adj")); w.ExitCode != 0 || got != "-1000\n" {
				t.Errorf("the agent's OOM score is %q, %v", got, w)
			}
			return
		}
	}
	t.Errorf("no root in %q, %v", got, w)
}

func testBadRequests(t *testing.T, v *vm, layers []string) {
	for _, c := range []struct {
		name string
		r    *api.CreateContainerRequest
		s    *specs.Spec
		code codes.Code
		text string
	}{
		{"id", request("../x", layers), spec("id"), codes.InvalidArgument, "container id"},
		{"twice", request("main", layers), spec("id"), codes.AlreadyExists, "it exists"},
		{"missing layer", request("bad", []string{"none.ext4"}), spec("id"), codes.NotFound, "none.ext4"},
		{"layer name", request("bad", []string{"../scratch.img"}), spec("id"), codes.InvalidArgument, "layer"},
		{"user", &api.CreateContainerRequest{Id: "bad", Layers: layers, PidMode: 1, User: &api.User{Name: "mallory"}}, spec("id"), codes.InvalidArgument, "mallory"},
		{"pid mode", &api.CreateContainerRequest{Id: "bad", Layers: layers, PidMode: api.NamespaceMode_POD}, spec("id"), codes.FailedPrecondition, "pid namespace"},
		{"no command", request("bad", layers), &specs.Spec{Process: &specs.Process{}}, codes.InvalidArgument, "process.args"},
	} {
		_, err := v.create(c.r, c.s)
		if err == nil {
			t.Errorf("%s: accepted", c.name)
			continue
		}
		wantCode(t, err, c.code, c.text)
	}
	_, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "none"})
	wantCode(t, err, codes.NotFound, "none")
	_, err = v.agent.SetUpSandbox(v.ctx(), &api.SetUpSandboxRequest{})
	wantCode(t, err, codes.AlreadyExists, "has one")
	_, err = v.stream(api.Header{Kind: api.Stdout, Container: "none"})
	wantReset(t, err, "no such container")
}

// testDevices: the disk with every container's writes can't be had by mknod, not even
// by a privileged container, which has the guest's other devices (T37).
func testDevices(t *testing.T, v *vm, layers []string) {
	got, w := v.run(request("mknod", layers), spec("mknod", "/disk", "/dev/disk"))
	if w.ExitCode != 0 {
		t.Errorf("got %q, %v", got, w)
	}
	privileged := func(args ...string) *specs.Spec {
		s := spec(args...)
		s.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}}
		return s
	}
	if got, w = v.run(request("mknod", layers), privileged("mknod", "/disk", "/dev/disk")); w.ExitCode != 0 {
		t.Errorf("privileged: got %q, %v", got, w)
	}
	if got, w = v.run(request("ls", layers), privileged("ls", "/dev")); w.ExitCode != 0 || strings.Contains(got, "vd") || strings.Contains(got, "loop0") {
		t.Errorf("privileged: got %q, %v", got, w)
	}
	wantContains(t, "devices", got, "kmsg", "fuse", "net", "loop-control")
}

func testStats(t *testing.T, v *vm, layers []string) {
	v.serve("serves", "3001", layers)
	s := spec("flood", "3")
	s.Process.Args = []string{"/probe", "write", "/written", strings.Repeat("x", 100_000)}
	if _, err := v.create(request("writes", layers), s); err != nil {
		t.Fatal(err)
	}
	if _, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: "writes"}); err != nil {
		t.Fatal(err)
	}
	if _, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "writes"}); err != nil {
		t.Fatal(err)
	}
	stats, err := v.agent.Stats(v.ctx(), &api.StatsRequest{Files: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%v", stats)
	found := 0
	for _, c := range stats.Containers {
		switch c.Id {
		case "writes":
			found++
			if c.WritableBytes < 100_000 || c.WritableBytes > 200_000 {
				t.Errorf("%d writable bytes, want about 100000", c.WritableBytes)
			}
		case "main":
			if c.CpuUsageNanos == 0 || c.MemoryWorkingSetBytes == 0 || c.Pids == 0 || len(c.Pressure) == 0 {
				t.Errorf("empty figures: %v", c)
			}
			if c.Files < 4 || c.Sockets == 0 || c.Sockets >= c.Files || c.FilesLimit == 0 || c.MemoryKernelBytes == 0 {
				t.Errorf("files, sockets, the limit of both or the kernel's memory: %v", c)
			}
		case "serves":
			found++
			// Streams, what it listens on, and what Go's runtime has open. Nobody has
			// connected: a server that was busy keeps pipes for a while.
			if c.Processes != 1 || c.Files < 4 || c.Files > 20 || c.Sockets != 1 {
				t.Errorf("processes, files or sockets: %v", c)
			}
		}
	}
	if p := stats.Pod; p.Files == 0 || stats.ScratchInodes == 0 || stats.ScratchInodesFree == 0 || stats.ScratchInodesFree >= stats.ScratchInodes {
		t.Errorf("files of the pod %v, inodes %d, free %d", p, stats.ScratchInodes, stats.ScratchInodesFree)
	}
	if found != 2 || len(stats.Interfaces) != 1 || stats.Interfaces[0].Name != "eth0" {
		t.Errorf("containers or interfaces missing: %v", stats)
	}
	v.remove("writes")
	v.remove("serves")
}

// testNothingLeft: after all that, the guest holds what one container needs
// (T38), and its layers are mounted once (T24).
func testNothingLeft(t *testing.T, v *vm, layers []string) {
	s := spec("sleep", "1h")
	r := request("looker", layers)
	r.PidMode = api.NamespaceMode_TARGET
	r.PidTarget = "main"
	s.Process.Args = []string{"/probe", "ls", "/sys/block"}
	got, _ := v.run(r, s)
	loops, layersOf := 0, map[string]string{}
	for line := range strings.Lines(got) {
		if !strings.HasPrefix(line, "loop") {
			continue
		}
		loops++
		// T24: a layer is on one device, which is read-only and caches nothing.
		dir := "/sys/block/" + strings.TrimSpace(line)
		state, code := v.exec("main", "loop", "/probe", "read", dir+"/loop/backing_file", dir+"/ro", dir+"/loop/dio")
		if code != 0 {
			continue // a device that nothing is bound to
		}
		file, flags, _ := strings.Cut(state, "\n")
		if flags != "1\n1\n" {
			t.Errorf("%s of %s: read-only and direct are %q", line, file, flags)
		}
		if other := layersOf[file]; other != "" {
			t.Errorf("%s is on %s and %s", file, other, line)
		}
		layersOf[file] = line
	}
	if len(layersOf) < len(layers) {
		t.Errorf("loop devices have %v, want %d layers at least", layersOf, len(layers))
	}
	t.Logf("loop devices: %d", loops)
	// max_loop's static devices count too: what matters is that reuse keeps it flat.
	if loops > 8 {
		t.Errorf("%d loop devices: they leak", loops)
	}
}

// TestBare: a guest without disk, shares and NIC still answers, and says what is
// missing.
func TestBare(t *testing.T) {
	v := boot(t, options{arch: "amd64", bare: true})
	if _, err := v.agent.SetUpSandbox(v.ctx(), &api.SetUpSandboxRequest{PidMode: api.NamespaceMode_POD,
		Interfaces: []*api.Interface{{Mac: "02:00:00:00:00:99"}}}); err == nil || !strings.Contains(err.Error(), "02:00:00:00:00:99") {
		t.Errorf("an unknown NIC: %v", err)
	}
	_, err := v.create(&api.CreateContainerRequest{Id: "x", Layers: []string{"a.ext4"}}, spec("id"))
	wantCode(t, err, codes.Unavailable, "scratch")
	hello, err := v.agent.Hello(v.ctx(), &api.HelloRequest{})
	if err != nil {
		t.Fatal(err)
	}
	failed := ""
	for _, s := range hello.Boot {
		if strings.Contains(s.Name, "failed") {
			failed += s.Name + "\n"
		}
	}
	wantContains(t, "boot steps", failed, "scratch disk", "layers", "volumes")
	_, _ = v.agent.Shutdown(v.ctx(), &api.ShutdownRequest{})
	<-v.gone
}

// TestSharedPID: one pid namespace for the pod, whose init is out of reach.
func TestSharedPID(t *testing.T) {
	v := boot(t, options{arch: "amd64"})
	layers := v.probeImage("amd64")
	v.sandbox(api.NamespaceMode_POD)
	r := request("a", layers)
	r.PidMode = api.NamespaceMode_POD
	s := spec("serve", "3000")
	if _, err := v.create(r, s); err != nil {
		t.Fatal(err)
	}
	if _, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: "a"}); err != nil {
		t.Fatal(err)
	}
	if got, code := v.exec("a", "e", "/probe", "read", "/proc/1/cmdline"); code != 0 || !strings.Contains(got, "pod-init") {
		t.Errorf("got %q, %d", got, code)
	}
	// T25: the OOM killer looks elsewhere first.
	if got, code := v.exec("a", "e", "/probe", "read", "/proc/1/oom_score_adj"); code != 0 || got != "-999\n" {
		t.Errorf("pod-init's OOM score is %q, %d", got, code)
	}
	// Signals to PID 1 of the pod are swallowed, orphans are reaped.
	r.Id = "b"
	if got, w := v.run(r, spec("killinit")); w.ExitCode != 0 {
		t.Errorf("got %q, %v", got, w)
	}
	if got, w := v.run(r, spec("orphans", "50")); w.ExitCode != 0 {
		t.Errorf("got %q, %v", got, w)
	}
	if got, code := v.exec("a", "e", "/probe", "echo", "alive"); got != "alive\n" || code != 0 {
		t.Errorf("got %q, %d", got, code)
	}
	// A container's end is the end of all its processes, and only of its.
	if got, w := v.run(r, spec("spawn", "sleep", "1h")); w.ExitCode != 0 {
		t.Errorf("got %q, %v", got, w)
	}
	if _, err := v.agent.Signal(v.ctx(), &api.SignalRequest{Id: "a", Signal: 9}); err != nil {
		t.Fatal(err)
	}
	if w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "a"}); err != nil || w.ExitCode != 137 {
		t.Errorf("got %v, %v", w, err)
	}
	v.remove("a")
	_, _ = v.agent.Shutdown(v.ctx(), &api.ShutdownRequest{})
	<-v.gone
}

// TestUserNamespace: a pod whose root is nobody in the guest (T33).
func TestUserNamespace(t *testing.T) {
	const first, count = 100000, 65536
	v := boot(t, options{arch: runtime.GOARCH})
	layers := v.probeImage(runtime.GOARCH)
	ids := []*api.IDMapping{{HostId: first, Length: count}}
	if _, err := v.agent.SetUpSandbox(v.ctx(), &api.SetUpSandboxRequest{UidMappings: ids, GidMappings: []*api.IDMapping{{ContainerId: 1, HostId: first, Length: count}}}); err == nil {
		t.Error("a mapping without root was accepted")
	}
	if _, err := v.agent.SetUpSandbox(v.ctx(), &api.SetUpSandboxRequest{
		Hostname: "mapped", PidMode: api.NamespaceMode_POD, UidMappings: ids, GidMappings: ids, UnixNanos: time.Now().UnixNano(),
		Interfaces: []*api.Interface{{Name: "eth0", Mac: podMAC, Addresses: []string{"10.0.2.15/24"}}},
		Sysctls:    map[string]string{"net.core.somaxconn": "1234", "kernel.shm_rmid_forced": "1"},
	}); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"mine", "theirs"} {
		dir := filepath.Join(v.vols, d)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if d == "mine" {
			if err := os.Chown(dir, first, first); err != nil {
				t.Fatal(err)
			}
		}
	}
	r := request("a", layers)
	r.PidMode = api.NamespaceMode_POD
	s := spec("serve", "3000")
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/mine", Type: "bind", Source: "volume://mine", Options: []string{"rbind", "rw"}},
		specs.Mount{Destination: "/theirs", Type: "bind", Source: "volume://theirs", Options: []string{"rbind", "rw"}})
	if _, err := v.create(r, s); err != nil {
		t.Fatal(err)
	}
	if _, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: "a"}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
		code int32
	}{
		{[]string{"read", "/proc/self/uid_map"}, "         0     100000      65536\n", 0},
		{[]string{"id"}, "uid 0 gid 0", 0},
		{[]string{"read", "/file"}, "above", 0},
		{[]string{"write", "/file", "written"}, "", 0},
		{[]string{"write", "/new", "written"}, "", 0},
		{[]string{"write", "/dev/null", "x"}, "", 0},
		{[]string{"write", "/dev/shm/x", "x"}, "", 0},
		{[]string{"write", "/etc/hosts", "127.0.0.1 localhost\n"}, "", 0},
		{[]string{"write", "/dev/stderr", "to my own stream"}, "to my own stream", 0},
		{[]string{"write", "/mine/x", "x"}, "", 0},
		{[]string{"write", "/theirs/x", "x"}, "denied", 1},
		{[]string{"write", "/proc/sys/kernel/panic", "1"}, "", 1},
		{[]string{"read", "/proc/sys/net/core/somaxconn"}, "1234", 0},
	} {
		if got, code := v.exec("a", "e", append([]string{"/probe"}, c.args...)...); code != c.code || !strings.Contains(got, c.want) {
			t.Errorf("%q: %q, exit code %d; want %q, %d", c.args, got, code, c.want, c.code)
		}
	}
	var st syscall.Stat_t
	if err := syscall.Stat(filepath.Join(v.vols, "mine", "x"), &st); err != nil || st.Uid != first || st.Gid != first {
		t.Errorf("what root wrote belongs to %d:%d on the host, %v; want %d", st.Uid, st.Gid, err, first)
	}
	// A user of the image, and a pid namespace of its own.
	r = request("b", layers)
	r.User = &api.User{Name: "alice"}
	if got, w := v.run(r, spec("id")); w.ExitCode != 0 || !strings.Contains(got, "uid 1000 gid 1000 groups [50 1000] pid 1") {
		t.Errorf("another user: %q, %v", got, w)
	}
	if _, err := v.agent.Exec(v.ctx(), &api.ExecRequest{Id: "a", ExecId: "t", Args: []string{"/probe", "write", "/dev/tty", "to my own terminal"}, Tty: true}); err != nil {
		t.Fatal(err)
	}
	if w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "a", ExecId: "t"}); err != nil || w.ExitCode != 0 {
		t.Errorf("exec with a terminal: %v, %v", w, err)
	}
	// A terminal has its name here, too.
	r = request("tty", layers)
	r.Tty, r.Stdin = true, true
	if _, err := v.create(r, spec("tty")); err != nil {
		t.Fatal(err)
	}
	terminal, err := v.stream(api.Header{Kind: api.Terminal, Container: "tty"})
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	if _, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: "tty"}); err != nil {
		t.Fatal(err)
	}
	v.first(terminal, "console is there, and /dev/pts/0")
	fmt.Fprint(terminal, "typed\n")
	if w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "tty"}); err != nil || w.ExitCode != 0 {
		t.Errorf("container with a terminal: %v, %v", w, err)
	}
	v.remove("tty")
	r = request("c", layers)
	if got, w := v.run(r, spec("read", "/proc/self/oom_score_adj")); w.ExitCode != 0 || got != "0\n" {
		t.Errorf("the container's OOM score: %q, %v", got, w)
	}
	// T25: nobody in the pod is as safe as pod-init, whose children they are.
	if got, w := v.run(r, spec("write", "/proc/self/oom_score_adj", "-1")); w.ExitCode == 0 || !strings.Contains(got, "denied") {
		t.Errorf("a container made itself safer from the OOM killer: %q, %v", got, w)
	}
	if got, code := v.exec("a", "e", "/probe", "write", "/proc/self/oom_score_adj", "-1"); code == 0 || !strings.Contains(got, "denied") {
		t.Errorf("an exec made itself safer from the OOM killer: %q, %d", got, code)
	}
	// An image without layers, whose program comes with a volume: "/" is its root's.
	program, err := os.ReadFile(filepath.Join(v.dir, "probe"))
	if err == nil {
		err = errors.Join(os.Mkdir(filepath.Join(v.vols, "tools"), 0o755), os.WriteFile(filepath.Join(v.vols, "tools", "probe"), program, 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	s = spec()
	s.Process.Args = []string{"/tools/probe", "write", "/new", "x"}
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/tools", Type: "bind", Source: "volume://tools", Options: []string{"rbind", "ro"}})
	if got, w := v.run(request("bare", nil), s); w.ExitCode != 0 {
		t.Errorf("an image without layers: %q, %v", got, w)
	}
	// T37: the guest's device, whatever its name in the container.
	s = spec("read", "/dev/empty")
	s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/empty", Type: "c", Major: 1, Minor: 3}}
	s.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}}
	if got, w := v.run(r, s); w.ExitCode != 0 || got != "" {
		t.Errorf("a device under another name: %q, %v", got, w)
	}
	_, _ = v.agent.Shutdown(v.ctx(), &api.ShutdownRequest{})
	<-v.gone
}
