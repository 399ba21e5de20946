package vz

import (
	"context"
	"net"
	"runtime"
	"sync"
	"time"

	infinity "github.com/Code-Hex/go-infinity-channel"
)

type VirtualMachineState int

const (
	VirtualMachineStateStopped VirtualMachineState = iota
	VirtualMachineStateRunning
	VirtualMachineStatePaused
	VirtualMachineStateError
	VirtualMachineStateStarting
	VirtualMachineStatePausing
	VirtualMachineStateResuming
	VirtualMachineStateStopping
	VirtualMachineStateSaving
	VirtualMachineStateRestoring
)

// VirtualMachine is one QEMU.
type VirtualMachine struct {
	config *VirtualMachineConfiguration
	// These have a goroutine each that ends when the channel is closed, which vz does
	// with the second alone, and that when the machine is released.
	notify *infinity.Channel[VirtualMachineState]
	lost   *infinity.Channel[*DisconnectedError]
	watch  sync.Once

	mu       sync.Mutex
	state    VirtualMachineState
	stopping bool
	guest    *guest
}

type VirtualMachineStartOption func(*virtualMachineStartOptions) error

type virtualMachineStartOptions struct{}

func NewVirtualMachine(config *VirtualMachineConfiguration) (*VirtualMachine, error) {
	if err := called("NewVirtualMachine", 11); err != nil {
		return nil, err
	}
	v := &VirtualMachine{
		config: config, notify: infinity.NewChannel[VirtualMachineState](), lost: infinity.NewChannel[*DisconnectedError](),
	}
	runtime.SetFinalizer(v, func(v *VirtualMachine) {
		v.lost.Close()
		released.Add(1)
	})
	return v, nil
}

func (v *VirtualMachine) set(s VirtualMachineState) {
	v.mu.Lock()
	v.state = s
	v.mu.Unlock()
	v.notify.In() <- s
}

func (v *VirtualMachine) State() VirtualMachineState {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.state
}

func (v *VirtualMachine) StateChangedNotify() <-chan VirtualMachineState { return v.notify.Out() }

func (v *VirtualMachine) Start(opts ...VirtualMachineStartOption) error {
	if s := v.State(); s != VirtualMachineStateStopped && s != VirtualMachineStateError {
		return vzError(ErrorInvalidVirtualMachineStateTransition, "start in state %d", s)
	}
	v.set(VirtualMachineStateStarting)
	if err := called("Start", 11); err != nil {
		v.set(VirtualMachineStateError)
		return err
	}
	// What nobody refers to is closed now. // T50
	runtime.GC()
	runtime.GC()
	g, err := startGuest(v.config)
	if err != nil {
		v.set(VirtualMachineStateError)
		return vzError(ErrorInternal, "%v", err)
	}
	v.mu.Lock()
	v.guest = g
	v.mu.Unlock()
	v.set(VirtualMachineStateRunning)
	go func() {
		err := g.wait()
		v.mu.Lock()
		stopping := v.stopping
		v.mu.Unlock()
		if err != nil && !stopping {
			v.set(VirtualMachineStateError)
			return
		}
		if stopping { // and after Stop's answer
			time.Sleep(5 * time.Millisecond)
		}
		v.set(VirtualMachineStateStopped)
	}()
	return nil
}

func (v *VirtualMachine) Stop() error {
	if err := called("Stop", 12); err != nil {
		return err
	}
	v.mu.Lock()
	g := v.guest
	if v.state != VirtualMachineStateRunning {
		defer v.mu.Unlock()
		return vzError(ErrorInvalidVirtualMachineStateTransition, "stop in state %d", v.state)
	}
	v.state, v.stopping = VirtualMachineStateStopping, true
	v.mu.Unlock()
	g.kill()
	_ = g.wait()
	return nil
}

// DisconnectedError says that a NIC lost its attachment.
type DisconnectedError struct {
	Err    error
	Config *VirtioNetworkDeviceConfiguration
}

