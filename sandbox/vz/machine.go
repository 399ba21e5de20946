//go:build (darwin && cgo) || fakevz

package vz

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/Code-Hex/vz/v3"
	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

const (
	// closeTimeout bounds Close's wait for the framework to end a machine, which
	// takes milliseconds.
	closeTimeout = 10 * time.Second
	// stopAgain is the pause before a machine is told to stop that could not.
	stopAgain = 50 * time.Millisecond
	// lastState bounds the wait for word of a machine's end, which is there already or
	// on its way.
	lastState = time.Second
)

// errGone is what connections to a machine that ended fail with.
var errGone = fmt.Errorf("the machine is gone: %w (%w)", syscall.ECONNRESET, errdefs.ErrUnavailable)

// machine is one VZVirtualMachine. vz's objects stay referenced until it is gone, and
// not longer: their finalizers release what is behind them, and with it the process
// that ran the guest.
type machine struct {
	config   vmm.Config
	vzConfig *vz.VirtualMachineConfiguration

	done     chan struct{}  // closed when the VM has ended
	killed   chan struct{}  // closed when it has to
	changing chan struct{}  // a semaphore of one
	owner    sync.WaitGroup // of run, and of watchNICs

	mu      sync.Mutex
	files   []*os.File // what the framework uses; T50: it has no descriptors of its own
	started bool
	dying   bool // killed is closed
	ended   bool // done is closed, or about to be
	err     error
	vm      *vz.VirtualMachine
	socket  *vz.VirtioSocketDevice
	running time.Time // since when; zero: not yet
	watched bool      // watchNICs runs
	conns   map[*conn]bool

	closeOnce sync.Once
	closeErr  error
}

var (
	_ vmm.ShareSetter  = (*machine)(nil)
	_ vmm.MemorySetter = (*machine)(nil)
)

// Start implements vmm.Machine.
func (m *machine) Start(ctx context.Context) error {
	m.mu.Lock()
	started, dying := m.started, m.dying
	m.started = true
	m.mu.Unlock()
	switch {
	case dying:
		return fmt.Errorf("machine %s: start: it was killed: %w", m.config.ID, errdefs.ErrFailedPrecondition)
	case started:
		return fmt.Errorf("machine %s: start: it was started already: %w", m.config.ID, errdefs.ErrFailedPrecondition)
	}
	if err := m.start(ctx); err != nil {
		return fmt.Errorf("machine %s: start: %w", m.config.ID, err)
	}
	klog.V(2).InfoS("Started machine", "machine", m.config.ID, "arch", m.config.Arch)
	return nil
}

func (m *machine) start(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		m.end(err)
		return err
	}
	vm, err := vz.NewVirtualMachine(m.vzConfig)
	if err != nil {
		err = classify(err)
		m.end(err)
		return err
	}
	// Asked once: each call makes new objects.
	sockets := vm.SocketDevices()
	if len(sockets) == 0 {
		err := errors.New("the framework made a machine without the vsock device it was told to")
		m.end(err)
		return err
	}
	m.mu.Lock()
	m.vm, m.socket = vm, sockets[0]
	m.mu.Unlock()
	result := make(chan error, 1)
	m.owner.Go(func() { m.run(vm, result) })
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		m.kill()
		return fmt.Errorf("wait for the framework to start it: %w", ctx.Err())
	}
}

// run owns vm from its start to its end. Neither call to the framework has a bound:
// one that hangs costs the machine, which the caller's context notices.
func (m *machine) run(vm *vz.VirtualMachine, started chan<- error) {
	states := vm.StateChangedNotify()
	if err := vm.Start(); err != nil {
		err = classify(err)
		m.end(err)
		started <- err
		return
	}
	m.mu.Lock()
	m.running = time.Now()
	m.mu.Unlock()
	started <- nil
	for {
		select {
		case s := <-states:
			if ended(s) {
				m.stopped(s)
				return
			}
		case <-m.killed:
			if m.stop(vm) {
				return
			}
		}
	}
}

// stop ends vm, and reports whether it has ended.
func (m *machine) stop(vm *vz.VirtualMachine) bool {
	if s := vm.State(); ended(s) {
		m.stopped(s)
		return true
	}
	err := vm.Stop()
	if err == nil {
		// vz is told of the new state apart from Stop's answer, and ends this process
		// if the machine has been released by then.
		for late := time.Now().Add(lastState); !ended(vm.State()) && time.Now().Before(late); {
			time.Sleep(time.Millisecond)
		}
		m.end(nil)
		return true
	}
	// It is ending by itself, or not yet in a state to be stopped.
	klog.V(4).InfoS("Machine can't be stopped now", "machine", m.config.ID, "state", vm.State(), "err", err)
	time.Sleep(stopAgain)
	return false
}

