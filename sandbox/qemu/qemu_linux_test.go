package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/guest/image"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
	"github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest"
)

// inside marks the process in which the tests run.
const inside = "CRI_VZ_QEMU_TEST"

// TestMain runs the tests as a shim runs: in a mount namespace of its own, a slave
// of the host's. The network namespace keeps taps off the host.
func TestMain(m *testing.M) {
	switch os.Getenv(inside) {
	case "":
		os.Exit(reexec())
	case "owner":
		os.Exit(ownMachine())
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		fmt.Fprintln(os.Stderr, "make / a slave mount:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func reexec() int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests make mounts and taps in namespaces of their own: run them as root")
		return 1
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inside+"=tests")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// guestFor returns the stock guest for arch; it is built, which takes the network, if
// the machine has none.
func guestFor(t testing.TB, arch string) vmmtest.Guest {
	t.Helper()
	dir, err := image.DefaultDir()
	if err != nil {
		t.Fatal(err)
	}
	g, err := image.LocateKind(dir, arch, image.KindStock)
	if errdefs.IsNotFound(err) {
		// Apart from the real guests, which have the real agent.
		g, err = image.Build(t.Context(), image.Options{
			Dir: filepath.Join(dir, "conformance"), Arch: arch, Agent: vmmtest.Init(t, arch), Kind: image.KindStock,
		})
	}
	if err != nil {
		t.Fatalf("no guest to boot: %v", err)
	}
	return vmmtest.Guest{Arch: arch, Kernel: g.KernelPath, Initrd: g.InitrdPath, Cmdline: g.Cmdline}
}

func newTap(t *testing.T) vmm.NIC {
	t.Helper()
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	req := struct {
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}{flags: unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.TUNSETIFF, uintptr(unsafe.Pointer(&req))); errno != 0 {
		t.Fatalf("make a tap: %v", errno)
	}
	return vmm.NIC{MAC: []byte{2, 0, 0, 0, 0, 1}, MTU: 1400, Tap: f}
}

func mustNew(t testing.TB, o Options) vmm.Driver {
	t.Helper()
	d, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	for _, arch := range []string{"amd64", "arm64"} {
		t.Run(arch, func(t *testing.T) {
			g := guestFor(t, arch)
			g.NIC = newTap
			vmmtest.Run(t, func(t *testing.T) vmm.Driver { return mustNew(t, Options{Accel: AccelTCG}) }, g)
		})
	}
}

// owner is what ownMachine boots, as JSON in its environment.
const owner = "CRI_VZ_QEMU_TEST_OWNER"

// ownMachine is a process that starts a machine, prints its processes and waits.
func ownMachine() int {
	pids, err := startOwned()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for _, pid := range pids {
		fmt.Println(pid)
	}
	fmt.Println("started")
	select {}
}

func startOwned() ([]int, error) {
	var c vmm.Config
	if err := json.Unmarshal([]byte(os.Getenv(owner)), &c); err != nil {
		return nil, err
	}
	console, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	c.Console = console
	d, err := New(Options{Accel: AccelTCG})
	if err != nil {
		return nil, err
	}
	m, err := d.New(context.Background(), c)
	if err != nil {
		return nil, err
	}
	if err := m.Start(context.Background()); err != nil {
		return nil, err
	}
	return m.PIDs(), nil
}

// T8: a machine ends with the process that owns it, however that ends, and QEMU has
// no privilege.
func TestMachineDiesWithItsOwner(t *testing.T) {
	g := guestFor(t, runtime.GOARCH)
	c := vmm.Config{
		ID: "owned", Arch: g.Arch, Kernel: g.Kernel, Initrd: g.Initrd, Cmdline: g.Cmdline + " testinit=hang",
		CPUs: 1, MemoryBytes: 256 << 20, RunDir: runDir(t),
		Shares: []vmm.Share{{Tag: "share", Dir: t.TempDir()}},
	}
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), inside+"=owner", owner+"="+string(b))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	var pids []string
	in := bufio.NewScanner(out)
	for in.Scan() && in.Text() != "started" {
		pids = append(pids, in.Text())
	}
	if len(pids) != 2 {
		t.Fatalf("processes %v, want QEMU and a virtiofsd", pids)
	}
	status, err := os.ReadFile("/proc/" + pids[0] + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\nUid:\t65534\t65534\t65534\t65534\n", "\nGid:\t65534\t65534\t65534\t65534\n",
		"\nGroups:\t \n", "\nCapEff:\t0000000000000000\n", "\nSeccomp:\t2\n"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("QEMU's status has no %q", want)
		}
	}
	status, err = os.ReadFile("/proc/" + pids[1] + "/status")
	if err != nil || !strings.Contains(string(status), "\nSeccomp:\t2\n") {
		t.Errorf("virtiofsd has no seccomp filter: %v", err)
	}
	for _, ns := range []string{"net", "ipc", "pid"} {
		own, err1 := os.Readlink("/proc/self/ns/" + ns)
		for i, pid := range pids {
			its, err2 := os.Readlink("/proc/" + pid + "/ns/" + ns)
			if err := errors.Join(err1, err2); err != nil || own == its {
				t.Errorf("process %d is in our %s namespace: %v", i, ns, err)
			}
		}
	}

	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		var alive []string
		for _, pid := range pids {
			b, err := os.ReadFile("/proc/" + pid + "/stat")
			// A zombie waits for init. // T13
			if err == nil && !strings.Contains(string(b), ") Z ") {
				alive = append(alive, pid)
			}
		}
		if len(alive) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("2 s after their owner's end, there are %v of %v", alive, pids)
		}
	}
}

