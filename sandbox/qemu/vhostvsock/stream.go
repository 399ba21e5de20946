//go:build linux

package vhostvsock

import (
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const network = "vsock"

// addr is the address of one end of a stream.
type addr struct {
	cid  uint64
	port uint32
}

func (a addr) Network() string { return network }
func (a addr) String() string  { return fmt.Sprintf("%d:%d", a.cid, a.port) }

// What a stream wants to send besides data.
const (
	wantRequest = 1 << iota
	wantShutdown
	wantCreditUpdate
)

// stream is the host's end of a connection to the guest.
//
// Write lends its slice to the rx worker, which takes a packet's worth at a time in
// turn with the other streams: nothing is kept for the guest on this side.
type stream struct {
	d    *Device
	flow flow

	next   *stream // in d's queue; next and queued are guarded by d.mu
	queued bool

	mu                 sync.Mutex
	readable, writable *sync.Cond

	connecting bool // the guest has not answered yet
	requested  bool // the guest has our request
	dead       bool // gone from d.streams; err says why, nil: both sides agreed
	closed     bool // by Close
	released   bool // buffer and budget are given back
	err        error
	localShut  uint32
	peerShut   uint32
	want       int
	linger     *time.Timer

	// Receiving. All counts wrap, as the protocol's do.
	in        buffer
	window    int    // what the guest may have sent and we not read
	delivered int    // since window grew
	fwdCnt    uint32 // bytes read so far
	told      uint32 // fwdCnt + window as the guest knows it

	// Sending.
	out       []byte // of the current Write, what is left
	writing   bool
	txCnt     uint32 // bytes sent so far
	peerAlloc uint32
	peerFwd   uint32

	readDeadline, writeDeadline deadline
}

var _ interface {
	net.Conn
	CloseWrite() error
} = (*stream)(nil)

func newStream(d *Device, f flow) *stream {
	st := &stream{d: d, flow: f, connecting: true, window: minWindow}
	st.readable, st.writable = sync.NewCond(&st.mu), sync.NewCond(&st.mu)
	return st
}

// The methods down to Read are called with mu held.

// packet returns a header of the stream, which also tells the guest its credit.
func (st *stream) packet(op uint16) packet {
	st.told = st.fwdCnt + uint32(st.window)
	st.want &^= wantCreditUpdate
	return packet{
		srcCID: hostCID, dstCID: st.d.cid, srcPort: st.flow.host, dstPort: st.flow.guest,
		kind: typeStream, op: op, bufAlloc: uint32(st.window), fwdCnt: st.fwdCnt,
	}
}

// credit is how many bytes the guest has room for.
func (st *stream) credit() uint32 {
	inFlight := st.txCnt - st.peerFwd
	if inFlight >= st.peerAlloc { // the guest may have shrunk its buffer
		return 0
	}
	return st.peerAlloc - inFlight
}

func (st *stream) hasData() bool {
	return len(st.out) > 0 && st.writeError() == nil && st.credit() > 0
}

func (st *stream) schedule() {
	if st.dead {
		return
	}
	if st.connecting && st.want&wantRequest != 0 || !st.connecting && (st.want != 0 || st.hasData()) {
		st.d.schedule(st)
	}
}

// kill takes the stream out of the device. What was received stays readable.
func (st *stream) kill(err error) {
	if st.dead {
		return
	}
	st.dead, st.err = true, err
	st.want = 0
	if st.linger != nil {
		st.linger.Stop()
	}
	st.d.forget(st)
	st.readable.Broadcast()
	st.writable.Broadcast()
}

// abort resets the stream.
func (st *stream) abort(err error) {
	if st.dead {
		return
	}
	if st.requested {
		st.d.reset(st.packet(opReset))
	}
	st.kill(err)
}

// release gives back what the stream may receive.
func (st *stream) release() {
	if !st.released {
		st.released = true
		st.in.free()
		st.d.unreserve(st.window + chunkSize)
	}
}

// send is called by the rx worker. It writes the stream's next packet, if there is
// one, into a chain with room for more than a header.
func (st *stream) send(c *chain) int {
	st.mu.Lock()
	defer st.mu.Unlock() // also when the guest's memory is gone and put panics
	if st.dead {
		return 0
	}
	var p packet
	var data []byte
	switch {
	case st.connecting:
		if st.want&wantRequest == 0 {
			return 0
		}
		st.want &^= wantRequest
		st.requested = true
		p = st.packet(opRequest)
	case st.hasData():
		room := min(c.size-headerSize, maxPayload, uint64(st.credit()), uint64(len(st.out)))
		data = st.out[:room]
		p = st.packet(opData)
		p.size = uint32(room)
	case st.want&wantShutdown != 0:
		st.want &^= wantShutdown
		p = st.packet(opShutdown)
		p.flags = st.localShut
	case st.want&wantCreditUpdate != 0:
		p = st.packet(opCreditUpdate)
	default:
		return 0
	}
	var b [headerSize]byte
	p.encode(&b)
	c.put(b[:])
	c.put(data)
	if len(data) > 0 {
		st.txCnt += uint32(len(data))
		if st.out = st.out[len(data):]; len(st.out) == 0 {
			st.writable.Broadcast()
		}
	}
	st.schedule()
	return headerSize + len(data)
}

// receive is called by the tx worker with a packet of this stream, c being at its
// payload. A guest that does not keep to the protocol loses the stream.
func (st *stream) receive(p packet, c *chain) {
	st.mu.Lock()
	defer st.mu.Unlock() // also when the guest's memory is gone and c panics
	if st.dead {
		return
	}
	if p.op == opReset {
		st.receiveReset()
		return
	}
	if !st.receiveCredit(p) {
		return
	}
	if st.connecting {
		if p.op != opResponse || !st.requested {
			st.abort(fmt.Errorf("guest answers with operation %d: %w", p.op, syscall.EPROTO))
			return
		}
		st.connecting = false
		st.writable.Broadcast()
		return
	}
	switch p.op {
	case opData:
		st.receiveData(p, c)
	case opCreditUpdate:
	case opCreditRequest:
		st.want |= wantCreditUpdate
	case opShutdown:
		st.peerShut |= p.flags & shutBoth
		if st.peerShut == shutBoth {
			// §5.10.6.6: the reset is the answer that frees the ports. The guest
			// would wait for it for seconds.
			st.abort(nil)
			return
		}
		st.readable.Broadcast()
		st.writable.Broadcast()
	default:
		st.abort(fmt.Errorf("guest sends operation %d on a connected stream: %w", p.op, syscall.EPROTO))
		return
	}
	st.schedule()
}

func (st *stream) receiveReset() {
	switch {
	case st.connecting:
		st.kill(syscall.ECONNREFUSED)
	case st.closed || st.peerShut&shutSend != 0:
		st.kill(nil)
	default:
		st.kill(syscall.ECONNRESET)
	}
}

func (st *stream) receiveCredit(p packet) bool {
	if int32(p.fwdCnt-st.txCnt) > 0 {
		st.abort(fmt.Errorf("guest says it has read %d bytes of %d: %w", p.fwdCnt, st.txCnt, syscall.EPROTO))
		return false
	}
	// A driver with several senders fills headers in one order and queues the
	// packets in another. What is older than known is ignored.
	if int32(p.fwdCnt-st.peerFwd) >= 0 {
		st.peerFwd, st.peerAlloc = p.fwdCnt, p.bufAlloc
	}
	return true
}

func (st *stream) receiveData(p packet, c *chain) {
	switch {
	case uint64(p.size) > c.size:
		st.abort(fmt.Errorf("guest sends a packet of %d bytes that says %d: %w", c.size, p.size, syscall.EPROTO))
		return
	case st.peerShut&shutSend != 0:
		st.abort(fmt.Errorf("guest sends data after its shutdown: %w", syscall.EPROTO))
		return
	case st.closed:
		// Sent before the guest saw our shutdown; nobody will read it.
		st.fwdCnt += p.size
		return
	case uint64(p.size) > uint64(st.window-st.in.n):
		st.abort(fmt.Errorf("guest sends %d bytes where %d are allowed: %w", p.size, st.window-st.in.n, syscall.EPROTO))
		return
	}
	for left := int(p.size); left > 0; {
		k := min(left, len(c.segs[0]))
		st.in.write(c.segs[0][:k])
		c.advance(k)
		left -= k
	}
	st.readable.Broadcast()
}

// readError and writeError say why a Read with nothing to read, or a Write, can't go on.
func (st *stream) readError() error {
	switch {
	case st.closed:
		return net.ErrClosed
	case st.readDeadline.expired:
		return os.ErrDeadlineExceeded
	case st.in.n > 0:
		return nil
	case st.peerShut&shutSend != 0 || st.dead && st.err == nil:
		return io.EOF
	}
	return st.err
}

func (st *stream) writeError() error {
	switch {
	case st.closed:
		return net.ErrClosed
	case st.writeDeadline.expired:
		return os.ErrDeadlineExceeded
	case st.dead && st.err != nil:
		return st.err
	case st.dead || st.localShut&shutSend != 0 || st.peerShut&shutReceive != 0:
		return syscall.EPIPE
	}
	return nil
}

func (st *stream) opError(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: network, Source: st.LocalAddr(), Addr: st.RemoteAddr(), Err: err}
}