func ended(s vz.VirtualMachineState) bool {
	return s == vz.VirtualMachineStateStopped || s == vz.VirtualMachineStateError
}

// stopped is called when the machine has reached a state that is its last.
func (m *machine) stopped(s vz.VirtualMachineState) {
	if s == vz.VirtualMachineStateError {
		m.end(errors.New("the Virtualization framework ended the machine because of an error of its own; Console.app shows it for the process com.apple.Virtualization.VirtualMachine"))
		return
	}
	m.end(nil) // the guest powered itself off
}

// end says that nothing of the machine runs any more. The first call counts.
func (m *machine) end(cause error) {
	m.mu.Lock()
	if m.ended {
		m.mu.Unlock()
		return
	}
	m.ended = true
	m.vm, m.socket, m.vzConfig = nil, nil, nil
	if !m.dying { // what happens to a machine that is being killed is no error
		m.err = cause
	}
	var conns []*conn
	for c := range m.conns {
		conns = append(conns, c)
	}
	m.mu.Unlock()
	// The guest's ends are gone. Nobody must wait for them.
	for _, c := range conns {
		_ = c.Conn.Close()
	}
	close(m.done)
}

// watchNICs logs what the framework says, and has said, of NICs that lost their
// attachment.
func (m *machine) watchNICs(vm *vz.VirtualMachine) {
	lost, err := vm.NetworkDeviceAttachmentWasDisconnected()
	if err != nil {
		return
	}
	for {
		select {
		case e, ok := <-lost:
			if !ok {
				return
			}
			klog.ErrorS(e, "NIC of machine is cut off", "machine", m.config.ID)
		case <-m.done:
			return
		}
	}
}

// conn is a connection to the guest. It has no CloseWrite, and nor has vz's.
type conn struct {
	net.Conn
	machine *machine
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.machine.mu.Lock()
	delete(c.machine.conns, c)
	c.machine.mu.Unlock()
	return c.Conn.Close()
}

// Dial implements vmm.Machine.
func (m *machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	c, err := m.dial(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("machine %s: connect to port %d: %w", m.config.ID, port, err)
	}
	return c, nil
}

func (m *machine) dial(ctx context.Context, port uint32) (net.Conn, error) {
	m.mu.Lock()
	vm, socket, running, over := m.vm, m.socket, !m.running.IsZero(), m.ended
	m.mu.Unlock()
	switch {
	case over:
		return nil, errGone
	case !running:
		return nil, fmt.Errorf("it doesn't run: %w", errdefs.ErrFailedPrecondition)
	}
	type result struct {
		conn *vz.VirtioSocketConnection
		err  error
	}
	// Connect can't be cancelled, and the framework does not promise to answer.
	answer := make(chan result, 1)
	go func() {
		c, err := socket.Connect(port)
		runtime.KeepAlive(vm) // whose the socket is
		answer <- result{c, err}
	}()
	abandon := func(err error) (net.Conn, error) {
		go func() {
			if r := <-answer; r.err == nil && r.conn != nil {
				_ = r.conn.Close()
			}
		}()
		return nil, err
	}
	select {
	case r := <-answer:
		if r.err != nil {
			return nil, refused(classify(r.err))
		}
		return m.adopt(r.conn)
	case <-ctx.Done():
		return abandon(fmt.Errorf("wait for the guest: %w", ctx.Err()))
	case <-m.done:
		return abandon(errGone)
	}
}

// refused makes of whatever the framework answers when nothing listens what the
// contract calls it.
func refused(err error) error {
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) {
		return err
	}
	return fmt.Errorf("%w: %w", err, syscall.ECONNRESET)
}

// adopt makes sure that c ends with the machine.
func (m *machine) adopt(c net.Conn) (net.Conn, error) {
	wrapped := &conn{Conn: c, machine: m}
	m.mu.Lock()
	over, watched, vm := m.ended, m.watched, m.vm
	if !over {
		m.conns[wrapped] = true
		m.watched = true
	}
	// From the first connection on, and not before: who has asked vz once keeps the
	// machine for as long as the process lives, and a guest that did not boot has a
	// successor. Under mu, because run is one of owner's until ended is set: Close
	// waits for this one too.
	if !over && !watched {
		m.owner.Go(func() { m.watchNICs(vm) })
	}
	m.mu.Unlock()
	if over {
		_ = c.Close()
		return nil, errGone
	}
	return wrapped, nil
}

