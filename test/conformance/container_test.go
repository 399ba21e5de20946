//go:build linux

package conformance_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

const (
	created = runtimeapi.ContainerState_CONTAINER_CREATED
	running = runtimeapi.ContainerState_CONTAINER_RUNNING
	exited  = runtimeapi.ContainerState_CONTAINER_EXITED
)

func TestContainer(t *testing.T) {
	p := sharedPodOf(t)
	ctx := cri.Timeout(t, cri.CallTimeout)
	began := time.Now().UnixNano()
	id := p.Create(t, "life", cri.Command("/bin/trap-term"), cri.AsRoot)

	t.Run("created, it has not run", func(t *testing.T) {
		st := p.Container(t, id)
		if st.GetState() != created || st.GetCreatedAt() < began || st.GetStartedAt() != 0 || st.GetFinishedAt() != 0 {
			t.Errorf("%v", st)
		}
		_, err := p.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"/bin/id"}})
		cri.WantError(t, err, codes.FailedPrecondition, id)
	})
	p.StartByID(t, id)
	t.Run("started, it runs", func(t *testing.T) {
		st := p.Container(t, id)
		if st.GetState() != running || st.GetStartedAt() < st.GetCreatedAt() || st.GetFinishedAt() != 0 {
			t.Errorf("%v", st)
		}
		_, err := p.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
		cri.WantError(t, err, codes.FailedPrecondition, id)
	})
	t.Run("stopped, it gets a signal, its grace period, and its end", func(t *testing.T) {
		log := p.Container(t, id).GetLogPath()
		cri.WaitForLog(t, log, "trapping SIGTERM")
		stopped := time.Now()
		p.StopByID(t, id, 2)
		if took := time.Since(stopped); took < 1900*time.Millisecond || took > 4*time.Second {
			t.Errorf("stop with 2 s of grace took %v", took)
		}
		st := p.Container(t, id)
		if st.GetState() != exited || st.GetExitCode() != 137 || st.GetReason() != "Error" || st.GetFinishedAt() < st.GetStartedAt() {
			t.Errorf("%v", st)
		}
		if out := cri.ReadLog(t, log).Stdout; !strings.Contains(out, "ignored terminated") {
			t.Errorf("SIGTERM did not come first: %q", out)
		}
		p.StopByID(t, id, 0) // idempotent
		_, err := p.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
		cri.WantError(t, err, codes.FailedPrecondition, id)
	})
	t.Run("removed, it is unknown", func(t *testing.T) {
		p.RemoveByID(t, id)
		p.RemoveByID(t, id) // idempotent
		_, err := p.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		cri.WantError(t, err, codes.NotFound, id)
	})
	t.Run("created or running, it can be removed", func(t *testing.T) {
		p.RemoveByID(t, p.Create(t, "removed-created"))
		p.RemoveByID(t, p.Start(t, "removed-running", cri.Command("/bin/sleep", "infinity")))
	})
	t.Run("a program that ends on SIGTERM is not waited for", func(t *testing.T) {
		id := p.Start(t, "ends-on-term", cri.Command("/bin/sleep", "infinity"))
		stopped := time.Now()
		p.StopByID(t, id, 30)
		if took := time.Since(stopped); took > 5*time.Second {
			t.Errorf("took %v", took)
		}
	})
}

