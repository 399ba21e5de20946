// Package vmmtest is the conformance suite of package vmm, which every driver runs:
//
//	vmmtest.Run(t, newDriver, vmmtest.Guest{Arch: "amd64", Kernel: ..., Initrd: ...})
//
// The guests run the suite's own init (testinit), not the agent. Machines are booted
// as seldom as can be, and the suite prints how often and for how long.
package vmmtest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

const (
	commandPort = 1024 // testinit's, and the real agent's
	echoPort    = 1025
	deafPort    = 1026 // nobody listens there

	// bootTimeout is far beyond any boot, also of eight at once under emulation.
	bootTimeout = 60 * time.Second
	// soon bounds what takes milliseconds on an idle machine.
	soon = 10 * time.Second
)

// Guest is what the suite boots.
type Guest struct {
	// Arch is GOARCH's name.
	Arch string
	// Kernel and Initrd are boot files; the initramfs' /init is replaced by the
	// suite's, which loads the modules that its /modules.list names.
	Kernel, Initrd string
	// Cmdline is what the kernel needs beside the driver's console=.
	Cmdline string
	// NIC, if set, makes a NIC whose Tap or Frames the driver will own.
	NIC func(t *testing.T) vmm.NIC
	// LeaksOf names functions whose goroutines are somebody else's to end.
	LeaksOf []string
}

// Init builds the suite's init for arch and returns its path.
func Init(t testing.TB, arch string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "init")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest/testinit")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build testinit: %v\n%s", err, out)
	}
	return path
}

// WithInit returns the path of an initramfs like initrd, with /init replaced.
func WithInit(t testing.TB, initrd, init string) string {
	t.Helper()
	var out bytes.Buffer
	for _, f := range []string{initrd, init} {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if f == init {
			b = archive("init", b)
		}
		// The kernel unpacks one archive after the other, each from a multiple of 4.
		for out.Len()%4 != 0 {
			out.WriteByte(0)
		}
		out.Write(b)
	}
	path := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// archive is a cpio archive of one executable file
// (Documentation/driver-api/early-userspace/buffer-format.rst).
func archive(name string, content []byte) []byte {
	var b bytes.Buffer
	add := func(name string, mode int, content []byte) {
		fmt.Fprintf(&b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
			1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
		b.Write(content)
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
	}
	add(name, 0o100755, content)
	add("TRAILER!!!", 0, nil)
	return b.Bytes()
}

// suite is one run.
type suite struct {
	driver vmm.Driver
	guest  Guest
	caps   vmm.Capabilities
	boots  atomic.Int64
}

// Run tests the driver that newDriver returns with guest.
func Run(t *testing.T, newDriver func(t *testing.T) vmm.Driver, guest Guest) {
	guest.Initrd = WithInit(t, guest.Initrd, Init(t, guest.Arch))
	s := &suite{driver: newDriver(t), guest: guest}
	start := time.Now()
	// T46
	defer func() {
		t.Logf("%s %s %s: %d boots, %.1f s", s.driver.Name(), s.caps.Accelerator, guest.Arch, s.boots.Load(), time.Since(start).Seconds())
	}()
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	var err error
	if s.caps, err = s.driver.Capabilities(ctx, guest.Arch); err != nil {
		t.Fatalf("capabilities: %v", err)
	}
	// What a driver starts once and for all is no leak of a machine.
	s.newMachine(t, s.config(t)).startAndKill(t)
	noLeak := []goleak.Option{goleak.IgnoreCurrent()}
	for _, f := range guest.LeaksOf {
		noLeak = append(noLeak, goleak.IgnoreAnyFunction(f))
	}

	for _, test := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"bad configurations", s.badConfigs},
		{"before start", s.beforeStart},
		{"processes die", s.processesDie},
		{"boot hangs", s.bootHangs},
		{"life", s.life},
		{"kill", s.kill},
	} {
		ok := t.Run(test.name, func(t *testing.T) {
			before := resources(t)
			// After the machine's own clean-up, which was registered later.
			t.Cleanup(func() {
				if t.Failed() {
					return // a machine that failed half-way would only add noise
				}
				if err := goleak.Find(noLeak...); err != nil {
					t.Errorf("goroutines left behind: %v", err)
				}
				before.compare(t, resources(t))
			})
			test.run(t)
		})
		if !ok && test.name == "life" {
			t.Log("the rest would repeat this failure")
			return
		}
	}
}

