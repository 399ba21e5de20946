//go:build linux && (amd64 || arm64)

package container

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const busybox = "/bin/busybox"

// TestMain makes the test binary the agent's stand-in: it is what is forked as
// container-init and exec-init.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "container-init":
			os.Exit(ExitCode(Init()))
		case "exec-init":
			os.Exit(ExitCode(ExecInit()))
		}
	}
	os.Exit(m.Run())
}

// newRoot makes a root file system with busybox in a temporary directory.
func newRoot(t testing.TB) string {
	t.Helper()
	if unix.Geteuid() != 0 {
		t.Fatal("this test makes namespaces and mounts: run it as root")
	}
	// The mount source may contain no symbolic link.
	tmp, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(tmp), 0o755); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(tmp, "rootfs")
	for _, d := range []string{"bin", "etc", "proc", "tmp", "root"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	copyFile(t, busybox, filepath.Join(root, "bin/busybox"), 0o755)
	for _, applet := range strings.Fields("sh cat ls id mount chmod sleep stat touch mkdir grep echo true tty stty pwd env wc readlink head hostname test kill dd ps umount ln sync") {
		if err := os.Link(filepath.Join(root, "bin/busybox"), filepath.Join(root, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	writeTestFile(t, filepath.Join(root, "etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www:/var/www:/bin/false\nalice:x:1000:1000::/home/alice:/bin/sh\n")
	writeTestFile(t, filepath.Join(root, "etc/group"), "root:x:0:\nwww-data:x:33:\nstaff:x:50:alice,www-data\nmany:x:50000:alice\n")
	return root
}

func copyFile(t testing.TB, from, to string, mode os.FileMode) {
	t.Helper()
	src, err := os.Open(from)
	if err != nil {
		t.Fatalf("%v (install busybox-static)", err)
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o700)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(dst, src); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(dst.Chmod(mode), dst.Close()); err != nil {
		t.Fatal(err)
	}
}

func writeTestFile(t testing.TB, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// defaultCaps is containerd's default set.
var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// newConfig is a container as the host would describe it.
func newConfig(root string, args ...string) *Config {
	return &Config{Spec: specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: root},
		Process: &specs.Process{
			Args: args,
			Env:  []string{"PATH=/usr/bin:/bin"},
			Cwd:  "/",
			Capabilities: &specs.LinuxCapabilities{
				Bounding: defaultCaps, Effective: defaultCaps, Permitted: defaultCaps,
			},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev", "relatime"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		},
		Linux: &specs.Linux{
			MaskedPaths: []string{
				"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
				"/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/sys/devices/virtual/powercap", "/proc/scsi",
			},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}}
}

// child is a container-init or exec-init that was told its configuration.
type child struct {
	cmd      *exec.Cmd
	report   error
	out      bytes.Buffer
	exitCode int
}

// initFlags are the namespaces of a pod and a container with its own pid namespace.
const initFlags = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNET

// start forks what the agent would fork. edit may change the command before.
func start(t testing.TB, kind string, config *Config, edit func(*exec.Cmd)) *child {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	// A test must not hang on a child that never reports.
	limit := unix.Timeval{Sec: 20}
	if err := errors.Join(unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit)); err != nil {
		t.Fatal(err)
	}
	c := &child{cmd: exec.Command("/proc/self/exe", kind)}
	c.cmd.ExtraFiles = []*os.File{theirs}
	c.cmd.Stdout, c.cmd.Stderr = &c.out, &c.out
	c.cmd.SysProcAttr = &syscall.SysProcAttr{}
	c.cmd.WaitDelay = 10 * time.Second
	if kind == "container-init" {
		c.cmd.SysProcAttr.Cloneflags = initFlags
	}
	if edit != nil {
		edit(c.cmd)
	}
	err = c.cmd.Start()
	theirs.Close()
	if err != nil {
		t.Fatalf("start %s: %v", kind, err)
	}
	t.Cleanup(func() {
		if c.cmd.ProcessState == nil {
			_ = c.cmd.Process.Kill()
			_ = c.cmd.Wait()
		}
	})
	if err := WriteConfig(rawFD(pair[0]), config); err != nil {
		t.Fatalf("write configuration: %v", err)
	}
	c.report = ReadReport(rawFD(pair[0]))
	return c
}

func (c *child) wait() {
	timer := time.AfterFunc(30*time.Second, func() { _ = c.cmd.Process.Kill() })
	defer timer.Stop()
	_ = c.cmd.Wait()
	c.exitCode = c.cmd.ProcessState.ExitCode()
}

// runToEnd runs a container to its end, which must have started.
func runToEnd(t testing.TB, config *Config) (out string, exitCode int) {
	t.Helper()
	c := start(t, "container-init", config, nil)
	c.wait()
	if c.report != nil {
		t.Fatalf("container did not start: %v", c.report)
	}
	return c.out.String(), c.exitCode
}

// sh runs a shell script in the container that config describes.
func sh(t testing.TB, config *Config, script string) string {
	t.Helper()
	config.Spec.Process.Args = []string{"sh", "-c", script}
	out, code := runToEnd(t, config)
	if code != 0 {
		t.Fatalf("exit code %d, output:\n%s", code, out)
	}
	return out
}

// mustFail runs a container that must not start, and returns the report.
func mustFail(t testing.TB, config *Config) (*Error, int) {
	t.Helper()
	c := start(t, "container-init", config, nil)
	c.wait()
	var e *Error
	if !errors.As(c.report, &e) {
		t.Fatalf("report is %v, not an *Error; output:\n%s", c.report, c.out.String())
	}
	if c.out.Len() > 0 {
		t.Errorf("a failed start wrote to the container's output: %q", c.out.String())
	}
	return e, c.exitCode
}

func TestInitRuns(t *testing.T) {
	out := sh(t, newConfig(newRoot(t)), `echo pid $$; pwd; ls -d /old* 2>/dev/null; echo "home $HOME"; umask; cat /proc/self/oom_score_adj; ls /proc/self/fd | wc -l; cat /proc/1/cmdline | head -c 2; echo; grep SigBlk /proc/self/status`)
	// ls itself has 0, 1, 2 and the directory open. No signal may be
	// left blocked by the Go runtime.
	want := "pid 1\n/\nhome /root\n0022\n0\n4\nsh\nSigBlk:\t0000000000000000\n"
	if out != want {
		t.Errorf("output is\n%s\nwant\n%s", out, want)
	}
}

func TestFailures(t *testing.T) {
	root := newRoot(t)
	writeTestFile(t, filepath.Join(root, "plain"), "text")
	writeTestFile(t, filepath.Join(root, "bin/noformat"), "no format")
	writeTestFile(t, filepath.Join(root, "bin/nointerp"), "#!/no/such/interpreter\n")
	for _, f := range []string{"bin/noformat", "bin/nointerp"} {
		if err := os.Chmod(filepath.Join(root, f), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/elsewhere", filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	args := func(args ...string) func(*Config) {
		return func(c *Config) { c.Spec.Process.Args = args }
	}
	mount := func(m specs.Mount) func(*Config) {
		return func(c *Config) { c.Spec.Mounts = append(c.Spec.Mounts, m) }
	}
	tests := []struct {
		name    string
		edit    func(*Config)
		step    string
		class   string
		code    int
		message string
	}{
		{"not in PATH", args("foo"), "command", ClassNotFound, 127, `exec: "foo": executable file not found in $PATH`},
		{"no PATH", func(c *Config) { c.Spec.Process.Env = nil; c.Spec.Process.Args = []string{"sh"} }, "command", ClassNotFound, 127, `exec: "sh": executable file not found in $PATH`},
		{"absolute, missing", args("/foo"), "command", ClassNotFound, 127, `exec: "/foo": stat /foo: no such file or directory`},
		{"not executable", args("/plain"), "command", ClassPermission, 126, `exec: "/plain": permission denied`},
		{"directory", args("/bin"), "command", ClassPermission, 126, `exec: "/bin": is a directory`},
		{"no interpreter", args("nointerp"), "exec", ClassNotFound, 127, `exec /bin/nointerp: no such file or directory`},
		{"wrong format", args("noformat"), "exec", ClassInvalid, 1, `exec /bin/noformat: exec format error`},
		{"no arguments", args(), "check the spec", ClassInvalid, 1, "process.args is empty"},
		{"NUL", args("echo", "a\x00b"), "check the spec", ClassInvalid, 1, "NUL"},
		{"unknown user", func(c *Config) { c.User = &User{Name: "bob"} }, "user", ClassInvalid, 1, "unable to find user bob: no matching entries in passwd file"},
		{"unknown capability", func(c *Config) { c.Spec.Process.Capabilities.Bounding = []string{"CAP_FLY"} }, "check the spec", ClassInvalid, 1, "CAP_FLY"},
		{"unknown limit", func(c *Config) { c.Spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_X"}} }, "check the spec", ClassInvalid, 1, "RLIMIT_X"},
		{"seccomp notify", func(c *Config) { c.Spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActNotify} }, "check the spec", ClassInvalid, 1, "SCMP_ACT_NOTIFY"}, // T23
		{"apparmor", func(c *Config) { c.Spec.Process.ApparmorProfile = "x" }, "check the spec", ClassInvalid, 1, "apparmorProfile"},
		{"node sysctl", func(c *Config) { c.Spec.Linux.Sysctl = map[string]string{"vm.swappiness": "1"} }, "sysctls", ClassInvalid, 1, "vm.swappiness"},
		{"sysctl out of proc/sys", func(c *Config) { c.Spec.Linux.Sysctl = map[string]string{"net/../../sysrq-trigger": "1"} }, "sysctls", ClassInvalid, 1, "malformed"},
		{"missing source", mount(specs.Mount{Destination: "/v", Type: "bind", Source: "/no/such/source"}), "mounts", ClassOther, 1, "/no/such/source"},
		{"bad option", mount(specs.Mount{Destination: "/v", Type: "tmpfs", Options: []string{"size=rubbish"}}), "mounts", ClassOther, 1, "size=rubbish"},
		{"bind option", mount(specs.Mount{Destination: "/v", Type: "bind", Source: "/tmp", Options: []string{"size=1"}}), "mounts", ClassInvalid, 1, "size=1"},
		{"file system type", mount(specs.Mount{Destination: "/v", Type: "ext4", Source: "/dev/vda"}), "mounts", ClassInvalid, 1, "ext4"},
		{"mount at the root", mount(specs.Mount{Destination: "/..", Type: "tmpfs"}), "mounts", ClassInvalid, 1, "below /"},
		{"bind inside proc", mount(specs.Mount{Destination: "/proc/self/attr", Type: "bind", Source: "/tmp"}), "mounts", ClassInvalid, 1, "inside /proc"},
		{"proc on a link", mount(specs.Mount{Destination: "/link", Type: "proc"}), "mounts", ClassInvalid, 1, "not an ordinary directory"},
		{"directory onto a file", mount(specs.Mount{Destination: "/plain", Type: "bind", Source: "/tmp"}), "mounts", ClassInvalid, 1, "onto a file"},
		{"below a file", mount(specs.Mount{Destination: "/plain/v", Type: "tmpfs"}), "mounts", ClassOther, 1, "not a directory"},
		{"cwd is a file", func(c *Config) { c.Spec.Process.Cwd = "/plain" }, "working directory", ClassInvalid, 1, "/plain"},
		{"relative cwd", func(c *Config) { c.Spec.Process.Cwd = "tmp" }, "check the spec", ClassInvalid, 1, "tmp"},
		{"namespaces", func(c *Config) { c.Namespaces = []Namespace{{Type: "mount", FD: 4}} }, "check the spec", ClassInvalid, 1, "no namespaces"},
		{"no root", func(c *Config) { c.Spec.Root.Path = root + "/absent" }, "root file system", ClassOther, 1, "absent"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			config := newConfig(root, "true")
			test.edit(config)
			e, code := mustFail(t, config)
			if e.Step != test.step || e.Class != test.class || code != test.code || !strings.Contains(e.Message, test.message) {
				t.Errorf("step %q class %q code %d: %s\nwant step %q class %q code %d: %s", e.Step, e.Class, code, e.Message, test.step, test.class, test.code, test.message)
			}
		})
	}
}

// TestNoDescriptorLeaks: what the agent leaves open and what the steps open
// stays out of the container, and can't be its working directory
// (CVE-2024-21626).
func TestNoDescriptorLeaks(t *testing.T) {
	root := newRoot(t)
	dir, err := os.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	leak := func(cmd *exec.Cmd) { cmd.ExtraFiles = append(cmd.ExtraFiles, dir, dir, dir) }
	// The descriptor that the shell lists the directory with is closed again
	// when readlink asks for it.
	c := start(t, "container-init", newConfig(root, "sh", "-c", "for f in /proc/$$/fd/*; do readlink $f; done; true"), leak)
	c.wait()
	if c.report != nil || c.exitCode != 0 {
		t.Fatalf("report %v, exit code %d", c.report, c.exitCode)
	}
	if n := strings.Count(c.out.String(), "\n"); n != 3 {
		t.Errorf("%d descriptors in the container, want 3:\n%s", n, c.out.String())
	}
	for fd := 3; fd < 24; fd++ {
		config := newConfig(root, "sh", "-c", "test . -ef / && readlink /proc/self/cwd")
		config.Spec.Process.Cwd = fmt.Sprintf("/proc/self/fd/%d", fd)
		c := start(t, "container-init", config, leak)
		c.wait()
		// One of them is the container's own root, which is no harm.
		if c.report == nil && c.out.String() != "/\n" {
			t.Errorf("%s was accepted as working directory: %q", config.Spec.Process.Cwd, c.out.String())
		}
	}
}

func TestWorkingDirectory(t *testing.T) {
	root := newRoot(t)
	if err := os.MkdirAll(filepath.Join(root, "home/alice/private"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(root, "home/alice/private"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Run("created", func(t *testing.T) {
		config := newConfig(root)
		config.Spec.Process.Cwd = "/new/cwd/dir"
		if out := sh(t, config, "pwd; stat -c %a ."); out != "/new/cwd/dir\n755\n" {
			t.Errorf("output %q", out)
		}
	})
	t.Run("created on a root that is then read-only", func(t *testing.T) {
		config := newConfig(root)
		config.Spec.Root.Readonly = true
		config.Spec.Process.Cwd = "/new2"
		if out := sh(t, config, "pwd; touch x 2>&1 || true"); out != "/new2\ntouch: x: Read-only file system\n" {
			t.Errorf("output %q", out)
		}
	})
	t.Run("that only root may enter", func(t *testing.T) {
		config := newConfig(root)
		config.Spec.Process.Cwd = "/home/alice/private"
		config.User = &User{Name: "www-data"}
		if out := sh(t, config, "readlink /proc/self/cwd"); out != "/home/alice/private\n" {
			t.Errorf("output %q", out)
		}
	})
}

func TestUsers(t *testing.T) {
	root := newRoot(t)
	n := func(v uint32) *uint32 { return &v }
	for _, test := range []struct {
		name string
		user User
		want string
	}{
		{"uid without an account", User{Name: "1002"}, "1002 0 0 /"},
		{"name", User{Name: "www-data"}, "33 33 33 50 /var/www"},
		{"ids", User{Name: "1003:1004"}, "1003 1004 1004 /"},
		{"name and gid", User{Name: "www-data:1004"}, "33 1004 1004 50 /var/www"},
		{"merge", User{UID: n(1000), AdditionalGIDs: []uint32{1234}}, "1000 1000 1000 50 50000 1234 /home/alice"},
		{"strict", User{UID: n(1000), AdditionalGIDs: []uint32{1234}, SupplementalGroupsPolicy: GroupsStrict}, "1000 1000 1000 1234 /home/alice"},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := newConfig(root)
			config.User = &test.user
			out := sh(t, config, `echo $(id -u) $(id -g) $(grep Groups /proc/self/status | { read _ g; echo $g; }) $HOME`)
			// The kernel sorts groups.
			got, want := strings.Fields(out), strings.Fields(test.want)
			if len(got) != len(want) || got[0] != want[0] || got[1] != want[1] || got[len(got)-1] != want[len(want)-1] {
				t.Fatalf("%q, want %q", out, test.want)
			}
			for _, g := range want[2 : len(want)-1] {
				if !strings.Contains(" "+strings.Join(got[2:len(got)-1], " ")+" ", " "+g+" ") {
					t.Errorf("%q, want %q", out, test.want)
				}
			}
		})
	}
}

func TestCapabilities(t *testing.T) {
	root := newRoot(t)
	status := func(t *testing.T, config *Config) map[string]string {
		out := sh(t, config, "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status")
		m := make(map[string]string)
		for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
			k, v, _ := strings.Cut(line, ":")
			m[k] = strings.TrimLeft(strings.TrimSpace(v), "0")
		}
		return m
	}
	check := func(t *testing.T, got, want map[string]string) {
		t.Helper()
		for k, v := range want {
			if got[k] != v {
				t.Errorf("%s is %q, want %q", k, got[k], v)
			}
		}
	}
	t.Run("default", func(t *testing.T) {
		check(t, status(t, newConfig(root)), map[string]string{"CapBnd": "a80425fb", "CapEff": "a80425fb", "CapPrm": "a80425fb", "CapInh": "", "CapAmb": "", "NoNewPrivs": ""})
	})
	t.Run("none", func(t *testing.T) {
		config := newConfig(root)
		config.Spec.Process.Capabilities = nil
		check(t, status(t, config), map[string]string{"CapBnd": "", "CapEff": "", "CapPrm": "", "CapInh": "", "CapAmb": ""})
	})
	t.Run("user", func(t *testing.T) {
		config := newConfig(root)
		config.User = &User{Name: "alice"}
		check(t, status(t, config), map[string]string{"CapBnd": "a80425fb", "CapEff": "", "CapPrm": ""})
	})
	t.Run("ambient", func(t *testing.T) {
		config := newConfig(root)
		config.User = &User{Name: "alice"}
		c := config.Spec.Process.Capabilities
		c.Inheritable, c.Ambient = []string{"CAP_NET_BIND_SERVICE"}, []string{"CAP_NET_BIND_SERVICE"}
		check(t, status(t, config), map[string]string{"CapEff": "400", "CapPrm": "400", "CapInh": "400", "CapAmb": "400"})
	})
}

func TestNoNewPrivileges(t *testing.T) {
	root := newRoot(t)
	// exit(geteuid()): busybox gives setuid up by itself.
	program := elfProgram(unix.EM_X86_64, []byte{
		0xb8, 107, 0, 0, 0, // mov $geteuid, %eax
		0x0f, 0x05, // syscall
		0x89, 0xc7, // mov %eax, %edi
		0xb8, 60, 0, 0, 0, // mov $exit, %eax
		0x0f, 0x05, // syscall
	})
	if runtime.GOARCH == "arm64" {
		program = elfProgram(unix.EM_AARCH64, []byte{
			0xe8, 0x15, 0x80, 0xd2, // mov x8, #geteuid
			0x01, 0x00, 0x00, 0xd4, // svc #0
			0xa8, 0x0b, 0x80, 0xd2, // mov x8, #exit
			0x01, 0x00, 0x00, 0xd4, // svc #0
		})
	}
	writeProgram(t, filepath.Join(root, "bin/suid"), program, 0o755|os.ModeSetuid)
	for nnp, want := range map[bool]int{false: 0, true: 200} {
		config := newConfig(root, "suid")
		config.User = &User{Name: "200"}
		config.Spec.Process.NoNewPrivileges = nnp
		if _, code := runToEnd(t, config); code != want {
			t.Errorf("no_new_privs %v: effective uid %d, want %d", nnp, code, want)
		}
	}
}

// writeProgram writes an executable of the test's own.
func writeProgram(t testing.TB, name string, program []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(name, program, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, mode); err != nil {
		t.Fatal(err)
	}
}

// elfProgram is a static program of one segment that holds just code. The test
// binary won't do: with the race detector it needs a loader.
func elfProgram(machine int, code []byte) []byte {
	const base = 0x400000
	word, ident, header, segment := 8, byte(2), 64, 56
	if machine == unix.EM_386 {
		word, ident, header, segment = 4, 1, 52, 32
	}
	var b []byte
	put := func(n int, v uint64) {
		for range n {
			b = append(b, byte(v))
			v >>= 8
		}
	}
	size := uint64(header + segment + len(code))
	b = append(b, 0x7f, 'E', 'L', 'F', ident, 1, 1)
	b = append(b, make([]byte, 9)...)
	put(2, 2) // ET_EXEC
	put(2, uint64(machine))
	put(4, 1)
	put(word, base+uint64(header+segment)) // entry
	put(word, uint64(header))
	put(word, 0)
	put(4, 0)
	put(2, uint64(header))
	put(2, uint64(segment))
	put(2, 1)
	put(6, 0)
	put(4, 1) // PT_LOAD
	if word == 8 {
		put(4, 5) // readable, executable
	}
	put(word, 0)
	put(word, base)
	put(word, base)
	put(word, size)
	put(word, size)
	if word == 4 {
		put(4, 5)
	}
	put(word, 0x1000)
	return append(b, code...)
}

func TestLimitsUmaskEnvironment(t *testing.T) {
	config := newConfig(newRoot(t))
	config.Spec.Process.Rlimits = []specs.POSIXRlimit{
		{Type: "RLIMIT_NOFILE", Soft: 123, Hard: 456}, {Type: "RLIMIT_CORE", Soft: 0, Hard: 0},
	}
	umask := uint32(0o077)
	score := 500
	config.Spec.Process.User.Umask = &umask
	config.Spec.Process.OOMScoreAdj = &score
	config.Spec.Process.Env = append(config.Spec.Process.Env, "A=1", "HOME=/else", "A=2")
	config.Spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1", "net/ipv4/conf/lo/forwarding": "1", "fs.mqueue.msg_max": "77"}
	out := sh(t, config, `ulimit -Sn; ulimit -Hn; ulimit -c; umask; cat /proc/self/oom_score_adj; echo $A $HOME; env | grep -c ^A=
cd /proc/sys; cat net/ipv4/ip_unprivileged_port_start kernel/shm_rmid_forced net/ipv4/conf/lo/forwarding fs/mqueue/msg_max`)
	want := "123\n456\n0\n0077\n500\n2 /else\n1\n80\n1\n1\n77\n"
	if out != want {
		t.Errorf("output\n%swant\n%s", out, want)
	}
}

// TestUserNamespace: in a pod with a user namespace nobody makes devices, and
// root is root of the namespace only (T21, T33).
func TestUserNamespace(t *testing.T) {
	root := newRoot(t)
	config := newConfig(root, "sh", "-c", `cat /proc/self/uid_map | { read a b c; echo $a $b $c; }; stat -c '%F %t:%T' /dev/null /dev/urandom; echo x >/dev/null && id -u; wc -c </proc/uptime; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; (echo x >/proc/sys/kernel/hostname) 2>&1; grep CapEff /proc/self/status`)
	config.Spec.Linux.MaskedPaths = append(config.Spec.Linux.MaskedPaths, "/proc/uptime")
	config.Spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "80"}
	config.Spec.Process.NoNewPrivileges = false
	config.Spec.Linux.Seccomp = allowList()
	score := 300
	config.Spec.Process.OOMScoreAdj = &score
	c := start(t, "container-init", config, func(cmd *exec.Cmd) {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		identity := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}}
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = identity, identity
		cmd.SysProcAttr.GidMappingsEnableSetgroups = true
	})
	c.wait()
	want := "0 0 65536\ncharacter special file 1:3\ncharacter special file 1:9\n0\n0\n80\nsh: can't create /proc/sys/kernel/hostname: Read-only file system\nCapEff:\t00000000a80425fb\n"
	if c.report != nil || c.out.String() != want {
		t.Errorf("report %v, output\n%swant\n%s", c.report, c.out.String(), want)
	}
}

// TestSharedPIDNamespace: without a pid namespace of its own the container sees
// its parent's.
func TestSharedPIDNamespace(t *testing.T) {
	c := start(t, "container-init", newConfig(newRoot(t), "sh", "-c", "echo $$; readlink /proc/self/ns/pid; ls -d /proc/1"), func(cmd *exec.Cmd) {
		cmd.SysProcAttr.Cloneflags &^= unix.CLONE_NEWPID
	})
	c.wait()
	ns, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("%d\n%s\n/proc/1\n", c.cmd.Process.Pid, ns); c.report != nil || c.out.String() != want {
		t.Errorf("report %v, output\n%swant\n%s", c.report, c.out.String(), want)
	}
}

// TestExec joins a running container as exec-init does (T21).
func TestExec(t *testing.T) {
	root := newRoot(t)
	ready := filepath.Join(root, "ready")
	c := start(t, "container-init", newConfig(root, "sh", "-c", "mkdir /made; >/ready; exec sleep 60"), nil)
	if c.report != nil {
		t.Fatal(c.report)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(ready); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal("the container did not get ready within 10 s")
		}
	}
	open := func(name string) *os.File {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", c.cmd.Process.Pid, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	pidns := open("pid")
	namespaces := []*os.File{open("mnt"), open("cgroup"), open("ipc"), open("uts"), open("net")}
	execIn := func(t *testing.T, config *Config) *child {
		if config.Namespaces == nil {
			config.Namespaces = []Namespace{{"mount", 4}, {"cgroup", 5}, {"ipc", 6}, {"uts", 7}, {"network", 8}}
		}
		done := make(chan *child)
		go func() {
			defer close(done)
			// Never unlocked: the thread ends with the goroutine, and its pid
			// namespace with it.
			runtime.LockOSThread()
			if err := unix.Setns(int(pidns.Fd()), unix.CLONE_NEWPID); err != nil {
				t.Errorf("setns pid: %v", err)
				return
			}
			c := start(t, "exec-init", config, func(cmd *exec.Cmd) { cmd.ExtraFiles = append(cmd.ExtraFiles, namespaces...) })
			c.wait()
			done <- c
		}()
		e, ok := <-done
		if !ok {
			t.FailNow()
		}
		return e
	}
	t.Run("joins", func(t *testing.T) {
		config := newConfig("/ignored", "sh", "-c", `cd /proc/self/ns; for n in mnt pid cgroup ipc uts net; do readlink $n; done; cd /made; ls -d /made; cat /proc/1/cmdline | head -c 5; echo; id -u; echo $HOME; pwd; ls /proc/self/fd | wc -l; grep -E "^(CapBnd|Seccomp:)" /proc/self/status`)
		config.User = &User{Name: "alice"}
		config.Spec.Process.Cwd = "/made"
		config.Spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"swapon"}, Action: specs.ActErrno}}}
		e := execIn(t, config)
		want := ""
		for _, n := range []string{"mnt", "pid", "cgroup", "ipc", "uts", "net"} {
			ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", c.cmd.Process.Pid, n))
			if err != nil {
				t.Fatal(err)
			}
			want += ns + "\n"
		}
		want += "/made\nsleep\n1000\n/home/alice\n/made\n4\nCapBnd:\t00000000a80425fb\nSeccomp:\t2\n"
		if e.report != nil || e.out.String() != want {
			t.Errorf("report %v, output\n%swant\n%s", e.report, e.out.String(), want)
		}
	})
	t.Run("joins by pidfd", func(t *testing.T) {
		fd, err := unix.PidfdOpen(c.cmd.Process.Pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		pidfd := os.NewFile(uintptr(fd), "pidfd")
		defer pidfd.Close()
		saved := namespaces
		namespaces = []*os.File{pidfd}
		defer func() { namespaces = saved }()
		config := newConfig("/ignored", "sh", "-c", "readlink /proc/self/ns/net; ls -d /made")
		config.Namespaces = []Namespace{{"mount", 4}, {"cgroup", 4}, {"network", 4}}
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", c.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if e := execIn(t, config); e.report != nil || e.out.String() != ns+"\n/made\n" {
			t.Errorf("report %v, output %q", e.report, e.out.String())
		}
	})
	t.Run("command not found", func(t *testing.T) {
		e := execIn(t, newConfig("/ignored", "nosuch"))
		if e.report == nil || !strings.Contains(e.report.Error(), `exec: "nosuch": executable file not found in $PATH`) || e.exitCode != 127 {
			t.Errorf("report %v, exit code %d", e.report, e.exitCode)
		}
	})
	t.Run("missing cwd is not created", func(t *testing.T) {
		config := newConfig("/ignored", "true")
		config.Spec.Process.Cwd = "/absent"
		e := execIn(t, config)
		if e.report == nil || !strings.Contains(e.report.Error(), "/absent") {
			t.Errorf("report %v", e.report)
		}
	})
	t.Run("cwd through a leaked descriptor", func(t *testing.T) { // CVE-2024-21626
		for fd := 3; fd < 16; fd++ {
			config := newConfig("/ignored", "sh", "-c", "test . -ef / && readlink /proc/self/cwd")
			config.Spec.Process.Cwd = fmt.Sprintf("/proc/self/fd/%d", fd)
			if e := execIn(t, config); e.report == nil && e.out.String() != "/\n" {
				t.Errorf("fd %d is a working directory: %s", fd, e.out.String())
			}
		}
	})
}