// Read returns what the guest has sent; io.EOF once it said that it sends no more.
// A stream that ends without saying so fails with ECONNRESET, after what it brought
// was read.
func (st *stream) Read(p []byte) (int, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for {
		err := st.readError()
		if err != nil {
			return 0, st.opError("read", err)
		}
		if len(p) == 0 {
			return 0, nil
		}
		if st.in.n > 0 {
			break
		}
		st.readable.Wait()
	}
	n := st.in.read(p)
	st.fwdCnt += uint32(n)
	st.delivered += n
	// A reader that has emptied a whole window keeps up with the guest.
	if st.delivered >= st.window && st.window < maxWindow && st.d.grow(st.window) {
		st.window *= 2
		st.delivered = 0
	}
	// Tell of room in quarters: each costs a packet, and the guest is never left
	// without credit, because the last quarter is told of too when all is read.
	if untold := st.fwdCnt + uint32(st.window) - st.told; untold >= uint32(st.window/4) {
		st.want |= wantCreditUpdate
		st.schedule()
	}
	return n, nil
}

// Write returns when all of p is in the guest's buffers, in the order of calls. A
// Write that fails says how much of p went there.
func (st *stream) Write(p []byte) (int, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for {
		if err := st.writeError(); err != nil {
			return 0, st.opError("write", err)
		}
		if !st.writing {
			break
		}
		st.writable.Wait()
	}
	st.writing = true
	st.out = p
	st.schedule()
	var err error
	for len(st.out) > 0 {
		if err = st.writeError(); err != nil {
			break
		}
		st.writable.Wait()
	}
	n := len(p) - len(st.out)
	st.out, st.writing = nil, false
	st.writable.Broadcast() // the next writer
	return n, st.opError("write", err)
}

