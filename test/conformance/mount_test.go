//go:build linux

package conformance_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

// volume mounts a directory or file of the host.
func volume(host, container string, readonly bool) cri.Option {
	return cri.Mount(&runtimeapi.Mount{HostPath: host, ContainerPath: container, Readonly: readonly})
}

func TestMounts(t *testing.T) {
	p := sharedPodOf(t)
	dir := directory(t)
	for _, d := range []string{"rw", "ro"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o777); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, d, "there"), "from the host\n")
	}
	if err := os.MkdirAll(filepath.Join(dir, "rw", "sub", "path"), 0o777); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "single"), "one\n")
	writeFile(t, filepath.Join(dir, "secret"), "not shared\n")
	if err := os.Symlink("rw", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	id := p.Start(t, "volumes", cri.AsRoot, cri.Command("/bin/sleep", "infinity"),
		volume(dir+"/rw", "/rw", false), volume(dir+"/ro", "/ro", true), volume(dir+"/link", "/linked", false),
		volume(dir+"/single", "/etc/single", true), volume(dir+"/rw/sub/path", "/sub", false), volume(dir+"/single", "/rw/single", false))
	t.Run("what is on the host is in the container, also through a symlink", func(t *testing.T) {
		if got := p.Output(t, id, "/bin/cat", "/rw/there", "/ro/there", "/linked/there", "/etc/single"); got != strings.Repeat("from the host\n", 3)+"one\n" {
			t.Errorf("%q", got)
		}
	})
	t.Run("what the container writes is on the host", func(t *testing.T) {
		p.Output(t, id, "/bin/write", "/rw/new", "from the pod")
		if b, err := os.ReadFile(dir + "/rw/new"); err != nil || string(b) != "from the pod\n" {
			t.Errorf("%q, %v", b, err)
		}
	})
	t.Run("subPath: a directory within a volume", func(t *testing.T) {
		p.Output(t, id, "/bin/write", "/sub/deep", "in it")
		if b, err := os.ReadFile(dir + "/rw/sub/path/deep"); err != nil || string(b) != "in it\n" {
			t.Errorf("%q, %v", b, err)
		}
		if got := p.Output(t, id, "/bin/cat", "/rw/sub/path/deep"); got != "in it\n" {
			t.Errorf("%q", got)
		}
	})
	t.Run("read-only is", func(t *testing.T) {
		for _, path := range []string{"/ro/new", "/ro/there", "/etc/single"} {
			if r := p.Do(t, id, "/bin/write", path, "x"); r.Code == 0 || !strings.Contains(r.Stderr, "read-only") {
				t.Errorf("write %s: %+v", path, r)
			}
		}
	})
	t.Run("a single file's updates in place are seen, its folder is not", func(t *testing.T) { // T30
		writeFile(t, filepath.Join(dir, "single"), "two\n")
		if got := p.Output(t, id, "/bin/cat", "/etc/single"); got != "two\n" {
			t.Errorf("%q", got)
		}
		if got := p.Output(t, id, "/bin/ls", "/rw"); strings.Contains(got, "secret") {
			t.Errorf("%s", got)
		}
	})
	t.Run("files made later are seen", func(t *testing.T) {
		writeFile(t, filepath.Join(dir, "rw", "later"), "later\n")
		if got := p.Output(t, id, "/bin/cat", "/rw/later"); got != "later\n" {
			t.Errorf("%q", got)
		}
	})
	t.Run("emptyDir: two containers write to one directory", func(t *testing.T) {
		if r := p.Run(t, "second", cri.AsRoot, cri.FreshLog, volume(dir+"/rw", "/data", false), cri.Command("/bin/write", "/data/second", "me too")); r.Code != 0 {
			t.Fatalf("%+v", r)
		}
		if got := p.Output(t, id, "/bin/cat", "/rw/second"); got != "me too\n" {
			t.Errorf("%q", got)
		}
	})
	t.Run("the termination log is the container's to write and the host's to read", func(t *testing.T) {
		log := filepath.Join(dir, "termination")
		writeFile(t, log, "")
		if err := os.Chmod(log, 0o666); err != nil {
			t.Fatal(err)
		}
		r := p.Run(t, "says-why", cri.FreshLog, volume(log, "/dev/termination-log", false), cri.Command("/bin/write", "/dev/termination-log", "no reason"))
		if b, err := os.ReadFile(log); err != nil || string(b) != "no reason\n" || r.Code != 0 {
			t.Errorf("%q, %v, %+v", b, err, r)
		}
	})
	t.Run("mount_options are the mount's", func(t *testing.T) {
		st, err := suite.Status(cri.Timeout(t, cri.CallTimeout), &runtimeapi.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if !st.GetFeatures().GetMountOptions() {
			t.Skip("the runtime says that it has none")
		}
		mounts := p.Run(t, "options", cri.FreshLog, volume(dir+"/rw", "/plain", false), cri.Command("/bin/cat", "/proc/self/mounts"),
			cri.Mount(&runtimeapi.Mount{HostPath: dir + "/rw", ContainerPath: "/options", MountOptions: []string{"noexec", "nosuid"}}))
		var plain, options string
		for line := range strings.Lines(mounts.Stdout) {
			switch f := strings.Fields(line); f[1] {
			case "/plain":
				plain = f[3]
			case "/options":
				options = f[3]
			}
		}
		if plain == "" || strings.Contains(plain, "noexec") || !strings.Contains(options, "noexec") || !strings.Contains(options, "nosuid") {
			t.Errorf("without %q, with %q: %+v", plain, options, mounts)
		}
	})
	t.Run("a missing host path is refused", func(t *testing.T) { // T29
		ctr, err := p.CreateContext(t.Context(), "missing", volume(dir+"/nothing", "/mnt", false))
		if err == nil {
			p.RemoveByID(t, ctr)
			t.Error("it was created")
		}
	})
}

// configMaps and secrets: the kubelet writes a new directory and swaps a symlink.
func TestConfigMapUpdates(t *testing.T) { // T31
	p := sharedPodOf(t)
	dir := directory(t)
	update := func(i int) {
		t.Helper()
		version := fmt.Sprintf("..%d", i)
		if err := os.Mkdir(filepath.Join(dir, version), 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, version, "key"), fmt.Sprintf("value %d\n", i))
		tmp := filepath.Join(dir, "..data_tmp")
		if err := os.Symlink(version, tmp); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
		if i > 0 { // at once, as a kubelet does
			if err := os.RemoveAll(filepath.Join(dir, fmt.Sprintf("..%d", i-1))); err != nil {
				t.Fatal(err)
			}
		}
	}
	update(0)
	if err := os.Symlink("..data/key", filepath.Join(dir, "key")); err != nil {
		t.Fatal(err)
	}
	id := p.Start(t, "config", cri.AsRoot, cri.Command("/bin/sleep", "infinity"), volume(dir, "/config", true))
	shows := func(want string) func() error {
		return func() error {
			if r := p.Do(t, id, "/bin/cat", "/config/key"); r.Code != 0 || r.Stdout != want {
				return fmt.Errorf("%+v, want %q", r, want)
			}
			return nil
		}
	}
	cri.Eventually(t, 2*time.Second, "the value", shows("value 0\n"))
	update(1)
	cri.Eventually(t, 2*time.Second, "the new value", shows("value 1\n"))

	const last = 1000
	reader := p.Start(t, "reader", cri.AsRoot, cri.Command("/app/web", "reread", "/config/key", fmt.Sprintf("value %d", last)), volume(dir, "/config", true))
	for i := 2; i <= last; i++ {
		update(i)
		time.Sleep(5 * time.Millisecond)
	}
	cri.Eventually(t, 2*time.Second, "the last value", shows(fmt.Sprintf("value %d\n", last)))
	st := p.WaitExit(t, reader, 5*time.Second)
	if log := cri.ReadLog(t, st.GetLogPath()); st.GetExitCode() != 0 {
		t.Errorf("the reader: %+v", log)
	} else {
		t.Logf("the reader saw %s", log.Stdout)
	}
}