// TestTerminal: session, controlling terminal, size and /dev/console.
func TestTerminal(t *testing.T) {
	for name, own := range map[string]bool{"/dev/pts/0": true, "/dev/console": false} {
		t.Run(name, func(t *testing.T) {
			config := newConfig(newRoot(t), "sh", "-c", "test /proc/self/fd/0 -ef /dev/console && echo same; tty; readlink /proc/self/fd/1; stty size; echo to-tty >/dev/tty; stat -c %u:%g /dev/console")
			config.Spec.Process.Terminal = true
			config.Spec.Process.ConsoleSize = &specs.Box{Height: 33, Width: 99}
			config.User = &User{Name: "alice"}
			ptmx, extra := "/dev/ptmx", []*os.File(nil)
			if own {
				devpts, err := NewTerminals(&config.Spec, func(id uint32) uint32 { return id + 1000 })
				if err != nil {
					t.Fatal(err)
				}
				defer devpts.Close()
				ptmx, extra = fmt.Sprintf("/proc/self/fd/%d/ptmx", devpts.Fd()), []*os.File{devpts}
				config.TerminalsFD = 4
			}
			master, err := os.OpenFile(ptmx, os.O_RDWR|unix.O_NOCTTY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer master.Close()
			if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
				t.Fatal(err)
			}
			peer, _, errno := unix.Syscall(unix.SYS_IOCTL, master.Fd(), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
			if errno != 0 {
				t.Fatal(errno)
			}
			slave := os.NewFile(peer, "slave")
			var st unix.Stat_t
			if err := unix.Fstat(int(peer), &st); err != nil || own && st.Gid != 1005 {
				t.Errorf("the terminal's group is %d, %v; want the spec's, as the caller calls it", st.Gid, err)
			}
			c := start(t, "container-init", config, func(cmd *exec.Cmd) {
				cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
				cmd.ExtraFiles = append(cmd.ExtraFiles, extra...)
			})
			slave.Close()
			var out bytes.Buffer
			read := make(chan struct{})
			go func() { // EIO when the last slave is closed
				_, _ = io.Copy(&out, master)
				close(read)
			}()
			c.wait()
			select {
			case <-read:
			case <-time.After(10 * time.Second):
				t.Fatal("the terminal was not closed within 10 s")
			}
			want := fmt.Sprintf("same\n%[1]s\n%[1]s\n33 99\nto-tty\n1000:%[2]d\n", name, st.Gid)
			if got := strings.ReplaceAll(out.String(), "\r", ""); c.report != nil || got != want {
				t.Errorf("report %v, output\n%swant\n%s", c.report, got, want)
			}
		})
	}
}

func TestReadMessageIsCapped(t *testing.T) {
	var e Error
	if err := readMessage(strings.NewReader("\xff\xff\xff\xff"), &e, maxReport); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("error is %v", err)
	}
	if err := ReadReport(strings.NewReader("\x00\x00\x00\x09{")); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("error is %v", err)
	}
}

func FuzzReadReport(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02{}"))
	f.Add([]byte("\x00\x00\x00\x20{\"step\":\"exec\",\"class\":\"other\"}"))
	f.Fuzz(func(t *testing.T, data []byte) { _ = ReadReport(bytes.NewReader(data)) })
}