func (e *DisconnectedError) Unwrap() error { return e.Err }
func (e *DisconnectedError) Error() string { return e.Err.Error() }

func (v *VirtualMachine) NetworkDeviceAttachmentWasDisconnected() (<-chan *DisconnectedError, error) {
	if err := called("NetworkDeviceAttachmentWasDisconnected", 12); err != nil {
		return nil, err
	}
	out := infinity.NewChannel[*DisconnectedError]()
	v.watch.Do(func() { go v.watchDisconnected(out) })
	return out.Out(), nil
}

// watchDisconnected refers to the machine, and ends when that is released, which is
// never.
func (v *VirtualMachine) watchDisconnected(out *infinity.Channel[*DisconnectedError]) {
	for e := range v.lost.Out() {
		e.Config = v.config.nics[0]
		out.In() <- e
	}
	out.Close()
}

type VirtioSocketDevice struct{ vm *VirtualMachine }

func (v *VirtualMachine) SocketDevices() []*VirtioSocketDevice {
	if TestNoSockets {
		return nil
	}
	devices := make([]*VirtioSocketDevice, len(v.config.sockets))
	for i := range devices {
		devices[i] = &VirtioSocketDevice{v}
	}
	return devices
}

// VirtioSocketConnection has what vz's has: no CloseWrite, no File, no SyscallConn.
type VirtioSocketConnection struct{ raw net.Conn }

func (v *VirtioSocketConnection) Read(b []byte) (n int, err error)  { return v.raw.Read(b) }
func (v *VirtioSocketConnection) Write(b []byte) (n int, err error) { return v.raw.Write(b) }
func (v *VirtioSocketConnection) Close() error                      { return v.raw.Close() }
func (v *VirtioSocketConnection) LocalAddr() net.Addr               { return v.raw.LocalAddr() }
func (v *VirtioSocketConnection) RemoteAddr() net.Addr              { return v.raw.RemoteAddr() }
func (v *VirtioSocketConnection) SetDeadline(t time.Time) error     { return v.raw.SetDeadline(t) }
func (v *VirtioSocketConnection) SetReadDeadline(t time.Time) error { return v.raw.SetReadDeadline(t) }
func (v *VirtioSocketConnection) SetWriteDeadline(t time.Time) error {
	return v.raw.SetWriteDeadline(t)
}

// Connect answers late, and says of a guest that does not listen what macOS says.
func (v *VirtioSocketDevice) Connect(port uint32) (*VirtioSocketConnection, error) {
	if err := called("Connect", 11); err != nil {
		return nil, err
	}
	v.vm.mu.Lock()
	g, s := v.vm.guest, v.vm.state
	v.vm.mu.Unlock()
	if s != VirtualMachineStateRunning {
		return nil, vzError(ErrorInvalidVirtualMachineState, "connect in state %d", s)
	}
	c, err := g.dial(port)
	if err != nil {
		const darwinECONNRESET = 54
		return nil, &NSError{Domain: "NSPOSIXErrorDomain", Code: darwinECONNRESET, LocalizedDescription: "The operation couldn’t be completed. Connection reset by peer"}
	}
	return &VirtioSocketConnection{c}, nil
}

// connectBound is how long a guest without its driver is waited for.
const connectBound = time.Second

func (g *guest) dial(port uint32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), connectBound)
	defer cancel()
	return g.vsock.Dial(ctx, port)
}

// VirtioSocketListener is here for its fault.
type VirtioSocketListener struct{}

func (v *VirtioSocketDevice) Listen(port uint32) (*VirtioSocketListener, error) {
	return &VirtioSocketListener{}, called("Listen", 11)
}

// Accept never returns, also not after Close.
func (v *VirtioSocketListener) Accept() (net.Conn, error) { select {} }

func (v *VirtioSocketListener) Close() error { return nil }