func TestContainerAttributes(t *testing.T) {
	p := sharedPodOf(t)
	dir := directory(t)
	id := p.Create(t, "attributes", cri.Command("/bin/sleep", "1"), cri.Attempt(3),
		cri.Mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/mnt", Readonly: true}),
		func(c *runtimeapi.ContainerConfig) {
			c.Annotations = map[string]string{"example.org/key": "a value"}
			c.Labels["key"] = "value"
		})
	st := p.Container(t, id)
	if m := st.GetMetadata(); m.GetName() != "attributes" || m.GetAttempt() != 3 {
		t.Errorf("metadata %v", m)
	}
	if st.GetLabels()["key"] != "value" || st.GetAnnotations()["example.org/key"] != "a value" {
		t.Errorf("labels %v, annotations %v", st.GetLabels(), st.GetAnnotations())
	}
	if want := p.Config.GetLogDirectory() + "/attributes-3.log"; st.GetLogPath() != want {
		t.Errorf("log path %q, want %q", st.GetLogPath(), want)
	}
	if st.GetImage().GetImage() == "" || st.GetImageId() == "" || st.GetImageRef() == "" {
		t.Errorf("image %v, id %q, ref %q", st.GetImage(), st.GetImageId(), st.GetImageRef())
	}
	if m := st.GetMounts(); len(m) == 0 || !slices.ContainsFunc(m, func(m *runtimeapi.Mount) bool {
		return m.GetHostPath() == dir && m.GetContainerPath() == "/mnt" && m.GetReadonly()
	}) {
		t.Errorf("mounts %v", m)
	}
	for _, c := range []struct {
		name   string
		filter *runtimeapi.ContainerFilter
		want   bool
	}{
		{"none", nil, true},
		{"id", &runtimeapi.ContainerFilter{Id: id}, true},
		{"the beginning of its id", &runtimeapi.ContainerFilter{Id: id[:13]}, true},
		{"pod", &runtimeapi.ContainerFilter{PodSandboxId: p.ID}, true},
		{"other pod", &runtimeapi.ContainerFilter{PodSandboxId: "zzz"}, false},
		{"its state", &runtimeapi.ContainerFilter{State: &runtimeapi.ContainerStateValue{State: created}}, true},
		{"another state", &runtimeapi.ContainerFilter{State: &runtimeapi.ContainerStateValue{State: running}}, false},
		{"label", &runtimeapi.ContainerFilter{LabelSelector: map[string]string{"key": "value"}}, true},
		{"other label", &runtimeapi.ContainerFilter{LabelSelector: map[string]string{"key": "other"}}, false},
	} {
		r, err := p.ListContainers(cri.Timeout(t, cri.CallTimeout), &runtimeapi.ListContainersRequest{Filter: c.filter})
		if err != nil {
			t.Fatal(err)
		}
		if got := slices.ContainsFunc(r.GetContainers(), func(i *runtimeapi.Container) bool { return i.GetId() == id && i.GetPodSandboxId() == p.ID }); got != c.want {
			t.Errorf("by %s: listed %v, want %v", c.name, got, c.want)
		}
	}
}

func TestContainerExit(t *testing.T) {
	p := sharedPodOf(t)
	for _, c := range []struct {
		promise string
		options []cri.Option
		code    int32
		reason  string
		stdout  string
	}{
		{"0 is Completed", []cri.Option{cri.Command("/bin/echo", "hello", "there")}, 0, "Completed", "hello there\n"},
		{"another code is Error", []cri.Option{cri.Command("/bin/exit", "3")}, 3, "Error", ""},
		{"a program is found by PATH", []cri.Option{cri.Command("echo", "found")}, 0, "Completed", "found\n"},
		{"arguments without a command go to the image's entrypoint", []cri.Option{cri.Args("echo", "entrypoint")}, 0, "Completed", "entrypoint\n"},
		{"beyond the memory limit is OOMKilled with 137", []cri.Option{cri.Command("/bin/oom"), cri.MemoryLimit(48 << 20)}, 137, "OOMKilled", "holding 8 MiB\n"},
	} {
		t.Run(c.promise, func(t *testing.T) {
			id := p.Start(t, "exit", append(c.options, cri.FreshLog)...)
			st := p.WaitExit(t, id, 30*time.Second)
			if st.GetExitCode() != c.code || st.GetReason() != c.reason {
				t.Errorf("exit code %d, reason %q (%s), want %d %q", st.GetExitCode(), st.GetReason(), st.GetMessage(), c.code, c.reason)
			}
			if log := cri.ReadLog(t, st.GetLogPath()); !strings.HasPrefix(log.Stdout, c.stdout) || log.Stderr != "" {
				t.Errorf("log %+v", log)
			}
		})
	}
	t.Run("a missing program is the start's error", func(t *testing.T) {
		id, err := p.CreateAndStart(t.Context(), "not-found", cri.Command("/bin/nothing"))
		cri.WantError(t, err, codes.NotFound, "/bin/nothing")
		if id == "" {
			t.Fatal("CreateContainer failed")
		}
		defer p.RemoveByID(t, id)
		if st := p.Container(t, id); st.GetState() != exited || st.GetReason() != "StartError" || st.GetExitCode() != 128 {
			t.Errorf("%v", st)
		}
	})
}

