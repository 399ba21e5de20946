package shim

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

const (
	// dialEvery is the pause between two attempts to reach a booting agent, which
	// the agent cuts short: it writes a line to the console when it listens.
	dialEvery = 20 * time.Millisecond
	// dialAttempt bounds one attempt: a guest without its vsock driver yet
	// doesn't even refuse.
	dialAttempt = 2 * time.Second
	// boots is how many VMs a boot that makes no progress gets (T7).
	boots = 2
	// progressNanos is the CPU time that counts as progress: an idle guest's
	// timer ticks stay below it, a guest that competes for the CPU doesn't.
	progressNanos = 100e6
	// clockFactor is how many times too fast a guest's clock may run, and clockSlack
	// what short steps may be off besides. Clocks have been seen to be right, or 15 to
	// 80 times too fast.
	clockFactor = 2
	clockSlack  = 100 * time.Millisecond
	// entropyBytes seed the guest's pool: the size of the kernel's own, in bits.
	entropyBytes = 256
)

// errStalled and errDied are boots that a fresh VM may survive. An emulated guest of
// two CPUs has been seen to panic in one of some hundred boots on a busy host.
var (
	errStalled = errors.New("no progress")
	errDied    = errors.New("the VM failed")
)

// StartMachine implements shim/api.
func (s *Shim) StartMachine(ctx context.Context, _ *shimapi.StartMachineRequest) (*shimapi.StartMachineResponse, error) {
	s.mu.Lock()
	again := s.started
	s.started = true
	s.mu.Unlock()
	if again {
		return nil, fmt.Errorf("pod %s: its VM was started before: %w", s.cfg.ID, errdefs.ErrFailedPrecondition)
	}
	if err := s.publish(ctx); err != nil {
		err = fmt.Errorf("pod %s: host ports: %w", s.cfg.ID, err)
		s.vmGone(err.Error())
		return nil, err
	}
	if err := s.startMachine(ctx); err != nil {
		return nil, s.bootFailed(err)
	}
	state, _ := s.state()
	return &shimapi.StartMachineResponse{Steps: state.Steps}, nil
}

// Boot implements shim/api.
func (s *Shim) Boot(ctx context.Context, req *shimapi.BootRequest) (*shimapi.BootResponse, error) {
	s.mu.Lock()
	ready := s.machine != nil && !s.booted
	s.booted = s.booted || ready
	s.mu.Unlock()
	if !ready {
		return nil, fmt.Errorf("pod %s: its VM was not started, or booted before: %w", s.cfg.ID, errdefs.ErrFailedPrecondition)
	}
	sandbox := req.GetSandbox()
	if sandbox == nil {
		sandbox = &guestapi.SetUpSandboxRequest{}
	}
	for try := 1; ; try++ {
		err := s.bootOnce(ctx, sandbox)
		if err == nil {
			state, _ := s.state()
			return &shimapi.BootResponse{Steps: state.Steps, Lease: s.lease}, nil
		}
		klog.ErrorS(err, "Boot failed", "pod", s.cfg.ID, "try", try)
		if (errors.Is(err, errStalled) || errors.Is(err, errDied)) && try < boots && ctx.Err() == nil {
			s.change(func() { s.steps = append(s.steps, &guestapi.Step{Name: "boot again: " + err.Error()}) })
			if err = s.startMachine(ctx); err == nil {
				continue
			}
		}
		return nil, s.bootFailed(err)
	}
}

// bootFailed makes the end of the VM known and returns the error for the caller.
func (s *Shim) bootFailed(err error) error {
	err = fmt.Errorf("pod %s: %w; %s", s.cfg.ID, err, s.console.lastLines())
	s.vmGone(err.Error())
	return err
}

// step records how long a part of the start took.
func (s *Shim) step(name string, start time.Time) {
	s.change(func() {
		s.steps = append(s.steps, &guestapi.Step{Name: name, Nanos: int64(time.Since(start))})
	})
}

