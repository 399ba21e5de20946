package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/network"
	"github.com/cri-vz/cri-vz/sandbox/shim"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// Run makes a pod and returns when it is ready. It reserves the name
// (errdefs.ErrAlreadyExists names the holder), then takes named steps. After an
// error, which names the step, nothing of the pod is left; that holds when ctx
// ends, too. What the host's memory can't hold is errdefs.ErrResourceExhausted.
func (p *Pods) Run(ctx context.Context, cfg *runtimeapi.PodSandboxConfig, handler string) (*Pod, error) {
	cfg = proto.CloneOf(cfg)
	meta := cfg.GetMetadata()
	if meta.GetName() == "" {
		return nil, fmt.Errorf("run pod sandbox: its metadata has no name: %w", errdefs.ErrInvalidArgument)
	}
	class, ok := p.o.Classes[handler]
	if !ok {
		return nil, fmt.Errorf("run pod sandbox %s: there is no runtime handler %q: %w", meta.GetName(), handler, errdefs.ErrInvalidArgument)
	}
	size, reserve, err := sizeOf(class, runtime.NumCPU(), cfg)
	if err != nil {
		return nil, fmt.Errorf("run pod sandbox %s: %w", meta.GetName(), err)
	}
	parent := cgroupParent(p.o.Charge, cfg)
	if _, err := cgroupNames(p.o.CgroupRoot, parent, "x"); err != nil {
		return nil, fmt.Errorf("run pod sandbox %s: %w", meta.GetName(), err)
	}
	id, pr, err := p.reserve(meta)
	if err != nil {
		return nil, err
	}
	pod := newPod(p, &podRecord{ID: id, Phase: creating, Handler: handler, CgroupParent: parent, CreatedAt: time.Now().UnixNano(), Size: size, config: cfg})
	pod.progress = pr
	err = p.start(ctx, pod, size.MemoryBytes+size.HugepageBytes+reserve)
	last := Step{Name: "ready", Nanos: time.Now().UnixNano() - pod.createdAt, Last: true}
	if err != nil {
		last.Name, last.Error = "failed", err.Error()
	}
	pr.add(last)
	p.endProgress(meta, pr)
	if err != nil {
		return nil, fmt.Errorf("run pod sandbox %s: %w", meta.GetName(), err)
	}
	return pod, nil
}

// start takes the steps; memory is the whole VM's. On error it has undone them.
func (p *Pods) start(ctx context.Context, pod *Pod, memory int64) (err error) {
	dir, run, rec := pod.dir, pod.run, pod.rec
	cfg := rec.config
	st := &starter{pod: pod.id, progress: pod.progress}
	kept := false        // the console of a start that failed
	unconnected := false // by the network, of which a console says nothing
	defer func() {
		if err == nil {
			return
		}
		if errs := st.undoAll(ctx); len(errs) > 0 {
			// What is left is a pod that isn't ready, which whoever lists pods can
			// remove, as often as it takes; the next Open tries as well.
			err = fmt.Errorf("%w (and clean-up failed, remove pod %s to try again: %w)", err, pod.id, errors.Join(errs...))
			pod.mu.Lock()
			pod.reason = err.Error()
			pod.mu.Unlock()
			p.mu.Lock()
			p.pods[pod.id] = pod
			p.mu.Unlock()
			return
		}
		p.unreserve(cfg.GetMetadata())
		if kept {
			err = fmt.Errorf("%w; `cri-vz console %s` prints all that the guest wrote", err, pod.id[:shortID])
		}
	}()

	release, err := p.admit(memory)
	if err != nil {
		return err
	}
	defer release()

	if err := st.step(ctx, "record", func(context.Context) error {
		if err := os.MkdirAll(filepath.Join(dir, shim.LayersDir), 0o700); err != nil {
			return err
		}
		for _, d := range []string{shim.VolumesDir, shim.ContainersDir} {
			if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
				return err
			}
		}
		if err := os.Mkdir(run, 0o700); err != nil {
			return err
		}
		return rec.write(dir)
	}, func(context.Context) error {
		kept = !unconnected && p.keepConsole(pod)
		return removeFiles(dir, run)
	}); err != nil {
		return err
	}

	if err := st.step(ctx, "cgroup", func(context.Context) (err error) {
		rec.Cgroups, err = makeCgroups(p.o.CgroupRoot, rec.CgroupParent, pod.id)
		return err
	}, func(ctx context.Context) error { return removeCgroups(ctx, rec.Cgroups) }); err != nil {
		return err
	}

	var nic *network.NIC
	if err := st.step(ctx, "NIC", func(ctx context.Context) (err error) {
		nic, err = p.o.Network.Prepare(ctx, networkPod(pod.id, cfg))
		return err
	}, pod.tearDownNetwork); err != nil {
		return err
	}

	if err := st.step(ctx, "scratch disk", func(context.Context) error {
		return p.o.Scratch(filepath.Join(dir, shim.ScratchFile))
	}, nil); err != nil {
		return err
	}

	if err := st.step(ctx, "shim", func(ctx context.Context) error {
		return p.startShim(ctx, pod, memory, nic)
	}, func(ctx context.Context) error { return pod.killShim(ctx) }); err != nil {
		return err
	}

	client, booted, err := p.startMachine(ctx, pod)
	if err != nil {
		return err
	}
	defer booted()

	// The guest needs the network last, so that it is made while the kernel boots.
	if err := st.step(ctx, "network", func(ctx context.Context) (err error) {
		rec.Network, err = p.o.Network.SetUp(ctx, pod.id)
		if err == nil && !rec.Network.DHCP && len(addresses(rec.Network)) == 0 { // T42
			err = fmt.Errorf("the pod got no address: %w", errdefs.ErrFailedPrecondition)
		}
		unconnected = err != nil
		return err
	}, nil); err != nil {
		return err
	}

	// Not a step of its own: the shim's steps are, and its error names one.
	if err := p.boot(ctx, pod, client, nic); err != nil {
		return err
	}

	pod.mu.Lock()
	rec.Phase = ready
	rec.Steps = pod.progress.snapshot()
	pod.mu.Unlock()
	if err := rec.write(dir); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	p.mu.Lock()
	p.pods[pod.id] = pod
	closed := p.closed
	p.mu.Unlock()
	p.events.emit(runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT, pod, pod.id)
	p.events.emit(runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT, pod, pod.id)
	if closed {
		// The daemon ends just now, but the pod is there for the next one. Close
		// didn't know its shim and waits for whoever follows it.
		if client, err := pod.shimClient(); err == nil {
			client.close()
		}
		klog.InfoS("Pod became ready while the daemon shut down", "pod", pod.id)
	}
	return nil
}