// config is the least that boots.
func (s *suite) config(t *testing.T) vmm.Config {
	t.Helper()
	// Short, as sockets lie in it.
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		left, err := os.ReadDir(dir)
		if err != nil {
			t.Error(err)
		}
		for _, e := range left {
			if e.Name() != "console" {
				t.Errorf("left behind in the run directory: %s", e.Name())
			}
		}
		_ = os.RemoveAll(dir)
	})
	console, err := os.Create(filepath.Join(dir, "console"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = console.Close()
		if b, err := os.ReadFile(console.Name()); t.Failed() && err == nil {
			t.Logf("console:\n%s", b[max(0, len(b)-4096):])
		}
	})
	return vmm.Config{
		ID: "conformance", Arch: s.guest.Arch,
		Kernel: s.guest.Kernel, Initrd: s.guest.Initrd, Cmdline: s.guest.Cmdline,
		CPUs: 1, MemoryBytes: 256 << 20, Console: console, RunDir: dir,
	}
}

// machine is a Machine with what a test wants of it.
type machine struct {
	vmm.Machine
	suite *suite
}

// newMachine makes a machine that ends with the test.
func (s *suite) newMachine(t *testing.T, c vmm.Config) *machine {
	t.Helper()
	m, err := s.driver.New(t.Context(), c)
	if err != nil {
		t.Fatalf("new: %v", err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return &machine{m, s}
}

func (m *machine) start(t *testing.T) {
	t.Helper()
	m.suite.boots.Add(1)
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	if err := m.Start(ctx); err != nil {
		t.Fatalf("start: %v", err)
	}
}

func (m *machine) startAndKill(t *testing.T) {
	t.Helper()
	m.start(t)
	m.mustKill(t)
	if err := m.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

func (m *machine) mustKill(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	if err := m.Kill(ctx); err != nil {
		t.Fatalf("kill: %v", err)
	}
	select {
	case <-m.Done():
	default:
		t.Fatal("killed, but Done is open")
	}
	for _, pid := range m.PIDs() {
		if err := syscall.Kill(pid, 0); err == nil {
			t.Errorf("process %d is there after Kill", pid)
		}
	}
}

// waitReady returns a connection to the init's commands.
func (m *machine) waitReady(t testing.TB) *client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	for {
		conn, err := m.Dial(ctx, commandPort)
		if err == nil {
			t.Cleanup(func() { _ = conn.Close() })
			return &client{conn: conn, in: bufio.NewReader(conn)}
		}
		if ctx.Err() != nil || !refused(err) {
			t.Fatalf("guest is not ready: %v", err)
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-m.Done():
			t.Fatalf("machine died in its boot: %v", m.Err())
		}
	}
}

func (m *machine) waitDone(t *testing.T, within time.Duration) {
	t.Helper()
	select {
	case <-m.Done():
	case <-time.After(within):
		t.Fatalf("machine is not done after %s", within)
	}
}

func refused(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET)
}

// client sends commands to testinit.
type client struct {
	conn net.Conn
	in   *bufio.Reader
}

// try returns the result of a command, or the guest's error.
func (c *client) try(t testing.TB, format string, args ...any) (string, error) {
	t.Helper()
	line := fmt.Sprintf(format, args...)
	_ = c.conn.SetDeadline(time.Now().Add(bootTimeout))
	if _, err := fmt.Fprintln(c.conn, line); err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	reply, err := c.in.ReadString('\n')
	if err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	word, quoted, _ := strings.Cut(strings.TrimSpace(reply), " ")
	text, err := strconv.Unquote(quoted)
	if err != nil {
		t.Fatalf("%s: reply %q: %v", line, reply, err)
	}
	if word != "ok" {
		return "", errors.New(text)
	}
	return text, nil
}

func (c *client) do(t testing.TB, format string, args ...any) string {
	t.Helper()
	out, err := c.try(t, format, args...)
	if err != nil {
		t.Fatalf("guest: "+format+": %v", append(args, err)...)
	}
	return out
}

func (c *client) expect(t *testing.T, want, format string, args ...any) {
	t.Helper()
	if got := c.do(t, format, args...); got != want {
		t.Errorf("guest: %s = %q, want %q", fmt.Sprintf(format, args...), got, want)
	}
}

// beforeStart: a machine that never ran can be killed and closed.
func (s *suite) beforeStart(t *testing.T) {
	m := s.newMachine(t, s.config(t))
	if pids := m.PIDs(); len(pids) != 0 {
		t.Errorf("processes before Start: %v", pids)
	}
	m.mustKill(t)
	m.mustKill(t)
	if err := m.Err(); err != nil {
		t.Errorf("Err after Kill: %v", err)
	}
	if err := m.Start(t.Context()); err == nil {
		t.Error("a machine that was killed can be started")
	}
	closed := s.newMachine(t, s.config(t))
	if err := closed.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	select {
	case <-closed.Done():
	default:
		t.Error("closed, but Done is open")
	}

	// All at once, while it boots.
	busy := s.newMachine(t, s.config(t))
	var all sync.WaitGroup
	s.boots.Add(1)
	all.Go(func() { _ = busy.Start(t.Context()) })
	all.Go(func() { _ = busy.Kill(t.Context()) })
	all.Go(func() { _, _ = busy.Progress() })
	all.Go(func() { _ = busy.Close() })
	all.Go(func() { busy.PIDs() })
	all.Wait()
	busy.waitDone(t, soon)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	late := s.newMachine(t, s.config(t))
	if err := late.Start(ctx); err == nil {
		t.Error("Start succeeds without time")
	}
}

// processesDie: each process of a machine is one without which it is dead.
func (s *suite) processesDie(t *testing.T) {
	for i := 0; ; i++ {
		c := s.config(t)
		c.Shares = []vmm.Share{{Tag: "share", Dir: t.TempDir()}}
		m := s.newMachine(t, c)
		m.start(t)
		pids := m.PIDs()
		if i == len(pids) {
			return
		}
		if err := m.Start(t.Context()); err == nil {
			t.Error("started twice")
		}
		if err := syscall.Kill(pids[i], syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		m.waitDone(t, time.Second) // T12
		err := m.Err()
		if err == nil || !strings.Contains(err.Error(), "was killed by signal 9") {
			t.Errorf("process %d of %d was killed, Err: %v", i, len(pids), err)
		}
		t.Logf("Err: %v", err)
		if conn, err := m.Dial(t.Context(), commandPort); err == nil {
			_ = conn.Close()
			t.Error("a dead machine can be dialled")
		}
		for _, pid := range pids {
			if err := syscall.Kill(pid, 0); err == nil {
				t.Errorf("process %d is there after Done", pid)
			}
		}
		m.mustKill(t)
		if got := m.Err(); !errors.Is(got, err) {
			t.Errorf("Kill changed Err to %v", got)
		}
	}
}

// bootHangs: nothing ever listens in the guest.
func (s *suite) bootHangs(t *testing.T) { // T7
	c := s.config(t)
	c.Cmdline += " testinit=hang"
	m := s.newMachine(t, c)
	m.start(t)
	var last uint64
	for range 3 {
		now, err := m.Progress()
		if err != nil {
			t.Fatalf("progress: %v", err)
		}
		if now <= last {
			t.Errorf("a booting guest makes no progress: %d, then %d", last, now)
		}
		last = now
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		conn, err := m.Dial(ctx, commandPort)
		cancel()
		if err == nil {
			_ = conn.Close()
			t.Error("dialled a guest that doesn't listen")
		} else if !refused(err) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial: %v", err)
		}
		if took := time.Since(start); took > soon/2 {
			t.Errorf("dial took %s, with 300 ms to do it", took)
		}
		if refused(err) {
			time.Sleep(300 * time.Millisecond)
		}
	}
	m.mustKill(t)
	if err := m.Err(); err != nil {
		t.Errorf("Err after Kill: %v", err)
	}
}

// kill: of a guest that computes, and what becomes of its connections.
func (s *suite) kill(t *testing.T) {
	m := s.newMachine(t, s.config(t))
	m.start(t)
	c := m.waitReady(t)
	c.do(t, "spin")
	before, err := m.Progress()
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	if after, err := m.Progress(); err != nil || after <= before {
		t.Errorf("a busy guest makes no progress: %d, then %d, %v", before, after, err)
	}
	start := time.Now()
	m.mustKill(t)
	t.Logf("killed in %s", time.Since(start).Round(time.Millisecond))
	if err := m.Err(); err != nil {
		t.Errorf("Err after Kill: %v", err)
	}
	_ = c.conn.SetDeadline(time.Now().Add(soon))
	if _, err := c.in.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read from a dead guest: %v", err)
	}
}