// startMachine makes a VM and starts it.
func (s *Shim) startMachine(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(s.cfg.Timeouts.Boot))
	defer cancel()
	start := time.Now()
	mc, err := s.machineConfig(ctx)
	if err != nil {
		return fmt.Errorf("vm start: %w", err)
	}
	m, err := s.driver.New(ctx, mc)
	if err != nil {
		return fmt.Errorf("vm start: %w: %w", err, classOf(err))
	}
	s.mu.Lock()
	stopping := s.stopping
	s.machine = m
	s.mu.Unlock()
	if stopping {
		err = fmt.Errorf("the pod is being stopped: %w", errdefs.ErrFailedPrecondition)
	} else {
		err = m.Start(ctx)
	}
	if err != nil {
		s.dropMachine(m)
		return fmt.Errorf("vm start: %w", err)
	}
	s.volumes.attach(m)
	s.step("vm start", start)
	s.mu.Lock()
	s.machineStart = time.Now()
	s.mu.Unlock()
	return nil
}

// dropMachine closes a VM that failed to boot.
func (s *Shim) dropMachine(m vmm.Machine) {
	if err := m.Close(); err != nil {
		klog.ErrorS(err, "Closing a VM that failed to boot", "pod", s.cfg.ID)
	}
	s.mu.Lock()
	s.machine, s.agent = nil, nil
	s.mu.Unlock()
}

// bootOnce takes a VM that was started to ready. After an error it is gone.
func (s *Shim) bootOnce(ctx context.Context, sandbox *guestapi.SetUpSandboxRequest) (err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(s.cfg.Timeouts.Boot))
	defer cancel()
	s.mu.Lock()
	m, start := s.machine, s.machineStart
	s.mu.Unlock()
	var a *agent
	defer func() {
		if err != nil {
			if a != nil {
				s.releaseLease(a)
				a.close()
			}
			s.dropMachine(m)
		}
	}()

	conn, err := s.awaitAgent(ctx, m)
	if err != nil {
		return fmt.Errorf("kernel and agent: %w", err)
	}
	a = newAgent(conn, time.Duration(s.cfg.Timeouts.Agent), s.killVM)
	// Hello is also the test whether it is an agent at all, so nothing is asked
	// meanwhile: a bound will do.
	hctx, hcancel := context.WithTimeout(ctx, time.Duration(s.cfg.Timeouts.Agent))
	hello, err := bounded(hctx, "hello", a.Hello, &guestapi.HelloRequest{Version: guestapi.Version})
	hcancel()
	if err != nil {
		return fmt.Errorf("kernel and agent: %w", err)
	}
	if hello.GetVersion() != guestapi.Version {
		return fmt.Errorf("kernel and agent: the guest agent speaks version %d of the API and this build %d: rebuild the guest image: %w", hello.GetVersion(), guestapi.Version, errdefs.ErrFailedPrecondition)
	}
	s.step("kernel and agent", start)
	s.addGuestSteps(hello.GetBoot())

	start = time.Now()
	sandbox.UnixNanos = time.Now().UnixNano()
	sandbox.Entropy = make([]byte, entropyBytes)
	_, _ = rand.Read(sandbox.Entropy) // never fails
	granted := hostClock(start)
	dhcp := usesDHCP(sandbox)
	if dhcp {
		s.change(func() { s.leased = true })
	}
	sctx, scancel := context.WithTimeout(ctx, 6*time.Duration(s.cfg.Timeouts.Agent))
	setUp, err := bounded(sctx, "set up sandbox", a.SetUpSandbox, sandbox)
	early := sctx.Err() == nil
	scancel()
	if early && errdefs.IsDeadlineExceeded(err) {
		// The guest's bound ran out before this one: it hung, or its kernel took the
		// measure of its clock while the host was busy, and the clock runs many
		// times too fast. A fresh VM measures again. // T7
		err = fmt.Errorf("%w: %w", err, errStalled)
	}
	if err == nil && dhcp {
		err = checkLease(setUp.GetLease())
	}
	if err == nil {
		err = checkClock(setUp.GetSteps(), time.Since(start))
	}
	if err != nil {
		return fmt.Errorf("sandbox set-up: %w", err)
	}
	s.step("sandbox set-up", start)
	s.addGuestSteps(setUp.GetSteps())

	var gone bool
	s.change(func() {
		if gone = s.vm == shimapi.VM_GONE || s.stopping; !gone {
			s.agent, s.vm, s.lease = a, shimapi.VM_READY, setUp.GetLease()
		}
	})
	if gone {
		return fmt.Errorf("the pod was stopped while it booted: %w", errdefs.ErrFailedPrecondition)
	}
	s.tasks.Go(func() { s.watchMachine(m) })
	s.tasks.Go(func() { s.watchAgent(a) })
	s.tasks.Go(func() {
		looks := time.NewTicker(clockEvery)
		defer looks.Stop()
		begin := time.Now()
		s.watchClock(a, looks.C, func() hostTime { return hostClock(begin) })
	})
	if dhcp {
		s.tasks.Go(func() {
			looks := time.NewTicker(clockEvery)
			defer looks.Stop()
			s.watchLease(a, setUp.GetLease(), granted, looks.C, func() hostTime { return hostClock(start) })
		})
	}
	s.tasks.Go(func() {
		looks := time.NewTicker(time.Duration(s.cfg.Timeouts.Idle) / idleLooks)
		defer looks.Stop()
		s.watchIdle(a, m, looks.C)
	})
	return nil
}

