//go:build linux

package vhostvsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4
	descSize     = 16

	// maxRingSize is QEMU's VIRTQUEUE_MAX_SIZE; QEMU gives vsock 128.
	maxRingSize = 1024

	availNoInterrupt = 1
)

// errStopped ends a ring worker that is asked to stop.
var errStopped = errors.New("ring stopped")

// ring is the device's side of a split virtqueue (virtio 1.2 §2.7). Chains are
// used in the order in which they became available, so one index serves both.
//
// It has no lock: while worker is set it is the worker's, otherwise the
// session's. The call descriptor alone changes under a running worker (setCall).
type ring struct {
	name string // as the driver sees it: "rx" is what the guest receives

	// Set by QEMU.
	size              int
	descAddr          uint64
	usedAddr          uint64
	availAddr         uint64
	addressed         bool
	enabled           bool
	eventIdx          bool
	kick              *os.File
	call              int
	base              uint16 // next, as told to QEMU when the ring stopped
	baseTold          bool   // and QEMU has not set it since
	mem               *memory
	desc, avail, used []byte

	// Run state.
	next         uint16 // the next chain to take from avail, and to put in used
	signalled    uint16 // next at the latest look at used_event
	signalledSet bool
	fenceWord    uint32
	segs         [][]byte
	table        [][]byte

	worker *worker
}

type worker struct {
	stop chan struct{}
	done chan struct{}
}

func newRing(name string, mem *memory) (*ring, error) {
	// A descriptor of our own holds the place until QEMU sends one, so that the
	// number stays the same for the worker (setCall).
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("%s ring: make an eventfd: %w", name, err)
	}
	return &ring{name: name, mem: mem, call: fd}, nil
}

func (q *ring) close() {
	if q.kick != nil {
		_ = q.kick.Close()
		q.kick = nil
	}
	_ = unix.Close(q.call)
}

// checkEventfd refuses what can't be an eventfd, and makes it non-blocking: one
// whose counter is full would otherwise stop whoever writes to it. (QEMU's are
// non-blocking anyway; the flag is shared with QEMU.)
func checkEventfd(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	// Files without a name in any file system, as eventfds are, have no type.
	if st.Mode&unix.S_IFMT != 0 {
		return fmt.Errorf("descriptor of mode %#o is not an eventfd", st.Mode)
	}
	return unix.SetNonblock(fd, true)
}

// setKick takes over fd, of which the ring learns that the driver added buffers.
// The worker must be stopped.
func (q *ring) setKick(fd int) error {
	if err := checkEventfd(fd); err != nil {
		_ = unix.Close(fd)
		return fmt.Errorf("%s ring: kick: %w", q.name, err)
	}
	f := os.NewFile(uintptr(fd), q.name+" kick")
	// Without deadlines the worker could not be stopped.
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		_ = f.Close()
		return fmt.Errorf("%s ring: kick: %w", q.name, err)
	}
	if q.kick != nil {
		_ = q.kick.Close()
	}
	q.kick = f
	return nil
}

// setCall replaces the descriptor that interrupts the driver by a duplicate of fd.
// QEMU does so while the ring runs; dup3 swaps it under the worker's feet without
// a lock.
func (q *ring) setCall(fd int) error {
	if err := checkEventfd(fd); err != nil {
		return fmt.Errorf("%s ring: call: %w", q.name, err)
	}
	if err := unix.Dup3(fd, q.call, unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("%s ring: call: %w", q.name, err)
	}
	return nil
}

// clearCall puts a descriptor in place that nobody listens to.
func (q *ring) clearCall() error {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("%s ring: make an eventfd: %w", q.name, err)
	}
	defer unix.Close(fd)
	return q.setCall(fd)
}

func (q *ring) configured() bool {
	return q.kick != nil && q.enabled && q.addressed && q.size != 0
}

