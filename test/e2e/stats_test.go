//go:build linux

package e2e_test

import (
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A guest that doesn't answer is left out of a listing, which goes on without it
// (T12).
func TestStatsWithADeafGuest(t *testing.T) {
	p := sharedPodOf(t)
	deaf := newPod(t, podConfig(suite.node, "deaf"))
	if _, err := deaf.createAndStart(t.Context(), "idle", command("/bin/sleep", "infinity")); err != nil {
		t.Fatal(err)
	}
	qemu, err := helperOf(deaf.id, "qemu-system")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(qemu.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Kill(qemu.PID, unix.SIGCONT) }()
	began := time.Now()
	r, err := p.ListPodSandboxStats(timeout(t, callTimeout), &runtimeapi.ListPodSandboxStatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("took %v", took)
	}
	var ids []string
	for _, s := range r.GetStats() {
		ids = append(ids, s.GetAttributes().GetId())
	}
	if !slices.Contains(ids, p.id) || slices.Contains(ids, deaf.id) {
		t.Errorf("pods %v, the deaf one is %s", ids, deaf.id)
	}
	_, err = p.PodSandboxStats(timeout(t, callTimeout), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: deaf.id})
	wantError(t, err, codes.DeadlineExceeded, deaf.id)
}

// Pressure stall information is in the answer if the guest's kernel has it.
func TestPressure(t *testing.T) {
	p := sharedPodOf(t)
	r, err := p.ContainerStats(timeout(t, callTimeout), &runtimeapi.ContainerStatsRequest{ContainerId: p.idle})
	if err != nil {
		t.Fatal(err)
	}
	have := p.exec(t, p.idle, "/bin/cat", "/sys/fs/cgroup/cpu.pressure").code == 0
	if s := r.GetStats(); have != (s.GetCpu().GetPsi() != nil) || have != (s.GetMemory().GetPsi() != nil) || have != (s.GetIo().GetPsi() != nil) {
		t.Errorf("in the guest: %v, in the answer: %v", have, s)
	}
}
