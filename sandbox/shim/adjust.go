package shim

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// pinTimeout bounds the hypervisor's answer to where its virtual CPUs run.
const pinTimeout = 5 * time.Second

// AdjustMachine implements shim/api.
func (s *Shim) AdjustMachine(ctx context.Context, req *shimapi.AdjustMachineRequest) (*shimapi.AdjustMachineResponse, error) {
	_, m, err := s.running()
	if err != nil {
		return nil, err
	}
	release, err := acquire(ctx, s.adjusting, "the VM of pod "+s.cfg.ID)
	if err != nil {
		return nil, err
	}
	defer release()
	pinner, ok := m.(vmm.CPUPinner)
	if len(req.GetCpus()) > 0 && !ok {
		return nil, fmt.Errorf("pod %s: the driver %q can't choose the host's CPUs for a VM: %w", s.cfg.ID, s.driver.Name(), errdefs.ErrNotImplemented)
	}
	if ok && (s.pinned || len(req.GetCpus()) > 0) {
		cpus := make([]int, len(req.GetCpus()))
		for i, n := range req.GetCpus() {
			cpus[i] = int(n)
		}
		pctx, cancel := context.WithTimeout(ctx, pinTimeout)
		defer cancel()
		if err := pinner.PinCPUs(pctx, cpus); err != nil {
			return nil, fmt.Errorf("pod %s: %w", s.cfg.ID, err)
		}
		s.pinned = len(cpus) > 0
	}
	for _, pid := range m.PIDs() {
		if err := setOOMScoreAdj(pid, int(req.GetOomScoreAdj())); err != nil {
			// A preference of the host's, which an unprivileged shim may not set.
			klog.ErrorS(err, "Setting the OOM killer's preference", "pod", s.cfg.ID, "pid", pid)
		}
	}
	return &shimapi.AdjustMachineResponse{}, nil
}
