package shim

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/network/frameswitch"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// Shim is one pod. Its gRPC-like methods are package shim/api's service.
type Shim struct {
	cfg     Config
	driver  vmm.Driver
	tap     *os.File // nil: no NIC
	volumes volumes
	console *console

	// gone is closed when the VM is gone for good; reason and vm say so then.
	gone     chan struct{}
	goneOnce sync.Once
	// stopped is closed when Stop has done its work and the process may end.
	stopped chan struct{}
	// stop holds a token for the one that stops the pod.
	stop chan struct{}
	// tasks are the supervisors of containers and the watcher of the machine.
	tasks sync.WaitGroup
	// adjusting holds a token for AdjustMachine, and pinned says whether the VM's
	// CPUs are not all that there are.
	adjusting chan struct{}
	pinned    bool

	mu           sync.Mutex
	revision     uint64
	changed      chan struct{} // closed and replaced with every change
	vm           shimapi.VM
	reason       string
	started      bool // StartMachine was called
	booted       bool // Boot was called
	stopping     bool
	diskError    string
	lease        *guestapi.Lease // what Boot got
	leased       bool            // the DHCP server may have a lease of this pod's
	steps        []*guestapi.Step
	containers   map[string]*container
	machine      vmm.Machine
	machineStart time.Time // when its Start returned
	agent        *agent
	port         *frameswitch.Port // nil: not on a frame switch
}

// New makes a shim for c. It takes ownership of tap, which may be nil.
func newShim(c Config, d vmm.Driver, tap *os.File, v volumes) (*Shim, error) {
	con, err := openConsole(filepath.Join(c.PodDir, ConsoleFile))
	if err != nil {
		return nil, err
	}
	return &Shim{
		cfg: c, driver: d, tap: tap, volumes: v, console: con,
		gone:       make(chan struct{}),
		stopped:    make(chan struct{}),
		stop:       make(chan struct{}, 1),
		adjusting:  make(chan struct{}, 1),
		changed:    make(chan struct{}),
		containers: make(map[string]*container),
	}, nil
}

// Serve runs the pod's shim with machines of d until Stop was called or ctx
// ends, which stops the pod. It owns tap.
func Serve(ctx context.Context, c Config, d vmm.Driver, tap *os.File) error {
	c.Timeouts = c.Timeouts.withDefaults()
	return serve(ctx, c, d, tap, newVolumes(c))
}

func serve(ctx context.Context, c Config, d vmm.Driver, tap *os.File, v volumes) error {
	if tap != nil {
		defer tap.Close()
	}
	s, err := newShim(c, d, tap, v)
	if err != nil {
		return err
	}
	defer s.console.close()
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(toStatus))
	if err != nil {
		return err
	}
	shimapi.RegisterShimService(server, s)
	data, err := s.listen(shimapi.SocketData)
	if err != nil {
		return err
	}
	defer data.Close()
	control, err := s.listen(shimapi.SocketControl)
	if err != nil {
		return err
	}
	defer control.Close()

	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(context.Background(), control); err != nil && ctx.Err() == nil {
			select {
			case <-s.stopped:
			default:
				klog.ErrorS(err, "Control socket failed", "pod", c.ID)
			}
		}
	})
	serving.Go(func() { s.serveConns(data, nil, s.serveStream) })

	select {
	case <-s.stopped:
	case <-ctx.Done():
		stopCtx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		if _, err := s.Stop(stopCtx, &shimapi.StopRequest{}); err != nil {
			klog.ErrorS(err, "Stopping the pod failed", "pod", c.ID)
		}
		cancel()
	}
	// The answer to Stop gets a moment to leave: Shutdown takes a connection for
	// idle whose call is just being answered.
	time.Sleep(10 * time.Millisecond)
	shutdown, cancel := context.WithTimeout(context.Background(), time.Second)
	_ = server.Shutdown(shutdown)
	cancel()
	server.Close()
	data.Close()
	control.Close()
	serving.Wait()
	return nil
}

// listen serves a socket in the run directory, for the shim's own user only.
func (s *Shim) listen(name string) (net.Listener, error) {
	if err := CheckRunDir(s.cfg.RunDir); err != nil {
		return nil, err
	}
	path := filepath.Join(s.cfg.RunDir, name)
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("shim socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("shim socket: %w", err)
	}
	// The directory is 0700, so nobody else was here in between.
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("shim socket: %w", err)
	}
	return &ownListener{l.(*net.UnixListener)}, nil
}

// ownListener turns away peers of another user.
type ownListener struct{ *net.UnixListener }

func (l *ownListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(c)
		if err == nil && (uid == os.Geteuid() || uid == 0) {
			return c, nil
		}
		klog.InfoS("Refused a connection of another user", "uid", uid, "err", err)
		c.Close()
	}
}

// toStatus gives errors their class on the wire.
func toStatus(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	resp, err := method(ctx, unmarshal)
	return resp, errgrpc.ToGRPC(err)
}

// change applies f to the state and tells the watchers.
func (s *Shim) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	s.revision++
	close(s.changed)
	s.changed = make(chan struct{})
}

