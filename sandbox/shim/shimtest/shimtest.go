// Package shimtest has a [vmm.Driver] whose guests are goroutines, for what real
// guests don't do on demand: hang while they boot, answer garbage, go deaf. It
// is for tests; what real guests do is tested with real ones.
package shimtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// Driver makes guests that are goroutines. The zero value's guests behave.
type Driver struct {
	// Hang is how many machines, the first ones, never get anywhere.
	Hang int
	// Busy makes machines that hang use their CPU.
	Busy bool
	// Console is what a guest writes when it starts.
	Console string
	// Garbage makes the agent answer with these bytes instead of ttrpc.
	Garbage []byte
	// Version is the agent's API version; 0 is the right one.
	Version uint32
	// OnSetUp is called with what the agent gets.
	OnSetUp func(*guestapi.SetUpSandboxRequest)
	// Lease is what the agent got by DHCP, and OnRenew what it gets then.
	Lease   *guestapi.Lease
	OnRenew func() (*guestapi.Lease, error)
	// LateSetUps is how many machines, from the first on, say that setting up the
	// sandbox took them too long.
	LateSetUps int
	// FastClocks is how many, from the first on, say that it took them an hour.
	FastClocks int

	mu       sync.Mutex
	machines []*Machine
}

var _ vmm.Driver = (*Driver)(nil)

// Name implements vmm.Driver.
func (d *Driver) Name() string { return "test" }

// Capabilities implements vmm.Driver.
func (d *Driver) Capabilities(context.Context, string) (vmm.Capabilities, error) {
	return vmm.Capabilities{Accelerator: "none", SharePropagation: true}, nil
}

// Validate implements vmm.Driver.
func (d *Driver) Validate(vmm.Config) error { return nil }

// New implements vmm.Driver.
func (d *Driver) New(_ context.Context, c vmm.Config) (vmm.Machine, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := &Machine{driver: d, config: c, n: len(d.machines), done: make(chan struct{}), procs: make(map[string]*proc)}
	d.machines = append(d.machines, m)
	for _, nic := range c.NICs {
		if nic.Tap != nil {
			nic.Tap.Close()
		}
	}
	return m, nil
}

// Machines returns the machines made so far.
func (d *Driver) Machines() []*Machine {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]*Machine(nil), d.machines...)
}

// Machine is a guest.
type Machine struct {
	driver *Driver
	config vmm.Config
	n      int
	deaf   atomic.Bool
	begin  time.Time
	tasks  sync.WaitGroup
	// Clock is what SetClock has set last, unix nanoseconds.
	Clock atomic.Int64
	// Released says that the lease was given back.
	Released atomic.Bool
	// OnMemory, if not nil, answers Memory.
	OnMemory func(*guestapi.MemoryRequest) *guestapi.MemoryResponse

	once sync.Once
	done chan struct{}
	err  error // set before done is closed

	mu      sync.Mutex
	control *listener
	server  *ttrpc.Server
	conns   []net.Conn
	procs   map[string]*proc
}

var _ vmm.Machine = (*Machine)(nil)

// GoDeaf makes the agent leave everything unanswered from now on.
func (m *Machine) GoDeaf() { m.deaf.Store(true) }

// Babble makes an agent that was sane say something else on its control connection.
func (m *Machine) Babble(garbage []byte) {
	m.mu.Lock()
	c := m.conns[0]
	m.mu.Unlock()
	_, _ = c.Write(garbage)
}

// HangUp makes the agent close its control connection.
func (m *Machine) HangUp() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.conns[0].Close()
}

// Die ends the machine as if its VMM had crashed, with err, or as if the guest
// had powered itself off.
func (m *Machine) Die(err error) {
	m.once.Do(func() {
		m.err = err
		m.mu.Lock()
		conns, server, control := m.conns, m.server, m.control
		m.mu.Unlock()
		for _, c := range conns {
			c.Close()
		}
		if server != nil {
			server.Close()
			control.Close()
		}
		close(m.done)
	})
}

