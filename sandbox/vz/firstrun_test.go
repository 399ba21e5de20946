//go:build (darwin && cgo) || fakevz

package vz

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
	"github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest"
)

// What nobody knows before it ran on a Mac; hack/mac-first-run runs these there. Here
// they run against the stand-in, so that they are known to test something.

// bootFirst starts a machine whose guest obeys commands.
func bootFirst(t *testing.T, change func(*vmm.Config)) (vmm.Machine, *vmmtest.Client) {
	t.Helper()
	m, err := newDriver(t).New(t.Context(), firstConfig(t, change))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	start := time.Now()
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	c := vmmtest.Await(t, m)
	t.Logf("FIGURE: boot to the first answer %.2f s", time.Since(start).Seconds())
	return m, c
}

func firstConfig(t *testing.T, change func(*vmm.Config)) vmm.Config {
	t.Helper()
	g := guest(t)
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	console, err := os.Create(filepath.Join(dir, "console"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if b, err := os.ReadFile(console.Name()); t.Failed() && err == nil {
			t.Logf("console: %d bytes\n%s", len(b), b[max(0, len(b)-4096):])
		}
		_ = console.Close()
	})
	c := vmm.Config{
		ID: "first-run", Arch: g.Arch, Kernel: g.Kernel, Initrd: vmmtest.WithInit(t, g.Initrd, vmmtest.Init(t, g.Arch)), Cmdline: g.Cmdline,
		CPUs: 1, MemoryBytes: 256 << 20, Console: console, RunDir: dir,
	}
	if change != nil {
		change(&c)
	}
	return c
}

// Experiment 1: the image boots directly, and hvc0 shows what it says.
func TestFirstRun1Boot(t *testing.T) {
	var console string
	_, c := bootFirst(t, func(c *vmm.Config) { console = c.Console.Name() })
	c.Do(t, "console 10 on hvc0")
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if b, err := os.ReadFile(console); err == nil && bytes.Count(b, []byte("on hvc0")) == 10 {
			t.Logf("FIGURE: %d bytes on hvc0", len(b))
			return
		}
		if time.Now().After(end) {
			t.Fatal("hvc0 does not show what the guest says")
		}
	}
}

// Experiment 2: a hard-linked layer that appears after boot can be mounted from the
// share, file-backed, and how fast it is.
func TestFirstRun2Layer(t *testing.T) {
	store, layers := t.TempDir(), t.TempDir()
	_, c := bootFirst(t, func(c *vmm.Config) {
		c.Shares = []vmm.Share{{Tag: "layers", Dir: layers, ReadOnly: true}}
	})
	at := c.Do(t, "mount layers")
	c.Do(t, "list %s", at) // so that the guest may remember what is not there
	const size = 64 << 20
	path := filepath.Join(store, "layer.ext4")
	makeLayer(t, path, size)
	if err := os.Link(path, filepath.Join(layers, "layer.ext4")); err != nil {
		t.Fatal(err)
	}
	root := c.Do(t, "mountlayer %s/layer.ext4", at)
	start := time.Now()
	if got := c.Do(t, "size %s/content", root); got != strconv.Itoa(size) {
		t.Fatalf("the layer's file has %s bytes, want %d", got, size)
	}
	t.Logf("FIGURE: %.0f MB/s from a layer", size/1e6/time.Since(start).Seconds())
	if _, err := c.Try(t, "write %s/layer.ext4 poisoned", at); err == nil { // T1
		t.Error("the guest wrote to a layer")
	}
}

func makeLayer(t *testing.T, path string, size int) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := tar2ext4.ConvertTarToExt4(tarOf(t, "content", size), f, tar2ext4.MaximumDiskSize(1<<30)); err != nil {
		t.Fatal(err)
	}
}

// tarOf is an archive of one file.
func tarOf(t *testing.T, name string, size int) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(size)})
	if err == nil {
		_, err = w.Write(bytes.Repeat([]byte("0123456789abcdef"), size/16))
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return &b
}

