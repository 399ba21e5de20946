//go:build linux

package vhostvsock

import (
	"context"
	"fmt"
	"math"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"
)

const (
	// defaultReceiveBudget is 64 MiB: 800 streams with a small window each, or 64
	// of which half the budget has made the windows large.
	defaultReceiveBudget = 64 << 20

	// minWindow is what a new stream may receive unread, and maxWindow what it may
	// once its reader has shown that it keeps up: several times what 200 MB/s and a
	// round trip of 0.5 ms need.
	minWindow = 64 << 10
	maxWindow = 512 << 10

	// turnPackets is how many packets a stream sends before the next one may: with
	// 4 KiB each, 64 KiB. A process in the guest that is woken for one packet costs
	// more than the packet.
	turnPackets = 16

	// maxResets is how many replies to unwanted packets may wait for the guest's
	// buffers before its packets wait too.
	maxResets = 256

	// defaultLinger is how long a closed stream waits for the guest to agree, as
	// Linux has it (VSOCK_CLOSE_TIMEOUT).
	defaultLinger = 8 * time.Second

	// firstPort is the first host port of outgoing streams: none that means
	// something to anyone.
	firstPort = 1 << 30
)

// errGone is what streams of a device that ended fail with.
var errGone = fmt.Errorf("vsock device is gone: %w (%w)", syscall.ECONNRESET, errdefs.ErrUnavailable)

// Device is the vsock device of one guest. Its methods may be called concurrently.
type Device struct {
	cid    uint64
	budget int
	linger time.Duration

	// work wakes the rx worker when there is something to send, resetRoom the tx
	// worker when resets are not full any more. Both hold one token.
	work      chan struct{}
	resetRoom chan struct{}
	done      chan struct{} // closed when the device is

	mu       sync.Mutex // taken with a stream's mu held, never the other way round
	closed   bool
	conn     *net.UnixConn
	served   chan struct{} // closed when Serve returns; nil before Serve
	ready    chan struct{} // closed while the guest's driver is there
	isReady  bool
	streams  map[flow]*stream
	lastPort uint32
	reserved int // bytes of the budget promised to streams

	// What the rx worker has to send: resets of streams that are not in streams,
	// and a queue of streams that takes turnPackets of each in turn.
	resets      []packet
	first, last *stream
	turn        *stream // whose turn it is
	taken       int     // packets of its turn
	resetNext   bool
}

// flow names a stream by its ports.
type flow struct{ host, guest uint32 }

// Option changes a Device.
type Option func(*Device)

// WithReceiveBudget bounds the memory, in bytes, in which the device keeps what the
// guest has sent and nobody has read; 64 MiB unless told. Dial refuses a stream that
// has no room in it.
func WithReceiveBudget(bytes int) Option {
	return func(d *Device) { d.budget = bytes }
}

// New returns the device of the guest that is to have the address guestCID, 3 or
// more; each VM may have the same. It starts nothing: call Serve.
func New(guestCID uint64, opts ...Option) *Device {
	d := &Device{
		cid:       guestCID,
		budget:    defaultReceiveBudget,
		linger:    defaultLinger,
		work:      make(chan struct{}, 1),
		resetRoom: make(chan struct{}, 1),
		done:      make(chan struct{}),
		ready:     make(chan struct{}),
		streams:   map[flow]*stream{},
		lastPort:  firstPort,
	}
	for _, o := range opts {
		o(d)
	}
	return d
}

// Serve is the device for the QEMU at the other end of c, which it owns and closes.
// It returns nil when QEMU hangs up or Close is called, and an error when QEMU or
// the guest break the protocol. Either way the device is then closed and its streams
// are reset: a guest can't get its vsock device back, so its VM is to be ended. Serve
// can be called once.
func (d *Device) Serve(c *net.UnixConn) error {
	err := d.serve(c)
	if err != nil {
		return fmt.Errorf("vsock device of guest CID %d: %w", d.cid, err)
	}
	return nil
}

