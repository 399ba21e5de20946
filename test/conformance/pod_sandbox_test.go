//go:build linux

package conformance_test

import (
	"fmt"
	"slices"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

// One pod from its start to its removal.
func TestPodSandbox(t *testing.T) {
	ctx := cri.Timeout(t, cri.CallTimeout)
	p := newPod(t, podConfig("sandbox"))
	t.Run("ready means that it has an address", func(t *testing.T) { // T42
		st := p.Sandbox(t, p.ID)
		if st.GetState() != runtimeapi.PodSandboxState_SANDBOX_READY || st.GetNetwork().GetIp() == "" || st.GetCreatedAt() == 0 || st.GetId() != p.ID {
			t.Errorf("%v", st)
		}
	})
	t.Run("what the client named is kept", func(t *testing.T) {
		st := p.Sandbox(t, p.ID)
		if m, want := st.GetMetadata(), p.Config.GetMetadata(); m.GetName() != want.GetName() || m.GetUid() != want.GetUid() || m.GetNamespace() != want.GetNamespace() || m.GetAttempt() != want.GetAttempt() {
			t.Errorf("metadata %v, want %v", m, want)
		}
		if fmt.Sprint(st.GetLabels()) != fmt.Sprint(p.Config.GetLabels()) || fmt.Sprint(st.GetAnnotations()) != fmt.Sprint(p.Config.GetAnnotations()) {
			t.Errorf("labels %v, annotations %v", st.GetLabels(), st.GetAnnotations())
		}
	})
	t.Run("filters find it", func(t *testing.T) { podFilters(t, p, runtimeapi.PodSandboxState_SANDBOX_READY) })
	t.Run("its name is taken", func(t *testing.T) {
		_, err := p.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.Config})
		cri.WantError(t, err, codes.AlreadyExists)
	})
	running := p.Start(t, "running", cri.Command("/bin/sleep", "infinity"))
	t.Run("stopping it ends its containers", func(t *testing.T) {
		for range 2 { // idempotent
			if _, err := p.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
				t.Fatal(err)
			}
		}
		if st := p.Container(t, running); st.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || st.GetFinishedAt() < st.GetStartedAt() {
			t.Errorf("its container: %v", st)
		}
		if st := p.Sandbox(t, p.ID); st.GetState() != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("%v", st)
		}
		podFilters(t, p, runtimeapi.PodSandboxState_SANDBOX_NOTREADY)
	})
	t.Run("stopped, it takes no container", func(t *testing.T) {
		id, err := p.CreateContext(ctx, "late", cri.Command("/bin/sleep", "1"))
		if err == nil {
			p.RemoveByID(t, id)
			t.Error("a container was created")
		}
	})
	t.Run("removing it removes its containers", func(t *testing.T) {
		for range 2 { // idempotent
			if _, err := p.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
				t.Fatal(err)
			}
		}
		_, err := p.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.ID})
		cri.WantError(t, err, codes.NotFound, p.ID)
		_, err = p.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: running})
		cri.WantError(t, err, codes.NotFound, running)
	})
}

func podFilters(t *testing.T, p *cri.Pod, state runtimeapi.PodSandboxState) {
	t.Helper()
	other := runtimeapi.PodSandboxState_SANDBOX_READY + runtimeapi.PodSandboxState_SANDBOX_NOTREADY - state
	name := p.Config.GetMetadata().GetName()
	for _, c := range []struct {
		name   string
		filter *runtimeapi.PodSandboxFilter
		want   bool
	}{
		{"none", nil, true},
		{"id", &runtimeapi.PodSandboxFilter{Id: p.ID}, true},
		{"the beginning of its id", &runtimeapi.PodSandboxFilter{Id: p.ID[:13]}, true},
		{"other id", &runtimeapi.PodSandboxFilter{Id: "zzz"}, false},
		{"its state", &runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{State: state}}, true},
		{"another state", &runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{State: other}}, false},
		{"label", &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"pod": name}}, true},
		{"a label too many", &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"pod": name, "x": "y"}}, false},
	} {
		r, err := p.ListPodSandbox(cri.Timeout(t, cri.CallTimeout), &runtimeapi.ListPodSandboxRequest{Filter: c.filter})
		if err != nil {
			t.Fatal(err)
		}
		got := slices.ContainsFunc(r.GetItems(), func(i *runtimeapi.PodSandbox) bool { return i.GetId() == p.ID })
		if got != c.want {
			t.Errorf("by %s: listed %v, want %v", c.name, got, c.want)
		}
	}
}

func TestRemoveRunningPodSandbox(t *testing.T) {
	p := newPod(t, podConfig("removed-running"))
	p.Start(t, "running", cri.Command("/bin/sleep", "infinity"))
	if _, err := p.RemovePodSandbox(cri.Timeout(t, cri.CallTimeout), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		t.Fatal(err)
	}
}

// What is not there any more, or never was, is stopped and removed already.
func TestIdempotence(t *testing.T) {
	ctx := cri.Timeout(t, cri.CallTimeout)
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for _, c := range []struct {
		name string
		call func() error
	}{
		{"StopPodSandbox", func() error {
			_, err := suite.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
			return err
		}},
		{"RemovePodSandbox", func() error {
			_, err := suite.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
			return err
		}},
		{"StopContainer", func() error {
			_, err := suite.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 1})
			return err
		}},
		{"RemoveContainer", func() error {
			_, err := suite.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
			return err
		}},
		{"RemoveImage", func() error {
			_, err := suite.Images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: "sha256:" + id}})
			return err
		}},
	} {
		t.Run(c.name+" of an unknown id is no error", func(t *testing.T) {
			if err := c.call(); err != nil {
				t.Error(err)
			}
		})
	}
}