// WaitTasks waits for the machine's goroutines, for leak tests.
func (m *Machine) WaitTasks() { m.tasks.Wait() }

// Start implements vmm.Machine.
func (m *Machine) Start(context.Context) error {
	m.begin = time.Now()
	if m.driver.Console != "" {
		_, _ = io.WriteString(m.config.Console, m.driver.Console)
	}
	if m.n < m.driver.Hang {
		return nil
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	l := &listener{conns: make(chan net.Conn), closed: make(chan struct{})}
	guestapi.RegisterAgentService(server, m)
	m.mu.Lock()
	m.server, m.control = server, l
	m.mu.Unlock()
	m.tasks.Go(func() { _ = server.Serve(context.Background(), l) })
	return nil
}

// Dial implements vmm.Machine.
func (m *Machine) Dial(_ context.Context, port uint32) (net.Conn, error) {
	m.mu.Lock()
	l := m.control
	m.mu.Unlock()
	refused := fmt.Errorf("dial port %d: %w", port, syscall.ECONNREFUSED)
	select {
	case <-m.done:
		return nil, fmt.Errorf("dial port %d: the machine is gone: %w", port, syscall.ECONNRESET)
	default:
	}
	if l == nil {
		return nil, refused
	}
	host, guest, err := socketPair()
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	m.conns = append(m.conns, guest)
	m.mu.Unlock()
	switch {
	case m.driver.Garbage != nil && port == guestapi.PortControl:
		m.tasks.Go(func() {
			for {
				if _, err := guest.Write(m.driver.Garbage); err != nil {
					return
				}
			}
		})
	case port == guestapi.PortControl:
		select {
		case l.conns <- guest:
		case <-l.closed:
			return nil, refused
		}
	case port == guestapi.PortData:
		m.tasks.Go(func() { m.serveStream(guest) })
	default:
		host.Close()
		guest.Close()
		return nil, refused
	}
	return host, nil
}

// Progress implements vmm.Machine.
func (m *Machine) Progress() (uint64, error) {
	if m.driver.Busy {
		return uint64(time.Since(m.begin)), nil
	}
	return 0, nil
}

// PIDs implements vmm.Machine.
func (m *Machine) PIDs() []int { return nil }

// Kill implements vmm.Machine.
func (m *Machine) Kill(context.Context) error { m.Die(nil); return nil }

// Done implements vmm.Machine.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Err implements vmm.Machine.
func (m *Machine) Err() error { return m.err }

// Close implements vmm.Machine.
func (m *Machine) Close() error { m.Die(nil); return nil }

// listener hands out connections that were made in this process.
type listener struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}
func (l *listener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *listener) Addr() net.Addr { return &net.UnixAddr{Net: "unix"} }

func socketPair() (a, b net.Conn, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		return nil, nil, err
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conns[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, nil, err
		}
	}
	return conns[0], conns[1], nil
}

// proc is a process: its arguments' second says what it does, as in
// sandbox/testdata/app.
type proc struct {
	args  []string
	stdin bool
	tty   bool

	inR  *io.PipeReader
	inW  *io.PipeWriter
	out  *io.PipeReader
	outW *io.PipeWriter
	errR *io.PipeReader
	errW *io.PipeWriter

	term   chan struct{}
	kill   chan struct{}
	once   [2]sync.Once
	exited chan struct{}
	code   int32
	at     int64
}

func newProc(args []string, stdin, tty bool) *proc {
	p := &proc{args: args, stdin: stdin, tty: tty, term: make(chan struct{}), kill: make(chan struct{}), exited: make(chan struct{})}
	p.inR, p.inW = io.Pipe()
	p.out, p.outW = io.Pipe()
	p.errR, p.errW = io.Pipe()
	return p
}

func (p *proc) arg(i int) string {
	if i < len(p.args) {
		return p.args[i]
	}
	return ""
}

func (p *proc) signal(n uint32) {
	switch syscall.Signal(n) {
	case syscall.SIGTERM:
		p.once[0].Do(func() { close(p.term) })
	case syscall.SIGKILL:
		p.once[1].Do(func() {
			close(p.kill)
			p.inW.Close()
		})
	}
}

