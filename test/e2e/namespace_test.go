//go:build linux

package e2e_test

import (
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestPidNamespaces(t *testing.T) {
	p := sharedPodOf(t)
	mode := func(m runtimeapi.NamespaceMode, target string) option {
		return security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: m, TargetId: target}
		})
	}
	own := p.start(t, "own-pids", command("/bin/sleep", "1111"), mode(runtimeapi.NamespaceMode_CONTAINER, ""))
	first := command("/bin/cat", "/proc/1/cmdline")
	if got := p.output(t, own, "/bin/cat", "/proc/1/cmdline"); got != "/bin/sleep\x001111\x00" {
		t.Errorf("process 1 of a container with its own namespace: %q", got)
	}
	if r := p.run(t, "shares-pids", first, freshLog); r.code != 0 || strings.Contains(r.stdout, "cat") {
		t.Errorf("process 1 of the pod: %+v", r)
	}
	// T27
	if r := p.run(t, "targets", first, freshLog, mode(runtimeapi.NamespaceMode_TARGET, own)); strings.TrimSuffix(r.stdout, "\n") != "/bin/sleep\x001111\x00" {
		t.Errorf("process 1 of the target: %+v", r)
	}
}

// A container without a limit meets the VM's own; the agent lives on (T25).
func TestOutOfMemoryInTheWholeVM(t *testing.T) {
	p := sharedPodOf(t)
	id := p.start(t, "oom-vm", command("/bin/oom"))
	st := p.waitExit(t, id, 60*time.Second)
	if st.GetExitCode() != 137 {
		t.Errorf("%v", st)
	}
	if got := p.output(t, p.idle, "/bin/echo", "alive"); got != "alive\n" {
		t.Errorf("%q", got)
	}
}

// Shared in the pod, as Kubernetes has it: network and IPC; apart: mounts.
func TestContainersOfOnePod(t *testing.T) {
	p := sharedPodOf(t)
	p.output(t, p.idle, "/bin/write", "/dev/shm/note", "shared memory")
	r := p.run(t, "neighbour", command("/bin/cat", "/dev/shm/note"), freshLog)
	if r.stdout != "shared memory\n" {
		t.Errorf("/dev/shm: %+v", r)
	}
	web := p.start(t, "web-here", func(c *runtimeapi.ContainerConfig) {
		c.Envs = []*runtimeapi.KeyValue{{Key: "PORT", Value: []byte("3456")}}
	})
	waitForLog(t, p.container(t, web).GetLogPath(), "listening")
	if got := p.output(t, p.idle, "/bin/get", "http://127.0.0.1:3456/healthz"); got != "ok\n" {
		t.Errorf("over the pod's loopback: %q", got)
	}
}