// SetShare implements vmm.ShareSetter.
func (m *machine) SetShare(ctx context.Context, tag string, dirs map[string]vmm.SharedDir) error {
	if err := m.setShare(ctx, tag, dirs); err != nil {
		return fmt.Errorf("machine %s: share %s: %w", m.config.ID, tag, err)
	}
	return nil
}

func (m *machine) setShare(ctx context.Context, tag string, dirs map[string]vmm.SharedDir) error {
	if !m.isLive(tag) {
		return fmt.Errorf("no share of that tag can change: %w", errdefs.ErrInvalidArgument)
	}
	if err := vmm.CheckDirs(dirs); err != nil {
		return err
	}
	return m.change(ctx, func(vm *vz.VirtualMachine) error {
		share, err := multipleShare(dirs)
		if err != nil {
			return err
		}
		return setShare(vm, tag, share)
	})
}

// SetMemory implements vmm.MemorySetter. The framework gives macOS the pages that the
// balloon takes; those that the guest frees it keeps.
func (m *machine) SetMemory(ctx context.Context, bytes int64) error {
	err := m.change(ctx, func(vm *vz.VirtualMachine) error { return setMemory(vm, bytes) })
	if err != nil {
		return fmt.Errorf("machine %s: balloon: %w", m.config.ID, err)
	}
	return nil
}

// change has f change the machine while it runs. One after the other, in the callers'
// order: the last change counts. It takes the machine's own queue, which may be busy.
func (m *machine) change(ctx context.Context, f func(*vz.VirtualMachine) error) error {
	m.mu.Lock()
	vm, running, over := m.vm, !m.running.IsZero(), m.ended
	m.mu.Unlock()
	if !running || over {
		return fmt.Errorf("it doesn't run: %w", errdefs.ErrFailedPrecondition)
	}
	select {
	case m.changing <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("wait for another change: %w", ctx.Err())
	}
	result := make(chan error, 1)
	go func() {
		defer func() { <-m.changing }()
		result <- f(vm)
	}()
	select {
	case err := <-result:
		return classify(err)
	case <-ctx.Done():
		return fmt.Errorf("wait for the framework: %w", ctx.Err())
	case <-m.done:
		return errGone
	}
}

func (m *machine) isLive(tag string) bool {
	for _, s := range m.config.Shares {
		if s.Tag == tag {
			return s.Dirs != nil
		}
	}
	return false
}

// Progress implements vmm.Machine: with the time that the machine has run, as the
// framework has no better figure.
func (m *machine) Progress() (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.running.IsZero() || m.ended {
		return 0, fmt.Errorf("machine %s: progress: it doesn't run: %w", m.config.ID, errdefs.ErrFailedPrecondition)
	}
	return uint64(time.Since(m.running)), nil
}

// PIDs implements vmm.Machine. The framework's processes are launchd's children, and
// nobody tells which is whose.
func (m *machine) PIDs() []int { return nil }

// kill tells run to end the machine.
func (m *machine) kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.dying {
		m.dying = true
		close(m.killed)
	}
}

// Kill implements vmm.Machine.
func (m *machine) Kill(ctx context.Context) error {
	m.mu.Lock()
	started := m.started
	m.started = true // from now on Start refuses
	m.mu.Unlock()
	m.kill()
	if !started {
		m.end(nil)
	}
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("machine %s: wait for the framework to stop it: %w", m.config.ID, ctx.Err())
	}
}

// Done implements vmm.Machine.
func (m *machine) Done() <-chan struct{} { return m.done }

// Err implements vmm.Machine.
func (m *machine) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Close implements vmm.Machine.
func (m *machine) Close() error {
	m.closeOnce.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		if m.closeErr = m.Kill(ctx); m.closeErr == nil {
			// Not before the machine has ended: the framework would use descriptors
			// that by then are somebody else's.
			m.closeErr = m.release()
			// Finalizers now, and not in minutes: the next machine wants the memory.
			m.owner.Wait()
			runtime.GC()
		}
	})
	return m.closeErr
}

// release closes the files that the framework used.
func (m *machine) release() error {
	m.mu.Lock()
	files := m.files
	m.files = nil
	m.mu.Unlock()
	var errs []error
	for _, f := range files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