func (d *Device) serve(c *net.UnixConn) error {
	defer c.Close()
	// §5.10.4: 0 to 2 are reserved, and so are the upper 32 bits and all ones.
	if d.cid < 3 || d.cid >= math.MaxUint32 {
		return fmt.Errorf("a guest can't have this CID, choose one from 3 to 4294967294: %w", errdefs.ErrInvalidArgument)
	}
	d.mu.Lock()
	switch {
	case d.closed:
		d.mu.Unlock()
		return fmt.Errorf("serve: device is closed: %w", errdefs.ErrUnavailable)
	case d.served != nil:
		d.mu.Unlock()
		return fmt.Errorf("serve: device is being served already: %w", errdefs.ErrFailedPrecondition)
	}
	d.conn, d.served = c, make(chan struct{})
	d.mu.Unlock()
	defer close(d.served)

	s, err := newSession(d, c)
	if err == nil {
		klog.V(4).InfoS("Serving vsock device", "cid", d.cid)
		err = s.serve()
		d.mu.Lock()
		if d.closed { // what Close did to the connection is not an error
			err = nil
		}
		d.mu.Unlock()
	}
	d.shut()
	return err
}

// Close ends the device, resets its streams, and returns when Serve is about to.
// It may be called more than once.
func (d *Device) Close() error {
	d.shut()
	d.mu.Lock()
	c, served := d.conn, d.served
	d.mu.Unlock()
	if served == nil {
		return nil
	}
	_ = c.Close()
	// Bounded: no worker waits for anything that a closed connection and its stop
	// channel don't end.
	<-served
	return nil
}

// shut closes the device for streams.
func (d *Device) shut() {
	d.mu.Lock()
	if !d.closed {
		d.closed = true
		close(d.done)
	}
	d.mu.Unlock()
	d.killStreams(errGone)
}

// guestReset is called when the guest's driver started anew.
func (d *Device) guestReset() {
	d.mu.Lock()
	d.resets = nil
	d.mu.Unlock()
	d.killStreams(syscall.ECONNRESET)
}

func (d *Device) killStreams(err error) {
	d.mu.Lock()
	all := make([]*stream, 0, len(d.streams))
	for _, st := range d.streams {
		all = append(all, st)
	}
	d.mu.Unlock()
	for _, st := range all {
		st.mu.Lock()
		st.kill(err)
		st.mu.Unlock()
	}
}

func (d *Device) setReady(ready bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case ready && !d.isReady:
		close(d.ready)
	case !ready && d.isReady:
		d.ready = make(chan struct{})
	}
	d.isReady = ready
}

// Dial opens a stream to a port in the guest. It waits for the guest's driver and
// for the guest's answer as long as ctx allows. The stream has a CloseWrite method,
// which ends the guest's reading and leaves ours open; it must be closed.
//
// Errors are *net.OpError around: syscall.ECONNREFUSED if nobody listens there, the
// error of ctx, errdefs.ErrUnavailable if the device is or gets closed, and
// errdefs.ErrResourceExhausted if the receive budget has no room.
func (d *Device) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	st, err := d.dial(ctx, port)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Addr: addr{d.cid, port}, Err: err}
	}
	return st, nil
}

func (d *Device) dial(ctx context.Context, port uint32) (*stream, error) {
	if err := d.waitReady(ctx); err != nil {
		return nil, err
	}
	st, err := d.newStream(port)
	if err != nil {
		return nil, err
	}
	cancel := context.AfterFunc(ctx, func() {
		st.mu.Lock()
		defer st.mu.Unlock()
		if st.connecting {
			st.abort(fmt.Errorf("wait for the guest to answer: %w", ctx.Err()))
		}
	})
	defer cancel()

	st.mu.Lock()
	defer st.mu.Unlock()
	st.want |= wantRequest
	st.schedule()
	for st.connecting && !st.dead {
		st.writable.Wait()
	}
	if st.connecting {
		st.release()
		return nil, st.err
	}
	// The guest may have hung up already; that is for Read to say.
	return st, nil
}

func (d *Device) waitReady(ctx context.Context) error {
	d.mu.Lock()
	closed, ready := d.closed, d.ready
	d.mu.Unlock()
	if closed {
		return errGone
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-ready:
		return nil
	case <-d.done:
		return errGone
	case <-ctx.Done():
		return fmt.Errorf("wait for the guest's vsock driver: %w", ctx.Err())
	}
}

