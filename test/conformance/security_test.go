//go:build linux

package conformance_test

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

type securityContext = runtimeapi.LinuxContainerSecurityContext

func capabilities(add, drop []string) cri.Option {
	return cri.Security(func(s *securityContext) {
		s.Capabilities = &runtimeapi.Capability{AddCapabilities: add, DropCapabilities: drop}
	})
}

func seccomp(kind runtimeapi.SecurityProfile_ProfileType, file string) cri.Option {
	return cri.Security(func(s *securityContext) {
		s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: kind, LocalhostRef: file}
	})
}

// What a process finds: user, groups, capabilities, filters, files, limits.
func TestSecurityContext(t *testing.T) {
	p := sharedPodOf(t)
	denied := filepath.Join(directory(t), "denied.json")
	writeFile(t, denied, `{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["sethostname", "fchmodat", "chmod"], "action": "SCMP_ACT_ERRNO"}]}`)
	const (
		unconfined = runtimeapi.SecurityProfile_Unconfined
		standard   = runtimeapi.SecurityProfile_RuntimeDefault
		localhost  = runtimeapi.SecurityProfile_Localhost
	)
	status := cri.Command("/bin/cat", "/proc/self/status")
	ids := func(user, group int64, more ...int64) cri.Option {
		return cri.Security(func(s *securityContext) {
			s.RunAsUser, s.RunAsGroup = &runtimeapi.Int64Value{Value: user}, &runtimeapi.Int64Value{Value: group}
			s.SupplementalGroups = more
		})
	}
	userName := func(name string) cri.Option {
		return cri.Security(func(s *securityContext) { s.RunAsUsername = name })
	}
	for _, c := range []struct {
		promise string
		options []cri.Option
		want    string // regular expression over stdout and stderr
		code    int32
	}{
		{"the user is the image's", []cri.Option{cri.Command("/bin/id")}, `^uid=1000 euid=1000 gid=1000 groups=\[(1000 )?2000\]\n$`, 0},
		{"run_as_user 0 is root", []cri.Option{cri.Command("/bin/id"), cri.AsRoot}, `^uid=0 euid=0 gid=0 `, 0},
		{"run_as_user and run_as_group are numbers", []cri.Option{cri.Command("/bin/id"), ids(4242, 4343, 5000)}, `^uid=4242 euid=4242 gid=4343 groups=\[(4343 )?5000\]\n$`, 0},
		{"run_as_username is looked up in the image", []cri.Option{cri.Command("/bin/id"), userName("nobody")}, `^uid=65534 euid=65534 gid=65534 `, 0},
		{"supplemental groups are added to the image's", []cri.Option{cri.Command("/bin/id"), cri.Security(func(s *securityContext) {
			s.SupplementalGroups = []int64{5000}
		})}, `groups=\[(1000 )?2000 5000\]\n$`, 0},
		{"with policy Strict they are the only ones", []cri.Option{cri.Command("/bin/id"), cri.Security(func(s *securityContext) {
			s.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
			s.SupplementalGroups = []int64{5000}
		})}, `groups=\[(1000 )?5000\]\n$`, 0},

		{"root has the default capabilities", []cri.Option{status, cri.AsRoot}, `(?s)CapEff:\s00000000a80425fb\n.*CapBnd:\s00000000a80425fb\n`, 0},
		{"a user has none", []cri.Option{status}, `CapEff:\s0000000000000000\n`, 0},
		{"adding NET_ADMIN lets it make a bridge", []cri.Option{cri.Command("/app/web", "bridge", "br-test"), cri.AsRoot, capabilities([]string{"NET_ADMIN"}, nil)}, `^$`, 0},
		{"without NET_ADMIN it can't", []cri.Option{cri.Command("/app/web", "bridge", "br-test"), cri.AsRoot}, `not permitted`, 1},
		{"dropping NET_RAW takes raw sockets away", []cri.Option{cri.Command("/app/web", "rawsocket"), cri.AsRoot, capabilities(nil, []string{"NET_RAW"})}, `not permitted`, 1},
		{"with NET_RAW they are there", []cri.Option{cri.Command("/app/web", "rawsocket"), cri.AsRoot}, `^$`, 0},
		{"dropping ALL leaves none", []cri.Option{status, cri.AsRoot, capabilities(nil, []string{"ALL"})}, `CapBnd:\s0000000000000000\n`, 0},
		{"dropping ALL and adding one leaves one", []cri.Option{status, cri.AsRoot, capabilities([]string{"SYS_TIME"}, []string{"ALL"})}, `CapEff:\s0000000002000000\n`, 0},
		{"adding ALL gives what root can have", []cri.Option{cri.Command("/app/web", "bridge", "br-test"), cri.AsRoot, capabilities([]string{"ALL"}, nil)}, `^$`, 0},
		{"privileged can make a bridge", []cri.Option{cri.Command("/app/web", "bridge", "br-test"), cri.AsRoot, cri.Privileged}, `^$`, 0},
		{"privileged has a writable /sys", []cri.Option{cri.Command("/bin/cat", "/proc/mounts"), cri.AsRoot, cri.Privileged}, ` /sys sysfs rw,`, 0},

		{"no_new_privs is on when asked for", []cri.Option{status, cri.Security(func(s *securityContext) { s.NoNewPrivs = true })}, `NoNewPrivs:\s1\n`, 0},
		{"no_new_privs is off when not", []cri.Option{status}, `NoNewPrivs:\s0\n`, 0},
		// T23
		{"no seccomp profile is no filter", []cri.Option{status}, `Seccomp:\s0\n`, 0},
		{"Unconfined is no filter", []cri.Option{status, seccomp(unconfined, "")}, `Seccomp:\s0\n`, 0},
		{"RuntimeDefault is a filter", []cri.Option{status, seccomp(standard, "")}, `Seccomp:\s2\n`, 0},
		{"a Localhost profile denies what it says", []cri.Option{cri.Command("/app/web", "chmod", "700", "/tmp"), cri.AsRoot, seccomp(localhost, denied)}, `not permitted`, 1},
		{"it denies CAP_SYS_ADMIN too", []cri.Option{cri.Command("/app/web", "sethostname", "other"), cri.AsRoot, capabilities([]string{"SYS_ADMIN"}, nil), seccomp(localhost, denied)}, `not permitted`, 1},
		{"privileged is not filtered", []cri.Option{cri.Command("/app/web", "chmod", "1777", "/tmp"), cri.AsRoot, cri.Privileged, seccomp(localhost, denied)}, `^$`, 0},
		{"SYS_ADMIN without a filter sets the host name", []cri.Option{cri.Command("/app/web", "sethostname", "shared-pod"), cri.AsRoot, capabilities([]string{"SYS_ADMIN"}, nil), seccomp(unconfined, "")}, `^$`, 0},

		{"the root file system is writable", []cri.Option{cri.Command("/bin/write", "/new", "x"), cri.AsRoot}, `^$`, 0},
		{"readonly_rootfs makes it read-only", []cri.Option{cri.Command("/bin/write", "/new", "x"), cri.AsRoot, readonlyRootfs}, `read-only file system`, 1},
		{"/dev/shm stays writable then", []cri.Option{cri.Command("/bin/write", "/dev/shm/new", "x"), cri.AsRoot, readonlyRootfs}, `^$`, 0},
		{"a masked file is empty", []cri.Option{cri.Command("/bin/cat", "/etc/group"), masked("/etc/group", "/not/there")}, `^$`, 0},
		{"a masked directory is empty", []cri.Option{cri.Command("/bin/ls", "/home"), cri.AsRoot, masked("/home")}, `^$`, 0},
		{"a read-only path is", []cri.Option{cri.Command("/bin/write", "/tmp/x", "x"), cri.Security(func(s *securityContext) { s.ReadonlyPaths = []string{"/tmp"} })}, `read-only file system`, 1},

		{"working_dir", []cri.Option{cri.Command("/bin/pwd"), func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "/tmp" }}, `^/tmp\n$`, 0},
		{"the working directory is the image's", []cri.Option{cri.Command("/bin/pwd")}, `^/app\n$`, 0},
		{"the environment is the image's and the request's", []cri.Option{cri.Command("/bin/env"), cri.Env("PORT", "80"), cri.Env("OWN", "a=b c")}, `(?s)OWN=a=b c\n.*PATH=/usr/local/sbin.*PORT=80\n`, 0},
		{"HOSTNAME is the pod's", []cri.Option{cri.Command("/bin/env")}, `(^|\n)HOSTNAME=shared-pod\n`, 0},
		{"HOSTNAME is the request's, if it says so", []cri.Option{cri.Command("/bin/env"), cri.Env("HOSTNAME", "mine")}, `(^|\n)HOSTNAME=mine\n`, 0},
		{"environment values are bytes", []cri.Option{cri.Command("/bin/env"), cri.Env("OWN", "\xff\x80 x")}, `OWN=[^a-z ]{2} x\n`, 0},
		// T26
		{"devpts, mqueue and a read-only /sys are mounted", []cri.Option{cri.Command("/bin/cat", "/proc/mounts")}, `(?s)\ndevpts /dev/pts .*\nmqueue /dev/mqueue .*\nsysfs /sys sysfs ro,`, 0},
		{"/dev/shm has 64 MiB", []cri.Option{cri.Command("/bin/cat", "/proc/mounts")}, ` /dev/shm tmpfs rw,[^\n]*size=65536k`, 0},
	} {
		t.Run(c.promise, func(t *testing.T) {
			r := p.Run(t, "process", append(c.options, cri.FreshLog)...)
			if r.Code != c.code {
				t.Errorf("exit code %d, want %d", r.Code, c.code)
			}
			if out := r.Stdout + r.Stderr; !regexp.MustCompile(c.want).MatchString(out) {
				t.Errorf("output %q, want %q", out, c.want)
			}
		})
	}
	t.Run("run_as_group without a user is refused", func(t *testing.T) {
		id, err := p.CreateContext(t.Context(), "group-alone", cri.Security(func(s *securityContext) { s.RunAsGroup = &runtimeapi.Int64Value{Value: 1} }))
		if err == nil {
			p.RemoveByID(t, id)
			t.Error("it was created")
		}
	})
	t.Run("exec is confined as its container", func(t *testing.T) {
		id := p.Start(t, "confined", cri.AsRoot, cri.Command("/bin/sleep", "infinity"), seccomp(standard, ""), capabilities(nil, []string{"NET_RAW"}))
		if got := p.Output(t, id, "/bin/cat", "/proc/self/status"); !strings.Contains(got, "Seccomp:\t2\n") {
			t.Errorf("no filter: %s", got)
		}
		if r := p.Do(t, id, "/app/web", "rawsocket"); r.Code != 1 {
			t.Errorf("NET_RAW is back: %+v", r)
		}
	})
}

