//go:build linux

package e2e_test

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestContainerLifeCycle(t *testing.T) {
	p := sharedPodOf(t)
	ctx := timeout(t, callTimeout)
	began := time.Now().UnixNano()
	id := p.create(t, "life", command("/bin/trap-term"), asRoot)

	st := p.container(t, id)
	if st.GetState() != runtimeapi.ContainerState_CONTAINER_CREATED || st.GetCreatedAt() < began || st.GetStartedAt() != 0 || st.GetFinishedAt() != 0 {
		t.Errorf("created container: %v", st)
	}
	_, err := p.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"/bin/id"}})
	wantError(t, err, codes.FailedPrecondition, id)

	p.startContainer(t, id)
	st = p.container(t, id)
	if st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING || st.GetStartedAt() < st.GetCreatedAt() || st.GetFinishedAt() != 0 {
		t.Errorf("running container: %v", st)
	}
	_, err = p.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	wantError(t, err, codes.FailedPrecondition, id)
	waitForLog(t, st.GetLogPath(), "trapping SIGTERM")

	// The second fault of the proof of concept: Stop stops, also what ignores
	// SIGTERM, within grace + 2 s.
	stopBegan := time.Now()
	if _, err := p.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 2}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(stopBegan); took < 1900*time.Millisecond || took > 4*time.Second {
		t.Errorf("stop with 2 s of grace took %v", took)
	}
	st = p.container(t, id)
	if st.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || st.GetExitCode() != 137 || st.GetReason() != "Error" || st.GetFinishedAt() < st.GetStartedAt() {
		t.Errorf("stopped container: %v", st)
	}
	if log := readLog(t, st.GetLogPath()).stdout; !strings.Contains(log, "ignored terminated") {
		t.Errorf("SIGTERM did not come first: %q", log)
	}
	_, err = p.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	wantError(t, err, codes.FailedPrecondition, id)

	for range 2 { // idempotent
		if _, err := p.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id}); err != nil {
			t.Error(err)
		}
	}
	for range 2 {
		p.removeContainer(t, id)
	}
	_, err = p.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	wantError(t, err, codes.NotFound, id)
	if _, err := p.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
}

func TestContainerExit(t *testing.T) {
	p := sharedPodOf(t)
	for _, c := range []struct {
		name    string
		options []option
		code    int32
		reason  string
		stdout  string
	}{
		{"success", []option{command("/bin/echo", "hello", "there")}, 0, "Completed", "hello there\n"},
		{"failure", []option{command("/bin/exit", "3")}, 3, "Error", ""},
		{"search-path", []option{command("echo", "found")}, 0, "Completed", "found\n"},
		{"image-arguments", []option{args("echo", "entrypoint")}, 0, "Completed", "entrypoint\n"},
		{"oom", []option{command("/bin/oom"), memory(48 << 20)}, 137, "OOMKilled", "holding 8 MiB\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := p.start(t, "exit-"+c.name, c.options...)
			st := p.waitExit(t, id, 30*time.Second)
			if st.GetExitCode() != c.code || st.GetReason() != c.reason {
				t.Errorf("exit code %d, reason %q (%s), want %d %q", st.GetExitCode(), st.GetReason(), st.GetMessage(), c.code, c.reason)
			}
			if log := readLog(t, st.GetLogPath()); !strings.HasPrefix(log.stdout, c.stdout) || log.stderr != "" {
				t.Errorf("log %q", log)
			}
		})
	}
	t.Run("command not found", func(t *testing.T) {
		id, err := p.createAndStart(t.Context(), "not-found", command("/bin/nothing"))
		wantError(t, err, codes.NotFound, "/bin/nothing")
		if id == "" {
			t.Fatal("CreateContainer failed; a missing command is StartContainer's error")
		}
		defer p.removeContainer(t, id)
		st := p.container(t, id)
		if st.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || st.GetReason() != "StartError" || st.GetExitCode() != 128 {
			t.Errorf("status after a failed start: %v", st)
		}
	})
}

