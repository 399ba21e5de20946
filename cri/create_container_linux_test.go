package cri

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// T27: the target of a pid namespace is a running container of the same pod.
func TestPidTarget(t *testing.T) {
	s := newTestServer(t)
	g := newGenerator(t, s)
	create := func(pod, name, target string) (string, error) {
		req := proto.CloneOf(g.good["CreateContainer"].(*runtimeapi.CreateContainerRequest))
		req.PodSandboxId, req.Config.Metadata.Name = pod, name
		if target != "" {
			req.Config.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: target}
		}
		r, err := s.CreateContainer(t.Context(), req)
		return r.GetContainerId(), err
	}
	another, err := s.RunPodSandbox(t.Context(), proto.CloneOf(g.good["RunPodSandbox"].(*runtimeapi.RunPodSandboxRequest)))
	if err != nil {
		t.Fatal(err)
	}
	created, err := create(g.pod, "created", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := create(g.pod, "joins", g.container); err != nil {
		t.Errorf("a running container of the pod: %v", err)
	}
	for _, tt := range []struct {
		name, pod, target string
		is                func(error) bool
	}{
		{"not there", g.pod, "0000", errdefs.IsNotFound},
		{"not running", g.pod, created, errdefs.IsFailedPrecondition},
		{"in another pod", another.GetPodSandboxId(), g.container, errdefs.IsInvalidArgument},
	} {
		if _, err := create(tt.pod, "refused", tt.target); !tt.is(err) || !strings.Contains(err.Error(), "target_id") {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}