func readonlyRootfs(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.ReadonlyRootfs = true }

func masked(paths ...string) cri.Option {
	return cri.Security(func(s *securityContext) { s.MaskedPaths = paths })
}

// Modes of the pid namespace.
func TestPidNamespaces(t *testing.T) {
	const first = "/proc/1/cmdline"
	t.Run("POD: containers share one, and none of them is process 1", func(t *testing.T) {
		p := sharedPodOf(t)
		if r := p.Run(t, "shares-pids", cri.Command("/bin/cat", first), cri.FreshLog); r.Code != 0 || strings.Contains(r.Stdout, "cat") {
			t.Errorf("%+v", r)
		}
		other := p.Start(t, "seen", cri.Command("/bin/sleep", "2718"))
		if !runs(t, p.Pod, p.Idle, "2718") {
			t.Errorf("the process of container %.12s is not seen by another one", other)
		}
	})
	t.Run("CONTAINER: its process is process 1, and it sees no other", func(t *testing.T) {
		p := sharedPodOf(t)
		own := p.Start(t, "own-pids", cri.Command("/bin/sleep", "1111"), cri.Pid(runtimeapi.NamespaceMode_CONTAINER, ""))
		if got := p.Output(t, own, "/bin/cat", first); got != "/bin/sleep\x001111\x00" {
			t.Errorf("process 1: %q", got)
		}
		p.Start(t, "not-seen", cri.Command("/bin/sleep", "3141"))
		if runs(t, p.Pod, own, "3141") {
			t.Error("it sees another container's process")
		}
		t.Run("TARGET: another container joins it", func(t *testing.T) { // T27
			if r := p.Run(t, "targets", cri.Command("/bin/cat", first), cri.FreshLog, cri.Pid(runtimeapi.NamespaceMode_TARGET, own)); strings.TrimSuffix(r.Stdout, "\n") != "/bin/sleep\x001111\x00" {
				t.Errorf("process 1: %+v", r)
			}
		})
	})
	t.Run("NODE: containers of the pod see each other", func(t *testing.T) {
		p := shared(t, runtimeapi.NamespaceMode_NODE)
		p.Start(t, "on-node", cri.Command("/bin/sleep", "1618"))
		if !runs(t, p.Pod, p.Idle, "1618") {
			t.Error("it does not see another container's process")
		}
	})
}

