//go:build linux && (amd64 || arm64)

package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/cri-vz/cri-vz/guest/agent/container"
	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestMain makes the test binary the agent's stand-in: it is what the tests
// fork as pod-init, container-init and exec-init.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case RolePodInit:
			os.Exit(RunPodInit())
		case RoleContainerInit:
			os.Exit(container.ExitCode(container.Init()))
		case RoleExecInit:
			os.Exit(container.ExitCode(container.ExecInit()))
		}
	}
	m.Run()
}

const busybox = "/bin/busybox"

// host is an agent on the machine of the tests: everything but PID 1 and the
// VM. What can only be seen in a guest is tested in test/guest.
type host struct {
	*Agent
	t      *testing.T
	client api.AgentService
	data   string // socket
	ended  chan struct{}
}

// testReaper is one for all tests, as two would steal each other's children.
var testReaper = sync.OnceValue(func() *reaper {
	r := newReaper()
	go r.run(context.Background(), childSignals())
	return r
})

func cgroupRoot(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 3 && f[2] == "cgroup2" {
			return f[1]
		}
	}
	t.Fatal("no cgroup2 file system is mounted: the agent's tests need one (mount -t cgroup2 none /sys/fs/cgroup/unified)")
	return ""
}

func newHost(t *testing.T) *host {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test makes namespaces, mounts and cgroups: run it as root")
	}
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cg, err := os.MkdirTemp(cgroupRoot(t), "cri-vz-test-")
	if err != nil {
		t.Fatal(err)
	}
	p := paths{
		exe: exe, run: dir + "/run", layers: dir + "/layers", mounts: dir + "/l", volumes: dir + "/volumes",
		scratch: dir + "/scratch", cgroup: cg, devpts: "/dev/pts",
	}
	for _, d := range []string{p.run, p.layers, p.mounts, p.volumes, p.scratch, cg + "/pod"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// Overlays want an upper directory that isn't on an overlay itself.
	if err := unix.Mount("scratch", p.scratch, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("layers", p.mounts, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	h := &host{Agent: newAgent(p, &logger{w: io.Discard, debug: true}), t: t, ended: make(chan struct{})}
	h.reaper = testReaper()
	h.end = sync.OnceFunc(func() { close(h.ended) })
	if err := h.layers.init(); err != nil {
		t.Fatal(err)
	}
	h.scratch = &scratch{dir: p.scratch}
	close(h.networked)
	close(h.booted)

	h.data = dir + "/data"
	control, err := net.Listen("unix", dir+"/control")
	if err != nil {
		t.Fatal(err)
	}
	data, err := net.Listen("unix", h.data)
	if err != nil {
		t.Fatal(err)
	}
	go h.serveControl(control)
	go h.serveStreams(data)
	conn, err := net.Dial("unix", dir+"/control")
	if err != nil {
		t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	h.client = api.NewAgentClient(c)
	t.Cleanup(func() {
		for id := range h.containers {
			if _, err := h.RemoveContainer(context.Background(), &api.RemoveContainerRequest{Id: id}); err != nil {
				t.Error(err)
			}
		}
		c.Close()
		control.Close()
		data.Close()
		if h.sandbox != nil && h.sandbox.pod != nil {
			h.sandbox.pod.conn.close()
			if !wait(h.ended, 10*time.Second) {
				t.Error("pod-init did not end within 10s")
			}
		}
		if err := unmount(p.run + "/pod/shm"); err != nil {
			t.Error(err)
		}
		if entries, _ := os.ReadDir(p.run + "/containers"); len(entries) != 0 {
			t.Errorf("left in the run directory: %v", entries)
		}
		if entries, _ := os.ReadDir(p.scratch); len(entries) != 0 {
			t.Errorf("left on the scratch disk: %v", entries)
		}
		if len(h.layers.layers) != 0 {
			t.Errorf("layers are left: %v", h.layers.layers)
		}
		for _, m := range []string{p.mounts, p.scratch} {
			if err := unix.Unmount(m, 0); err != nil {
				t.Errorf("unmount %s: %v", m, err)
			}
		}
		if err := cgroup(cg).remove(); err != nil {
			t.Error(err)
		}
	})
	return h
}

func (h *host) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	h.t.Cleanup(cancel)
	return ctx
}

// image makes a layer with busybox.
func (h *host) image(name string) {
	h.t.Helper()
	dir := h.t.TempDir()
	b, err := os.ReadFile(busybox)
	if err != nil {
		h.t.Fatalf("%v: install busybox-static", err)
	}
	for _, d := range []string{"bin", "etc"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			h.t.Fatal(err)
		}
	}
	if err := os.WriteFile(dir+"/bin/busybox", b, 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Symlink("busybox", dir+"/bin/sh"); err != nil {
		h.t.Fatal(err)
	}
	img := filepath.Join(h.paths.layers, name)
	if err := os.WriteFile(img, nil, 0o644); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Truncate(img, 8<<20); err != nil {
		h.t.Fatal(err)
	}
	if b, err := exec.Command("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", dir, img).CombinedOutput(); err != nil {
		h.t.Fatalf("mkfs.ext4: %v\n%s", err, b)
	}
}

func (h *host) create(id string, r *api.CreateContainerRequest, script string) {
	h.t.Helper()
	s := specs.Spec{
		Process: &specs.Process{Args: []string{"/bin/sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin"}},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755"}},
			{Destination: "/dev/shm", Source: "agent://shm", Options: []string{"rbind"}},
		},
	}
	b, err := json.Marshal(s)
	if err != nil {
		h.t.Fatal(err)
	}
	r.Id, r.Spec = id, b
	if r.Layers == nil {
		r.Layers = []string{"img"}
	}
	if _, err := h.client.CreateContainer(h.ctx(), r); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) start(id string) {
	h.t.Helper()
	if _, err := h.client.StartContainer(h.ctx(), &api.StartContainerRequest{Id: id}); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) stream(header api.Header) (*api.Stream, error) {
	conn, err := net.Dial("unix", h.data)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	return api.Open(conn, header)
}

func (h *host) output(id, exec string) string {
	h.t.Helper()
	s, err := h.stream(api.Header{Kind: api.Stdout, Container: id, Exec: exec})
	if err != nil {
		h.t.Fatal(err)
	}
	defer s.Close()
	b, err := io.ReadAll(s)
	if err != nil {
		h.t.Errorf("output of %s/%s: %v", id, exec, err)
	}
	return string(b)
}

func (h *host) wait(id, exec string) *api.WaitResponse {
	h.t.Helper()
	w, err := h.client.Wait(h.ctx(), &api.WaitRequest{Id: id, ExecId: exec})
	if err != nil {
		h.t.Fatal(err)
	}
	return w
}

func (h *host) exec(id, exec, script string) (string, int32) {
	h.t.Helper()
	if _, err := h.client.Exec(h.ctx(), &api.ExecRequest{Id: id, ExecId: exec, Args: []string{"sh", "-c", script}}); err != nil {
		h.t.Fatal(err)
	}
	out := h.output(id, exec)
	w := h.wait(id, exec)
	if _, err := h.client.RemoveExec(h.ctx(), &api.RemoveExecRequest{Id: id, ExecId: exec}); err != nil {
		h.t.Error(err)
	}
	return out, w.ExitCode
}

func (h *host) sandboxWith(mode api.NamespaceMode) {
	h.t.Helper()
	if _, err := h.client.SetUpSandbox(h.ctx(), &api.SetUpSandboxRequest{Hostname: "pod", PidMode: mode}); err != nil {
		h.t.Fatal(err)
	}
}

func TestLife(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent(), goleak.IgnoreAnyFunction("github.com/cri-vz/cri-vz/guest/agent.(*reaper).run"),
		goleak.IgnoreAnyFunction("os/signal.loop"), goleak.IgnoreAnyFunction("os/signal.signal_recv"))
	t.Run("pod", func(t *testing.T) { // its cleanups run before the check
		h := newHost(t)
		h.image("img")
		h.sandboxWith(api.NamespaceMode_CONTAINER)
		h.create("a", &api.CreateContainerRequest{PidMode: api.NamespaceMode_CONTAINER, Stdin: true}, "read x; echo $x $$; exit 3")
		h.start("a")
		if out, code := h.exec("a", "e", "hostname; ls /; exit 9"); !strings.HasPrefix(out, "pod\n") || strings.Contains(out, "lost+found") || code != 9 {
			t.Errorf("exec: %q, %d", out, code)
		}
		in, err := h.stream(api.Header{Kind: api.Stdin, Container: "a"})
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		fmt.Fprintln(in, "line")
		if out := h.output("a", ""); out != "line 1\n" {
			t.Errorf("output %q", out)
		}
		if w := h.wait("a", ""); w.ExitCode != 3 {
			t.Errorf("exit code %d, want 3", w.ExitCode)
		}
		_, err = h.client.Exec(h.ctx(), &api.ExecRequest{Id: "a", ExecId: "e", Args: []string{"sh"}})
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("exec of a stopped container: %v", err)
		}
	})
}

