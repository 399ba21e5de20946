package sandbox

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/guest/image"
	"github.com/cri-vz/cri-vz/sandbox/network"
	"github.com/cri-vz/cri-vz/sandbox/network/frameswitch"
	"github.com/cri-vz/cri-vz/sandbox/scratch"
	"github.com/cri-vz/cri-vz/sandbox/shim"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/shim/shimtest"
)

// TestMain is the shim, too: the tests' pods run this binary.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "switch" {
		os.Exit(frameswitch.Main(os.Args[2:]))
	}
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case "shim":
			os.Exit(shim.Main(os.Args[2:]))
		case "fake-shim":
			os.Exit(fakeShim(os.Args[2], &shimtest.Driver{}))
		case "dhcp-shim", "same-address-shim":
			os.Exit(dhcpShim(os.Args[2], os.Args[1] == "same-address-shim"))
		case "slow-boot-shim":
			os.Exit(fakeShim(os.Args[2], &shimtest.Driver{Hang: 1}))
		case "no-boot-shim":
			os.Exit(fakeShim(os.Args[2], &shimtest.Driver{Hang: 99}))
		}
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests start shims in mount namespaces of their own and VMs: run them as root")
		os.Exit(1)
	}
	code := m.Run()
	if code == 0 {
		// A frame switch outlives its pods by some seconds.
		if err := goleak.Find(goleak.IgnoreAnyFunction("github.com/cri-vz/cri-vz/sandbox/network/frameswitch.Process.Ensure.func1")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// fakeShim is a real shim process whose guests are not real.
func fakeShim(podDir string, d *shimtest.Driver) int {
	c, err := shim.ReadConfig(podDir)
	if err == nil {
		err = shim.Run(c, d)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// guestArch is the guests' architecture, which another driver may change.
var guestArch = runtime.GOARCH

// built is what all tests with VMs share: a guest with this tree's agent and a
// layer with the test program.
var built struct {
	once  sync.Once
	dir   string
	guest Guest
	layer string
	err   error
}

// guestAndLayer builds both once; the kernel comes from the guest directory,
// or from the distribution if there is none.
func guestAndLayer(t testing.TB) (Guest, string) {
	t.Helper()
	built.once.Do(func() {
		built.err = func() error {
			dir, err := os.MkdirTemp("", "cri-vz-sandbox-test-")
			if err != nil {
				return err
			}
			built.dir = dir
			for _, b := range [][3]string{{"agent", "../cmd/cri-vz-agent", guestArch}, {"app", "./testdata/app", guestArch}, {"amd64", "./testdata/app", "amd64"}} {
				cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, b[0]), b[1])
				cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+b[2])
				if out, err := cmd.CombinedOutput(); err != nil {
					return fmt.Errorf("build %s: %w\n%s", b[1], err, out)
				}
			}
			guests, err := image.DefaultDir()
			if err != nil {
				return err
			}
			o := image.Options{Dir: guests, Arch: guestArch, Agent: filepath.Join(dir, "agent"), Kind: image.KindFast}
			g, err := image.Build(context.Background(), o)
			if err != nil { // nobody built that kernel
				o.Kind = image.KindStock
				g, err = image.Build(context.Background(), o)
			}
			if err != nil {
				return err
			}
			built.guest = Guest{Arch: g.Arch, Kernel: g.KernelPath, Initrd: g.InitrdPath, Cmdline: g.Cmdline}
			built.layer = filepath.Join(dir, "layer.ext4")
			return makeLayer(built.layer, filepath.Join(dir, "app"), filepath.Join(dir, "amd64"))
		}()
	})
	if built.err != nil {
		t.Fatalf("prepare VMs: %v", built.err)
	}
	return built.guest, built.layer
}

// makeLayer is an ext4 image with programs in / and the directories that mounts need.
func makeLayer(path string, programs ...string) error {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, d := range []string{"proc/", "sys/", "dev/", "etc/", "tmp/", "data/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755}); err != nil {
			return err
		}
	}
	for _, program := range programs {
		b, err := os.ReadFile(program)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: filepath.Base(program), Mode: 0o755, Size: int64(len(b))}); err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return tar2ext4.ConvertTarToExt4(&buf, f, tar2ext4.MaximumDiskSize(1<<30))
}

// env is a root with pods.
type env struct {
	t    testing.TB
	o    Options
	pods *Pods
}