// runs tells whether a container sees a process with that last argument.
func runs(t *testing.T, p *cri.Pod, id, arg string) bool {
	t.Helper()
	for line := range strings.Lines(p.Output(t, id, "/bin/ls", "/proc")) {
		f := strings.Fields(line)
		pid := f[len(f)-1]
		if strings.Trim(pid, "0123456789") != "" {
			continue
		}
		if r := p.Do(t, id, "/bin/cat", "/proc/"+pid+"/cmdline"); strings.HasSuffix(r.Stdout, "\x00"+arg+"\x00") {
			return true
		}
	}
	return false
}

// A set-user-id program of the image has effect unless no_new_privs is on.
func TestPrivilegeEscalation(t *testing.T) {
	p := sharedPodOf(t)
	ref := layered(t)
	for _, c := range []struct {
		promise string
		on      bool
		euid    string
	}{
		{"not with no_new_privs", true, " euid=1000 "},
		{"without it", false, " euid=0 "},
	} {
		t.Run(c.promise, func(t *testing.T) {
			r := p.Run(t, "escalates", cri.FreshLog, cri.Image(ref), cri.Command("/bin/setuid-id", "id"), cri.Security(func(s *securityContext) { s.NoNewPrivs = c.on }))
			if r.Code != 0 || !strings.Contains(r.Stdout, c.euid) {
				t.Errorf("%+v, want %q", r, c.euid)
			}
		})
	}
}