// newStream makes a stream with a host port of its own.
func (d *Device) newStream(port uint32) (*stream, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errGone
	}
	if d.reserved+minWindow+chunkSize > d.budget {
		return nil, fmt.Errorf("%d streams have the receive budget of %d bytes, close some: %w", len(d.streams), d.budget, errdefs.ErrResourceExhausted)
	}
	// There are far fewer streams than ports, so this ends soon.
	f := flow{guest: port}
	for taken := true; taken; {
		if d.lastPort++; d.lastPort == math.MaxUint32 { // which is VMADDR_PORT_ANY
			d.lastPort = firstPort
		}
		f.host = d.lastPort
		_, taken = d.streams[f]
	}
	st := newStream(d, f)
	d.reserved += minWindow + chunkSize
	d.streams[f] = st
	return st, nil
}

// forget drops the stream, whose ports then are free. The guest's packets to it will
// be answered by resets.
func (d *Device) forget(st *stream) {
	d.mu.Lock()
	delete(d.streams, st.flow)
	if d.turn == st {
		d.turn = nil
	}
	d.mu.Unlock()
}

// grow promises a stream n more bytes. Half of the budget is kept for new streams.
func (d *Device) grow(n int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.reserved+n > d.budget/2 {
		return false
	}
	d.reserved += n
	return true
}

func (d *Device) unreserve(n int) {
	d.mu.Lock()
	d.reserved -= n
	d.mu.Unlock()
}

// schedule puts the stream at the end of the queue of those that have something to
// send, or in front if its turn is not over, unless it is in it.
func (d *Device) schedule(st *stream) {
	d.mu.Lock()
	queued := st.queued
	if !queued {
		st.queued = true
		switch {
		case d.first == nil:
			d.first, d.last = st, st
		case st == d.turn && d.taken < turnPackets:
			st.next, d.first = d.first, st
		default:
			d.last.next, d.last = st, st
		}
	}
	d.mu.Unlock()
	if !queued {
		wake(d.work)
	}
}

// reset queues a reset of a stream that is not, or no more, in streams.
func (d *Device) reset(p packet) {
	d.mu.Lock()
	// The tx worker stops at maxResets. What is beyond are streams that this side
	// gave up; the guest learns of these with the next packet it sends to them.
	queued := len(d.resets) < 2*maxResets
	if queued {
		d.resets = append(d.resets, p)
	}
	d.mu.Unlock()
	if queued {
		wake(d.work)
	}
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (d *Device) resetsFull() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.resets) >= maxResets
}

func (d *Device) hasWork() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.first != nil || len(d.resets) > 0
}

// nextWork takes a reset or the first stream off what there is to send. Resets and
// streams take turns, so that a guest process which provokes resets without end
// starves no stream, nor the other way round.
func (d *Device) nextWork() (*packet, *stream) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.resets) > 0 && (d.resetNext || d.first == nil) {
		p := d.resets[0]
		if d.resets = d.resets[1:]; len(d.resets) == 0 {
			d.resets = nil
		}
		d.resetNext = false
		if len(d.resets) < maxResets {
			wake(d.resetRoom)
		}
		return &p, nil
	}
	st := d.first
	if st == nil {
		return nil, nil
	}
	if d.first = st.next; d.first == nil {
		d.last = nil
	}
	st.next, st.queued = nil, false
	if st != d.turn || d.taken == turnPackets {
		d.turn, d.taken = st, 0
	}
	d.taken++
	d.resetNext = true
	return nil, st
}

// send writes one packet into a chain that has room for more than a header, and
// returns its size; 0 if there is none.
func (d *Device) send(c *chain) int {
	for {
		p, st := d.nextWork()
		switch {
		case p != nil:
			var b [headerSize]byte
			p.encode(&b)
			c.put(b[:])
			return headerSize
		case st == nil:
			return 0
		}
		if n := st.send(c); n > 0 {
			return n
		}
	}
}

// receive takes a packet of the guest's. A chain that is too short for a header is
// dropped, and so is a packet that claims to be someone else's: there is nobody to
// whom a reset could go.
func (d *Device) receive(c *chain) {
	p, err := c.header()
	if err != nil || p.srcCID != d.cid {
		return
	}
	if p.dstCID == hostCID && p.kind == typeStream {
		d.mu.Lock()
		st := d.streams[flow{host: p.dstPort, guest: p.srcPort}]
		d.mu.Unlock()
		if st != nil {
			st.receive(p, c)
			return
		}
	}
	if p.op == opReset { // never answered, or two peers would do so for ever
		return
	}
	d.reset(packet{
		srcCID: p.dstCID, dstCID: p.srcCID, srcPort: p.dstPort, dstPort: p.srcPort,
		kind: p.kind, op: opReset,
	})
}
