package sandbox

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// hostShare is what a pod's containers ask of the host for the VM that they
// share: CPUs to run on (T28), and how readily its OOM killer takes the VM.
type hostShare struct {
	// turn is held while what follows changes and the shim is told.
	turn  chan struct{}
	asked map[string]*runtimeapi.LinuxContainerResources // by container
	told  *shimapi.AdjustMachineRequest                  // nil: not known, an earlier daemon told it
}

func newHostShare() hostShare {
	return hostShare{turn: make(chan struct{}, 1), asked: make(map[string]*runtimeapi.LinuxContainerResources)}
}

// machine is what becomes of what all containers ask for. The VM runs on the
// CPUs of all cpusets together, because a guest's CPU runs whichever container's
// process the guest chooses, and the container that is worth most protects it.
func (h *hostShare) machine() *shimapi.AdjustMachineRequest {
	req := &shimapi.AdjustMachineRequest{}
	first := true
	for _, r := range h.asked {
		cpus, _ := parseCPUs(r.GetCpusetCpus()) // askHost has checked it
		req.Cpus = append(req.Cpus, cpus...)
		if adj := int32(r.GetOomScoreAdj()); first || adj < req.OomScoreAdj {
			req.OomScoreAdj, first = adj, false
		}
	}
	slices.Sort(req.Cpus)
	req.Cpus = slices.Compact(req.Cpus)
	return req
}

// askHost has the host treat the pod's VM as its containers ask, of which the
// one with that id now asks for r, which is the field named at of a request.
// After an error it is treated as before.
func (p *Pod) askHost(ctx context.Context, at, id string, r *runtimeapi.LinuxContainerResources) error {
	if _, err := hostCPUs(r.GetCpusetCpus()); err != nil {
		return fmt.Errorf("%s.cpuset_cpus: %w", at, err)
	}
	return p.changeHost(ctx, id, func(h *hostShare) { h.asked[id] = r })
}

// leaveHost is askHost for a container that is gone, whether the host is told or
// not.
func (p *Pod) leaveHost(ctx context.Context, id string) error {
	return p.changeHost(ctx, "", func(h *hostShare) { delete(h.asked, id) })
}

// changeHost makes a change and tells the shim. On error it puts back what the
// container with that id asked for.
func (p *Pod) changeHost(ctx context.Context, id string, change func(*hostShare)) (err error) {
	h := &p.host
	select {
	case h.turn <- struct{}{}:
		defer func() { <-h.turn }()
	case <-ctx.Done():
		return fmt.Errorf("host CPUs of the pod's VM: waited for another container's: %w", ctx.Err())
	}
	was, asked := h.asked[id]
	defer func() {
		switch {
		case err == nil:
		case asked:
			h.asked[id] = was
		default:
			delete(h.asked, id)
		}
	}()
	change(h)
	req := h.machine()
	if h.told != nil && proto.Equal(req, h.told) {
		return nil
	}
	client, err := p.shimClient()
	if err != nil {
		return err
	}
	h.told = nil // until the shim has answered
	_, err = ask(ctx, client.AdjustMachine, req)
	if errdefs.IsNotImplemented(err) && len(req.GetCpus()) == 0 {
		err = nil // a shim of the previous version
	}
	if err != nil {
		return fmt.Errorf("run the pod's VM on the host's CPUs %v: %w", req.GetCpus(), err)
	}
	h.told = req
	return nil
}

// releaseHost ends what a container that is going away asked of the host.
func (c *Container) releaseHost() {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	// A pod without a shim has no VM to treat in any way.
	if err := c.pod.leaveHost(ctx, c.id); err != nil && !errdefs.IsFailedPrecondition(err) && !errdefs.IsUnavailable(err) {
		klog.ErrorS(err, "Releasing a container's share of the host", "pod", c.pod.id, "container", c.id)
	}
}