// TestExecsAtOnce would lose statuses if anything but the reaper waited (T22).
func TestExecsAtOnce(t *testing.T) {
	h := newHost(t)
	h.image("img")
	h.sandboxWith(api.NamespaceMode_POD)
	h.create("a", &api.CreateContainerRequest{PidMode: api.NamespaceMode_POD}, "while :; do sleep 100; done")
	h.start("a")
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			for j := range 5 {
				// An orphan each, which pod-init has to bury.
				if out, code := h.exec("a", fmt.Sprint("e", i, "-", j), fmt.Sprintf("(sleep 0.01 &) ; echo %d; exit %d", j, i)); out != fmt.Sprintln(j) || code != int32(i) {
					t.Errorf("exec %d-%d: %q, %d", i, j, out, code)
				}
			}
		})
	}
	all.Wait()
}

// TestVolumesAreNotSynced: the host is told that it may miss a container's last
// writes (T35).
func TestVolumesAreNotSynced(t *testing.T) {
	h := newHost(t)
	h.image("img")
	h.sandboxWith(api.NamespaceMode_POD)
	h.create("a", &api.CreateContainerRequest{PidMode: api.NamespaceMode_POD}, "exit 0")
	c, err := h.container("a")
	if err != nil {
		t.Fatal(err)
	}
	c.volumes = []string{"/no/such/volume"}
	h.start("a")
	if w := h.wait("a", ""); w.ExitCode != 0 || !strings.Contains(w.Message, "/no/such/volume") {
		t.Errorf("%v", w)
	}
	c.volumes = nil
}