// checkClock compares what a guest says of its steps, which came one after the other,
// with the time that the call took. A kernel that took the measure of its clock while
// the host was busy, and found it many times too fast, has every bound of its own run
// out early for as long as it lives: containers fail to start in a pod that looks
// well. // T7
func checkClock(steps []*guestapi.Step, took time.Duration) error {
	var said time.Duration
	for _, st := range steps {
		said += time.Duration(max(st.GetNanos(), 0))
	}
	if said > clockFactor*took+clockSlack || said < 0 { // a guest can say what it likes
		return fmt.Errorf("the guest measured %v in a call of %v, its clock runs too fast: %w", said, took, errStalled)
	}
	return nil
}

// bounded makes a call whose ctx is its only bound.
func bounded[Req, Resp any](ctx context.Context, what string, f func(context.Context, Req) (Resp, error), req Req) (Resp, error) {
	type result struct {
		resp Resp
		err  error
	}
	start := time.Now()
	answer := make(chan result, 1)
	go func() {
		resp, err := f(ctx, req)
		answer <- result{resp, err}
	}()
	var none Resp
	select {
	case r := <-answer:
		if r.err != nil && ctx.Err() == nil {
			return none, agentError(what, r.err)
		}
		if r.err == nil {
			return r.resp, nil
		}
	case <-ctx.Done():
	}
	return none, fmt.Errorf("guest agent: %s: no usable answer in %v: %w", what, time.Since(start).Round(time.Millisecond), ctx.Err())
}

// addGuestSteps takes over what the guest says of its own start, capped.
func (s *Shim) addGuestSteps(steps []*guestapi.Step) {
	if len(steps) == 0 {
		return
	}
	s.change(func() {
		for _, st := range steps[:min(len(steps), 64)] {
			s.steps = append(s.steps, &guestapi.Step{Name: "guest: " + escape(st.GetName(), 128), Nanos: max(st.GetNanos(), 0)})
		}
	})
}