// life is everything that a guest in good health shows, in one boot.
func (s *suite) life(t *testing.T) {
	c := s.config(t)
	c.CPUs = 2
	writable := filepath.Join(t.TempDir(), "writable")
	layers := filepath.Join(t.TempDir(), "layers")
	write(t, filepath.Join(writable, "from-host"), "host")
	write(t, filepath.Join(layers, "layer"), "intact")
	c.Shares = []vmm.Share{
		{Tag: "writable", Dir: writable},
		{Tag: "layers", Dir: layers, ReadOnly: true},
	}
	later := s.laterMounts(t, &c)
	live := s.liveShare(t, &c)
	full := s.fullDisk(t, &c)
	data := filepath.Join(t.TempDir(), "data")
	write(t, data, strings.Repeat("x", 1<<20))
	image := filepath.Join(t.TempDir(), "image")
	write(t, image, strings.Repeat("y", 1<<20))
	// As awkward as a serial can be.
	const serial = "data,a=b 4567890123!"
	c.Disks = append(c.Disks, vmm.Disk{Serial: serial, Path: data}, vmm.Disk{Serial: "image", Path: image, ReadOnly: true})
	if s.guest.NIC != nil {
		c.NICs = []vmm.NIC{s.guest.NIC(t)}
	}

	m := s.newMachine(t, c)
	m.start(t)
	booted := time.Now()
	if err := c.Console.Close(); err != nil { // the contract allows it
		t.Error(err)
	}
	guest := m.waitReady(t)
	t.Logf("ready %.2f s after Start", time.Since(booted).Seconds())

	t.Run("machine", func(t *testing.T) {
		f := strings.Fields(guest.do(t, "machine"))
		want := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[c.Arch]
		mem, _ := strconv.Atoi(f[2])
		if f[0] != want || f[1] != "2" || mem > 256 || mem < 128 {
			t.Errorf("architecture, CPUs, MiB = %v, want %s 2 and up to 256", f, want)
		}
	})
	t.Run("entropy", func(t *testing.T) {
		if got := guest.do(t, "read /sys/class/misc/hw_random/rng_current"); !strings.HasPrefix(got, "virtio_rng") {
			t.Errorf("random numbers come from %q, want the host's", got)
		}
	})
	if pinner, ok := m.Machine.(vmm.CPUPinner); ok {
		t.Run("host CPUs", func(t *testing.T) { pinCPUs(t, m, pinner, c.CPUs) }) // T28
	}
	t.Run("dial where nothing listens", func(t *testing.T) {
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		defer cancel()
		conn, err := m.Dial(ctx, deafPort)
		if err == nil {
			_ = conn.Close()
		}
		if !refused(err) {
			t.Errorf("dial: %v, want a refused connection", err)
		}
		if took := time.Since(start); took > soon/2 {
			t.Errorf("it took %s", took)
		}
	})
	t.Run("many streams", func(t *testing.T) {
		var all sync.WaitGroup
		for i := range 48 {
			all.Go(func() {
				if err := m.echo(byte(i), 128<<10); err != nil {
					t.Errorf("stream %d: %v", i, err)
				}
			})
		}
		all.Wait()
	})
	t.Run("share", func(t *testing.T) {
		dir := guest.do(t, "mount writable")
		guest.expect(t, "host", "read %s/from-host", dir)
		guest.do(t, "write %s/from-guest guest", dir)
		if b, err := os.ReadFile(filepath.Join(writable, "from-guest")); err != nil || string(b) != "guest" {
			t.Errorf("host reads %q, %v", b, err)
		}
		write(t, filepath.Join(writable, "new"), "made after boot")
		guest.expect(t, "made after boot", "read %s/new", dir)
	})
	t.Run("read-only share", func(t *testing.T) { // T1
		dir := guest.do(t, "mount layers")
		guest.expect(t, "intact", "read %s/layer", dir)
		// A remount is the guest's own affair, whatever it answers.
		_, _ = guest.try(t, "remount-rw %s", dir)
		for _, attack := range []string{
			"write %s/layer poisoned", "create %s/new", "remove %s/layer", "chmod %s/layer",
		} {
			if _, err := guest.try(t, attack, dir); err == nil || !strings.Contains(err.Error(), "read-only file system") {
				t.Errorf(attack+": %v, want a read-only file system", dir, err)
			}
		}
		if b, err := os.ReadFile(filepath.Join(layers, "layer")); err != nil || string(b) != "intact" {
			t.Errorf("guest root changed a read-only share: %q, %v", b, err)
		}
		if _, err := os.Stat(filepath.Join(layers, "new")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("guest root made a file in a read-only share: %v", err)
		}
		// What the image store does: a file that appears after boot.
		write(t, filepath.Join(layers, "later"), "later")
		guest.expect(t, "later", "read %s/later", dir)
	})
	if later != nil {
		t.Run("mounts after boot", func(t *testing.T) { later(t, guest) }) // T2
	}
	if live != nil {
		t.Run("live share", func(t *testing.T) { live(t, m, guest) })
	}
	t.Run("disks", func(t *testing.T) {
		fixed := guest.do(t, "disk image")
		want := fmt.Sprintf("%d %x", 1<<20, sha256.Sum256(bytes.Repeat([]byte("y"), 1<<20)))
		guest.expect(t, want, "blocksum %s", fixed)
		if _, err := guest.try(t, "blockwrite %s poisoned", fixed); err == nil {
			t.Error("guest wrote to a read-only disk")
		}
		name := guest.do(t, "disk %s", serial)
		guest.do(t, "blockwrite %s from guest", name)
		b, err := os.ReadFile(data)
		if err != nil || !bytes.HasPrefix(b, []byte("from guestxxx")) {
			t.Errorf("host reads %.20q, %v", b, err)
		}
		if b, err := os.ReadFile(image); err != nil || b[0] != 'y' {
			t.Errorf("guest changed a read-only disk: %.20q, %v", b, err)
		}
	})
	if full != nil {
		t.Run("host disk is full", func(t *testing.T) { full(t, guest) }) // T9
	}
	if len(c.NICs) > 0 {
		t.Run("nic", func(t *testing.T) {
			guest.expect(t, fmt.Sprintf("%s/%d", c.NICs[0].MAC, c.NICs[0].MTU), "nics")
		})
	}
	if setter, ok := m.Machine.(vmm.MemorySetter); ok {
		t.Run("balloon", func(t *testing.T) { setMemory(t, setter, c.MemoryBytes, guest) })
	}
	t.Run("console", func(t *testing.T) {
		const lines = 500
		guest.do(t, "console %d to the console", lines)
		var b []byte
		for end := time.Now().Add(soon); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			b, _ = os.ReadFile(c.Console.Name())
			if bytes.Count(b, []byte("to the console")) >= lines {
				return
			}
		}
		t.Errorf("console has %d of %d lines", bytes.Count(b, []byte("to the console")), lines)
	})
	t.Run("guest powers off", func(t *testing.T) {
		guest.do(t, "poweroff")
		m.waitDone(t, soon)
		if err := m.Err(); err != nil {
			t.Errorf("Err: %v", err)
		}
	})
}