// What a pod's containers share, as Kubernetes has it: network, IPC, host name;
// not their mounts.
func TestContainersOfOnePod(t *testing.T) {
	p := sharedPodOf(t)
	t.Run("shared memory", func(t *testing.T) {
		p.Output(t, p.Idle, "/bin/write", "/dev/shm/note", "shared memory")
		if r := p.Run(t, "neighbour", cri.Command("/bin/cat", "/dev/shm/note"), cri.FreshLog); r.Stdout != "shared memory\n" {
			t.Errorf("%+v", r)
		}
	})
	t.Run("loopback", func(t *testing.T) {
		web := p.Start(t, "web-here", cri.Env("PORT", "3456"))
		cri.WaitForLog(t, p.Container(t, web).GetLogPath(), "listening")
		if got := p.Output(t, p.Idle, "/bin/get", "http://127.0.0.1:3456/healthz"); got != "ok\n" {
			t.Errorf("%q", got)
		}
		if log := cri.ReadLog(t, p.Container(t, p.Idle).GetLogPath()); log.Stdout+log.Stderr != "" {
			t.Errorf("the neighbour's log has %+v", log)
		}
	})
	t.Run("a port below 1024, for whoever asks", func(t *testing.T) {
		id := p.Start(t, "low-port", cri.Command("/bin/tcp-echo", "81"))
		cri.WaitForLog(t, p.Container(t, id).GetLogPath(), "listening")
	})
	t.Run("not their files", func(t *testing.T) {
		p.Output(t, p.Idle, "/bin/write", "/tmp/mine", "x")
		if r := p.Run(t, "apart", cri.Command("/bin/ls", "/tmp"), cri.FreshLog); r.Stdout != "" {
			t.Errorf("%+v", r)
		}
	})
	t.Run("sysctls of the pod", func(t *testing.T) {
		for file, want := range map[string]string{"/proc/sys/kernel/shm_rmid_forced": "1\n", "/proc/sys/fs/mqueue/msg_max": "99\n"} {
			if got := p.Output(t, p.Idle, "/bin/cat", file); got != want {
				t.Errorf("%s: %q", file, got)
			}
		}
	})
}
