package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"

	"k8s.io/klog/v2"

	"github.com/cri-vz/cri-vz/sandbox/shim"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

var (
	podID    = regexp.MustCompile(`^[0-9a-f]{64}$`)
	runDirID = regexp.MustCompile(`^[0-9a-f]{12}$`)
)

// recover reads what an earlier daemon left. What can't be read or undone is
// logged and stays on disk: one broken pod doesn't keep a node from starting.
func (p *Pods) recover(ctx context.Context) error {
	entries, err := os.ReadDir(filepath.Join(p.o.Root, "pods"))
	if err != nil {
		return fmt.Errorf("recover pods: %w", err)
	}
	var wg sync.WaitGroup
	for _, e := range entries {
		if !e.IsDir() || !podID.MatchString(e.Name()) {
			continue
		}
		rec, err := readPodRecord(p.podDir(e.Name()))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			// Half of a pod is unusable, but its parts are known by its id.
			klog.ErrorS(err, "Pod record is unreadable, the pod is undone", "pod", e.Name())
		}
		if err != nil {
			rec = &podRecord{ID: e.Name(), Phase: creating}
			if c, cerr := shim.ReadConfig(p.podDir(e.Name())); cerr == nil {
				rec.Cgroups = c.Cgroups
			}
		}
		pod := newPod(p, rec)
		// The name is taken as long as anything of the pod is there.
		if rec.config != nil {
			p.mu.Lock() // the pods before this one are being undone meanwhile
			p.names[podKey(rec.config.GetMetadata())] = pod.id
			p.mu.Unlock()
		}
		wg.Go(func() { p.recoverPod(ctx, pod) })
	}
	wg.Wait()
	p.sweepStrays(ctx)
	return ctx.Err()
}