// run is the process. Output that nobody takes keeps it, as it does in a guest.
func (p *proc) run(gone <-chan struct{}) {
	code := make(chan int32, 1)
	go func() { code <- p.main(gone) }()
	select {
	case p.code = <-code:
	case <-p.kill:
		p.code = 137
	case <-gone:
		p.code = 137
		p.signal(uint32(syscall.SIGKILL))
	}
	p.outW.Close()
	p.errW.Close()
	p.inR.Close()
	p.at = time.Now().UnixNano()
	close(p.exited)
}

func (p *proc) main(gone <-chan struct{}) int32 {
	switch p.arg(1) {
	case "echo":
		fmt.Fprintln(p.outW, p.arg(2))
		fmt.Fprintln(p.errW, "err "+p.arg(2))
	case "cat":
		_, _ = io.Copy(p.outW, p.inR)
	case "exit":
		n, _ := strconv.Atoi(p.arg(2))
		return int32(n)
	case "flood": // as much output as anybody takes
		b := make([]byte, 32<<10)
		for i := range b {
			b[i] = "0123456789abcde\n"[i%16]
		}
		for {
			if _, err := p.outW.Write(b); err != nil {
				return 1
			}
			select {
			case <-p.kill:
				return 137
			case <-p.term:
				return 0
			default:
			}
		}
	case "sleep", "late": // late takes its time to start
		select {
		case <-p.term:
			return 7
		case <-p.kill:
		}
	case "stubborn":
		<-p.kill
	case "undead": // SIGKILL doesn't help
		p.once[1].Do(func() {})
		<-gone
	}
	return 0
}

// answer holds a call up for ever if the agent is deaf.
func (m *Machine) answer(ctx context.Context) error {
	if m.deaf.Load() {
		select {
		case <-m.done:
		case <-ctx.Done():
		}
		return status.Error(codes.Unavailable, "deaf")
	}
	return nil
}

func (m *Machine) find(id, exec string) (*proc, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.procs[id+"/"+exec]; p != nil {
		return p, nil
	}
	return nil, status.Errorf(codes.NotFound, "no process %s/%s", id, exec)
}

func (m *Machine) add(id, exec string, p *proc) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.procs[id+"/"+exec] = p
}

// Hello implements guest/api.
func (m *Machine) Hello(ctx context.Context, _ *guestapi.HelloRequest) (*guestapi.HelloResponse, error) {
	v := m.driver.Version
	if v == 0 {
		v = guestapi.Version
	}
	return &guestapi.HelloResponse{Version: v, Boot: []*guestapi.Step{{Name: "mounts", Nanos: 1}}}, m.answer(ctx)
}

// SetUpSandbox implements guest/api.
func (m *Machine) SetUpSandbox(ctx context.Context, r *guestapi.SetUpSandboxRequest) (*guestapi.SetUpSandboxResponse, error) {
	if m.driver.OnSetUp != nil {
		m.driver.OnSetUp(r)
	}
	if len(m.driver.Machines()) <= m.driver.LateSetUps {
		return nil, status.Error(codes.DeadlineExceeded, "too late")
	}
	resp := &guestapi.SetUpSandboxResponse{Lease: m.driver.Lease}
	if len(m.driver.Machines()) <= m.driver.FastClocks {
		resp.Steps = []*guestapi.Step{{Name: "pod-init", Nanos: int64(time.Hour)}}
	}
	return resp, m.answer(ctx)
}

// RenewLease implements guest/api.
func (m *Machine) RenewLease(ctx context.Context, _ *guestapi.RenewLeaseRequest) (*guestapi.RenewLeaseResponse, error) {
	if m.driver.OnRenew == nil {
		return nil, status.Error(codes.FailedPrecondition, "no lease")
	}
	l, err := m.driver.OnRenew()
	return &guestapi.RenewLeaseResponse{Lease: l}, errors.Join(err, m.answer(ctx))
}

