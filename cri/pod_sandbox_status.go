package cri

import (
	"context"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/sandbox"
)

// PodSandboxStatus implements the CRI call of that name. A kubelet that follows
// GetContainerEvents takes the containers' statuses from here, too, and goes by
// the time to tell which of the two is newer.
func (s *Server) PodSandboxStatus(_ context.Context, req *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	pod, err := s.Pods.Get(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	now := time.Now().UnixNano() // before what it is the time of
	st := pod.Status()
	resp := &runtimeapi.PodSandboxStatusResponse{
		Status: podSandboxStatus(pod, st), ContainersStatuses: containersStatuses(pod), Timestamp: now,
	}
	if req.GetVerbose() {
		steps := make([]stepInfo, 0, len(st.Steps))
		for _, step := range st.Steps {
			steps = append(steps, stepInfo{Name: step.Name, Milliseconds: float64(step.Nanos) / 1e6})
		}
		if resp.Info, err = verboseInfo(podInfo{Reason: st.Reason, DiskError: st.DiskError, Console: pod.ConsolePath(), DataSocket: pod.DataSocket(), Steps: steps}); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

func podSandboxStatus(pod *sandbox.Pod, st sandbox.PodStatus) *runtimeapi.PodSandboxStatus {
	cfg := pod.Config()
	status := &runtimeapi.PodSandboxStatus{
		Id:             pod.ID(),
		Metadata:       cfg.GetMetadata(),
		State:          podState(st),
		CreatedAt:      st.CreatedAt,
		Network:        &runtimeapi.PodSandboxNetworkStatus{},
		Labels:         cfg.GetLabels(),
		Annotations:    cfg.GetAnnotations(),
		RuntimeHandler: pod.Handler(),
		Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{
			Options: namespaceOptions(cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()),
		}},
	}
	// A stopped sandbox has given its addresses back.
	if st.Ready {
		for i, ip := range st.IPs {
			if i == 0 {
				status.Network.Ip = ip.String()
				continue
			}
			status.Network.AdditionalIps = append(status.Network.AdditionalIps, &runtimeapi.PodIP{Ip: ip.String()})
		}
	}
	return status
}

func podState(st sandbox.PodStatus) runtimeapi.PodSandboxState {
	if st.Ready {
		return runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

func namespaceOptions(o *runtimeapi.NamespaceOption) *runtimeapi.NamespaceOption {
	if o == nil {
		return &runtimeapi.NamespaceOption{}
	}
	return o
}