// The signal that stops a container is the request's, else the image's, else
// SIGTERM.
func TestStopSignal(t *testing.T) {
	p := sharedPodOf(t)
	tag, _ := imageOf(t, "stops:hup", func(c *v1.Config) { c.StopSignal = "SIGHUP" })
	for _, c := range []struct {
		promise string
		options []cri.Option
		code    int32
	}{
		{"the image's", []cri.Option{cri.Image(tag)}, 128 + 1},
		{"the request's", []cri.Option{cri.Image(tag), func(c *runtimeapi.ContainerConfig) { c.StopSignal = runtimeapi.Signal_SIGNAL_SIGINT }}, 128 + 2},
		{"SIGTERM", nil, 128 + 15},
	} {
		t.Run(c.promise, func(t *testing.T) {
			id := p.Start(t, "stop-signal", append(c.options, cri.FreshLog, cri.Command("/bin/sleep", "infinity"))...)
			p.StopByID(t, id, 10)
			if st := p.Container(t, id); st.GetExitCode() != c.code {
				t.Errorf("exit code %d, want %d", st.GetExitCode(), c.code)
			}
		})
	}
}

// Init containers run one after the other in one pod, and a restart is a new
// attempt of the same container, as a kubelet makes them.
func TestContainersInSequence(t *testing.T) {
	p := sharedPodOf(t)
	dir := directory(t)
	volume := cri.Mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/shared"})
	for i := range 3 {
		name := fmt.Sprintf("init-%d", i)
		if r := p.Run(t, name, cri.AsRoot, volume, cri.Command("/bin/write", "/shared/"+name, name)); r.Code != 0 {
			t.Fatalf("%s: %+v", name, r)
		}
	}
	for attempt := range uint32(3) {
		id := p.Start(t, "restarts", volume, cri.Attempt(attempt), cri.Command("/bin/cat", "/shared/init-0", "/shared/init-1", "/shared/init-2"))
		st := p.WaitExit(t, id, 15*time.Second)
		if got := cri.ReadLog(t, st.GetLogPath()).Stdout; got != "init-0\ninit-1\ninit-2\n" || st.GetMetadata().GetAttempt() != attempt {
			t.Errorf("attempt %d: %q, %v", attempt, got, st.GetMetadata())
		}
	}
	t.Run("the name and attempt of a container are taken", func(t *testing.T) {
		first, err := p.CreateContext(t.Context(), "twice")
		if err != nil {
			t.Fatal(err)
		}
		defer p.RemoveByID(t, first)
		if second, err := p.CreateContext(t.Context(), "twice"); err == nil && second != first {
			p.RemoveByID(t, second)
			t.Error("a second container with the same name and attempt")
		}
	})
}

// Orphans of a container's processes don't stay.
func TestZombiesAreReaped(t *testing.T) {
	p := sharedPodOf(t)
	list := func() []string {
		var pids []string
		for line := range strings.Lines(p.Output(t, p.Idle, "/bin/ls", "/proc")) {
			f := strings.Fields(line)
			if name := f[len(f)-1]; strings.Trim(name, "0123456789") == "" {
				pids = append(pids, name)
			}
		}
		return pids[:len(pids)-1] // ls itself
	}
	before := list()
	if r := p.Run(t, "zombies", cri.Command("/bin/spawn-zombies", "8", "500ms")); r.Code != 0 {
		t.Fatalf("spawn-zombies: %+v", r)
	}
	cri.Eventually(t, 5*time.Second, "the end of all orphans", func() error {
		if now := list(); len(now) > len(before) {
			return fmt.Errorf("processes before %v, now %v", before, now)
		}
		return nil
	})
}