// newVMEnv has real VMs, and a network in a namespace of its own.
func newVMEnv(t testing.TB) *env {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil && runtime.GOARCH == "amd64" {
		t.Fatalf("tests of real VMs need QEMU (apt install qemu-system-x86): %v", err)
	}
	guest, _ := guestAndLayer(t)
	dir := shortTemp(t)
	ns := filepath.Join(dir, "node")
	if err := network.CreateNetns(ns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = network.DeleteNetns(ns) })
	nw, err := network.New(network.Config{
		ConfDir: filepath.Join(dir, "no-cni"), StateDir: filepath.Join(dir, "net"), RunDir: filepath.Join(dir, "netrun"),
		NodeNetns: ns, Subnets: []netip.Prefix{netip.MustParsePrefix("10.99.0.0/24")},
	})
	if err != nil {
		t.Fatal(err)
	}
	return newEnv(t, Options{
		Root: filepath.Join(dir, "root"), Run: filepath.Join(dir, "run"),
		Driver:  shim.Driver{Name: "qemu", Accel: "tcg"},
		Guest:   func(string) (Guest, error) { return guest, nil },
		Scratch: scratch.CreateScratch,
		Network: nw, Boots: 1,
		Classes:     map[string]Class{"": {MemoryBytes: 192 << 20}},
		ShimCommand: []string{self(t), "shim"},
		CgroupRoot:  "cri-vz-test-" + filepath.Base(dir),
	})
}

// newFakeEnv has real shim processes with guests that are not real.
func newFakeEnv(t testing.TB) *env {
	t.Helper()
	dir := shortTemp(t)
	return newEnv(t, Options{
		Root: filepath.Join(dir, "root"), Run: filepath.Join(dir, "run"),
		Guest: func(string) (Guest, error) { return Guest{Kernel: "/k", Initrd: "/i"}, nil },
		Scratch: func(path string) error {
			return os.WriteFile(path, nil, 0o600)
		},
		Network: &fakeNetwork{up: make(map[string]bool)}, Boots: 2,
		Classes:     map[string]Class{"": {MemoryBytes: 1 << 20, ReserveBytes: 1 << 20}},
		ShimCommand: []string{self(t), "fake-shim"},
		CgroupRoot:  "cri-vz-test-" + filepath.Base(dir),
		Timeouts:    shim.Timeouts{BootStall: shim.Duration(200 * time.Millisecond)},
	})
}

func newEnv(t testing.TB, o Options) *env {
	e := &env{t: t, o: o}
	e.open()
	t.Cleanup(func() {
		if e.pods == nil {
			e.open()
		}
		for _, p := range e.pods.List() {
			if t.Failed() {
				for _, f := range []string{shim.ConsoleFile, shim.LogFile} {
					b, _ := os.ReadFile(filepath.Join(p.dir, f))
					t.Logf("%s:\n%s", f, b[max(0, len(b)-3000):])
				}
			}
			if err := p.Remove(context.Background()); err != nil {
				t.Errorf("clean up: %v", err)
			}
		}
		e.close()
		entries, _ := os.ReadDir(filepath.Join(e.o.Root, "pods"))
		if len(entries) != 0 {
			t.Errorf("left behind: %v", entries)
		}
		left, _ := filepath.Glob("/sys/fs/cgroup/*/" + o.CgroupRoot + "/*")
		for _, l := range left {
			if st, err := os.Stat(l); err == nil && st.IsDir() {
				t.Errorf("left behind: %s", l)
			}
		}
		roots, _ := filepath.Glob("/sys/fs/cgroup/*/" + o.CgroupRoot)
		for _, r := range append(roots, filepath.Join("/sys/fs/cgroup", o.CgroupRoot)) {
			_ = os.Remove(r)
		}
	})
	return e
}

func (e *env) open() {
	e.t.Helper()
	p, err := Open(context.Background(), e.o)
	if err != nil {
		e.t.Fatal(err)
	}
	e.pods = p
}

// close is a daemon's end: pods live on.
func (e *env) close() {
	e.t.Helper()
	if err := e.pods.Close(); err != nil {
		e.t.Error(err)
	}
	e.pods = nil
}

func (e *env) run(name string) *Pod {
	e.t.Helper()
	p, err := e.pods.Run(e.t.Context(), podConfig(name), "")
	if err != nil {
		e.t.Fatalf("Run: %v", err)
	}
	return p
}

// create makes a container of the test program.
func (e *env) create(p *Pod, name string, change func(*CreateContainer), args ...string) *Container {
	e.t.Helper()
	c, err := p.CreateContainer(e.t.Context(), e.container(name, change, args...))
	if err != nil {
		e.t.Fatalf("CreateContainer: %v", err)
	}
	return c
}