// admit checks that the host has the memory for one more VM, counting those
// that are being started (T4). release is for when the VM has what it touches.
func (p *Pods) admit(bytes int64) (release func(), err error) {
	available, err := availableMemory()
	if err != nil {
		return nil, fmt.Errorf("admission: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if free := available - p.booting; bytes > free {
		return nil, fmt.Errorf("admission: the VM needs %d MiB of memory and the host has %d MiB available: %w", bytes>>20, max(free, 0)>>20, errdefs.ErrResourceExhausted)
	}
	p.booting += bytes
	return func() {
		p.mu.Lock()
		p.booting -= bytes
		p.mu.Unlock()
	}, nil
}

// startShim runs the pod's shim and connects to it.
func (p *Pods) startShim(ctx context.Context, pod *Pod, memory int64, nic *network.NIC) error {
	rec := pod.rec
	locate := p.o.Guest
	if own := p.o.Classes[rec.Handler].Guest; own != nil {
		locate = own
	}
	guest, err := locate(runtime.GOARCH)
	if err != nil {
		return fmt.Errorf("guest image: %w", err)
	}
	if guest.Arch == "" {
		guest.Arch = runtime.GOARCH
	}
	c := shim.Config{
		ID: pod.id, PodDir: pod.dir, RunDir: pod.run, Driver: p.o.Driver,
		Arch: guest.Arch, Kernel: guest.Kernel, Initrd: guest.Initrd, Cmdline: guest.Cmdline + rec.Size.cmdline(),
		CPUs: rec.Size.CPUs, MemoryBytes: memory,
		Cgroups: rec.Cgroups, Timeouts: p.o.Timeouts,
	}
	var inherit []*os.File
	defer func() {
		for _, f := range inherit {
			f.Close()
		}
	}()
	if nic != nil {
		tap, err := p.o.Network.OpenTap(pod.id)
		if err != nil {
			return fmt.Errorf("open tap: %w", err)
		}
		if tap != nil {
			inherit = append(inherit, tap)
			c.TapFD = 2 + len(inherit)
		}
		c.MAC, c.MTU = nic.MAC, nic.MTU
		for _, m := range nic.HostPorts {
			c.HostPorts = append(c.HostPorts, shim.HostPort{Address: m.HostIP, Port: uint16(m.HostPort), PodPort: uint16(m.ContainerPort)})
		}
		if nic.Switch != nil {
			c.SwitchSocket, c.SwitchMAC = nic.Switch.Socket, nic.Switch.MAC
		}
	}
	if mounts, root, err := hostMounts(); err != nil {
		return fmt.Errorf("mount namespace: %w", err)
	} else if mounts != nil {
		inherit = append(inherit, mounts, root)
		c.HostMountFD, c.HostRootFD = 1+len(inherit), 2+len(inherit)
	}
	if err := c.Write(); err != nil {
		return err
	}
	logFile, err := os.OpenFile(filepath.Join(pod.dir, shim.LogFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	cmd := exec.Command(p.o.ShimCommand[0], append(p.o.ShimCommand[1:len(p.o.ShimCommand):len(p.o.ShimCommand)], pod.dir)...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.ExtraFiles = inherit
	if err := startProcess(cmd); err != nil {
		return fmt.Errorf("start %s: %w", p.o.ShimCommand[0], err)
	}
	exited := make(chan struct{})
	// Not one of p.tasks: the shim outlives the daemon's Close.
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	start, _, err := startTime(cmd.Process.Pid)
	if err == nil {
		pod.mu.Lock()
		rec.Shim = process{PID: cmd.Process.Pid, Start: start}
		pod.mu.Unlock()
		err = rec.write(pod.dir)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		<-exited
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, shimStart)
	defer cancel()
	began := time.Now()
	for {
		client, state, err := connect(ctx, pod.run)
		if err == nil {
			pod.attach(client, state)
			return nil
		}
		select {
		case <-exited:
			return fmt.Errorf("the shim ended at once: %s", logTail(filepath.Join(pod.dir, shim.LogFile)))
		case <-ctx.Done():
			return fmt.Errorf("waited %v for the shim to serve its socket: %w (%v)", time.Since(began).Round(time.Millisecond), ctx.Err(), err)
		case <-time.After(3 * time.Millisecond):
		}
	}
}

// startMachine has the shim start the VM. As many as Options.Boots are between this and
// booted at one time.
func (p *Pods) startMachine(ctx context.Context, pod *Pod) (_ *client, booted func(), err error) {
	start := time.Now()
	select {
	case p.boots <- struct{}{}:
		booted = func() { <-p.boots }
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("vm start: waited %v for other boots to end: %w", time.Since(start).Round(time.Millisecond), ctx.Err())
	case <-p.closing:
		return nil, nil, fmt.Errorf("vm start: %w", errClosed)
	}
	if d := time.Since(start); d > 50*time.Millisecond {
		pod.progress.add(Step{Name: "wait for other boots", Nanos: int64(d)})
	}
	client, err := pod.shimClient()
	var resp *shimapi.StartMachineResponse
	if err == nil {
		resp, err = ask(ctx, client.StartMachine, &shimapi.StartMachineRequest{})
	}
	if err != nil {
		booted()
		return nil, nil, fmt.Errorf("boot: %w", err)
	}
	pod.progress.addShim(resp.GetSteps())
	return client, booted, nil
}

// boot has the shim wait for the guest and set up the sandbox.
func (p *Pods) boot(ctx context.Context, pod *Pod, client *client, nic *network.NIC) error {
	setUp, err := sandboxSetUp(p.o.Classes[pod.rec.Handler], pod.rec.config, nic, pod.rec.Network)
	if err != nil {
		return fmt.Errorf("sandbox set-up: %w", err)
	}
	resp, err := ask(ctx, client.Boot, &shimapi.BootRequest{Sandbox: setUp})
	if err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	pod.progress.addShim(resp.GetSteps())
	if err := p.leased(pod, resp.GetLease()); err != nil {
		return fmt.Errorf("sandbox set-up: %w", err)
	}
	return pod.refresh(ctx)
}

// leased takes over the address that the guest got, which a pod has to have (T42).
func (p *Pods) leased(pod *Pod, l *guestapi.Lease) error {
	if n := pod.rec.Network; n == nil || !n.DHCP {
		return nil
	}
	nw, ok := p.o.Network.(leases)
	a, err := netip.ParsePrefix(l.GetAddress())
	if err != nil || !ok {
		return fmt.Errorf("the pod got no address: %w", errors.Join(err, errdefs.ErrFailedPrecondition))
	}
	if err := nw.Leased(pod.id, a.Addr(), l.GetSeconds()); err != nil {
		return err
	}
	pod.mu.Lock()
	pod.rec.Network.Addresses = []netip.Prefix{a}
	pod.mu.Unlock()
	return nil
}

// logTail is the end of a shim's log, for an error.
func logTail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil || len(bytes.TrimSpace(b)) == 0 {
		return "its log " + path + " is empty"
	}
	b = bytes.TrimSpace(b[max(0, len(b)-2048):])
	return strings.ToValidUTF8(string(b), "?")
}

// removeFiles removes a pod's directories. The volumes directory is never
// descended into: should anything be mounted there, it is somebody's data.
func removeFiles(dir, run string) error {
	volumes := filepath.Join(dir, shim.VolumesDir)
	entries, err := os.ReadDir(volumes)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(volumes, e.Name())); err != nil {
			return fmt.Errorf("remove mount point of a volume: %w", err)
		}
	}
	if err := os.Remove(volumes); err != nil && !os.IsNotExist(err) {
		return err
	}
	if err := os.RemoveAll(run); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}