// What a process finds: user, groups, capabilities, files, limits.
func TestContainerProcess(t *testing.T) {
	p := sharedPodOf(t)
	type sc = runtimeapi.LinuxContainerSecurityContext
	status := command("/bin/cat", "/proc/self/status")
	caps := func(add, drop []string) option {
		return security(func(s *sc) {
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: add, DropCapabilities: drop}
		})
	}
	for _, c := range []struct {
		name    string
		options []option
		want    string // regular expression over stdout and stderr
		code    int32
	}{
		{"image's user", []option{command("/bin/id")}, `^uid=1000 euid=1000 gid=1000 groups=\[(1000 )?2000\]\n$`, 0},
		{"root", []option{command("/bin/id"), asRoot}, `^uid=0 euid=0 gid=0 `, 0},
		{"number", []option{command("/bin/id"), security(func(s *sc) {
			s.RunAsUser, s.RunAsGroup = &runtimeapi.Int64Value{Value: 4242}, &runtimeapi.Int64Value{Value: 4343}
			s.SupplementalGroups = []int64{5000}
		})}, `^uid=4242 euid=4242 gid=4343 groups=\[(4343 )?5000\]\n$`, 0},
		{"name", []option{command("/bin/id"), security(func(s *sc) { s.RunAsUsername = "nobody" })}, `^uid=65534 euid=65534 gid=65534 `, 0},
		{"strict groups", []option{command("/bin/id"), security(func(s *sc) {
			s.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
			s.SupplementalGroups = []int64{5000}
		})}, `groups=\[(1000 )?5000\]\n$`, 0},

		{"default capabilities", []option{status, asRoot}, `(?s)CapEff:\s00000000a80425fb\n.*CapBnd:\s00000000a80425fb\n`, 0},
		{"no capabilities as a user", []option{status}, `CapEff:\s0000000000000000\n`, 0},
		{"drop all", []option{status, asRoot, caps(nil, []string{"ALL"})}, `CapBnd:\s0000000000000000\n`, 0},
		{"drop all, add one", []option{status, asRoot, caps([]string{"SYS_TIME"}, []string{"ALL"})}, `CapEff:\s0000000002000000\n`, 0},
		{"privileged", []option{status, asRoot, privileged}, `CapEff:\s000001ffffffffff\n`, 0},
		{"no new privileges", []option{status, security(func(s *sc) { s.NoNewPrivs = true })}, `NoNewPrivs:\s1\n`, 0},
		{"new privileges", []option{status}, `NoNewPrivs:\s0\n`, 0},
		// T23
		{"no seccomp", []option{status}, `Seccomp:\s0\n`, 0},
		{"default seccomp", []option{status, security(func(s *sc) {
			s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
		})}, `Seccomp:\s2\n`, 0},

		{"writable root", []option{command("/bin/write", "/new", "x"), asRoot}, `^$`, 0},
		{"read-only root", []option{command("/bin/write", "/new", "x"), asRoot, security(func(s *sc) { s.ReadonlyRootfs = true })}, `read-only file system`, 1},
		{"writable /dev/shm below a read-only root", []option{command("/bin/write", "/dev/shm/new", "x"), asRoot, security(func(s *sc) { s.ReadonlyRootfs = true })}, `^$`, 0},
		{"masked file", []option{command("/bin/cat", "/etc/group"), security(func(s *sc) { s.MaskedPaths = []string{"/etc/group", "/not/there"} })}, `^$`, 0},
		{"masked directory", []option{command("/bin/ls", "/app"), args(), asRoot, security(func(s *sc) { s.MaskedPaths = []string{"/home"} })}, `web\n`, 0},
		{"read-only path", []option{command("/bin/write", "/tmp/x", "x"), security(func(s *sc) { s.ReadonlyPaths = []string{"/tmp"} })}, `read-only file system`, 1},

		{"working directory", []option{command("/bin/pwd"), func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "/tmp" }}, `^/tmp\n$`, 0},
		{"image's working directory", []option{command("/bin/pwd")}, `^/app\n$`, 0},
		{"environment", []option{command("/bin/env"), func(c *runtimeapi.ContainerConfig) {
			c.Envs = []*runtimeapi.KeyValue{{Key: "PORT", Value: []byte("80")}, {Key: "OWN", Value: []byte("a=b c")}}
		}}, `(?s)OWN=a=b c\n.*PATH=/usr/local/sbin.*PORT=80\n`, 0},
		// Go raises its own soft limit, so that only the hard one is as it was set.
		{"limits", []option{command("/bin/cat", "/proc/self/limits")}, `Max open files\s+\d+\s+52428[78]\s`, 0},
		{"host name", []option{command("/bin/hostname")}, `^shared\n$`, 0},
		{"resolv.conf", []option{command("/bin/cat", "/etc/resolv.conf")}, `(?s)search example.test\n.*nameserver 192.0.2.53\n.*options ndots:3\n`, 0},
		{"hosts", []option{command("/bin/cat", "/etc/hosts")}, `127\.0\.0\.1\s+localhost`, 0},
		{"sysctl", []option{command("/bin/cat", "/proc/sys/kernel/shm_rmid_forced")}, `^1\n$`, 0},
		// T26
		{"mounts", []option{command("/bin/cat", "/proc/mounts")}, `(?s)\ndevpts /dev/pts .*\nmqueue /dev/mqueue .*\nsysfs /sys sysfs ro,`, 0},
		{"shared memory", []option{command("/bin/cat", "/proc/mounts")}, ` /dev/shm tmpfs rw,nosuid,nodev,noexec,[^\n]*size=65536k`, 0},
		{"cgroup namespace", []option{command("/bin/cat", "/proc/self/cgroup")}, `^0::/\n$`, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := p.run(t, "process", append(c.options, freshLog)...)
			if r.code != c.code {
				t.Errorf("exit code %d, want %d", r.code, c.code)
			}
			if got := r.stdout + r.stderr; !regexp.MustCompile(c.want).MatchString(got) {
				t.Errorf("got %.2000q, want it to match %s", got, c.want)
			}
		})
	}
}