func (e *env) container(name string, change func(*CreateContainer), args ...string) CreateContainer {
	cc := CreateContainer{
		Config: &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: name}},
		Spec:   testSpec(append([]string{"/app"}, args...)...),
		Layers: func(dir string) ([]string, error) {
			if built.layer == "" {
				return nil, nil
			}
			// A copy where a link can't be: the directories may be of two disks.
			dst := filepath.Join(dir, "layer.ext4")
			if _, err := os.Stat(dst); err == nil {
				return []string{"layer.ext4"}, nil
			}
			if os.Link(built.layer, dst) != nil {
				b, err := os.ReadFile(built.layer)
				if err != nil {
					return nil, err
				}
				if err := os.WriteFile(dst, b, 0o600); err != nil {
					return nil, err
				}
			}
			return []string{"layer.ext4"}, nil
		},
		LogPath: filepath.Join(e.o.Root, name+".log"),
	}
	if change != nil {
		change(&cc)
	}
	return cc
}

func (e *env) start(c *Container) *Container {
	e.t.Helper()
	if err := c.Start(e.t.Context()); err != nil {
		e.t.Fatalf("Start: %v", err)
	}
	return c
}

// await polls, because the package's only event for its users is a status.
func await(t testing.TB, what string, bound time.Duration, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(bound); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, bound)
		}
	}
}

func exited(c *Container) func() bool {
	return func() bool { return c.Status().Phase == shimapi.Phase_EXITED }
}

// exec runs a command to its end and returns its output.
func execIn(t testing.TB, c *Container, args ...string) (stdout, stderr string, code int32) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	e, err := c.Exec(ctx, &guestapi.ExecRequest{Args: args})
	if err != nil {
		t.Fatalf("Exec: %v", err)
	}
	defer e.Close()
	var out [2]string
	var wg sync.WaitGroup
	for i, k := range []guestapi.Kind{guestapi.Stdout, guestapi.Stderr} {
		s, err := e.Stream(ctx, k)
		if err != nil {
			t.Fatalf("open %v: %v", k, err)
		}
		defer s.Close()
		wg.Go(func() {
			b, err := io.ReadAll(s)
			if err != nil {
				t.Errorf("read %v: %v", k, err)
			}
			out[i] = string(b)
		})
	}
	code, err = e.Wait(ctx)
	if err != nil {
		t.Fatalf("Wait: %v", err)
	}
	wg.Wait()
	return out[0], out[1], code
}

func podConfig(name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata:  &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "test", Uid: name + "-uid"},
		Hostname:  name,
		DnsConfig: &runtimeapi.DNSConfig{Servers: []string{"192.0.2.53"}},
		Linux:     &runtimeapi.LinuxPodSandboxConfig{},
	}
}

func testSpec(args ...string) *specs.Spec {
	return &specs.Spec{
		Version: specs.Version,
		Process: &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/"}, Capabilities: &specs.LinuxCapabilities{}},
		Root:    &specs.Root{Path: "rootfs"},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.CgroupNamespace},
		}},
	}
}

// shortTemp is a directory whose sockets have short paths (T14).
func shortTemp(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "cvz")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return dir
}

func self(t testing.TB) string {
	t.Helper()
	p, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// fakeNetwork gives no address and remembers who has one.
type fakeNetwork struct {
	mu     sync.Mutex
	up     map[string]bool
	refuse error // of Prepare
	fail   error // of SetUp
	down   error // of TearDown
	none   bool  // no address
	// bound is how long the latest TearDown might have taken.
	bound time.Duration
}

func (n *fakeNetwork) Prepare(_ context.Context, p network.Pod) (*network.NIC, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.refuse != nil {
		return nil, n.refuse
	}
	n.up[p.ID] = true
	return nil, nil
}
func (n *fakeNetwork) SetUp(context.Context, string) (*network.Result, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fail != nil {
		return nil, n.fail
	}
	if n.none {
		return &network.Result{Interface: "eth0"}, nil
	}
	return &network.Result{Interface: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.7/24")}}, nil
}
func (n *fakeNetwork) OpenTap(string) (*os.File, error) { return nil, nil }
func (n *fakeNetwork) TearDown(ctx context.Context, id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.bound = 0
	if deadline, ok := ctx.Deadline(); ok {
		n.bound = time.Until(deadline)
	}
	if n.down != nil {
		return n.down
	}
	delete(n.up, id)
	return nil
}
func (n *fakeNetwork) Pods() ([]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var ids []string
	for id := range n.up {
		ids = append(ids, id)
	}
	return ids, nil
}

// processes of a pod: the shim and all its descendants.
func processesWith(t testing.TB, text string) []string {
	t.Helper()
	var found []string
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		b, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err == nil && strings.Contains(string(b), text) {
			found = append(found, filepath.Base(d)+" "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return found
}
