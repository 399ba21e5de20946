package sandbox

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/shim"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// A pod's whole life in a real VM, in one VM because boots are what costs.
func TestVMLife(t *testing.T) {
	e := newVMEnv(t)
	steps, err := e.pods.WatchSteps(t.Context(), podConfig("life").Metadata)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	var watch sync.WaitGroup
	watch.Go(func() {
		for s := range steps {
			names = append(names, s.Name)
			t.Logf("%-28s %v", s.Name, time.Duration(s.Nanos).Round(time.Millisecond))
		}
	})
	p := e.run("life")
	watch.Wait()
	for _, want := range []string{"record", "network", "scratch disk", "shim", "vm start", "kernel and agent", "sandbox set-up", "ready"} {
		if !strings.Contains(strings.Join(names, "\n"), want) {
			t.Errorf("no step %q among %q", want, names)
		}
	}
	st := p.Status()
	if !st.Ready || len(st.IPs) != 1 {
		t.Fatalf("status %+v", st)
	}

	t.Run("output and exit code", func(t *testing.T) {
		c := e.start(e.create(p, "echo", nil, "echo", "hello"))
		await(t, "exit", 10*time.Second, exited(c))
		if s := c.Status(); s.ExitCode != 0 || s.Reason != shim.ReasonCompleted || s.StartedAt == 0 || s.FinishedAt < s.StartedAt {
			t.Errorf("status %+v", s)
		}
		b, _ := os.ReadFile(c.Status().LogPath)
		if !strings.Contains(string(b), "stdout F hello\n") || !strings.Contains(string(b), "stderr F err hello\n") {
			t.Errorf("log %q", b)
		}
		c = e.start(e.create(p, "exit", nil, "exit", "42"))
		await(t, "exit", 10*time.Second, exited(c))
		if s := c.Status(); s.ExitCode != 42 || s.Reason != shim.ReasonError {
			t.Errorf("status %+v", s)
		}
		if err := c.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := c.Remove(t.Context()); err != nil {
			t.Errorf("second Remove: %v", err)
		}
	})
	t.Run("missing command", func(t *testing.T) {
		c := e.create(p, "missing", func(cc *CreateContainer) { cc.Spec.Process.Args = []string{"/no-such"} })
		err := c.Start(t.Context())
		if err == nil || !strings.Contains(err.Error(), "/no-such") {
			t.Errorf("Start: %v", err)
		}
		if s := c.Status(); s.Phase != shimapi.Phase_EXITED || s.Reason != shim.ReasonStartError {
			t.Errorf("status %+v", s)
		}
	})
	t.Run("exec", func(t *testing.T) {
		c := e.start(e.create(p, "sleep", nil, "sleep"))
		if out, errOut, code := execIn(t, c, "/app", "echo", "x"); out != "x\n" || errOut != "err x\n" || code != 0 {
			t.Errorf("%q %q %d", out, errOut, code)
		}
		if _, _, code := execIn(t, c, "/app", "exit", "3"); code != 3 {
			t.Errorf("exit code %d", code)
		}
		if err := c.Stop(t.Context(), 5*time.Second); err != nil {
			t.Fatal(err)
		}
		if s := c.Status(); s.ExitCode != 7 {
			t.Errorf("a SIGTERM that was handled: %+v", s)
		}
	})
	t.Run("stop past the grace period", func(t *testing.T) {
		c := e.start(e.create(p, "stubborn", nil, "stubborn"))
		await(t, "its first line", 5*time.Second, func() bool {
			b, _ := os.ReadFile(c.Status().LogPath)
			return strings.Contains(string(b), "ready")
		})
		start := time.Now()
		if err := c.Stop(t.Context(), 300*time.Millisecond); err != nil {
			t.Fatal(err)
		}
		if s := c.Status(); s.ExitCode != 137 || !p.Status().Ready {
			t.Errorf("status %+v", s)
		}
		if took := time.Since(start); took > 2300*time.Millisecond {
			t.Errorf("Stop took %v", took)
		}
	})
	t.Run("attach", func(t *testing.T) {
		c := e.start(e.create(p, "cat", func(cc *CreateContainer) { cc.Stdin, cc.StdinOnce = true, true }, "cat"))
		out, err := p.Stream(t.Context(), guestapi.Header{Kind: guestapi.Stdout, Container: c.ID()})
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		in, err := p.Stream(t.Context(), guestapi.Header{Kind: guestapi.Stdin, Container: c.ID()})
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		if _, err := io.WriteString(in, "typed\n"); err != nil {
			t.Fatal(err)
		}
		if err := in.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(out); string(b) != "typed\n" || err != nil {
			t.Errorf("read %q, %v", b, err)
		}
		await(t, "exit after stdin's end", 10*time.Second, exited(c))
	})
	t.Run("volume", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "f"), []byte("from the host"), 0o644); err != nil {
			t.Fatal(err)
		}
		withVolume := func(v *shimapi.Volume) func(*CreateContainer) {
			return func(cc *CreateContainer) {
				cc.Volumes = []*shimapi.Volume{v}
				cc.Spec.Mounts = append(cc.Spec.Mounts, specs.Mount{Destination: "/data", Type: "bind", Source: "volume://v", Options: []string{"rbind"}})
			}
		}
		c := e.start(e.create(p, "vol", withVolume(&shimapi.Volume{Name: "v", HostPath: dir}), "sleep"))
		if out, errOut, code := execIn(t, c, "/app", "read", "/data/f"); out != "from the host" {
			t.Errorf("%q %q %d", out, errOut, code)
		}
		if _, errOut, code := execIn(t, c, "/app", "write", "/data/g", "from the guest"); code != 0 {
			t.Errorf("write: %s", errOut)
		}
		if b, _ := os.ReadFile(filepath.Join(dir, "g")); string(b) != "from the guest" {
			t.Errorf("the host reads %q", b)
		}
		if err := c.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		// T1, T3: the host refuses the write, whatever the guest's mount says.
		ro := e.start(e.create(p, "ro", withVolume(&shimapi.Volume{Name: "v", HostPath: dir, ReadOnly: true}), "sleep"))
		if _, errOut, code := execIn(t, ro, "/app", "write", "/data/h", "x"); code == 0 || !strings.Contains(errOut, "read-only") {
			t.Errorf("write to a read-only volume: %d %q", code, errOut)
		}
		if err := ro.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		// T2: a mount that the host made after the VM started, whatever the
		// propagation of "/".
		late := t.TempDir()
		if err := syscall.Mount("tmpfs", late, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		defer syscall.Unmount(late, syscall.MNT_DETACH)
		if err := os.WriteFile(filepath.Join(late, "f"), []byte("on tmpfs"), 0o644); err != nil {
			t.Fatal(err)
		}
		lc := e.start(e.create(p, "late", withVolume(&shimapi.Volume{Name: "v", HostPath: late, HostToContainer: true}), "sleep"))
		if out, errOut, code := execIn(t, lc, "/app", "read", "/data/f"); out != "on tmpfs" {
			t.Errorf("%q %q %d", out, errOut, code)
		}
		if err := lc.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		// T34: nothing of the pod keeps the host's mount busy.
		await(t, "unmount of the volume on the host", 3*time.Second, func() bool { return syscall.Unmount(late, 0) == nil })
		// T30: a single file.
		fc := e.start(e.create(p, "file", func(cc *CreateContainer) {
			withVolume(&shimapi.Volume{Name: "v", HostPath: filepath.Join(dir, "f")})(cc)
			cc.Spec.Mounts[len(cc.Spec.Mounts)-1].Destination = "/etc/one"
		}, "sleep"))
		if out, errOut, code := execIn(t, fc, "/app", "read", "/etc/one"); out != "from the host" {
			t.Errorf("%q %q %d", out, errOut, code)
		}
		if err := fc.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		// T29
		_, err := p.CreateContainer(t.Context(), e.container("sock", withVolume(&shimapi.Volume{Name: "v", HostPath: filepath.Join(p.run, "s")}), "sleep"))
		if err == nil || !strings.Contains(err.Error(), "socket") {
			t.Errorf("a socket as a volume: %v", err)
		}
	})
	t.Run("64 forwarded ports", func(t *testing.T) {
		c := e.start(e.create(p, "listen", nil, "listen", "8080"))
		port := guestapi.Header{Kind: guestapi.Port, Port: 8080}
		await(t, "listener", 10*time.Second, func() bool {
			s, err := p.Stream(t.Context(), port)
			if err == nil {
				s.Close()
			}
			return err == nil
		})
		var wg sync.WaitGroup
		for i := range 64 {
			wg.Go(func() {
				s, err := p.Stream(t.Context(), port)
				if err != nil {
					t.Errorf("connection %d: %v", i, err)
					return
				}
				defer s.Close()
				msg := strings.Repeat(strconv.Itoa(i)+" ", 2000)
				go func() {
					_, _ = io.WriteString(s, msg)
					_ = s.CloseWrite()
				}()
				if b, err := io.ReadAll(s); string(b) != msg || err != nil {
					t.Errorf("connection %d: %d bytes back, %v", i, len(b), err)
				}
			})
		}
		wg.Wait()
		_, err := p.Stream(t.Context(), guestapi.Header{Kind: guestapi.Port, Port: 8081})
		if err == nil || !strings.Contains(err.Error(), "8081") {
			t.Errorf("a port nobody listens on: %v", err)
		}
		if err := c.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("daemon restart", func(t *testing.T) {
		c := e.start(e.create(p, "count", nil, "count"))
		await(t, "first lines", 10*time.Second, func() bool {
			b, _ := os.ReadFile(c.Status().LogPath)
			return strings.Contains(string(b), "line 10\n")
		})
		gone := e.start(e.create(p, "ends-meanwhile", func(cc *CreateContainer) { cc.Stdin, cc.StdinOnce = true, true }, "cat"))
		in, err := p.Stream(t.Context(), guestapi.Header{Kind: guestapi.Stdin, Container: gone.ID()})
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		before := c.Status()
		e.close()
		_ = in.CloseWrite() // ends the container while there is no daemon
		time.Sleep(500 * time.Millisecond)
		e.open()
		p2, err := e.pods.Get(p.ID()[:8])
		if err != nil {
			t.Fatal(err)
		}
		if !p2.Status().Ready {
			t.Fatalf("pod after restart: %+v", p2.Status())
		}
		c2, err := e.pods.Container(c.ID())
		if err != nil {
			t.Fatal(err)
		}
		if got := c2.Status(); got.Phase != shimapi.Phase_RUNNING || got.StartedAt != before.StartedAt {
			t.Errorf("container after restart: %+v, before %+v", got, before)
		}
		g2, err := e.pods.Container(gone.ID())
		if err != nil {
			t.Fatal(err)
		}
		await(t, "exit", 5*time.Second, exited(g2))
		if got := g2.Status(); got.ExitCode != 0 || got.Reason != shim.ReasonCompleted {
			t.Errorf("what ended without a daemon: %+v", got)
		}
		if out, _, _ := execIn(t, c2, "/app", "echo", "again"); out != "again\n" {
			t.Errorf("exec after restart: %q", out)
		}
		if err := c2.Stop(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		b, _ := os.ReadFile(c2.Status().LogPath)
		for i, l := range strings.Split(strings.TrimSpace(string(b)), "\n") {
			if !strings.HasSuffix(l, " line "+strconv.Itoa(i)) {
				t.Fatalf("log line %d is %q", i, l)
			}
		}
		p = p2
	})

	shimPID := p.rec.Shim.PID
	start := time.Now()
	if err := p.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	t.Logf("Stop took %v", took.Round(time.Millisecond))
	if took > 4*time.Second {
		t.Error("Stop took longer than its bounds in sum")
	}
	if left := processesWith(t, p.ID()); len(left) != 0 {
		t.Errorf("processes after Stop: %q", left)
	}
	if (process{PID: shimPID, Start: p.rec.Shim.Start}).alive() {
		t.Error("the shim lives on after Stop")
	}
	if b, _ := os.ReadFile("/proc/self/mountinfo"); strings.Contains(string(b), p.ID()) {
		t.Error("mounts after Stop")
	}
	if err := p.Stop(t.Context()); err != nil {
		t.Errorf("second Stop: %v", err)
	}
	if err := p.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{p.dir, p.run} {
		if _, err := os.Stat(d); !os.IsNotExist(err) {
			t.Errorf("%s after Remove: %v", d, err)
		}
	}
	if ids, err := e.o.Network.Pods(); len(ids) != 0 || err != nil {
		t.Errorf("networks after Remove: %v, %v", ids, err)
	}
}

// kill -9 of the shim or of QEMU, and a guest that powers itself off: NotReady
// and exited within 2 s, and Remove works (T12).
func TestVMGone(t *testing.T) {
	tests := []struct {
		name   string
		kill   func(t *testing.T, p *Pod, c *Container)
		reason string
	}{
		{"shim killed", func(t *testing.T, p *Pod, _ *Container) {
			if err := syscall.Kill(p.rec.Shim.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}, "shim"},
		{"virtiofsd killed", func(t *testing.T, p *Pod, _ *Container) {
			if err := syscall.Kill(childOf(t, p.rec.Shim.PID, "virtiofsd"), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}, "virtiofsd"},
		{"guest powers itself off", func(t *testing.T, p *Pod, _ *Container) {
			e := &env{t: t, o: p.pods.o, pods: p.pods}
			e.start(e.create(p, "off", func(cc *CreateContainer) {
				cc.PidMode = guestapi.NamespaceMode_NODE
				caps := []string{"CAP_SYS_BOOT"}
				cc.Spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
			}, "poweroff"))
		}, "powered itself off"},
		{"qemu killed", func(t *testing.T, p *Pod, _ *Container) {
			if err := syscall.Kill(childOf(t, p.rec.Shim.PID, "qemu-system"), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}, "VM"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := newVMEnv(t)
			cfg := podConfig("gone")
			cfg.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE}}
			p, err := e.pods.Run(t.Context(), cfg, "")
			if err != nil {
				t.Fatal(err)
			}
			c := e.start(e.create(p, "sleep", func(cc *CreateContainer) { cc.PidMode = guestapi.NamespaceMode_CONTAINER }, "sleep"))
			pids := childrenOf(t, p.rec.Shim.PID)
			tt.kill(t, p, c)
			start := time.Now()
			await(t, "NotReady", 2*time.Second, func() bool { return !p.Status().Ready })
			await(t, "exited", 2*time.Second-time.Since(start), exited(c))
			if s := c.Status(); s.ExitCode != 255 || s.Reason != shim.ReasonSandboxGone || s.Message == "" {
				t.Errorf("container %+v", s)
			}
			if s := p.Status(); !strings.Contains(s.Reason, tt.reason) || len(s.IPs) != 0 {
				t.Errorf("pod %+v", s)
			}
			if st, err := shim.ReadStatus(c.dir); err != nil || st.GetPhase() != shimapi.Phase_EXITED {
				t.Errorf("record %v, %v", st, err)
			}
			await(t, "VM and helpers gone", 3*time.Second, func() bool {
				for _, p := range pids {
					if p.alive() {
						return false
					}
				}
				return true
			})
			if err := p.Remove(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// childrenOf lists a process's children.
func childrenOf(t testing.TB, pid int) []process {
	t.Helper()
	var list []process
	tasks, _ := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/children")
	for _, f := range tasks {
		b, _ := os.ReadFile(f)
		for _, s := range strings.Fields(string(b)) {
			n, _ := strconv.Atoi(s)
			if start, _, err := startTime(n); err == nil {
				list = append(list, process{PID: n, Start: start})
			}
		}
	}
	return list
}

func childOf(t testing.TB, pid int, name string) int {
	t.Helper()
	for _, p := range childrenOf(t, pid) {
		b, _ := os.ReadFile("/proc/" + strconv.Itoa(p.PID) + "/cmdline")
		if strings.Contains(string(b), name) {
			return p.PID
		}
	}
	t.Fatalf("process %d has no child %s", pid, name)
	return 0
}
