package cri

import (
	"context"
	"net/netip"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
)

// UpdateRuntimeConfig implements the CRI call of that name. A kubelet tells the
// node's pod CIDR with it; which addresses pods get is decided by CNI's
// configuration, which whoever assigned the CIDR writes, too, or by the built-in
// network's subnet. So a CIDR is checked, logged and otherwise left alone.
func (s *Server) UpdateRuntimeConfig(_ context.Context, req *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	cidr := req.GetRuntimeConfig().GetNetworkConfig().GetPodCidr()
	if cidr == "" {
		return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
	}
	for one := range strings.SplitSeq(cidr, ",") { // one for each address family
		if _, err := netip.ParsePrefix(strings.TrimSpace(one)); err != nil {
			return nil, refuse("runtime_config.network_config.pod_cidr", err.Error())
		}
	}
	klog.InfoS("The client told the node's pod CIDR; CNI's configuration decides", "cidr", cidr)
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}
