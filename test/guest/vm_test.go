//go:build linux

// Package guest_test boots the real agent on the real kernels and speaks the
// guest API to it, without anything of the host's side but the vsock device: it
// is the contract between the two, seen from outside. Networking and shims have
// tests of their own.
//
// It needs QEMU, virtiofsd, mkfs.ext4 and root, and fails without them.
package guest_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/guest/image"
	"github.com/cri-vz/cri-vz/sandbox/qemu/vhostvsock"
	"github.com/opencontainers/runtime-spec/specs-go"
)

const podMAC = "52:54:00:12:34:56"

// vm is a running guest.
type vm struct {
	t       *testing.T
	device  *vhostvsock.Device
	agent   api.AgentService
	client  *ttrpc.Client
	dir     string
	layers  string
	vols    string
	qemu    *exec.Cmd
	gone    chan struct{}
	started time.Time
}

// build builds a program of this module for arch.
func build(t *testing.T, arch, pkg, out string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, b)
	}
}

// virtiofsd finds the daemon and says whether it is the C one.
func virtiofsd(t *testing.T) (string, bool) {
	t.Helper()
	for _, p := range []string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"} {
		if _, err := os.Stat(p); err == nil {
			return p, p == "/usr/lib/qemu/virtiofsd"
		}
	}
	t.Fatal("no virtiofsd in /usr/libexec or /usr/lib/qemu: install virtiofsd or qemu-system-common")
	return "", false
}

func (v *vm) start(cmd *exec.Cmd) {
	v.t.Helper()
	// Nothing may outlive a test binary that is killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		v.t.Fatalf("start %s: %v", cmd.Path, err)
	}
	v.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

func (v *vm) share(tag string) []string {
	v.t.Helper()
	path, old := virtiofsd(v.t)
	socket := filepath.Join(v.dir, tag+".sock")
	args := []string{"--socket-path=" + socket, "--shared-dir", filepath.Join(v.dir, tag), "--sandbox", "chroot"}
	if old {
		args = []string{"--socket-path=" + socket, "-o", "source=" + filepath.Join(v.dir, tag), "-o", "sandbox=chroot"}
	}
	if err := os.Mkdir(filepath.Join(v.dir, tag), 0o755); err != nil {
		v.t.Fatal(err)
	}
	v.start(exec.Command(path, args...))
	for range 500 {
		if _, err := os.Stat(socket); err == nil {
			return []string{"-chardev", "socket,id=" + tag + ",path=" + socket, "-device", "vhost-user-fs-pci,chardev=" + tag + ",tag=" + tag}
		}
		time.Sleep(10 * time.Millisecond)
	}
	v.t.Fatalf("virtiofsd made no socket for %s in 5s", tag)
	return nil
}

type options struct {
	arch string
	bare bool // no disk, no shares
}