// CloseWrite tells the guest that nothing more comes; what it sends can still be
// read. A Write that is under way fails.
func (st *stream) CloseWrite() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	switch {
	case st.closed:
		return st.opError("close", net.ErrClosed)
	case st.dead:
		return st.opError("close", st.err)
	case st.localShut&shutSend != 0:
		return nil
	}
	st.localShut |= shutSend
	st.want |= wantShutdown
	st.writable.Broadcast()
	st.schedule()
	return nil
}

// Close ends the stream in both directions and drops what was not read. It does not
// wait: the device keeps the ports until the guest agrees, for 8 seconds at most.
// It may be called more than once.
func (st *stream) Close() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return nil
	}
	st.closed = true
	st.readDeadline.stop()
	st.writeDeadline.stop()
	st.release()
	st.readable.Broadcast()
	st.writable.Broadcast()
	if !st.dead {
		st.localShut = shutBoth
		st.want = wantShutdown
		st.linger = time.AfterFunc(st.d.linger, func() {
			st.mu.Lock()
			defer st.mu.Unlock()
			st.abort(nil)
		})
		st.schedule()
	}
	return nil
}

func (st *stream) LocalAddr() net.Addr  { return addr{hostCID, st.flow.host} }
func (st *stream) RemoteAddr() net.Addr { return addr{st.d.cid, st.flow.guest} }

func (st *stream) SetDeadline(t time.Time) error {
	return st.setDeadlines(t, true, true)
}

func (st *stream) SetReadDeadline(t time.Time) error {
	return st.setDeadlines(t, true, false)
}

func (st *stream) SetWriteDeadline(t time.Time) error {
	return st.setDeadlines(t, false, true)
}

func (st *stream) setDeadlines(t time.Time, read, write bool) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return st.opError("set", net.ErrClosed)
	}
	if read {
		st.readDeadline.set(&st.mu, st.readable, t)
	}
	if write {
		st.writeDeadline.set(&st.mu, st.writable, t)
		st.schedule() // a Write whose deadline was moved before it woke goes on
	}
	return nil
}

// deadline is guarded by the stream's mu.
type deadline struct {
	expired bool
	timer   *time.Timer
	setting int // which set a timer belongs to: one that fires late must do nothing
}

func (dl *deadline) set(mu *sync.Mutex, waiters *sync.Cond, t time.Time) {
	dl.stop()
	d := time.Until(t)
	dl.expired = !t.IsZero() && d <= 0
	if dl.expired {
		waiters.Broadcast()
	} else if !t.IsZero() {
		setting := dl.setting
		dl.timer = time.AfterFunc(d, func() {
			mu.Lock()
			defer mu.Unlock()
			if dl.setting == setting {
				dl.expired = true
				waiters.Broadcast()
			}
		})
	}
}

func (dl *deadline) stop() {
	dl.setting++
	if dl.timer != nil {
		dl.timer.Stop()
		dl.timer = nil
	}
}
