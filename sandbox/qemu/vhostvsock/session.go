//go:build linux

package vhostvsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"k8s.io/klog/v2"
)

const (
	rxRing = 0 // host to guest
	txRing = 1 // guest to host
	rings  = 2 // the third, of events, QEMU keeps to itself
)

// notifyBatch is after how many packets of a burst the driver is interrupted, so
// that it works on them while we make more. 16 times 4 KiB is what one bulk write
// is cut into.
const notifyBatch = 16

// session is a front-end's connection: the guest's memory and rings. All but fail
// is for the goroutine in serve only.
type session struct {
	d        *Device
	conn     *net.UnixConn
	mem      memory
	rings    [rings]*ring
	replyAck bool

	mu  sync.Mutex
	err error
}

func newSession(d *Device, conn *net.UnixConn) (*session, error) {
	s := &session{d: d, conn: conn}
	for i, name := range []string{rxRing: "rx", txRing: "tx"} {
		q, err := newRing(name, &s.mem)
		if err != nil {
			if i > 0 {
				s.rings[0].close()
			}
			return nil, err
		}
		s.rings[i] = q
	}
	return s, nil
}

// fail ends the session because of err. Safe for concurrent use.
func (s *session) fail(err error) {
	s.mu.Lock()
	if s.err == nil {
		s.err = err
	}
	s.mu.Unlock()
	_ = s.conn.Close()
}

// serve answers requests until the front-end hangs up (nil), a ring worker fails
// or a request is wrong. A wrong request is fatal: front-end and back-end would go
// on with different ideas of the guest's memory.
func (s *session) serve() error {
	defer s.close()
	for {
		m, err := readMessage(s.conn)
		if err == nil {
			err = s.answer(m)
			m.closeFDs()
		}
		if err != nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.err != nil { // the cause of the closed connection
				return s.err
			}
			// A front-end that dies with an unread reply resets the connection.
			if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
				return nil
			}
			return err
		}
	}
}

func (s *session) close() {
	s.stopRings()
	for _, q := range s.rings {
		q.close()
	}
	if err := s.mem.clear(); err != nil {
		klog.ErrorS(err, "Guest memory not unmapped", "cid", s.d.cid)
	}
}

func (s *session) answer(m *message) error {
	reply, err := s.handle(m)
	if err == nil {
		err = s.startRings(m.request == reqRemMemReg)
	}
	if err != nil {
		err = fmt.Errorf("vhost-user request %d: %w", m.request, err)
	}
	if reply == nil && s.replyAck && m.flags&messageNeedReply != 0 {
		status := uint64(0)
		if err != nil {
			status = 1
		}
		reply = u64(status)
	}
	if reply != nil {
		err = errors.Join(err, writeReply(s.conn, m.request, reply))
	}
	return err
}

