//go:build linux

package conformance_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

// The events that a kubelet follows: each with the sandbox's status, and with the
// containers' as they are then.
func TestContainerEvents(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), cri.CallTimeout)
	defer cancel()
	stream, err := suite.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Header(); err != nil { // from here on nothing is missed
		t.Fatal(err)
	}
	p, err := runPod(ctx, podConfig("events"))
	if err != nil {
		t.Fatal(err)
	}
	removed := false
	defer func() {
		if !removed {
			p.Remove(t)
		}
	}()
	names := map[string]string{p.ID: "pod"}
	// next skips what other tests' pods do.
	next := func() *runtimeapi.ContainerEventResponse {
		t.Helper()
		for {
			ev, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if ev.GetPodSandboxStatus().GetId() == p.ID {
				return ev
			}
		}
	}
	want := func(name string, typ runtimeapi.ContainerEventType) *runtimeapi.ContainerEventResponse {
		t.Helper()
		ev := next()
		if names[ev.GetContainerId()] != name || ev.GetContainerEventType() != typ || ev.GetPodSandboxStatus().GetMetadata().GetUid() != "uid-events" {
			t.Fatalf("event %v of %q, want %v of %q", ev.GetContainerEventType(), names[ev.GetContainerId()], typ, name)
		}
		if age := time.Since(time.Unix(0, ev.GetCreatedAt())); age < 0 || age > time.Minute {
			t.Errorf("the event's time is %v ago", age)
		}
		return ev
	}
	const (
		created = runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT
		started = runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT
		stopped = runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT
		deleted = runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT
	)
	state := func(ev *runtimeapi.ContainerEventResponse, id string) string {
		for _, c := range ev.GetContainersStatuses() {
			if c.GetId() == id {
				return fmt.Sprintf("%v %d", c.GetState(), c.GetExitCode())
			}
		}
		return "none"
	}
	want("pod", created)
	if ev := want("pod", started); ev.GetPodSandboxStatus().GetNetwork().GetIp() == "" {
		t.Error("a started pod has no address")
	}
	short, err := p.CreateAndStart(ctx, "short", cri.Command("/bin/exit", "3"))
	if err != nil {
		t.Fatal(err)
	}
	names[short] = "short"
	want("short", created)
	want("short", started)
	if ev := want("short", stopped); state(ev, short) != "CONTAINER_EXITED 3" {
		t.Errorf("stopped, and the status says %s", state(ev, short))
	}
	bad, err := p.CreateAndStart(ctx, "bad", cri.Command("/bin/nothing"))
	cri.WantError(t, err, codes.NotFound, "/bin/nothing")
	names[bad] = "bad"
	want("bad", created)
	want("bad", stopped)
	p.RemoveByID(t, short)
	if ev := want("short", deleted); state(ev, short) != "none" || state(ev, bad) == "none" {
		t.Errorf("deleted, and the statuses are %v", ev.GetContainersStatuses())
	}
	idle, err := p.CreateAndStart(ctx, "idle", cri.Command("/bin/sleep", "infinity"))
	if err != nil {
		t.Fatal(err)
	}
	names[idle] = "idle"
	want("idle", created)
	ev := want("idle", started)
	if suite.daemon != nil { // others leave it to ContainerStatus
		r, err := p.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.ID})
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, c := range r.GetContainersStatuses() {
			ids = append(ids, c.GetId())
		}
		if !slices.Equal(ids, []string{bad, idle}) || r.GetTimestamp() < ev.GetCreatedAt() || r.GetTimestamp() > time.Now().UnixNano() {
			t.Errorf("the sandbox's status has containers %v of time %d, want %v after %d", ids, r.GetTimestamp(), []string{bad, idle}, ev.GetCreatedAt())
		}
	}
	p.Remove(t)
	removed = true
	want("idle", stopped)
	if ev := want("pod", stopped); ev.GetPodSandboxStatus().GetState() != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Error("a stopped pod is ready")
	}
	gone := map[string]bool{}
	for range 3 {
		ev := next()
		if ev.GetContainerEventType() != deleted || ev.GetPodSandboxStatus().GetMetadata() == nil {
			t.Errorf("event %v of %s", ev.GetContainerEventType(), names[ev.GetContainerId()])
		}
		gone[names[ev.GetContainerId()]] = true
	}
	if !gone["pod"] || !gone["idle"] || !gone["bad"] {
		t.Errorf("deleted: %v", gone)
	}
}

// A list in portions is the list (KEP 5825).
func TestStreamLists(t *testing.T) {
	p := sharedPodOf(t)
	ctx := cri.Timeout(t, cri.CallTimeout)
	pods, err := p.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	ps, err := p.StreamPodSandboxes(ctx, &runtimeapi.StreamPodSandboxesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got := collect(t, ps.Recv, (*runtimeapi.StreamPodSandboxesResponse).GetPodSandboxes); len(got) != len(pods.GetItems()) || len(got) == 0 {
		t.Errorf("%d pods streamed, %d listed", len(got), len(pods.GetItems()))
	}
	cs, err := p.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: p.Idle}})
	if err != nil {
		t.Fatal(err)
	}
	if got := collect(t, cs.Recv, (*runtimeapi.StreamContainersResponse).GetContainers); len(got) != 1 || got[0].GetId() != p.Idle {
		t.Errorf("containers %v, want %s", got, p.Idle)
	}
	none, err := p.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: "nothing"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := collect(t, none.Recv, (*runtimeapi.StreamContainersResponse).GetContainers); len(got) != 0 {
		t.Errorf("containers %v", got)
	}
	images, err := suite.Images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	is, err := suite.Images.StreamImages(ctx, &runtimeapi.StreamImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got := collect(t, is.Recv, (*runtimeapi.StreamImagesResponse).GetImages); len(got) != len(images.GetImages()) || len(got) == 0 {
		t.Errorf("%d images streamed, %d listed", len(got), len(images.GetImages()))
	}
	pst, err := p.StreamPodSandboxStats(ctx, &runtimeapi.StreamPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{Id: p.ID}})
	if err != nil {
		t.Fatal(err)
	}
	if got := collect(t, pst.Recv, (*runtimeapi.StreamPodSandboxStatsResponse).GetPodSandboxStats); len(got) != 1 || got[0].GetAttributes().GetId() != p.ID {
		t.Errorf("stats of %v", got)
	}
}
