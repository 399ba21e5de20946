package cri

import (
	"cmp"
	"slices"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/sandbox"
)

// GetContainerEvents implements the CRI call of that name: what happens to
// containers and sandboxes from now on, each with what the sandbox and its
// containers are when it is sent. A client that lags too far is cut off with
// ResourceExhausted; it has to list and to follow again.
func (s *Server) GetContainerEvents(_ *runtimeapi.GetEventsRequest, stream runtimeapi.RuntimeService_GetContainerEventsServer) error {
	f := s.Pods.FollowEvents()
	defer f.Close()
	// By the headers a client knows that it misses nothing from here on.
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	return f.Each(stream.Context(), func(ev sandbox.Event) error { return stream.Send(containerEvent(ev)) })
}

func containerEvent(ev sandbox.Event) *runtimeapi.ContainerEventResponse {
	return &runtimeapi.ContainerEventResponse{
		ContainerId:        ev.ID,
		ContainerEventType: ev.Type,
		CreatedAt:          ev.At,
		PodSandboxStatus:   podSandboxStatus(ev.Pod, ev.Pod.Status()),
		ContainersStatuses: containersStatuses(ev.Pod),
	}
}

// containersStatuses are those of a pod's containers, the oldest first.
func containersStatuses(pod *sandbox.Pod) []*runtimeapi.ContainerStatus {
	var all []*runtimeapi.ContainerStatus
	for _, c := range pod.Containers() {
		all = append(all, containerStatus(c))
	}
	slices.SortFunc(all, func(a, b *runtimeapi.ContainerStatus) int {
		return cmp.Or(cmp.Compare(a.GetCreatedAt(), b.GetCreatedAt()), strings.Compare(a.GetId(), b.GetId()))
	})
	return all
}