// state is a copy of everything, and what is closed when it is out of date.
func (s *Shim) state() (*shimapi.PodState, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := &shimapi.PodState{Revision: s.revision, Vm: s.vm, Reason: s.reason, DiskError: s.diskError, Leased: s.leased, Steps: s.steps[:len(s.steps):len(s.steps)]}
	for _, c := range s.containers {
		if c.state != nil {
			p.Containers = append(p.Containers, proto.CloneOf(c.state))
		}
	}
	return p, s.changed
}

// Hello implements shim/api.
func (s *Shim) Hello(context.Context, *shimapi.HelloRequest) (*shimapi.HelloResponse, error) {
	return &shimapi.HelloResponse{Version: shimapi.Version, Pid: uint32(os.Getpid())}, nil
}

// Watch implements shim/api.
func (s *Shim) Watch(ctx context.Context, _ *shimapi.WatchRequest, stream shimapi.Shim_WatchServer) error {
	for {
		state, changed := s.state()
		if err := stream.Send(state); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-s.stopped:
			// The last change may have come with the end: it says, for one, whether a
			// lease is left.
			if last, _ := s.state(); last.GetRevision() > state.GetRevision() {
				return stream.Send(last)
			}
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

// vmGone makes the end of the VM known. The first reason stays.
func (s *Shim) vmGone(reason string) {
	s.goneOnce.Do(func() {
		klog.InfoS("The VM is gone", "pod", s.cfg.ID, "reason", reason)
		s.change(func() {
			s.vm, s.reason = shimapi.VM_GONE, reason
			close(s.gone)
		})
	})
}

// killVM ends the VM because of something that only its end can cure. The
// reason is known before the machine's own watcher can give another.
func (s *Shim) killVM(reason string) {
	s.vmGone(reason)
	s.mu.Lock()
	m := s.machine
	s.mu.Unlock()
	if m == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := m.Kill(ctx); err != nil {
		klog.ErrorS(err, "Killing the VM failed", "pod", s.cfg.ID)
	}
}

// running is the agent of a VM that is up, or why there is none.
func (s *Shim) running() (*agent, vmm.Machine, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.vm == shimapi.VM_GONE:
		return nil, nil, fmt.Errorf("pod %s: its VM is gone: %s: %w", s.cfg.ID, s.reason, errdefs.ErrFailedPrecondition)
	case s.stopping:
		return nil, nil, fmt.Errorf("pod %s is being stopped: %w", s.cfg.ID, errdefs.ErrFailedPrecondition)
	case s.vm != shimapi.VM_READY:
		return nil, nil, fmt.Errorf("pod %s: its VM is still booting: %w", s.cfg.ID, errdefs.ErrFailedPrecondition)
	}
	return s.agent, s.machine, nil
}

// Stop implements shim/api.
func (s *Shim) Stop(ctx context.Context, _ *shimapi.StopRequest) (*shimapi.StopResponse, error) {
	select {
	case s.stop <- struct{}{}:
		defer func() { <-s.stop }()
	case <-s.stopped:
		return &shimapi.StopResponse{}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case <-s.stopped:
		return &shimapi.StopResponse{}, nil
	default:
	}
	s.mu.Lock()
	s.stopping = true
	a, m := s.agent, s.machine
	s.mu.Unlock()

	kill := time.Duration(s.cfg.Timeouts.Kill)
	if m != nil {
		select {
		case <-m.Done():
		default:
			if a != nil {
				s.releaseLease(a)
				s.shutDown(a, m, kill)
			}
			s.killVM("the pod was stopped")
		}
		if err := m.Close(); err != nil {
			klog.ErrorS(err, "Closing the VM failed", "pod", s.cfg.ID)
		}
	}
	s.vmGone("the pod was stopped")
	if a != nil {
		a.close()
	}
	s.mu.Lock()
	port := s.port
	s.mu.Unlock()
	if port != nil {
		if err := port.Close(); err != nil {
			klog.ErrorS(err, "Leaving the frame switch failed", "pod", s.cfg.ID)
		}
	}
	waitFor(&s.tasks, 3*time.Second)
	if err := s.volumes.close(); err != nil {
		return nil, fmt.Errorf("pod %s: release volumes: %w", s.cfg.ID, err)
	}
	for _, name := range []string{shimapi.SocketControl, shimapi.SocketData} {
		_ = os.Remove(filepath.Join(s.cfg.RunDir, name))
	}
	close(s.stopped)
	return &shimapi.StopResponse{}, nil
}

// shutDown asks the guest to sync and power off, for so long and no longer.
func (s *Shim) shutDown(a *agent, m vmm.Machine, bound time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	defer cancel()
	go func() { _, _ = a.Shutdown(ctx, &guestapi.ShutdownRequest{}) }() // the answer is that the VM is gone
	select {
	case <-m.Done():
	case <-ctx.Done():
		klog.InfoS("The guest didn't power off and is killed", "pod", s.cfg.ID, "after", bound)
	}
}

// waitFor waits for a group, for a bounded time, and reports whether it ended.
func waitFor(wg *sync.WaitGroup, bound time.Duration) bool {
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	t := time.NewTimer(bound)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
		return false
	}
}