func u64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// handle carries out a request and returns the reply that it always has, or nil.
func (s *session) handle(m *message) ([]byte, error) {
	le := binary.LittleEndian
	need := func(n int) error {
		if len(m.body) < n {
			return fmt.Errorf("body of %d bytes, not %d", len(m.body), n)
		}
		return nil
	}
	switch m.request {
	case reqGetFeatures:
		return u64(offeredFeatures), nil
	case reqGetProtocolFeatures:
		return u64(offeredProtocolFeatures), nil
	case reqGetQueueNum:
		return u64(rings), nil
	case reqGetMaxMemSlots:
		return u64(maxRegions), nil
	case reqSetOwner, reqResetOwner, reqSetVringErr:
		return nil, nil

	case reqSetFeatures:
		if err := need(8); err != nil {
			return nil, err
		}
		f := le.Uint64(m.body)
		if f&^offeredFeatures != 0 {
			return nil, fmt.Errorf("features %#x of which only %#x were offered", f, uint64(offeredFeatures))
		}
		s.stopRings()
		for _, q := range s.rings {
			q.eventIdx = f&featureEventIdx != 0
			if f&featureProtocolFeatures == 0 {
				q.enabled = true // there is no SET_VRING_ENABLE then
			}
		}
		return nil, nil

	case reqSetProtocolFeatures:
		if err := need(8); err != nil {
			return nil, err
		}
		f := le.Uint64(m.body)
		if f&^offeredProtocolFeatures != 0 {
			return nil, fmt.Errorf("protocol features %#x of which only %#x were offered", f, uint64(offeredProtocolFeatures))
		}
		s.replyAck = f&protocolReplyAck != 0
		return nil, nil

	case reqSetMemTable:
		if err := need(8); err != nil {
			return nil, err
		}
		n := int(le.Uint32(m.body))
		if n > maxMessageFDs || n != len(m.fds) {
			return nil, fmt.Errorf("%d regions and %d descriptors", n, len(m.fds))
		}
		if err := need(8 + n*regionSpecSize); err != nil {
			return nil, err
		}
		s.stopRings()
		if err := s.mem.clear(); err != nil {
			return nil, err
		}
		for i, fd := range m.fds {
			if err := s.mem.add(parseRegion(m.body[8+i*regionSpecSize:]), fd); err != nil {
				return nil, err
			}
		}
		return nil, nil

	case reqAddMemReg, reqRemMemReg:
		if err := need(8 + regionSpecSize); err != nil {
			return nil, err
		}
		s.stopRings()
		if m.request == reqRemMemReg { // may carry a descriptor, of no use
			return nil, s.mem.remove(parseRegion(m.body[8:]))
		}
		if len(m.fds) != 1 {
			return nil, fmt.Errorf("%d descriptors, not 1", len(m.fds))
		}
		return nil, s.mem.add(parseRegion(m.body[8:]), m.fds[0])

	case reqGetConfig:
		return s.config(m.body)

	case reqSetVringKick, reqSetVringCall:
		if err := need(8); err != nil {
			return nil, err
		}
		v := le.Uint64(m.body)
		q, err := s.ring(uint32(v & vringIndexMask))
		if err != nil {
			return nil, err
		}
		if m.request == reqSetVringCall {
			if v&vringNoFD != 0 { // the driver is not to be interrupted
				return nil, q.clearCall()
			}
			if len(m.fds) != 1 {
				return nil, fmt.Errorf("%d descriptors, not 1", len(m.fds))
			}
			return nil, q.setCall(m.fds[0])
		}
		if v&vringNoFD != 0 {
			return nil, errors.New("polled rings are not supported")
		}
		fd, err := m.takeFD()
		if err != nil {
			return nil, err
		}
		s.stopRing(q)
		return nil, q.setKick(fd)

	case reqSetVringNum, reqSetVringBase, reqGetVringBase, reqSetVringEnable, reqSetVringAddr:
		if err := need(8); err != nil {
			return nil, err
		}
		q, err := s.ring(le.Uint32(m.body))
		if err != nil {
			return nil, err
		}
		s.stopRing(q)
		return s.setRing(q, m)
	}
	return nil, errors.New("not supported")
}

func (s *session) ring(i uint32) (*ring, error) {
	if i >= rings {
		return nil, fmt.Errorf("ring %d of %d", i, rings)
	}
	return s.rings[i], nil
}

// setRing carries out a request about a ring that is stopped; the body has at
// least 8 bytes.
func (s *session) setRing(q *ring, m *message) ([]byte, error) {
	le := binary.LittleEndian
	v := le.Uint32(m.body[4:])
	switch m.request {
	case reqSetVringNum:
		if v == 0 || v > maxRingSize || v&(v-1) != 0 {
			return nil, fmt.Errorf("%s ring: size %d is not a power of two up to %d", q.name, v, maxRingSize)
		}
		q.size = int(v)
	case reqSetVringBase:
		if v > 0xffff {
			return nil, fmt.Errorf("%s ring: index %d", q.name, v)
		}
		if q.baseTold && uint16(v) != q.base {
			// A paused guest goes on where it stopped. One that does not was reset,
			// and has forgotten its streams.
			s.d.guestReset()
		}
		q.baseTold = false
		q.next = uint16(v)
	case reqGetVringBase:
		// The ring stays stopped until the next SET_VRING_KICK.
		if q.kick != nil {
			_ = q.kick.Close()
			q.kick = nil
		}
		q.base, q.baseTold = q.next, true
		reply := make([]byte, 8)
		copy(reply, m.body[:4])
		le.PutUint32(reply[4:], uint32(q.next))
		return reply, nil
	case reqSetVringEnable:
		q.enabled = v != 0
	case reqSetVringAddr:
		if len(m.body) < 40 {
			return nil, fmt.Errorf("body of %d bytes, not 40", len(m.body))
		}
		q.descAddr, q.usedAddr, q.availAddr = le.Uint64(m.body[8:]), le.Uint64(m.body[16:]), le.Uint64(m.body[24:])
		q.addressed = true
	}
	return nil, nil
}

// config answers GET_CONFIG from struct virtio_vsock_config, which is the CID.
func (s *session) config(body []byte) ([]byte, error) {
	le := binary.LittleEndian
	if len(body) < configHeaderSize {
		return nil, fmt.Errorf("body of %d bytes", len(body))
	}
	off, n := le.Uint32(body), le.Uint32(body[4:])
	if off > maxConfig || n > maxConfig-off || int(n) != len(body)-configHeaderSize {
		return nil, fmt.Errorf("%d bytes at %d of the configuration, in a body of %d", n, off, len(body))
	}
	var space [maxConfig]byte
	le.PutUint64(space[:], s.d.cid)
	reply := make([]byte, len(body))
	copy(reply, body[:configHeaderSize])
	copy(reply[configHeaderSize:], space[off:off+n])
	return reply, nil
}