// setMemory takes a third of the guest's memory and gives it back.
func setMemory(t *testing.T, setter vmm.MemorySetter, all int64, guest *client) {
	total := func() (mib int64) {
		var arch string
		var cpus int
		if _, err := fmt.Sscan(guest.do(t, "machine"), &arch, &cpus, &mib); err != nil {
			t.Fatal(err)
		}
		return mib
	}
	before := total()
	for _, step := range []struct{ target, want int64 }{{all - all/3, before - all/3>>20}, {all, before}} {
		if err := setter.SetMemory(t.Context(), step.target); err != nil {
			t.Fatal(err)
		}
		var got int64
		for end := time.Now().Add(soon); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if got = total(); max(got, step.want)-min(got, step.want) <= 2 {
				break
			}
		}
		if max(got, step.want)-min(got, step.want) > 2 {
			t.Errorf("told to make do with %d MiB, a guest that had %d MiB for programs has %d, want %d", step.target>>20, before, got, step.want)
		}
	}
}

// liveShare adds a share whose directories change, and returns the test to run after
// boot.
func (s *suite) liveShare(t *testing.T, c *vmm.Config) func(*testing.T, *machine, *client) {
	if !s.caps.LiveShares {
		return nil
	}
	dirs := map[string]vmm.SharedDir{}
	for _, name := range []string{"first", "second", "fixed"} {
		d := filepath.Join(t.TempDir(), name)
		write(t, filepath.Join(d, "file"), name)
		dirs[name] = vmm.SharedDir{Dir: d, ReadOnly: name == "fixed"}
	}
	c.Shares = append(c.Shares, vmm.Share{Tag: "live", Dirs: map[string]vmm.SharedDir{"first": dirs["first"]}})
	return func(t *testing.T, m *machine, guest *client) {
		setter, ok := m.Machine.(vmm.ShareSetter)
		if !ok {
			t.Fatal("the driver has live shares and its machine is no ShareSetter")
		}
		at := guest.do(t, "mount live")
		guest.expect(t, "first", "read %s/first/file", at)
		if _, err := guest.try(t, "read %s/second/file", at); err == nil {
			t.Error("a directory is shared before it was set")
		}
		if err := setter.SetShare(t.Context(), "live", dirs); err != nil {
			t.Fatal(err)
		}
		guest.expect(t, "second", "read %s/second/file", at)
		guest.do(t, "write %s/first/new by the guest", at)
		if b, err := os.ReadFile(filepath.Join(dirs["first"].Dir, "new")); err != nil || string(b) != "by the guest" {
			t.Errorf("host reads %q, %v", b, err)
		}
		guest.expect(t, "fixed", "read %s/fixed/file", at)
		if _, err := guest.try(t, "write %s/fixed/file poisoned", at); err == nil { // T1
			t.Error("guest wrote to a read-only directory")
		}
		delete(dirs, "first")
		if err := setter.SetShare(t.Context(), "live", dirs); err != nil {
			t.Fatal(err)
		}
		guest.expect(t, "second", "read %s/second/file", at)
		// The guest may know the name for a moment longer.
		for end := time.Now().Add(soon); ; time.Sleep(100 * time.Millisecond) {
			if _, err := guest.try(t, "write %s/first/new again", at); err != nil {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("guest writes to a directory that was taken away %s ago", soon)
			}
		}
		for name, bad := range map[string]map[string]vmm.SharedDir{
			"a path for a name": {"../x": dirs["second"]},
			"a file":            {"x": {Dir: filepath.Join(dirs["second"].Dir, "file")}},
			"a missing one":     {"x": {Dir: filepath.Join(dirs["second"].Dir, "missing")}},
		} {
			if err := setter.SetShare(t.Context(), "live", bad); !errors.Is(err, vmm.ErrConfig) {
				t.Errorf("%s: %v, want ErrConfig", name, err)
			}
		}
		for _, tag := range []string{"writable", "none"} {
			if err := setter.SetShare(t.Context(), tag, dirs); err == nil {
				t.Errorf("share %s can be set", tag)
			}
		}
		guest.expect(t, "second", "read %s/second/file", at)
	}
}