// ReleaseLease implements guest/api.
func (m *Machine) ReleaseLease(ctx context.Context, _ *guestapi.ReleaseLeaseRequest) (*guestapi.ReleaseLeaseResponse, error) {
	m.Released.Store(true)
	return &guestapi.ReleaseLeaseResponse{}, m.answer(ctx)
}

// CreateContainer implements guest/api.
func (m *Machine) CreateContainer(ctx context.Context, r *guestapi.CreateContainerRequest) (*guestapi.CreateContainerResponse, error) {
	if err := m.answer(ctx); err != nil {
		return nil, err
	}
	var spec specs.Spec
	if err := json.Unmarshal(r.GetSpec(), &spec); err != nil || spec.Process == nil {
		return nil, status.Errorf(codes.InvalidArgument, "spec: %v", err)
	}
	if len(spec.Process.Args) > 1 && spec.Process.Args[1] == "refuse" {
		return nil, status.Error(codes.InvalidArgument, "refused\n\x1b[31mred")
	}
	if len(spec.Process.Args) > 1 && spec.Process.Args[1] == "made-late" {
		time.Sleep(300 * time.Millisecond)
	}
	m.add(r.GetId(), "", newProc(spec.Process.Args, r.GetStdin(), r.GetTty()))
	user := &guestapi.ResolvedUser{Uid: 7}
	if len(spec.Process.Args) > 1 && spec.Process.Args[1] == "many-groups" {
		user.SupplementalGroups = make([]uint32, 200_000)
	}
	return &guestapi.CreateContainerResponse{User: user}, nil
}

// StartContainer implements guest/api.
func (m *Machine) StartContainer(ctx context.Context, r *guestapi.StartContainerRequest) (*guestapi.StartContainerResponse, error) {
	if err := m.answer(ctx); err != nil {
		return nil, err
	}
	p, err := m.find(r.GetId(), "")
	if err != nil {
		return nil, err
	}
	if p.arg(1) == "missing" {
		return nil, status.Error(codes.NotFound, "exec: \"missing\": not found")
	}
	if p.arg(1) == "late" {
		time.Sleep(300 * time.Millisecond)
	}
	m.tasks.Go(func() { p.run(m.done) })
	return &guestapi.StartContainerResponse{Pid: 1}, nil
}

// Exec implements guest/api.
func (m *Machine) Exec(ctx context.Context, r *guestapi.ExecRequest) (*guestapi.ExecResponse, error) {
	if err := m.answer(ctx); err != nil {
		return nil, err
	}
	p := newProc(r.GetArgs(), r.GetStdin(), r.GetTty())
	m.add(r.GetId(), r.GetExecId(), p)
	m.tasks.Go(func() { p.run(m.done) })
	return &guestapi.ExecResponse{Pid: 2}, nil
}