// runDir is a short path, as sockets lie in it.
func runDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func nullConsole(t testing.TB) *os.File {
	t.Helper()
	f, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// A kernel that panics must not look like a guest that was done.
func TestKernelPanicIsAnError(t *testing.T) {
	g := guestFor(t, runtime.GOARCH)
	m, err := mustNew(t, Options{Accel: AccelTCG}).New(t.Context(), vmm.Config{
		ID: "panic", Arch: g.Arch, Kernel: g.Kernel, Cmdline: g.Cmdline + " panic=-1", // and nothing to mount as /
		CPUs: 1, MemoryBytes: 256 << 20, Console: nullConsole(t), RunDir: runDir(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("machine runs on")
	}
	if err := m.Err(); err == nil || !strings.Contains(err.Error(), "reset itself") {
		t.Errorf("Err: %v", err)
	}
}

// The error of a QEMU that doesn't start quotes what it says.
func TestStartErrorQuotesQEMU(t *testing.T) {
	g := guestFor(t, runtime.GOARCH)
	script := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nhead -c 100000 /dev/zero | tr '\\0' x >&2\necho the reason >&2\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	_ = os.Chmod(filepath.Dir(script), 0o755)
	_ = os.Chmod(filepath.Dir(filepath.Dir(script)), 0o755)
	m, err := mustNew(t, Options{Accel: AccelTCG, QEMUPath: map[string]string{g.Arch: script}}).New(t.Context(), vmm.Config{
		ID: "mute", Arch: g.Arch, Kernel: g.Kernel, CPUs: 1, MemoryBytes: 256 << 20, Console: nullConsole(t), RunDir: runDir(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	err = m.Start(t.Context())
	if err == nil || !strings.Contains(err.Error(), "exited with status 3") || !strings.Contains(err.Error(), "the reason") {
		t.Fatalf("start: %.300v", err)
	}
	if n := len(err.Error()); n > stderrLimit+1024 {
		t.Errorf("the error has %d bytes", n)
	}
}

func TestMissingPrograms(t *testing.T) {
	g := guestFor(t, runtime.GOARCH)
	c := vmm.Config{
		ID: "missing", Arch: g.Arch, Kernel: g.Kernel, CPUs: 1, MemoryBytes: 256 << 20, Console: nullConsole(t), RunDir: runDir(t),
		Shares: []vmm.Share{{Tag: "share", Dir: t.TempDir()}},
	}
	for _, test := range []struct {
		name string
		opts Options
		want string
	}{
		{"qemu", Options{QEMUPath: map[string]string{g.Arch: "/nowhere/qemu"}}, "apt install qemu-system-"},
		{"virtiofsd", Options{VirtiofsdPath: "/nowhere/virtiofsd"}, "Debian 12: apt install qemu-system-common"},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.opts.Accel = AccelTCG
			_, err := mustNew(t, test.opts).New(t.Context(), c)
			if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("New: %v, want ErrNotFound with %q", err, test.want)
			}
		})
	}
	if _, err := New(Options{Accel: "hvf"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown accelerator: %v", err)
	}
	if _, err := New(Options{QEMUPath: map[string]string{"vax": "/bin/true"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown architecture: %v", err)
	}
}

// The two virtiofsd are told apart by their help.
func TestVirtiofsdKinds(t *testing.T) {
	for _, test := range []struct {
		name, help string
		root       bool
		want       []string
	}{
		{"C", "    -o source=PATH             shared directory tree", true,
			[]string{"--fd=3", "-f", "-o", "source=/dir,sandbox=chroot,cache=auto,announce_submounts,no_flock,no_posix_lock,no_xattr,log_level=warn"}},
		{"Rust", "      --shared-dir <SHARED_DIR>", true,
			[]string{"--fd=3", "--shared-dir=/dir", "--sandbox=chroot", "--cache=auto", "--announce-submounts", "--inode-file-handles=never", "--log-level=warn"}},
		{"Rust with --readonly", "      --shared-dir <SHARED_DIR>\n      --readonly", true,
			[]string{"--fd=3", "--shared-dir=/dir", "--sandbox=chroot", "--cache=auto", "--announce-submounts", "--inode-file-handles=never", "--log-level=warn", "--readonly"}},
		{"Rust without root", "      --shared-dir <SHARED_DIR>", false,
			[]string{"--fd=3", "--shared-dir=/dir", "--sandbox=namespace", "--cache=auto", "--announce-submounts", "--inode-file-handles=never", "--log-level=warn"}},
		{"C without root", "source=PATH", false, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "virtiofsd")
			if err := os.WriteFile(path, []byte("#!/bin/sh\ncat <<'END'\n"+test.help+"\nEND\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			v, err := findVirtiofsd(path)
			if err != nil {
				t.Fatal(err)
			}
			cmd, err := v.command("/dir", true, test.root, 3)
			if test.want == nil {
				if !errdefs.IsFailedPrecondition(err) {
					t.Errorf("command: %v, want ErrFailedPrecondition", err)
				}
				return
			}
			if err != nil || !slices.Equal(cmd.Args[1:], test.want) {
				t.Errorf("arguments %q, %v, want %q", cmd.Args[1:], err, test.want)
			}
		})
	}
	if _, err := findVirtiofsd("/bin/true"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a program that is no virtiofsd: %v", err)
	}
}

// A mount that others would see is refused. // T1
func TestReadOnlyShareOnSharedMount(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(
		unix.Mount("tmpfs", dir, "tmpfs", 0, ""),
		unix.Mount("", dir, "", unix.MS_SHARED, ""),
	); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH) //nolint:errcheck // of the test's own namespace
	err := mountReadOnly(t.TempDir(), filepath.Join(dir, "share"))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), dir) {
		t.Errorf("mountReadOnly: %v, want ErrFailedPrecondition", err)
	}
}

// KVM is believed only after a boot, the verdict is remembered, and the fall-back
// works. On a machine where KVM works, it is to be found.
func TestAccelAuto(t *testing.T) {
	g := guestFor(t, runtime.GOARCH)
	opts := Options{CacheDir: t.TempDir(), ProbeKernel: g.Kernel, ProbeInitrd: g.Initrd}
	// QEMU's user may not open the host's device; a copy of it that everyone may.
	if st, err := os.Stat(kvmDevice); err == nil {
		node := filepath.Join(t.TempDir(), "kvm")
		if err := errors.Join(
			unix.Mknod(node, unix.S_IFCHR|0o666, int(st.Sys().(*syscall.Stat_t).Rdev)),
			os.Chmod(node, 0o666),
			unix.Mount(node, kvmDevice, "", unix.MS_BIND, ""),
		); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(kvmDevice, unix.MNT_DETACH) //nolint:errcheck // of the test's own namespace
	}
	start := time.Now()
	first, err := mustNew(t, opts).Capabilities(t.Context(), g.Arch)
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	t.Logf("%+v after %s", first, took)
	if took > probeTimeout+3*time.Second {
		t.Errorf("the probe took %s, its bound is %s", took, probeTimeout)
	}
	if first.Accelerator != "kvm" && first.Accelerator != "tcg" {
		t.Errorf("accelerator %q", first.Accelerator)
	}
	if _, err := os.Stat(kvmDevice); err == nil {
		files, _ := filepath.Glob(filepath.Join(opts.CacheDir, "kvm-*.json"))
		if len(files) != 1 {
			t.Fatalf("verdicts: %v", files)
		}
		b, _ := os.ReadFile(files[0])
		t.Logf("%s", b)
	}

	start = time.Now()
	d := mustNew(t, opts)
	again, err := d.Capabilities(t.Context(), g.Arch)
	if err != nil || again != first {
		t.Errorf("second verdict %+v, %v", again, err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("a remembered verdict took %s", took)
	}
	// Guests of another architecture have no KVM.
	for arch := range platforms {
		if arch != runtime.GOARCH {
			if c, err := d.Capabilities(t.Context(), arch); err != nil || c.Accelerator != "tcg" {
				t.Errorf("%s: %+v, %v", arch, c, err)
			}
		}
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	opts.CacheDir = t.TempDir()
	hurried := mustNew(t, opts)
	if _, err := hurried.Capabilities(ctx, g.Arch); err == nil && kvmThere() {
		t.Error("a verdict without time to find it")
	}
	opts.Accel = AccelKVM
	if c, err := mustNew(t, opts).Capabilities(t.Context(), "vax"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown architecture: %+v, %v", c, err)
	}
}

// KVM that works and KVM in which a guest stops half-way, acted by emulation.
func TestProbe(t *testing.T) {
	g := guestFor(t, runtime.GOARCH)
	binary, err := exec.LookPath(platforms[g.Arch].binary)
	if err != nil {
		t.Fatal(err)
	}
	cpu := platforms[g.Arch].cpuTCG
	for _, test := range []struct {
		name    string
		edit    string // what it does to the argument a
		timeout time.Duration
		err     string
	}{
		{"works", "", time.Minute, ""},
		{"stops half-way", "a=${a/panic=-1/panic=0 rdinit=/none}", 5 * time.Second, "did not boot with KVM within 5s"},
		{"no QEMU", "a=${a/accel=/nonsense=}", time.Minute, "nonsense"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "qemu") // where QEMU's user can reach it
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			script := filepath.Join(dir, "qemu")
			// No program runs for an argument: the host may be slow and the time is short.
			text := fmt.Sprintf(`#!/bin/bash
args=()
for a; do
	a=${a/accel=kvm/accel=tcg}
	[[ $a != host ]] || a=%s
	%s
	args+=("$a")
done
exec %s "${args[@]}"
`, cpu, test.edit, binary)
			if err := errors.Join(os.WriteFile(script, []byte(text), 0o755), os.Chmod(dir, 0o755)); err != nil {
				t.Fatal(err)
			}
			d := newDriver(Options{QEMUPath: map[string]string{g.Arch: script}, UID: nobody, GID: nobody})
			d.probeTimeout = test.timeout
			d.kvm = os.DevNull // the script's QEMU doesn't use it
			err = d.probeKVM(t.Context(), g.Arch, g.Kernel, g.Initrd)
			switch {
			case test.err == "" && err != nil:
				t.Error(err)
			case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)):
				t.Errorf("%v, want an error with %q", err, test.err)
			}
		})
	}
}

func kvmThere() bool {
	_, err := os.Stat(kvmDevice)
	return err == nil
}

// BenchmarkBareBoot is the time from New to a guest whose agent can be dialled, which a
// sandbox' own start is measured against.
func BenchmarkBareBoot(b *testing.B) {
	dir, err := image.DefaultDir()
	if err != nil {
		b.Fatal(err)
	}
	for _, kind := range []image.Kind{image.KindStock, image.KindFast} {
		b.Run(string(kind), func(b *testing.B) {
			g, err := image.LocateKind(dir, runtime.GOARCH, kind)
			if errdefs.IsNotFound(err) {
				b.Skip(err)
			}
			if err != nil {
				b.Fatal(err)
			}
			vmmtest.BareBoot(b, mustNew(b, Options{CacheDir: b.TempDir()}), vmmtest.Guest{
				Arch: g.Arch, Kernel: g.KernelPath, Initrd: g.InitrdPath, Cmdline: g.Cmdline,
			})
		})
	}
}
