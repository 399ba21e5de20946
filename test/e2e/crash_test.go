//go:build linux

package e2e_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pods side by side: four start at once, one of them asked for by two callers;
// they reach each other; and each loses another part of its machine.
func TestPodsAtOnceAndTheirCrashes(t *testing.T) {
	victims := []struct {
		name string
		kill func(t *testing.T, p *pod, ctr string)
	}{
		{"shim", killShim},
		{"qemu", func(t *testing.T, p *pod, _ string) { killHelper(t, p, "qemu-system") }},
		{"virtiofsd", func(t *testing.T, p *pod, _ string) { killHelper(t, p, "virtiofsd") }},
		{"poweroff", powerOff},
	}
	pods := make([]*pod, len(victims))
	refused := 0
	var g errgroup.Group
	for i, v := range victims {
		cfg := podConfig(suite.node, "victim-"+v.name)
		if v.name == "poweroff" {
			// reboot(2) ends a pid namespace, and the machine only in the first one.
			cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_NODE
		}
		g.Go(func() (err error) { pods[i], err = suite.node.runPod(t.Context(), cfg); return err })
	}
	twice := make(chan error, 2)
	var winner *pod
	for range 2 {
		go func() {
			p, err := suite.node.runPod(t.Context(), podConfig(suite.node, "twice"))
			if err == nil {
				winner = p
			}
			twice <- err
		}()
	}
	err := g.Wait()
	for range 2 {
		if err := <-twice; err != nil {
			boots.Add(-1)
			refused++
			wantError(t, err, codes.AlreadyExists, "twice")
		}
	}
	if winner != nil {
		defer winner.remove(t)
	}
	for _, p := range pods {
		if p != nil {
			defer p.remove(t)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if refused != 1 || winner == nil {
		t.Errorf("of two callers with one name %d were refused", refused)
	}

	t.Run("a reserved name", func(t *testing.T) {
		_, err := suite.node.RunPodSandbox(timeout(t, callTimeout), &runtimeapi.RunPodSandboxRequest{Config: podConfig(suite.node, "twice")})
		wantError(t, err, codes.AlreadyExists, "twice")
	})
	t.Run("pod to pod", func(t *testing.T) {
		web := pods[0].start(t, "web")
		waitForLog(t, suite.node.container(t, web).GetLogPath(), "listening")
		url := "http://" + suite.node.sandbox(t, pods[0].id).GetNetwork().GetIp() + ":3000/"
		if got, err := get(url); err != nil || got != "hello from victim-shim\n" {
			t.Errorf("from the node: %q, %v", got, err)
		}
		if got := pods[1].run(t, "get", command("/bin/get", url)); got.code != 0 || got.stdout != "hello from victim-shim\n" {
			t.Errorf("from another pod: %+v", got)
		}
	})
	t.Run("a deaf guest", func(t *testing.T) { // T12
		ctr := winner.start(t, "deaf", command("/bin/sleep", "infinity"))
		vmm, err := helperOf(winner.id, "qemu-system")
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Kill(vmm.PID, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err := suite.node.StopContainer(timeout(t, callTimeout), &runtimeapi.StopContainerRequest{ContainerId: ctr, Timeout: 1}); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > 1*time.Second+2500*time.Millisecond {
			t.Errorf("StopContainer with 1 s of grace took %v", took)
		}
		wantGone(t, winner, ctr, 255, began, 5*time.Second)
	})
	for i, v := range victims {
		t.Run("loss of "+v.name, func(t *testing.T) {
			p := pods[i]
			options := []option{command("/bin/sleep", "infinity"), asRoot}
			if v.name == "poweroff" {
				options = append(options, privileged)
			}
			ctr := p.start(t, "loses", options...)
			done, err := p.createAndStart(t.Context(), "done", command("/bin/exit", "7"))
			if err != nil {
				t.Fatal(err)
			}
			p.waitExit(t, done, 10*time.Second)
			began := time.Now()
			v.kill(t, p, ctr)
			wantGone(t, p, ctr, 255, began, 2*time.Second)
			// T10: a real exit code is never overwritten.
			if st := p.container(t, done); st.GetExitCode() != 7 || st.GetReason() != "Error" {
				t.Errorf("the container that had ended: %v", st)
			}
			ctx := timeout(t, callTimeout)
			_, err = p.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: ctr, Cmd: []string{"/bin/id"}})
			if status.Code(err) != codes.FailedPrecondition {
				t.Errorf("exec in it: %v", err)
			}
			_, err = p.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.config, Config: &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: "late"}, Image: &runtimeapi.ImageSpec{Image: "any"}}})
			wantError(t, err, codes.FailedPrecondition, p.id)
			for range 2 { // T34: gone when it returns; idempotent
				if _, err := p.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
					t.Error(err)
				}
			}
			wantNoMachine(t, p.id)
			for range 2 {
				if _, err := p.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
					t.Error(err)
				}
			}
			_, err = p.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
			wantError(t, err, codes.NotFound, p.id)
		})
	}
}

// wantGone checks that pod and container are told dead within bound of began.
func wantGone(t *testing.T, p *pod, ctr string, code int32, began time.Time, bound time.Duration) {
	t.Helper()
	eventually(t, time.Until(began.Add(bound)), "the pod to be told dead", func() error {
		sb, st := p.sandbox(t, p.id), p.container(t, ctr)
		if sb.GetState() != runtimeapi.PodSandboxState_SANDBOX_NOTREADY || st.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("pod %v, container %v", sb.GetState(), st.GetState())
		}
		return nil
	})
	if st := p.container(t, ctr); st.GetExitCode() != code || st.GetReason() == "" || st.GetMessage() == "" || st.GetFinishedAt() < began.Add(-time.Second).UnixNano() {
		t.Errorf("the container's end: %v", st)
	}
}

// wantNoMachine checks that no process of a pod is left.
func wantNoMachine(t *testing.T, id string) {
	t.Helper()
	for _, p := range processes() {
		if strings.Contains(p.Command, id[:12]) && p.State != 'Z' {
			t.Errorf("process %d is left: %.200s", p.PID, p.Command)
		}
	}
	for _, c := range cgroupsOf(id[:12]) {
		t.Errorf("cgroup %s is left", c)
	}
}

func killShim(t *testing.T, p *pod, _ string) {
	t.Helper()
	shim, err := shimOf(p.id)
	if err != nil {
		t.Fatal(err)
	}
	rest := descendants(shim.PID)
	if len(rest) < 2 {
		t.Errorf("the shim has %d children", len(rest))
	}
	if err := unix.Kill(shim.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, 2*time.Second, "the shim's children to die with it", func() error {
		for _, q := range processes() {
			for _, r := range rest {
				if q.PID == r.PID && q.State != 'Z' && q.Command == r.Command {
					return fmt.Errorf("process %d lives: %.100s", q.PID, q.Command)
				}
			}
		}
		return nil
	})
}

func killHelper(t *testing.T, p *pod, name string) {
	t.Helper()
	h, err := helperOf(p.id, name)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(h.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

func powerOff(t *testing.T, p *pod, ctr string) {
	t.Helper()
	// The answer may be lost with the machine.
	_, _ = p.ExecSync(timeout(t, 10*time.Second), &runtimeapi.ExecSyncRequest{ContainerId: ctr, Cmd: []string{"/app/web", "poweroff"}, Timeout: 5})
}