// Wait implements guest/api.
func (m *Machine) Wait(ctx context.Context, r *guestapi.WaitRequest) (*guestapi.WaitResponse, error) {
	p, err := m.find(r.GetId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	select {
	case <-p.exited:
		if err := m.answer(ctx); err != nil {
			return nil, err
		}
		resp := &guestapi.WaitResponse{ExitCode: p.code, ExitedAt: p.at, OomKilled: p.arg(1) == "oom"}
		if p.arg(1) == "unsynced" {
			resp.Message = "not written back\x1b[31m"
		}
		return resp, nil
	case <-m.done:
		return nil, errors.New("gone")
	}
}

// Signal implements guest/api.
func (m *Machine) Signal(ctx context.Context, r *guestapi.SignalRequest) (*guestapi.SignalResponse, error) {
	if err := m.answer(ctx); err != nil {
		return nil, err
	}
	p, err := m.find(r.GetId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	p.signal(r.GetSignal())
	return &guestapi.SignalResponse{}, nil
}

// ResizePty implements guest/api.
func (m *Machine) ResizePty(ctx context.Context, _ *guestapi.ResizePtyRequest) (*guestapi.ResizePtyResponse, error) {
	return &guestapi.ResizePtyResponse{}, m.answer(ctx)
}

// RemoveExec implements guest/api.
func (m *Machine) RemoveExec(ctx context.Context, r *guestapi.RemoveExecRequest) (*guestapi.RemoveExecResponse, error) {
	if p, err := m.find(r.GetId(), r.GetExecId()); err == nil {
		p.signal(uint32(syscall.SIGKILL))
	}
	return &guestapi.RemoveExecResponse{}, m.answer(ctx)
}

// RemoveContainer implements guest/api.
func (m *Machine) RemoveContainer(ctx context.Context, _ *guestapi.RemoveContainerRequest) (*guestapi.RemoveContainerResponse, error) {
	return &guestapi.RemoveContainerResponse{}, m.answer(ctx)
}

// UpdateContainer implements guest/api.
func (m *Machine) UpdateContainer(ctx context.Context, _ *guestapi.UpdateContainerRequest) (*guestapi.UpdateContainerResponse, error) {
	return &guestapi.UpdateContainerResponse{}, m.answer(ctx)
}

// Stats implements guest/api.
func (m *Machine) Stats(ctx context.Context, _ *guestapi.StatsRequest) (*guestapi.StatsResponse, error) {
	return &guestapi.StatsResponse{UnixNanos: 1}, m.answer(ctx)
}

// SetClock implements guest/api.
func (m *Machine) SetClock(ctx context.Context, r *guestapi.SetClockRequest) (*guestapi.SetClockResponse, error) {
	if err := m.answer(ctx); err != nil {
		return nil, err
	}
	m.Clock.Store(r.GetUnixNanos())
	return &guestapi.SetClockResponse{}, nil
}

// Memory implements guest/api.
func (m *Machine) Memory(ctx context.Context, r *guestapi.MemoryRequest) (*guestapi.MemoryResponse, error) {
	if err := m.answer(ctx); err != nil || m.OnMemory == nil {
		return &guestapi.MemoryResponse{}, err
	}
	return m.OnMemory(r), nil
}

// Shutdown implements guest/api.
func (m *Machine) Shutdown(ctx context.Context, _ *guestapi.ShutdownRequest) (*guestapi.ShutdownResponse, error) {
	if err := m.answer(ctx); err != nil {
		return nil, err
	}
	// Not from here: closing the server waits for no call, but the peer should
	// see the connection break, not an answer.
	m.tasks.Go(func() { m.Die(nil) })
	<-m.done
	return &guestapi.ShutdownResponse{}, nil
}

// serveStream is the guest's data port. Port 7 echoes; others refuse.
func (m *Machine) serveStream(conn net.Conn) {
	defer conn.Close()
	h, err := guestapi.ReadHeader(conn)
	if err != nil {
		return
	}
	var p *proc
	if h.Kind == guestapi.Port || h.Kind == guestapi.PodPort {
		if h.Port != 7 {
			err = fmt.Errorf("nothing listens on port %d", h.Port)
		}
	} else {
		p, err = m.find(h.Container, h.Exec)
	}
	s, err := guestapi.Accept(conn, err)
	if err != nil {
		return
	}
	switch h.Kind {
	case guestapi.Port, guestapi.PodPort:
		_, err = io.Copy(s, readOnly{s})
	case guestapi.Stdin:
		if _, err = io.Copy(p.inW, readOnly{s}); err == nil {
			p.inW.Close()
		}
	case guestapi.Stdout:
		_, err = io.Copy(writeOnly{s}, p.out)
	case guestapi.Stderr:
		_, err = io.Copy(writeOnly{s}, p.errR)
	case guestapi.Terminal:
		m.tasks.Go(func() { _, _ = io.Copy(p.inW, readOnly{s}) })
		_, err = io.Copy(writeOnly{s}, p.out)
	}
	if err == nil && s.CloseWrite() == nil {
		// The host closes when it has read all.
		_, _ = io.Copy(io.Discard, conn)
	}
}

type readOnly struct{ io.Reader }
type writeOnly struct{ io.Writer }