// Experiment 3: a share that gets more directories keeps open files and mounts, and
// finds what is in them while it changes: all volumes are in such a share, and shares of
// several directories have been seen to lose names under load.
func TestFirstRun3LiveShare(t *testing.T) {
	first, second := t.TempDir(), t.TempDir()
	for dir, content := range map[string]string{first: "first", second: "second"} {
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	dirs := map[string]vmm.SharedDir{"first": {Dir: first}}
	m, c := bootFirst(t, func(c *vmm.Config) { c.Shares = []vmm.Share{{Tag: "live", Dirs: dirs}} })
	at := c.Do(t, "mount live")
	c.Do(t, "hold %s/first/file", at)
	dirs = map[string]vmm.SharedDir{"first": {Dir: first}, "second": {Dir: second}}
	start := time.Now()
	if err := m.(vmm.ShareSetter).SetShare(t.Context(), "live", dirs); err != nil {
		t.Fatal(err)
	}
	t.Logf("FIGURE: a directory more in %.1f ms", float64(time.Since(start).Microseconds())/1000)
	if got, err := c.Try(t, "held"); err != nil || got != "first" {
		t.Errorf("the open file: %q, %v", got, err)
	}
	for _, name := range []string{"second", "first"} {
		if got, err := c.Try(t, "read %s/%s/file", at, name); err != nil || got != name {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	const reads, changes = 500, 25
	failed := 0
	third := t.TempDir()
	for i := range reads {
		if i%(reads/changes) == 0 {
			delete(dirs, "third")
			if i%(2*reads/changes) == 0 {
				dirs["third"] = vmm.SharedDir{Dir: third}
			}
			if err := m.(vmm.ShareSetter).SetShare(t.Context(), "live", dirs); err != nil {
				t.Fatal(err)
			}
		}
		name := []string{"first", "second"}[i%2]
		// A new file each time, of which the guest remembers nothing.
		if err := os.WriteFile(filepath.Join(dirs[name].Dir, strconv.Itoa(i)), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := c.Try(t, "read %s/%s/%d", at, name, i); err != nil || got != name {
			if failed++; failed == 1 {
				t.Errorf("file %d of %s: %q, %v", i, name, got, err)
			}
		}
	}
	t.Logf("FIGURE: %d of %d new files not found while the share changed %d times", failed, reads, changes)
}

// Experiment 4, the half that needs no addresses: a NIC behind the NAT and one on a
// cable, in this order. hack/two-pods is the other half.
func TestFirstRun4TwoNICs(t *testing.T) {
	_, cable := frames(t)
	_, c := bootFirst(t, func(c *vmm.Config) {
		c.NICs = []vmm.NIC{{MAC: []byte{2, 0, 0, 0, 0, 1}, MTU: natMTU}, {MAC: []byte{2, 0, 0, 0, 0, 2}, MTU: framesMTU, Frames: cable}}
	})
	if got, want := c.Do(t, "nics"), "02:00:00:00:00:01/1500 02:00:00:00:00:02/1500"; got != want {
		t.Errorf("NICs %q, want %q", got, want)
	}
}

// Experiment 5: many machines at once, and none that a killed owner leaves counts
// against a limit.
func TestFirstRun5ManyMachines(t *testing.T) {
	n := 20
	if runtime.GOOS != "darwin" {
		n = 2 // emulated
	}
	start := func() (machines []vmm.Machine) {
		t.Helper()
		for i := range n {
			m, err := newDriver(t).New(t.Context(), firstConfig(t, func(c *vmm.Config) { c.Cmdline += " testinit=hang" }))
			if err == nil {
				t.Cleanup(func() { _ = m.Close() })
				err = m.Start(t.Context())
			}
			if err != nil {
				t.Fatalf("machine %d of %d: %v", i+1, n, err)
			}
			machines = append(machines, m)
		}
		return machines
	}
	// A process like a shim, which is killed with its machine.
	cmd := exec.Command(os.Args[0], "-test.run=^TestFirstRun5Owner$", "-test.v")
	tmp, err := os.MkdirTemp("", "own") // which it can't remove
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(tmp) })
	cmd.Env = append(os.Environ(), "CRI_VZ_FIRST_RUN_OWNER=1", "TMPDIR="+tmp)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	seen := make([]byte, 0, 4096)
	for buf := make([]byte, 512); !bytes.Contains(seen, []byte("owner: runs")); {
		k, err := out.Read(buf)
		if seen = append(seen, buf[:k]...); err != nil {
			t.Fatalf("owner of a machine: %v: %s", err, seen)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	begin := time.Now()
	for _, m := range start() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
	start()
	t.Logf("FIGURE: %d machines twice in %.1f s", n, time.Since(begin).Seconds())
}

// TestFirstRun5Owner is the process that experiment 5 kills.
func TestFirstRun5Owner(t *testing.T) {
	if os.Getenv("CRI_VZ_FIRST_RUN_OWNER") == "" {
		return
	}
	m, err := newDriver(t).New(t.Context(), firstConfig(t, func(c *vmm.Config) { c.Cmdline += " testinit=hang" }))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	fmt.Println("owner: runs")
	select {}
}

// Experiment 6: what becomes of a guest when the Mac sleeps. Its clock may be behind
// by as long as the sleep took, no more: that is what its shim puts right, as soon as
// it sees that the wall clock has gone on without the monotonic one.
func TestFirstRun6Sleep(t *testing.T) {
	m, c := bootFirst(t, nil)
	before := guestClock(t, c)
	began := time.Now()
	asleep := sleep(t, m)
	woken := time.Now()
	after := guestClock(t, c)
	t.Logf("FIGURE: the guest answers %d ms after the waking up", time.Since(woken).Milliseconds())
	// Without Round it would be the monotonic clocks' difference.
	wall := time.Now().Round(0).Sub(began.Round(0))
	lost := wall - after.Sub(before)
	t.Logf("FIGURE: of %s, %s of them asleep, the guest's clock lost %s", wall.Round(time.Second), asleep.Round(time.Second), lost.Round(time.Millisecond))
	if lost < -time.Second || lost > asleep+time.Second {
		t.Error("the sleep doesn't explain the guest's clock")
	}
}

// sleep puts the Mac to sleep, and returns when it is awake again.
var sleep = askForSleep

// askForSleep asks on the terminal: hack/mac-first-run keeps the output until the end.
func askForSleep(t *testing.T, _ vmm.Machine) (asleep time.Duration) {
	if os.Getenv("CRI_VZ_FIRST_RUN_SLEEP") == "" {
		t.Skip("NOT RUN: with CRI_VZ_FIRST_RUN_SLEEP=1, put the Mac to sleep for a minute when told")
	}
	tty, err := os.OpenFile("/dev/tty", os.O_WRONLY, 0)
	if err != nil {
		t.Fatalf("there is nobody to put the Mac to sleep: %v", err)
	}
	defer tty.Close()
	fmt.Fprintln(tty, "Put this Mac to sleep now, and wake it after a minute.")
	for began := time.Now(); asleep < 20*time.Second; time.Sleep(time.Second) {
		// The monotonic clock stands still while a Mac sleeps, the wall clock goes on.
		asleep = time.Now().Round(0).Sub(began.Round(0)) - time.Since(began)
		if time.Since(began) > 5*time.Minute {
			t.Fatal("no sleep of 20 s was seen in 5 minutes: the Mac was not put to sleep, or the monotonic clock goes on, and then shims don't see it either")
		}
	}
	return asleep
}

func guestClock(t *testing.T, c *vmmtest.Client) time.Time {
	t.Helper()
	n, err := strconv.ParseInt(strings.TrimSpace(c.Do(t, "clock")), 10, 64)
	if err != nil {
		t.Fatal(errors.Join(errors.New("the guest's clock"), err))
	}
	return time.Unix(0, n)
}