// startRings starts each ring that QEMU has completely described and enabled.
// With lost set a ring may have lost its memory, and then stays stopped.
func (s *session) startRings(lost bool) error {
	running := 0
	for i, q := range s.rings {
		if q.worker == nil && q.configured() {
			if err := q.resolve(); err != nil {
				if lost {
					continue
				}
				return err
			}
			s.startRing(q, i == rxRing)
		}
		if q.worker != nil {
			running++
		}
	}
	s.d.setReady(running == rings)
	return nil
}

func (s *session) startRing(q *ring, rx bool) {
	q.signalled, q.signalledSet = q.next, false
	_ = q.kick.SetReadDeadline(time.Time{})
	w := &worker{stop: make(chan struct{}), done: make(chan struct{})}
	q.worker = w
	run := s.runTx
	if rx {
		run = s.runRx
	}
	go func() {
		defer close(w.done)
		if err := guarded(func() error { return run(q, w) }); !errors.Is(err, errStopped) {
			s.fail(err)
		}
	}()
}

func (s *session) stopRings() {
	for _, q := range s.rings {
		s.stopRing(q)
	}
}

// stopRing returns when the ring's worker has ended. A worker waits for its stop
// channel, or for a kick with the deadline set here.
func (s *session) stopRing(q *ring) {
	if q.worker == nil {
		return
	}
	s.d.setReady(false)
	close(q.worker.stop)
	_ = q.kick.SetReadDeadline(time.Unix(1, 0))
	<-q.worker.done
	q.worker = nil
}

// guarded runs a ring worker so that what its guest does to it is an error of the
// device and not the end of the process (T16): memory that was truncated after it
// was mapped raises SIGBUS, which becomes a panic here. A defect of ours that only
// hostile input reaches ends the same way.
func guarded(run func() error) (err error) {
	debug.SetPanicOnFault(true) // this goroutine runs nothing else
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		var fault interface{ Addr() uintptr }
		if e, ok := r.(error); ok && errors.As(e, &fault) {
			err = fmt.Errorf("guest memory vanished under the device: fault at %#x", fault.Addr())
			return
		}
		klog.ErrorS(nil, "Panic in a vsock ring worker", "panic", r, "stack", string(debug.Stack()))
		err = fmt.Errorf("panic in the ring worker: %v", r)
	}()
	return run()
}

func (w *worker) stopped() bool {
	select {
	case <-w.stop:
		return true
	default:
		return false
	}
}

// runTx takes packets from the guest.
func (s *session) runTx(q *ring, w *worker) error {
	for n := 1; ; n++ {
		if w.stopped() {
			q.notify()
			return errStopped
		}
		// Virtio 1.2 §5.10.6.1.2: when what must be sent in reply can't be kept any
		// more, packets are left in the ring (T16).
		if s.d.resetsFull() {
			q.notify()
			select {
			case <-s.d.resetRoom:
			case <-w.stop:
			}
			continue
		}
		ok, err := q.ready()
		if err != nil {
			return err
		}
		if !ok {
			q.notify()
			if err := q.waitKick(); err != nil {
				return err
			}
			continue
		}
		c, err := q.peek(false)
		if err != nil {
			return err
		}
		s.d.receive(&c)
		q.complete(c.head, 0)
		if n%notifyBatch == 0 {
			q.notify()
		}
	}
}

// runRx gives packets to the guest, as buffers and work allow.
func (s *session) runRx(q *ring, w *worker) error {
	for n := 1; ; n++ {
		if w.stopped() {
			q.notify()
			return errStopped
		}
		if !s.d.hasWork() {
			q.notify()
			select {
			case <-s.d.work:
			case <-w.stop:
			}
			continue
		}
		ok, err := q.ready()
		if err != nil {
			return err
		}
		if !ok {
			q.notify()
			if err := q.waitKick(); err != nil {
				return err
			}
			continue
		}
		c, err := q.peek(true)
		if err != nil {
			return err
		}
		if c.size <= headerSize {
			return fmt.Errorf("%s ring: buffer of %d bytes holds no packet", q.name, c.size)
		}
		// Whoever had work may have given up meanwhile; the chain stays then.
		if written := s.d.send(&c); written > 0 {
			q.complete(c.head, uint32(written))
			if n%notifyBatch == 0 {
				q.notify()
			}
		}
	}
}
