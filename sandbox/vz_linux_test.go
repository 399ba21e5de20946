//go:build fakevz

package sandbox

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/network"
	"github.com/cri-vz/cri-vz/sandbox/scratch"
	"github.com/cri-vz/cri-vz/sandbox/shim"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// newVZEnv has the macOS driver, with the stand-in for the framework.
func newVZEnv(t *testing.T) *env {
	t.Helper()
	guestArch = "arm64"
	t.Setenv("FAKEVZ_ARCH", guestArch) // for the shim
	guest, _ := guestAndLayer(t)
	dir := shortTemp(t)
	// QEMU's NAT takes the framework's place.
	nat, err := network.NewNAT(filepath.Join(dir, "net"), filepath.Join(dir, "run"), self(t), "switch")
	if err != nil {
		t.Fatal(err)
	}
	return newEnv(t, Options{
		Root: filepath.Join(dir, "root"), Run: filepath.Join(dir, "run"),
		Driver:  shim.Driver{Name: shim.DriverVZ},
		Guest:   func(string) (Guest, error) { return guest, nil },
		Scratch: scratch.CreateScratch,
		Network: nat, Boots: 1,
		Classes:     map[string]Class{"": {MemoryBytes: 192 << 20}},
		ShimCommand: []string{self(t), "shim"},
		CgroupRoot:  "cri-vz-test-" + filepath.Base(dir),
		Timeouts:    shim.Timeouts{Boot: shim.Duration(2 * time.Minute)},
	})
}

// The framework has a balloon only: the shim inflates it for a moment.
func TestIdlePodOnVZGivesMemoryBack(t *testing.T) { testIdlePod(t, newVZEnv(t)) }

// A pod's life by the macOS driver, with the image that a Mac boots, the real agent, a
// container and volumes, against the stand-in for the framework. // T47, T50
func TestPodOnVZ(t *testing.T) {
	e := newVZEnv(t)
	t.Setenv("FAKEVZ_ROSETTA", filepath.Join(built.dir, "app"))
	start := time.Now()
	p := e.run("mac")
	t.Logf("ready after %.1f s", time.Since(start).Seconds())
	if st := p.Status(); !st.Ready || len(st.IPs) != 1 || st.IPs[0].String() != "10.0.2.15" { // T42
		t.Fatalf("status %+v", st)
	}

	t.Run("output and exit code", func(t *testing.T) {
		c := e.start(e.create(p, "echo", nil, "echo", "hello"))
		await(t, "exit", 20*time.Second, exited(c))
		b, _ := os.ReadFile(c.Status().LogPath)
		if s := c.Status(); s.ExitCode != 0 || !strings.Contains(string(b), "stdout F hello\n") {
			t.Errorf("status %+v, log %q", s, b)
		}
	})

	host := t.TempDir()
	for name, content := range map[string]string{"dir/f": "in a directory", "fixed/f": "read-only", "single": "a file", "neighbour": "a secret"} {
		path := filepath.Join(host, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	mounts := func(volumes ...*shimapi.Volume) func(*CreateContainer) {
		return func(cc *CreateContainer) {
			for _, v := range volumes {
				cc.Volumes = append(cc.Volumes, v)
				cc.Spec.Mounts = append(cc.Spec.Mounts, specs.Mount{
					Destination: "/data/" + v.Name, Type: "bind", Source: "volume://" + v.Name, Options: []string{"rbind"},
				})
			}
		}
	}
	read := func(c *Container, path string) string {
		t.Helper()
		out, errOut, code := execIn(t, c, "/app", "read", path)
		if code != 0 {
			return "error: " + errOut
		}
		return out
	}
	t.Run("volumes of a pod that runs", func(t *testing.T) {
		c := e.start(e.create(p, "vol", mounts(
			&shimapi.Volume{Name: "dir", HostPath: filepath.Join(host, "dir")},
			&shimapi.Volume{Name: "fixed", HostPath: filepath.Join(host, "fixed"), ReadOnly: true},
			&shimapi.Volume{Name: "single", HostPath: filepath.Join(host, "single")},
		), "sleep"))
		for path, want := range map[string]string{"/data/dir/f": "in a directory", "/data/fixed/f": "read-only", "/data/single": "a file"} {
			if got := read(c, path); got != want {
				t.Errorf("%s: %q, want %q", path, got, want)
			}
		}
		// T30: what is written in place shows, and the neighbours don't.
		f, err := os.OpenFile(filepath.Join(host, "single"), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString("A FILE"); err != nil {
			t.Fatal(err)
		}
		f.Close()
		await(t, "the file's new content", 5*time.Second, func() bool { return read(c, "/data/single") == "A FILE" })
		shared, err := filepath.Glob(filepath.Join(p.dir, shim.FilesDir, "*", "*"))
		if err != nil || len(shared) != 1 || filepath.Base(shared[0]) != shim.LinkedFile {
			t.Errorf("shared as single files: %q, %v", shared, err)
		}

		// Another container's volumes leave the first one's alone.
		second := e.start(e.create(p, "vol2", mounts(&shimapi.Volume{Name: "dir", HostPath: filepath.Join(host, "fixed")}), "sleep"))
		if got := read(second, "/data/dir/f"); got != "read-only" {
			t.Errorf("second container: %q", got)
		}
		if got := read(c, "/data/dir/f"); got != "in a directory" {
			t.Errorf("first container after the second's start: %q", got)
		}
		if err := c.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := read(second, "/data/dir/f"); got != "read-only" {
			t.Errorf("second container after the first's end: %q", got)
		}
		if left, _ := filepath.Glob(filepath.Join(p.dir, shim.FilesDir, "*")); len(left) != 0 {
			t.Errorf("left behind: %q", left)
		}
	})
	t.Run("a program for amd64, by Rosetta", func(t *testing.T) {
		c := e.start(e.create(p, "amd64", func(cc *CreateContainer) { cc.Spec.Process.Args = []string{"/amd64", "a", "b"} }))
		await(t, "exit", 20*time.Second, exited(c))
		if b, _ := os.ReadFile(c.Status().LogPath); !strings.Contains(string(b), "stdout F translated [/amd64 a b]\n") {
			t.Errorf("log %q", b)
		}
	})
	t.Run("emptyDir", func(t *testing.T) { testEmptyDir(t, e, p, mounts) })
	t.Run("network behind the NAT", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0") // which QEMU's NAT shows as the gateway
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			if c, err := l.Accept(); err == nil {
				_, _ = c.Write([]byte("from outside"))
				_ = c.Close()
			}
		}()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		c := e.start(e.create(p, "dial", nil, "dial", "10.0.2.2:"+port))
		await(t, "exit", 20*time.Second, exited(c))
		if b, _ := os.ReadFile(c.Status().LogPath); !strings.Contains(string(b), "stdout P from outside") && !strings.Contains(string(b), "stdout F from outside") {
			t.Errorf("log %q", b)
		}
	})
	t.Run("what can't be a volume", func(t *testing.T) {
		socket := filepath.Join(shortTemp(t), "sock")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		for path, want := range map[string]string{socket: "is a socket", filepath.Join(host, "none"): "doesn't exist"} { // T29
			_, err := p.CreateContainer(t.Context(), e.container("bad", mounts(&shimapi.Volume{Name: "v", HostPath: path}), "sleep"))
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", path, err, want)
			}
		}
	})
	t.Run("a daemon that restarts", func(t *testing.T) {
		e.close()
		e.open()
		again, err := e.pods.Get(p.ID())
		if err != nil || !again.Status().Ready {
			t.Fatalf("pod after a restart: %v", err)
		}
		p = again
	})
	if err := p.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := p.Status(); st.Ready {
		t.Errorf("ready after Stop: %+v", st)
	}
}