// resolve finds the ring's three parts in the guest's memory.
func (q *ring) resolve() (err error) {
	n := uint64(q.size)
	// virtio 1.2 §2.7: the alignment the driver must keep to.
	if q.descAddr%descSize != 0 || q.availAddr%2 != 0 || q.usedAddr%4 != 0 {
		return fmt.Errorf("%s ring: descriptors at %#x, available ring at %#x or used ring at %#x not aligned", q.name, q.descAddr, q.availAddr, q.usedAddr)
	}
	if q.desc, err = q.mem.user(q.descAddr, descSize*n); err == nil {
		if q.avail, err = q.mem.user(q.availAddr, 6+2*n); err == nil {
			q.used, err = q.mem.user(q.usedAddr, 6+8*n)
		}
	}
	if err != nil {
		return fmt.Errorf("%s ring: %w", q.name, err)
	}
	// The addresses above are QEMU's; what counts for atomic access is where the
	// parts lie in this process, and a region's offset in its file may be odd.
	if uintptr(unsafe.Pointer(&q.avail[0]))%2 != 0 || uintptr(unsafe.Pointer(&q.used[0]))%4 != 0 {
		return fmt.Errorf("%s ring: lies at an odd offset of the guest's memory", q.name)
	}
	return nil
}

// fence is a full barrier: on amd64 the store is an XCHG, on arm64 a
// store-release and a load-acquire keep their order.
func (q *ring) fence() {
	atomic.StoreUint32(&q.fenceWord, 0)
	atomic.LoadUint32(&q.fenceWord)
}

// availIndex loads avail.idx with acquire semantics. There is no 16-bit atomic
// load, so the aligned word around it is loaded; it lies within the ring whichever
// half idx is, as ring entries follow it and the flags precede it.
func (q *ring) availIndex() uint16 {
	p := unsafe.Pointer(&q.avail[2])
	if uintptr(p)%4 == 0 {
		return uint16(atomic.LoadUint32((*uint32)(p)))
	}
	return uint16(atomic.LoadUint32((*uint32)(unsafe.Pointer(&q.avail[0]))) >> 16)
}

// ready tells whether a chain is waiting. Before it says no, it asks the driver
// to kick for the next one, and looks again.
func (q *ring) ready() (bool, error) {
	ok, err := q.pending()
	if ok || err != nil || !q.eventIdx {
		return ok, err
	}
	binary.LittleEndian.PutUint16(q.used[4+8*q.size:], q.next)
	q.fence()
	return q.pending()
}

func (q *ring) pending() (bool, error) {
	n := q.availIndex() - q.next
	if int(n) > q.size {
		return false, fmt.Errorf("%s ring: the driver offers %d chains in a ring of %d", q.name, n, q.size)
	}
	return n > 0, nil
}

// waitKick returns when the driver kicks, or errStopped.
func (q *ring) waitKick() error {
	var b [8]byte
	switch _, err := q.kick.Read(b[:]); {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errStopped
	default:
		return fmt.Errorf("%s ring: wait for the driver's kick: %w", q.name, err)
	}
}

// chain is a buffer of the driver's, in pieces. It is valid until the ring's next
// peek.
type chain struct {
	head uint16
	segs [][]byte
	size uint64 // bytes left in segs
}

