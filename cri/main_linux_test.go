package cri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cri-vz/cri-vz/imageservice"
	"github.com/cri-vz/cri-vz/sandbox"
	"github.com/cri-vz/cri-vz/sandbox/network"
	"github.com/cri-vz/cri-vz/sandbox/shim"
	"github.com/cri-vz/cri-vz/sandbox/shim/shimtest"
	"github.com/cri-vz/cri-vz/test/images"
)

// TestMain is the shim, too: the pods of testServer run this binary.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "fake-shim" {
		c, err := shim.ReadConfig(os.Args[2])
		if err == nil {
			err = shim.Run(c, &shimtest.Driver{})
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// testServer is a server on a socket whose pods are real but for their guests,
// which shimtest acts, with one image.
type testServer struct {
	*Server
	dir  string // private, for host paths
	conn *grpc.ClientConn
}

// testImageRef is the image of a testServer.
const testImageRef = "docker.io/library/test:1"

func newTestServer(t *testing.T) *testServer {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test starts shims in mount namespaces of their own: run it as root (make test does)")
	}
	dir, err := os.MkdirTemp("/tmp", "cvz") // short: sockets lie in it (T14)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	root := filepath.Join(dir, "root")
	// Nothing leaves this machine.
	hub := filepath.Join(dir, "certs.d", "docker.io")
	if err := errors.Join(os.MkdirAll(hub, 0o755), os.WriteFile(filepath.Join(hub, "hosts.toml"), []byte("server = \"http://127.0.0.1:1\"\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	store, err := imageservice.Open(imageservice.Config{Root: filepath.Join(root, "images"), RegistryConfigDir: filepath.Join(dir, "certs.d"), Arch: runtime.GOARCH})
	if err != nil {
		t.Fatal(err)
	}
	loadTestImage(t, store, dir)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	nw := &testNetwork{up: make(map[string]bool)}
	cgroups := "cri-vz-test-" + filepath.Base(dir)
	pods, err := sandbox.Open(ctx, sandbox.Options{
		Root: root, Run: filepath.Join(dir, "run"),
		Guest:   func(string) (sandbox.Guest, error) { return sandbox.Guest{Kernel: "/k", Initrd: "/i"}, nil },
		Scratch: func(path string) error { return os.WriteFile(path, nil, 0o600) },
		Network: nw, Boots: 2,
		Classes:     map[string]sandbox.Class{"": {MemoryBytes: 1 << 20, ReserveBytes: 1 << 20}, "other": {MemoryBytes: 1 << 20, ReserveBytes: 1 << 20}},
		ShimCommand: []string{self, "fake-shim"},
		CgroupRoot:  cgroups,
	})
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Options{
		Pods: pods, Images: store, NetworkStatus: func(context.Context) error { return nil }, ImageRoot: filepath.Join(root, "images"),
		Spool: filepath.Join(dir, "spool"), Handlers: []string{"other"}, Version: "test",
		StreamAddress: "127.0.0.1:0", LogRoot: filepath.Join(root, "logs"),
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "s"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var errs []error
		for _, p := range pods.List() {
			errs = append(errs, p.Remove(context.Background()))
		}
		errs = append(errs, conn.Close())
		cancel()
		errs = append(errs, <-served, pods.Close(), store.Close())
		if err := errors.Join(errs...); err != nil {
			t.Errorf("clean up: %v", err)
		}
		if left, _ := filepath.Glob(filepath.Join(root, "pods", "*")); len(left) > 0 {
			t.Errorf("records left: %v", left)
		}
		if len(nw.up) > 0 {
			t.Errorf("networks left: %v", nw.up)
		}
		roots, _ := filepath.Glob("/sys/fs/cgroup/*/" + cgroups)
		for _, r := range append(roots, filepath.Join("/sys/fs/cgroup", cgroups)) {
			if err := os.Remove(r); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Errorf("cgroup left: %v", err)
			}
		}
	})
	return &testServer{Server: s, dir: dir, conn: conn}
}

func loadTestImage(t *testing.T, store *imageservice.Store, dir string) {
	t.Helper()
	layer, err := images.Layer(images.File("app", 0o755, "x"))
	if err != nil {
		t.Fatal(err)
	}
	img, err := images.Image(runtime.GOARCH, v1.Config{Cmd: []string{"sleep"}}, layer)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "image.tar")
	if err := images.SaveDockerArchive(path, testImageRef, img); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := store.Load(t.Context(), f, nil); err != nil {
		t.Fatal(err)
	}
}

// testNetwork gives every pod the same address, and remembers who has it.
type testNetwork struct {
	mu sync.Mutex
	up map[string]bool
}

func (n *testNetwork) Prepare(_ context.Context, p network.Pod) (*network.NIC, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.up[p.ID] = true
	return nil, nil
}

func (n *testNetwork) SetUp(context.Context, string) (*network.Result, error) {
	return &network.Result{Interface: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.7/24")}}, nil
}

func (n *testNetwork) OpenTap(string) (*os.File, error) { return nil, nil }

func (n *testNetwork) TearDown(_ context.Context, id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.up, id)
	return nil
}

func (n *testNetwork) Pods() ([]string, error) { return nil, nil }