// mountTmpfs mounts a tmpfs with a file in it on the host for one test.
func mountTmpfs(t *testing.T, path string) {
	t.Helper()
	if err := os.Mkdir(path, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("conformance", path, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, 0); err != nil {
			t.Errorf("unmount %s: %v", path, err) // T34: a pod still uses it
		}
	})
	writeFile(t, filepath.Join(path, "inside"), "inside\n")
}

// sharedMount is a directory whose mounts propagate, whatever those of the
// test's own root do.
func sharedMount(t *testing.T) string {
	t.Helper()
	dir := directory(t)
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestMountPropagation(t *testing.T) { // T2
	p := sharedPodOf(t)
	for _, c := range []struct {
		promise string
		mode    runtimeapi.MountPropagation
		seen    bool
	}{
		{"PRIVATE: a later mount of the host is not seen", runtimeapi.MountPropagation_PROPAGATION_PRIVATE, false},
		{"HOST_TO_CONTAINER: it is", runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, true},
	} {
		t.Run(c.promise, func(t *testing.T) {
			dir := sharedMount(t)
			id := p.Create(t, "propagation", cri.FreshLog, cri.AsRoot, cri.Command("/bin/sleep", "infinity"),
				cri.Mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/mnt", Propagation: c.mode}))
			p.StartByID(t, id)
			// T34: when the container is gone, what it saw can be unmounted.
			defer p.RemoveByID(t, id)
			mountTmpfs(t, filepath.Join(dir, "later"))
			cri.Eventually(t, 3*time.Second, "propagation", func() error {
				r := p.Do(t, id, "/bin/cat", "/mnt/later/inside")
				if got := r.Stdout == "inside\n"; got != c.seen {
					return fmt.Errorf("seen %v, want %v: %+v", got, c.seen, r)
				}
				return nil
			})
		})
	}
}

func TestReadOnlyMounts(t *testing.T) {
	p := sharedPodOf(t)
	dir := directory(t)
	mountTmpfs(t, filepath.Join(dir, "below"))
	for _, c := range []struct {
		promise   string
		mount     *runtimeapi.Mount
		writeable bool // what is mounted below
		refused   bool
	}{
		{"readonly leaves mounts below as they are", &runtimeapi.Mount{Readonly: true}, true, false},
		{"recursive_read_only makes them read-only", &runtimeapi.Mount{Readonly: true, RecursiveReadOnly: true}, false, false},
		{"recursive_read_only needs readonly", &runtimeapi.Mount{RecursiveReadOnly: true}, false, true},
		{"recursive_read_only needs private propagation", &runtimeapi.Mount{Readonly: true, RecursiveReadOnly: true, Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}, false, true},
	} {
		t.Run(c.promise, func(t *testing.T) {
			c.mount.HostPath, c.mount.ContainerPath = dir, "/mnt"
			id, err := p.CreateAndStart(t.Context(), "read-only", cri.FreshLog, cri.AsRoot, cri.Command("/bin/sleep", "infinity"), cri.Mount(c.mount))
			if id != "" {
				defer p.RemoveByID(t, id)
			}
			if c.refused {
				if err == nil {
					t.Error("it was created")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if r := p.Do(t, id, "/bin/write", "/mnt/top", "x"); r.Code == 0 {
				t.Error("the top is writable")
			}
			if r := p.Do(t, id, "/bin/write", "/mnt/below/x", "x"); (r.Code == 0) != c.writeable {
				t.Errorf("below: %+v, want writable %v", r, c.writeable)
			}
		})
	}
}