// An emptyDir is the guest's own: who owns files in it is the containers' business, of
// which the host's share knows nothing. // T47
func testEmptyDir(t *testing.T, e *env, p *Pod, mounts func(...*shimapi.Volume) func(*CreateContainer)) {
	kubelet := t.TempDir()
	dir := filepath.Join(kubelet, "pods", p.Config().Metadata.Uid, "volumes/kubernetes.io~empty-dir/cache")
	// As a kubelet makes them for a pod with fsGroup 2000.
	for _, d := range []string{dir, filepath.Join(dir, "sub")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.Chown(d, 0, 2000), os.Chmod(d, 0o777|os.ModeSetgid)); err != nil {
			t.Fatal(err)
		}
	}
	cache := &shimapi.Volume{Name: "cache", HostPath: dir}
	run := func(name string, change func(*CreateContainer), volumes ...*shimapi.Volume) *Container {
		t.Helper()
		return e.start(e.create(p, name, func(cc *CreateContainer) {
			mounts(volumes...)(cc)
			if change != nil {
				change(cc)
			}
		}, "sleep"))
	}
	asRoot := func(cc *CreateContainer) {
		caps := []string{"CAP_CHOWN"}
		cc.Spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	}
	inGroup := func(cc *CreateContainer) {
		uid, gid := int64(1001), int64(1001)
		cc.User = &guestapi.User{Uid: &uid, Gid: &gid, SupplementalGroups: []uint32{2000}}
	}
	app := func(c *Container, args ...string) string {
		t.Helper()
		out, errOut, code := execIn(t, c, append([]string{"/app"}, args...)...)
		if code != 0 {
			t.Errorf("%q: %s", args, errOut)
		}
		return out
	}
	first := run("writer", asRoot, cache)
	app(first, "write", "/data/cache/f", "shared")
	app(first, "chown", "/data/cache/f", "1000", "2000")
	second := run("reader", inGroup, cache, &shimapi.Volume{Name: "sub", HostPath: filepath.Join(dir, "sub")})
	if got := app(second, "stat", "/data/cache/f"); got != "644 1000 2000\n" {
		t.Errorf("the other container's file is %q", got)
	}
	app(second, "write", "/data/cache/own", "x")
	if got := app(first, "stat", "/data/cache/own"); got != "644 1001 2000\n" {
		t.Errorf("what is made by fsGroup's right alone is %q", got)
	}
	if got := app(second, "stat", "/data/cache"); got != "2777 0 2000\n" {
		t.Errorf("the directory is %q", got)
	}
	app(second, "write", "/data/sub/f", "below")
	if got := app(first, "read", "/data/cache/sub/f"); got != "below" {
		t.Errorf("by way of a subPath: %q", got)
	}
	// A container that is started anew finds it as it was.
	if err := first.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	again := run("again", nil, &shimapi.Volume{Name: "cache", HostPath: dir, ReadOnly: true})
	if got := app(again, "read", "/data/cache/f"); got != "shared" {
		t.Errorf("after a restart: %q", got)
	}
	if _, errOut, code := execIn(t, again, "/app", "write", "/data/cache/f", "x"); code == 0 || !strings.Contains(errOut, "read-only") {
		t.Errorf("writing where it is read-only: %d %q", code, errOut)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 || left[0].Name() != "sub" {
		t.Errorf("the host sees %v, %v", left, err)
	}
}