// TestExecRemovedWhileItStarts: a caller that gives up leaves no process that nobody
// knows of.
func TestExecRemovedWhileItStarts(t *testing.T) {
	h := newHost(t)
	h.image("img")
	h.sandboxWith(api.NamespaceMode_POD)
	h.create("a", &api.CreateContainerRequest{PidMode: api.NamespaceMode_POD}, "while :; do sleep 100; done")
	h.start("a")
	c, err := h.container("a")
	if err != nil {
		t.Fatal(err)
	}
	caught := 0
	for i := range 20 {
		id := fmt.Sprint("e", i)
		started := make(chan error, 1)
		go func() {
			_, err := h.client.Exec(h.ctx(), &api.ExecRequest{Id: "a", ExecId: id, Args: []string{"sh", "-c", "sleep 1000"}})
			started <- err
		}()
		for begins := false; !begins; { // as soon as the agent has heard of it
			c.mu.Lock()
			_, reserved := c.reserved[id]
			begins = reserved || c.execs[id] != nil
			c.mu.Unlock()
		}
		if _, err := h.client.RemoveExec(h.ctx(), &api.RemoveExecRequest{Id: "a", ExecId: id}); err != nil {
			t.Fatal(err)
		}
		if err := <-started; status.Code(err) == codes.FailedPrecondition {
			caught++
		} else if err != nil {
			t.Error(err)
		}
		c.mu.Lock()
		left := c.execs[id]
		c.mu.Unlock()
		if _, err := os.Stat(c.cgroup.file("exec-" + id)); left != nil || !os.IsNotExist(err) {
			t.Fatalf("round %d: the exec is left: %v, %v", i, left, err)
		}
	}
	if caught == 0 {
		t.Error("no exec was removed while it started")
	}
}

// TestRestarts: nothing grows (T38).
func TestRestarts(t *testing.T) {
	h := newHost(t)
	h.image("img")
	h.sandboxWith(api.NamespaceMode_CONTAINER)
	count := func() (n int) {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		mounts, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			t.Fatal(err)
		}
		pod, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", h.sandbox.pod.pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(fds) + bytes.Count(mounts, []byte("\n")) + len(pod)
	}
	var before int
	for i := range 30 {
		h.create("a", &api.CreateContainerRequest{PidMode: api.NamespaceMode_CONTAINER}, "echo x")
		h.start("a")
		if out := h.output("a", ""); out != "x\n" {
			t.Errorf("output %q", out)
		}
		h.wait("a", "")
		if _, err := h.client.RemoveContainer(h.ctx(), &api.RemoveContainerRequest{Id: "a"}); err != nil {
			t.Fatal(err)
		}
		if i == 4 {
			before = count()
		}
	}
	// A stream's last goroutine may hold its descriptor for a moment.
	for deadline := time.Now().Add(5 * time.Second); count() > before+2; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d descriptors and mounts after 30 restarts, %d after 5", count(), before)
		}
	}
}