func (s *Shim) machineConfig(ctx context.Context) (vmm.Config, error) {
	c := s.cfg
	volumes, err := s.volumes.share(ctx, s.driver)
	if err != nil {
		return vmm.Config{}, err
	}
	mc := vmm.Config{
		ID: c.ID, Arch: c.Arch, Kernel: c.Kernel, Initrd: c.Initrd, Cmdline: c.Cmdline,
		CPUs: c.CPUs, MemoryBytes: c.MemoryBytes,
		DiskFailed: s.diskFailed,
		Console:    s.console.w,
		RunDir:     filepath.Join(c.RunDir, "vm"),
		Disks:      []vmm.Disk{{Serial: guestapi.DiskScratch, Path: filepath.Join(c.PodDir, ScratchFile)}},
		Shares: []vmm.Share{
			{Tag: guestapi.ShareLayers, Dir: filepath.Join(c.PodDir, LayersDir), ReadOnly: true},
			volumes,
		},
	}
	if err := os.MkdirAll(mc.RunDir, 0o700); err != nil {
		return mc, err
	}
	if c.MAC == "" {
		return mc, nil
	}
	mac, err := net.ParseMAC(c.MAC)
	if err != nil {
		return mc, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	nic := vmm.NIC{MAC: mac, MTU: c.MTU}
	if s.tap != nil {
		// A copy: the machine owns it, and a second machine needs one too.
		if nic.Tap, err = dupFile(s.tap); err != nil {
			return mc, err
		}
	}
	mc.NICs = []vmm.NIC{nic}
	if c.SwitchMAC == "" {
		return mc, nil
	}
	frames, err := s.joinSwitch(ctx)
	if err != nil {
		if nic.Tap != nil {
			nic.Tap.Close()
		}
		return mc, err
	}
	mc.NICs = append(mc.NICs, frames)
	return mc, nil
}

// classOf keeps a configuration error apart from a machine that failed.
func classOf(err error) error {
	if errors.Is(err, vmm.ErrConfig) {
		return errdefs.ErrInvalidArgument
	}
	return errdefs.ErrUnknown
}

// awaitAgent dials the agent until it answers, as long as the guest makes
// progress (T7).
func (s *Shim) awaitAgent(ctx context.Context, m vmm.Machine) (net.Conn, error) {
	stall := time.Duration(s.cfg.Timeouts.BootStall)
	type mark struct{ console, cpu uint64 }
	last, since := mark{}, time.Now()
	begin := since
	for {
		dctx, cancel := context.WithTimeout(ctx, min(dialAttempt, stall))
		conn, err := m.Dial(dctx, guestapi.PortControl)
		cancel()
		if err == nil {
			return conn, nil
		}
		select {
		case <-m.Done():
			if err := m.Err(); err != nil {
				return nil, fmt.Errorf("%w after %v: %w", errDied, time.Since(begin).Round(time.Millisecond), err)
			}
			return nil, fmt.Errorf("the guest powered itself off after %v, before its agent answered", time.Since(begin).Round(time.Millisecond))
		default:
		}
		if ctx.Err() != nil {
			if errors.Is(ctx.Err(), context.DeadlineExceeded) && time.Since(begin) > time.Duration(s.cfg.Timeouts.Boot)-2*time.Second {
				return nil, fmt.Errorf("the agent didn't answer in %v: %w (last attempt: %v)", time.Since(begin).Round(time.Millisecond), errStalled, err)
			}
			return nil, fmt.Errorf("waited %v for the agent: %w (last attempt: %v)", time.Since(begin).Round(time.Millisecond), ctx.Err(), err)
		}
		now := mark{console: s.console.bytes.Load()}
		if cpu, err := m.Progress(); err == nil {
			now.cpu = cpu
		}
		if now.console != last.console || now.cpu >= last.cpu+progressNanos {
			last, since = now, time.Now()
		}
		if idle := time.Since(since); idle >= stall {
			return nil, fmt.Errorf("the guest neither wrote to its console nor used its CPU for %v: %w", idle.Round(time.Millisecond), errStalled)
		}
		select {
		case <-time.After(dialEvery):
		case <-s.console.wrote:
		case <-m.Done():
		case <-ctx.Done():
		}
	}
}

// diskFailed keeps why a disk failed, for the status of the pod and of containers
// that fail because of it (T9).
func (s *Shim) diskFailed(serial, reason string) {
	s.change(func() { s.diskError = fmt.Sprintf("the host failed to serve the %s disk: %s", serial, reason) })
}

// watchMachine waits for the end of a VM that is up.
func (s *Shim) watchMachine(m vmm.Machine) {
	<-m.Done()
	s.mu.Lock()
	stopping := s.stopping
	a := s.agent
	s.mu.Unlock()
	switch err := m.Err(); {
	case stopping:
		s.vmGone("the pod was stopped")
	case err != nil:
		s.vmGone("the VM failed: " + escape(err.Error(), 1024))
	default:
		s.vmGone("the guest powered itself off")
	}
	// Calls that wait for this agent end now, whatever their connection says.
	a.close()
}

// lastBreath is how long the end of a VM may take to be known after its connections
// broke.
const lastBreath = 500 * time.Millisecond

// watchAgent waits for the end of the connection to the agent. Nothing can be asked
// of a pod that has lost it, so that its VM is as good as dead (T12).
func (s *Shim) watchAgent(a *agent) {
	select {
	case <-s.gone:
		return
	case <-a.broke:
	}
	// Most often it broke because the VM ended, whose watcher knows why.
	select {
	case <-s.gone:
	case <-time.After(lastBreath):
		s.killVM("the connection to the guest agent broke")
	}
}