func (p *Pods) recoverPod(ctx context.Context, pod *Pod) {
	switch pod.rec.Phase {
	case creating, removing:
		if err := p.undoPod(ctx, pod); err != nil {
			klog.ErrorS(err, "Undoing a half-made pod failed, removing it or the next start tries again", "pod", pod.id)
			p.keepHalf(pod, err)
			return
		}
		p.forgetName(pod)
		klog.InfoS("Undid a pod that an earlier daemon had half made or half removed", "pod", pod.id)
		return
	}
	half := pod.readContainers()
	if pod.rec.Phase == ready {
		pod.reconnect(ctx)
	}
	for _, c := range half {
		if client, err := pod.shimClient(); err == nil {
			uctx, cancel := context.WithTimeout(ctx, undoTimeout)
			_, err = ask(uctx, client.RemoveContainer, &shimapi.RemoveContainerRequest{Id: c})
			cancel()
			if err != nil {
				klog.ErrorS(err, "Undoing a half-made container", "pod", pod.id, "container", c)
			}
		}
		if err := os.RemoveAll(filepath.Join(pod.dir, shim.ContainersDir, c)); err != nil {
			klog.ErrorS(err, "Undoing a half-made container", "pod", pod.id, "container", c)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pods[pod.id] = pod
	for _, c := range pod.Containers() {
		p.containers[c.id] = c
		p.ctrNames[containerKey(pod.id, c.rec.config.GetMetadata())] = c.id
	}
}

// keepHalf shows a pod that could not be undone to whoever lists pods, as one that
// isn't ready: its name is taken until it is removed, which tries all of it again.
func (p *Pods) keepHalf(pod *Pod, why error) {
	if pod.rec.config == nil {
		return // nobody could name it
	}
	pod.rec.Phase = creating
	pod.reason = "an earlier daemon left it half made or half removed, and undoing that failed: " + why.Error()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pods[pod.id] = pod
}

// reconnect finds the pod's shim, or takes over from it.
func (p *Pod) reconnect(ctx context.Context) {
	var c *client
	var state *shimapi.PodState
	err := errors.New("its process is gone")
	if p.rec.Shim.alive() {
		c, state, err = connect(ctx, p.run)
	}
	if err == nil {
		p.attach(c, state)
		return
	}
	klog.InfoS("The pod's shim is gone", "pod", p.id, "err", err)
	kctx, cancel := context.WithTimeout(ctx, shimEnd)
	defer cancel()
	if kerr := p.rec.Shim.kill(kctx); kerr != nil {
		klog.ErrorS(kerr, "Killing a shim that doesn't answer", "pod", p.id)
	}
	p.mu.Lock()
	p.reason = "the pod's shim died while the daemon was away: " + err.Error()
	reason := p.reason
	p.mu.Unlock()
	p.settleContainers(reason)
}

// readContainers reads the records of the pod's containers and returns the ids
// of the half-made ones.
func (p *Pod) readContainers() (half []string) {
	dir := filepath.Join(p.dir, shim.ContainersDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		klog.ErrorS(err, "Reading a pod's containers", "pod", p.id)
		return nil
	}
	for _, e := range entries {
		rec, err := readContainerRecord(filepath.Join(dir, e.Name()))
		if err != nil || rec.Creating {
			if err != nil {
				klog.ErrorS(err, "Container record is unreadable, the container is undone", "pod", p.id, "container", e.Name())
			}
			half = append(half, e.Name())
			continue
		}
		c := newContainer(p, rec)
		if state, err := shim.ReadStatus(c.dir); err == nil {
			c.state = state
			c.state.Revision = 0 // the shim's own count is what compares
		} else {
			klog.ErrorS(err, "Container's status is unreadable", "pod", p.id, "container", c.id)
		}
		p.ctrs[c.id] = c
		p.host.asked[c.id] = c.Resources()
	}
	return half
}

// undoPod runs the inverses of all steps of a pod's start, whichever were taken.
func (p *Pods) undoPod(ctx context.Context, pod *Pod) error {
	ctx, cancel := context.WithTimeout(ctx, undoTimeout+tearDown)
	defer cancel()
	if err := pod.rec.Shim.kill(ctx); err != nil {
		return err
	}
	cgroups := pod.rec.Cgroups
	if len(cgroups) == 0 && pod.rec.config != nil {
		// Made, perhaps, but not yet on record: making them again finds them.
		var err error
		if cgroups, err = makeCgroups(p.o.CgroupRoot, pod.rec.CgroupParent, pod.id); err != nil {
			klog.ErrorS(err, "Finding a pod's cgroups", "pod", pod.id)
		}
		pod.rec.Cgroups = cgroups
	}
	if err := removeCgroups(ctx, cgroups); err != nil {
		return err
	}
	if err := p.o.Network.TearDown(ctx, pod.id); err != nil {
		return err
	}
	return removeFiles(pod.dir, pod.run)
}

func (p *Pods) forgetName(pod *Pod) {
	if pod.rec.config != nil {
		p.unreserve(pod.rec.config.GetMetadata())
	}
}

// sweepStrays removes networks and run directories of pods that have no record.
func (p *Pods) sweepStrays(ctx context.Context) {
	ids, err := p.o.Network.Pods()
	if err != nil {
		klog.ErrorS(err, "Listing pod networks")
	}
	for _, id := range ids {
		if _, err := os.Stat(p.podDir(id)); !os.IsNotExist(err) {
			continue
		}
		tctx, cancel := context.WithTimeout(ctx, tearDown)
		if err := p.o.Network.TearDown(tctx, id); err != nil {
			klog.ErrorS(err, "Removing the network of a pod without a record", "pod", id)
		}
		cancel()
	}
	entries, err := os.ReadDir(p.o.Run)
	if err != nil {
		klog.ErrorS(err, "Listing run directories")
		return
	}
	pods, _ := os.ReadDir(filepath.Join(p.o.Root, "pods"))
	for _, e := range entries {
		if !e.IsDir() || !runDirID.MatchString(e.Name()) ||
			slices.ContainsFunc(pods, func(d os.DirEntry) bool { return len(d.Name()) >= shortID && d.Name()[:shortID] == e.Name() }) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(p.o.Run, e.Name())); err != nil {
			klog.ErrorS(err, "Removing a run directory without a pod", "dir", e.Name())
		}
	}
}