// peek returns the chain at the front; ready must have said that there is one.
// Its descriptors must all be for the device to write, or all to read. Each is
// read once: the driver may be changing it meanwhile.
func (q *ring) peek(write bool) (chain, error) {
	le := binary.LittleEndian
	c := chain{head: le.Uint16(q.avail[4+2*(int(q.next)&(q.size-1)):])}
	segs := q.segs[:0]
	table, i := q.desc, int(c.head)
	indirect := false
	for left := q.size; ; left-- {
		if left == 0 {
			return c, fmt.Errorf("%s ring: chain at %d is longer than the ring (%d)", q.name, c.head, q.size)
		}
		if i >= len(table)/descSize {
			return c, fmt.Errorf("%s ring: chain at %d: descriptor %d of %d", q.name, c.head, i, len(table)/descSize)
		}
		d := table[descSize*i:][:descSize]
		addr, size, flags, next := le.Uint64(d), le.Uint32(d[8:]), le.Uint16(d[12:]), le.Uint16(d[14:])
		if overflows(addr, uint64(size)) {
			return c, fmt.Errorf("%s ring: chain at %d: address %#x, size %#x", q.name, c.head, addr, size)
		}
		if flags&descIndirect != 0 {
			if indirect || flags&descNext != 0 {
				return c, fmt.Errorf("%s ring: chain at %d: indirect descriptor within a table or with a successor", q.name, c.head)
			}
			if size == 0 || size%descSize != 0 || int(size)/descSize > q.size {
				return c, fmt.Errorf("%s ring: chain at %d: indirect table of %d bytes", q.name, c.head, size)
			}
			t, err := q.mem.guest(q.table[:0], addr, uint64(size))
			if err != nil {
				return c, fmt.Errorf("%s ring: chain at %d: indirect table: %w", q.name, c.head, err)
			}
			q.table = t
			if len(t) != 1 {
				return c, fmt.Errorf("%s ring: chain at %d: indirect table crosses memory regions", q.name, c.head)
			}
			table, i, indirect = t[0], 0, true
			continue
		}
		if (flags&descWrite != 0) != write {
			return c, fmt.Errorf("%s ring: chain at %d: buffer of the wrong direction", q.name, c.head)
		}
		var err error
		if segs, err = q.mem.guest(segs, addr, uint64(size)); err != nil {
			return c, fmt.Errorf("%s ring: chain at %d: %w", q.name, c.head, err)
		}
		c.size += uint64(size)
		if flags&descNext == 0 {
			q.segs, c.segs = segs, segs
			return c, nil
		}
		i = int(next)
	}
}

// complete gives the chain at the front back to the driver, with n bytes written
// into it.
func (q *ring) complete(head uint16, n uint32) {
	e := q.used[4+8*(int(q.next)&(q.size-1)):][:8]
	binary.LittleEndian.PutUint32(e, uint32(head))
	binary.LittleEndian.PutUint32(e[4:], n)
	q.next++
	// flags and idx, both the device's own; flags stay 0 (do kick).
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&q.used[0])), uint32(q.next)<<16)
}

// notify interrupts the driver if it wants to hear of what was completed since the
// last call.
func (q *ring) notify() {
	if q.signalled == q.next {
		return
	}
	q.fence()
	if q.eventIdx {
		old, set := q.signalled, q.signalledSet
		q.signalled, q.signalledSet = q.next, true
		event := binary.LittleEndian.Uint16(q.avail[4+2*q.size:])
		if set && q.next-event-1 >= q.next-old {
			return
		}
	} else {
		q.signalled, q.signalledSet = q.next, true
		if binary.LittleEndian.Uint16(q.avail)&availNoInterrupt != 0 {
			return
		}
	}
	// Fails only if the counter is full, and then the driver is notified already.
	one := [8]byte{0: 1}
	_, _ = unix.Write(q.call, one[:])
}

// advance drops n bytes from the front of the chain's first piece.
func (c *chain) advance(n int) {
	c.size -= uint64(n)
	if c.segs[0] = c.segs[0][n:]; len(c.segs[0]) == 0 {
		c.segs = c.segs[1:]
	}
}

// put copies p, for which there must be room, into the chain.
func (c *chain) put(p []byte) {
	for len(p) > 0 {
		n := copy(c.segs[0], p)
		p = p[n:]
		c.advance(n)
	}
}

// header takes a packet header off the chain.
func (c *chain) header() (packet, error) {
	if c.size < headerSize {
		return packet{}, io.ErrUnexpectedEOF
	}
	var b [headerSize]byte
	for n := 0; n < headerSize; {
		k := copy(b[n:], c.segs[0])
		c.advance(k)
		n += k
	}
	return decodePacket(&b), nil
}