// boot starts a guest and waits for its agent.
func boot(t *testing.T, o options) *vm {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test boots VMs with file shares: run it as root")
	}
	dir, err := os.MkdirTemp("", "cvz")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	v := &vm{t: t, dir: dir, layers: filepath.Join(dir, "layers"), vols: filepath.Join(dir, "volumes"), gone: make(chan struct{})}
	agent := filepath.Join(dir, "agent")
	build(t, o.arch, "github.com/cri-vz/cri-vz/cmd/cri-vz-agent", agent)
	cache, err := image.DefaultDir()
	if err != nil {
		t.Fatal(err)
	}
	g, err := image.Build(context.Background(), image.Options{Dir: cache, Arch: o.arch, Agent: agent, Kind: image.KindStock})
	if err != nil {
		t.Fatal(err)
	}

	program, console := "qemu-system-x86_64", "ttyS0"
	machine := []string{"-M", "q35,accel=tcg,memory-backend=mem", "-bios", "qboot.rom", "-cpu", "max,-erms,-fsrm"}
	if o.arch == "arm64" {
		program, console = "qemu-system-aarch64", "ttyAMA0"
		machine = []string{"-M", "virt,accel=tcg,gic-version=3,memory-backend=mem", "-cpu", "max,pauth-impdef=on"}
	}
	socket := filepath.Join(dir, "vsock.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	v.device = vhostvsock.New(3)
	go func() {
		if c, err := l.AcceptUnix(); err == nil {
			_ = v.device.Serve(c)
		}
	}()
	args := append(machine,
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-smp", "1", "-m", "512",
		"-object", "memory-backend-memfd,id=mem,size=512M,share=on",
		"-kernel", g.KernelPath, "-initrd", g.InitrdPath,
		"-append", "console="+console+" "+g.Cmdline+" crivz.debug crivz.emulated",
		"-serial", "file:"+filepath.Join(dir, "console"),
		"-chardev", "socket,id=vs,path="+socket, "-device", "vhost-user-vsock-pci,chardev=vs",
		"-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile=,mac="+podMAC)
	if !o.bare {
		disk := filepath.Join(dir, "scratch.img")
		if err := os.WriteFile(disk, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(disk, 4<<30); err != nil {
			t.Fatal(err)
		}
		mkfs(t, "-O", "quota,project", "-E", "quotatype=prjquota,lazy_itable_init=1,lazy_journal_init=1", disk)
		args = append(args, "-drive", "if=none,id=d0,format=raw,file="+disk, "-device", "virtio-blk-pci,drive=d0,serial=scratch")
		args = append(args, v.share("layers")...)
		args = append(args, v.share("volumes")...)
	}
	v.qemu = exec.Command(program, args...)
	var complaints bytes.Buffer
	v.qemu.Stderr = &complaints
	v.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	// PDEATHSIG strikes when the thread that forked ends.
	runtime.LockOSThread()
	v.started = time.Now()
	err = v.qemu.Start()
	runtime.UnlockOSThread()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = v.qemu.Wait()
		close(v.gone)
	}()
	t.Cleanup(func() {
		_ = v.qemu.Process.Kill()
		<-v.gone
		if t.Failed() {
			t.Logf("QEMU: %s\nconsole:\n%s", complaints.String(), v.console())
		}
	})

	ctx, cancel := context.WithTimeout(context.Background(), 120*time.Second)
	defer cancel()
	var conn net.Conn
	for {
		conn, err = v.device.Dial(ctx, api.PortControl)
		if err == nil {
			break
		}
		if isDone(v.gone) || ctx.Err() != nil {
			t.Fatalf("the agent never listened: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	v.client = ttrpc.NewClient(conn)
	t.Cleanup(func() { v.client.Close() })
	v.agent = api.NewAgentClient(v.client)
	hello, err := v.agent.Hello(ctx, &api.HelloRequest{Version: api.Version})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: kernel %s, agent answers after %v", o.arch, hello.KernelRelease, time.Since(v.started))
	return v
}

func mkfs(t *testing.T, args ...string) {
	t.Helper()
	if b, err := exec.Command("mkfs.ext4", append([]string{"-q", "-F"}, args...)...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, b)
	}
}

func isDone(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (v *vm) console() string {
	b, _ := os.ReadFile(filepath.Join(v.dir, "console"))
	return string(b)
}

// ctx bounds one call.
func (v *vm) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	v.t.Cleanup(cancel)
	return ctx
}

// layer makes a layer image of files by path.
func (v *vm) layer(name string, files map[string]string, copies map[string]string) {
	v.t.Helper()
	dir := v.t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		v.t.Fatal(err)
	}
	put := func(path string, data []byte, mode os.FileMode) {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			v.t.Fatal(err)
		}
		if err := os.WriteFile(path, data, mode); err != nil {
			v.t.Fatal(err)
		}
	}
	for path, text := range files {
		put(path, []byte(text), 0o644)
	}
	for path, from := range copies {
		b, err := os.ReadFile(from)
		if err != nil {
			v.t.Fatal(err)
		}
		put(path, b, 0o755)
	}
	img := filepath.Join(v.layers, name)
	if err := os.WriteFile(img, nil, 0o644); err != nil {
		v.t.Fatal(err)
	}
	if err := os.Truncate(img, 16<<20); err != nil {
		v.t.Fatal(err)
	}
	mkfs(v.t, "-O", "^has_journal", "-d", dir, img)
}

// probeImage makes the layers "base.ext4" and "top.ext4".
func (v *vm) probeImage(arch string) []string {
	v.t.Helper()
	probe := filepath.Join(v.dir, "probe")
	build(v.t, arch, "github.com/cri-vz/cri-vz/test/guest/probe", probe)
	v.layer("base.ext4", map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n",
		"etc/group":  "root:x:0:\nalice:x:1000:\nstaff:x:50:alice\n",
		"file":       "below",
		"home/x":     "",
	}, map[string]string{"probe": probe})
	v.layer("top.ext4", map[string]string{"file": "above"}, nil)
	return []string{"base.ext4", "top.ext4"}
}