// echo sends n bytes through the guest and checks what comes back.
func (m *machine) echo(seed byte, n int) error {
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	conn, err := m.Dial(ctx, echoPort)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(bootTimeout))
	sent := make([]byte, n)
	for i := range sent {
		sent[i] = byte(i*7) ^ byte(i>>8) ^ seed
	}
	written := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		written <- err
	}()
	got := make([]byte, n)
	_, err = io.ReadFull(conn, got)
	if err := errors.Join(err, <-written); err != nil {
		return err
	}
	if !bytes.Equal(got, sent) {
		return errors.New("what came back is not what was sent")
	}
	return nil
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// badConfigs: a request that can't work is refused before anything starts.
func (s *suite) badConfigs(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "garbage"), strings.Repeat("garbage ", 1024))
	write(t, filepath.Join(dir, "empty"), "")
	deep := filepath.Join(dir, strings.Repeat("d", 100))
	if err := os.Mkdir(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "garbage")
	for _, test := range []struct {
		name   string
		change func(c *vmm.Config)
	}{
		{"unknown architecture", func(c *vmm.Config) { c.Arch = "vax" }},
		{"kernel is missing", func(c *vmm.Config) { c.Kernel = filepath.Join(dir, "none") }},
		{"kernel is garbage", func(c *vmm.Config) { c.Kernel = file }},
		{"kernel is empty", func(c *vmm.Config) { c.Kernel = filepath.Join(dir, "empty") }},
		{"kernel is for another architecture", func(c *vmm.Config) {
			c.Arch = map[string]string{"amd64": "arm64", "arm64": "amd64"}[c.Arch]
		}},
		{"initrd is missing", func(c *vmm.Config) { c.Initrd = filepath.Join(dir, "none") }},
		{"newline in the command line", func(c *vmm.Config) { c.Cmdline += "\nx" }},
		{"command line too long", func(c *vmm.Config) { c.Cmdline += strings.Repeat(" x", 4096) }},
		{"no CPU", func(c *vmm.Config) { c.CPUs = 0 }},
		{"no memory", func(c *vmm.Config) { c.MemoryBytes = 0 }},
		{"negative memory", func(c *vmm.Config) { c.MemoryBytes = -1 << 20 }},
		{"memory is no multiple of 1 MiB", func(c *vmm.Config) { c.MemoryBytes++ }},
		{"no console", func(c *vmm.Config) { c.Console = nil }},
		{"run directory is missing", func(c *vmm.Config) { c.RunDir = filepath.Join(dir, "none") }},
		{"run directory is a file", func(c *vmm.Config) { c.RunDir = file }},
		{"socket path too long", func(c *vmm.Config) { c.RunDir = deep }}, // T14
		{"two disks with one serial", func(c *vmm.Config) {
			c.Disks = []vmm.Disk{{Serial: "a", Path: file}, {Serial: "a", Path: file}}
		}},
		{"disk without a serial", func(c *vmm.Config) { c.Disks = []vmm.Disk{{Path: file}} }},
		{"serial too long", func(c *vmm.Config) { c.Disks = []vmm.Disk{{Serial: strings.Repeat("s", 21), Path: file}} }},
		{"serial is not ASCII", func(c *vmm.Config) { c.Disks = []vmm.Disk{{Serial: "sérial", Path: file}} }},
		{"disk is missing", func(c *vmm.Config) { c.Disks = []vmm.Disk{{Serial: "a", Path: filepath.Join(dir, "none")}} }},
		{"disk is a directory", func(c *vmm.Config) { c.Disks = []vmm.Disk{{Serial: "a", Path: dir}} }},
		{"two shares with one tag", func(c *vmm.Config) {
			c.Shares = []vmm.Share{{Tag: "a", Dir: dir}, {Tag: "a", Dir: dir}}
		}},
		{"share without a tag", func(c *vmm.Config) { c.Shares = []vmm.Share{{Dir: dir}} }},
		{"share is a file", func(c *vmm.Config) { c.Shares = []vmm.Share{{Tag: "a", Dir: file}} }},
		{"share is missing", func(c *vmm.Config) { c.Shares = []vmm.Share{{Tag: "a", Dir: filepath.Join(dir, "none")}} }},
		{"NIC without a MAC", func(c *vmm.Config) { c.NICs = []vmm.NIC{{MTU: 1500}} }},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := s.config(t)
			if err := s.driver.Validate(c); err != nil {
				t.Fatalf("a good configuration: %v", err)
			}
			test.change(&c)
			if err := s.driver.Validate(c); !errors.Is(err, vmm.ErrConfig) {
				t.Errorf("Validate: %v, want ErrConfig", err)
			} else {
				t.Log(err)
			}
			var tap *os.File
			if len(c.NICs) > 0 { // T8: New owns it, also when it fails
				var err error
				if tap, err = os.Open(os.DevNull); err != nil {
					t.Fatal(err)
				}
				c.NICs[0].Tap = tap
			}
			m, err := s.driver.New(t.Context(), c)
			if !errors.Is(err, vmm.ErrConfig) {
				t.Errorf("New: %v, want ErrConfig", err)
			}
			if err == nil {
				_ = m.Close()
			}
			if tap != nil {
				if err := tap.Close(); !errors.Is(err, os.ErrClosed) {
					t.Errorf("New failed and left the tap open: %v", err)
				}
			}
		})
	}
}

// BareBoot measures a boot of a guest image, with its own agent and without a disk, a
// share or a NIC, until the agent can be dialled: what any sandbox costs at least.
func BareBoot(b *testing.B, driver vmm.Driver, guest Guest) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer null.Close()
	for b.Loop() {
		dir, err := os.MkdirTemp("", "vm")
		if err != nil {
			b.Fatal(err)
		}
		m, err := driver.New(b.Context(), vmm.Config{
			ID: "bare-boot", Arch: guest.Arch, Kernel: guest.Kernel, Initrd: guest.Initrd, Cmdline: guest.Cmdline,
			CPUs: 1, MemoryBytes: 512 << 20, Console: null, RunDir: dir,
		})
		if err != nil {
			b.Fatal(err)
		}
		if err := m.Start(b.Context()); err != nil {
			b.Fatal(err)
		}
		bare := &machine{Machine: m}
		bare.waitReady(b)
		b.StopTimer()
		if err := errors.Join(m.Close(), os.Remove(dir)); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