// T22: whoever is orphaned is reaped, and the pod's process list is as before.
func TestZombiesAreReaped(t *testing.T) {
	p := sharedPodOf(t)
	numbers := regexp.MustCompile(`(?m) (\d+)$`)
	list := func() []string {
		var pids []string
		for _, m := range numbers.FindAllStringSubmatch(p.output(t, p.idle, "/bin/ls", "/proc"), -1) {
			pids = append(pids, m[1])
		}
		return pids[:len(pids)-1] // ls itself
	}
	before := list()
	r := p.run(t, "zombies", command("/bin/spawn-zombies", "8", "500ms"))
	if r.code != 0 {
		t.Fatalf("spawn-zombies: %+v", r)
	}
	eventually(t, 5*time.Second, "the end of all orphans", func() error {
		if now := list(); len(now) > len(before) {
			return fmt.Errorf("processes before %v, now %v", before, now)
		}
		return nil
	})
}

func TestListAndFilter(t *testing.T) {
	p := sharedPodOf(t)
	ctx := timeout(t, callTimeout)
	created := p.create(t, "listed")
	st := p.sandbox(t, p.id)
	if st.GetState() != runtimeapi.PodSandboxState_SANDBOX_READY || st.GetNetwork().GetIp() == "" || st.GetLabels()["pod"] != "shared" ||
		st.GetAnnotations()["example.org/why"] != "test" || st.GetMetadata().GetUid() != "uid-shared" || st.GetCreatedAt() == 0 {
		t.Errorf("status of the pod: %v", st) // T42: never ready without an address
	}
	pods := func(f *runtimeapi.PodSandboxFilter) []string {
		r, err := p.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, i := range r.GetItems() {
			ids = append(ids, i.GetId())
		}
		return ids
	}
	ready := &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}
	notReady := &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY}
	for _, c := range []struct {
		name   string
		filter *runtimeapi.PodSandboxFilter
		want   bool
	}{
		{"none", nil, true},
		{"id", &runtimeapi.PodSandboxFilter{Id: p.id}, true},
		{"beginning of the id", &runtimeapi.PodSandboxFilter{Id: p.id[:10]}, true},
		{"other id", &runtimeapi.PodSandboxFilter{Id: "zzz"}, false},
		{"ready", &runtimeapi.PodSandboxFilter{State: ready}, true},
		{"not ready", &runtimeapi.PodSandboxFilter{State: notReady}, false},
		{"label", &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"pod": "shared"}}, true},
		{"other label", &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"pod": "shared", "x": "y"}}, false},
	} {
		if got := slices.Contains(pods(c.filter), p.id); got != c.want {
			t.Errorf("pods by %s: listed %v, want %v", c.name, got, c.want)
		}
	}
	running := &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}
	for _, c := range []struct {
		name          string
		filter        *runtimeapi.ContainerFilter
		idle, created bool
	}{
		{"none", nil, true, true},
		{"id", &runtimeapi.ContainerFilter{Id: p.idle}, true, false},
		{"pod", &runtimeapi.ContainerFilter{PodSandboxId: p.id}, true, true},
		{"other pod", &runtimeapi.ContainerFilter{PodSandboxId: "zzz"}, false, false},
		{"running", &runtimeapi.ContainerFilter{State: running}, true, false},
		{"label", &runtimeapi.ContainerFilter{LabelSelector: map[string]string{"container": "listed"}}, false, true},
	} {
		r, err := p.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: c.filter})
		if err != nil {
			t.Fatal(err)
		}
		has := func(id string) bool {
			return slices.ContainsFunc(r.GetContainers(), func(ct *runtimeapi.Container) bool { return ct.GetId() == id })
		}
		if has(p.idle) != c.idle || has(created) != c.created {
			t.Errorf("containers by %s: %v %v, want %v %v", c.name, has(p.idle), has(created), c.idle, c.created)
		}
	}
}