func (v *vm) sandbox(mode api.NamespaceMode) {
	v.t.Helper()
	r, err := v.agent.SetUpSandbox(v.ctx(), &api.SetUpSandboxRequest{
		Hostname: "pod-one", PidMode: mode,
		Interfaces: []*api.Interface{{Name: "eth0", Mac: podMAC, Mtu: 1400, Addresses: []string{"10.0.2.15/24", "fd00::15/64"}}},
		Routes: []*api.Route{
			{Destination: "10.0.2.0/24", Interface: "eth0", Source: "10.0.2.15"}, {Destination: "fd00::/64", Interface: "eth0"},
			{Gateway: "10.0.2.2", Interface: "eth0"}, {Destination: "10.9.0.0/16", Gateway: "192.0.2.1", Interface: "eth0"},
			{Destination: "10.8.0.0/16", Gateway: "fd00::1", Interface: "eth0"},
		},
		Dns:       &api.DNS{Servers: []string{"10.0.2.3"}, Searches: []string{"svc.local"}, Options: []string{"ndots:5"}},
		Sysctls:   map[string]string{"net.core.somaxconn": "1234", "kernel.shm_rmid_forced": "1"},
		UnixNanos: time.Now().UnixNano(), Entropy: bytes.Repeat([]byte{7}, 64),
		HostAliases: []*api.HostAlias{{Address: "192.0.2.9", Names: []string{"db"}}},
	})
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Logf("sandbox is set up %v after the start of QEMU", time.Since(v.started))
	for _, s := range r.Steps {
		v.t.Logf("sandbox: %s %v", s.Name, time.Duration(s.Nanos))
	}
}

// spec is what the CRI front would write, for the probe.
func spec(args ...string) *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE", "CAP_MKNOD"}
	return &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{},
		Process: &specs.Process{
			Args: append([]string{"/probe"}, args...), Cwd: "/", Env: []string{"PATH=/bin:/", "COLOUR=blue"}, NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
			{Destination: "/dev/shm", Source: "agent://shm", Options: []string{"rbind", "rw"}},
			{Destination: "/etc/resolv.conf", Source: "agent://resolv.conf", Options: []string{"rbind", "rw"}},
			{Destination: "/etc/hosts", Source: "agent://hosts", Options: []string{"rbind", "rw"}},
			{Destination: "/etc/hostname", Source: "agent://hostname", Options: []string{"rbind", "rw"}},
		},
		Linux: &specs.Linux{
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys"},
			ReadonlyPaths: []string{"/proc/sys"},
		},
	}
}

func (v *vm) create(r *api.CreateContainerRequest, s *specs.Spec) (*api.CreateContainerResponse, error) {
	v.t.Helper()
	b, err := json.Marshal(s)
	if err != nil {
		v.t.Fatal(err)
	}
	r.Spec = b
	return v.agent.CreateContainer(v.ctx(), r)
}

// stream opens a data stream.
func (v *vm) stream(h api.Header) (*api.Stream, error) {
	v.t.Helper()
	conn, err := v.device.Dial(v.ctx(), api.PortData)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(60 * time.Second))
	return api.Open(conn, h)
}

// first reads until want has come, bounded by the stream's deadline.
func (v *vm) first(s *api.Stream, want string) {
	v.t.Helper()
	var got []byte
	buf := make([]byte, 1024)
	for !strings.Contains(string(got), want) {
		n, err := s.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil {
			v.t.Fatalf("stream ended before %q: %q: %v", want, got, err)
		}
	}
}

// output is what a process writes to one of its streams.
func (v *vm) output(k api.Kind, id, exec string) func() string {
	v.t.Helper()
	s, err := v.stream(api.Header{Kind: k, Container: id, Exec: exec})
	if err != nil {
		v.t.Fatalf("stream %v of %s/%s: %v", k, id, exec, err)
	}
	var b []byte
	var rerr error
	var done sync.WaitGroup
	done.Go(func() { b, rerr = io.ReadAll(s); s.Close() })
	return func() string {
		v.t.Helper()
		done.Wait()
		if rerr != nil {
			v.t.Errorf("stream %v of %s/%s: %v", k, id, exec, rerr)
		}
		return string(b)
	}
}

// exec runs a command in a container and returns its output and exit code.
func (v *vm) exec(id, execID string, args ...string) (string, int32) {
	v.t.Helper()
	if _, err := v.agent.Exec(v.ctx(), &api.ExecRequest{Id: id, ExecId: execID, Args: args}); err != nil {
		v.t.Fatalf("exec %q: %v", args, err)
	}
	out, errs := v.output(api.Stdout, id, execID), v.output(api.Stderr, id, execID)
	w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: id, ExecId: execID})
	if err != nil {
		v.t.Fatal(err)
	}
	text := out() + errs()
	if _, err := v.agent.RemoveExec(v.ctx(), &api.RemoveExecRequest{Id: id, ExecId: execID}); err != nil {
		v.t.Error(err)
	}
	return text, w.ExitCode
}

func wantContains(t *testing.T, what, got string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("%s: got %q, want %q in it", what, got, w)
		}
	}
}

func wantReset(t *testing.T, err error, text string) {
	t.Helper()
	var r *api.ResetError
	if !errors.As(err, &r) || !strings.Contains(r.Reason, text) {
		t.Errorf("got %v, want a refusal with %q", err, text)
	}
}
