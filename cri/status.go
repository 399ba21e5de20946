package cri

import (
	"context"
	"encoding/json"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Status implements the CRI call of that name: the runtime is ready as soon as
// it answers; the network is when a pod could get one.
func (s *Server) Status(ctx context.Context, req *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	network := &runtimeapi.RuntimeCondition{Type: runtimeapi.NetworkReady, Status: true}
	if err := s.NetworkStatus(ctx); err != nil {
		network.Status, network.Reason, network.Message = false, "NetworkNotReady", err.Error()
	}
	resp := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			{Type: runtimeapi.RuntimeReady, Status: true}, network,
		}},
		Features: &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true, MountOptions: true},
	}
	for _, name := range append([]string{""}, s.Handlers...) {
		resp.RuntimeHandlers = append(resp.RuntimeHandlers, &runtimeapi.RuntimeHandler{
			Name:     name,
			Features: &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true, UserNamespaces: s.NoUserNamespaces == nil},
		})
	}
	if req.GetVerbose() {
		info, err := json.Marshal(nodeInfo{
			Version: s.Options.Version, Streaming: s.streams.ln.Addr().String(), LogRoot: s.LogRoot,
		})
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"config": string(info)}
	}
	return resp, nil
}

// nodeInfo is the "config" of a verbose Status.
type nodeInfo struct {
	Version   string `json:"version"`
	Streaming string `json:"streaming"`
	LogRoot   string `json:"logRoot"`
}