func TestCreateFailsCleanly(t *testing.T) {
	h := newHost(t)
	h.image("img")
	h.sandboxWith(api.NamespaceMode_CONTAINER)
	for _, c := range []struct {
		name, spec string
		layers     []string
	}{
		{"spec", "{", nil},
		{"no command", `{"process":{}}`, nil},
		{"missing layer", `{"process":{"args":["x"]}}`, []string{"img", "none"}},
		{"layer that is no image", `{"process":{"args":["x"]}}`, []string{"img", "garbage"}},
		{"volume", `{"process":{"args":["x"]},"mounts":[{"destination":"/v","source":"volume://none"}]}`, []string{"img"}},
		{"host path", `{"process":{"args":["x"]},"mounts":[{"destination":"/v","source":"/etc","type":"bind"}]}`, []string{"img"}},
		{"limit", `{"process":{"args":["x"]},"linux":{"resources":{"unified":{"cgroup.procs":"1"}}}}`, []string{"img"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.WriteFile(filepath.Join(h.paths.layers, "garbage"), make([]byte, 1<<20), 0o644); err != nil {
				t.Fatal(err)
			}
			r := &api.CreateContainerRequest{Id: "bad", PidMode: api.NamespaceMode_CONTAINER, Layers: c.layers, Spec: []byte(c.spec)}
			if _, err := h.client.CreateContainer(h.ctx(), r); err == nil {
				t.Error("accepted")
			}
			if entries, _ := os.ReadDir(h.paths.cgroup + "/pod/bad"); entries != nil {
				t.Error("the cgroup is left")
			}
		})
	}
}

// TestPodInitDies: the pod is lost, and nobody waits for ever.
func TestPodInitDies(t *testing.T) {
	h := newHost(t)
	h.image("img")
	h.sandboxWith(api.NamespaceMode_POD)
	h.create("a", &api.CreateContainerRequest{PidMode: api.NamespaceMode_POD}, "sleep 100")
	h.start("a")
	if err := unix.Kill(h.sandbox.pod.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if w := h.wait("a", ""); w.ExitCode != 255 {
		t.Errorf("exit code %d, want 255", w.ExitCode)
	}
	if !wait(h.ended, 10*time.Second) {
		t.Error("the machine was not ended")
	}
	if _, err := h.client.StartContainer(h.ctx(), &api.StartContainerRequest{Id: "a"}); err == nil {
		t.Error("start after the end of pod-init succeeded")
	}
}

// TestPortForward against real listeners in the pod's network namespace.
func TestPortForward(t *testing.T) {
	h := newHost(t)
	h.image("img")
	h.sandboxWith(api.NamespaceMode_CONTAINER)
	_, err := h.stream(api.Header{Kind: api.Port, Port: 8080})
	var refused *api.ResetError
	if !errors.As(err, &refused) || refused.Reason != "nothing listens on port 8080 of the pod" {
		t.Errorf("got %v", err)
	}
	sb, err := h.pod()
	if err != nil {
		t.Fatal(err)
	}
	for _, domain := range []int{unix.AF_INET, unix.AF_INET6} {
		fd, err := socketIn(int(sb.netns.Fd()), domain, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		var addr unix.Sockaddr = &unix.SockaddrInet4{Port: 8080, Addr: [4]byte{127, 0, 0, 1}}
		if domain == unix.AF_INET6 {
			addr = &unix.SockaddrInet6{Port: 8086, Addr: [16]byte{15: 1}}
		}
		if err := errors.Join(unix.Bind(fd, addr), unix.Listen(fd, 16)); err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "listener")
		l, err := net.FileListener(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					b, _ := io.ReadAll(io.LimitReader(c, 1<<20))
					if bytes.HasPrefix(b, []byte("reset")) {
						_ = c.(*net.TCPConn).SetLinger(0)
						return
					}
					_, _ = c.Write(b)
				}()
			}
		}()
	}
	for _, port := range []uint16{8080, 8086} {
		s, err := h.stream(api.Header{Kind: api.Port, Port: port})
		if err != nil {
			t.Fatal(err)
		}
		sent := bytes.Repeat([]byte("x"), 300_000)
		if _, err := s.Write(sent); err != nil {
			t.Fatal(err)
		}
		_ = s.CloseWrite() // half-close: the answer still comes
		got, err := io.ReadAll(s)
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("port %d: %d bytes, %v", port, len(got), err)
		}
		s.Close()
	}
	s, err := h.stream(api.Header{Kind: api.Port, Port: 8080})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, _ = s.Write([]byte("reset"))
	_ = s.CloseWrite()
	// T17: a reset is not an end of file.
	if _, err := io.ReadAll(s); !errors.As(err, &refused) {
		t.Errorf("got %v, want a reset", err)
	}
}

func TestIsName(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "Z9": true, "_.-": true, strings.Repeat("x", 128): true,
		"": false, "a/b": false, "a b": false, "a\x00": false, "ä": false, strings.Repeat("x", 129): false,
	} {
		if got := isName(name, 128); got != want {
			t.Errorf("isName(%q) = %v", name, got)
		}
	}
}
