//go:build linux

package vhostvsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Where things lie in the memory of the test's guest.
const (
	guestCID     = 3
	guestMemory  = 16 << 20
	guestBase    = 0x4000_0000      // guest physical
	userBase     = 0x7f00_0000_0000 // the front-end's
	ringSize     = 128
	slots        = ringSize / 2
	rxBuffer     = 4096
	rxSlotBase   = 0x10_0000
	rxSlotSize   = 0x2000
	txSlotBase   = 0x40_0000
	txSlotSize   = 0x1_1000
	indirectBase = 0x8_0000
	guestWindow  = 256 << 10
)

// guest is QEMU's vhost-user front-end and a guest's driver and stream layer in one,
// sharing a memfd with the device.
type guest struct {
	tb     testing.TB
	d      *Device
	fe     *net.UnixConn
	served chan error

	memfd int
	mem   []byte
	rings [rings]*driverRing

	mu      sync.Mutex
	freed   *sync.Cond // a tx slot
	conns   map[flow]*guestConn
	listen  map[uint32]func(*guestConn)
	seen    []packet // what came, when record is set
	record  bool
	hook    func(p packet, data []byte) bool // true: taken
	holding bool                             // received buffers are not offered again
	held    []int
	loops   sync.WaitGroup
	closing atomic.Bool
}

type driverRing struct {
	index             int
	desc, avail, used []byte
	next, lastUsed    uint16
	kick              int
	call              *os.File
	eventIdx          bool
	free              []int
	fence             uint32
}

type guestConfig struct {
	features uint64
	indirect bool
	base     uint16
	noSeals  bool
	slots    bool // ADD_MEM_REG instead of SET_MEM_TABLE
	noStart  bool
	options  []Option
}

func newGuest(tb testing.TB, mod func(*guestConfig)) *guest {
	tb.Helper()
	cfg := guestConfig{features: featureVersion1 | featureProtocolFeatures | featureEventIdx | featureIndirect}
	if mod != nil {
		mod(&cfg)
	}
	d := New(guestCID, cfg.options...)
	fe, be := socketPair(tb)
	g := &guest{tb: tb, d: d, fe: fe, served: make(chan error, 1), conns: map[flow]*guestConn{}, listen: map[uint32]func(*guestConn){}}
	g.freed = sync.NewCond(&g.mu)
	go func() { g.served <- d.Serve(be) }()

	seals := unix.MFD_ALLOW_SEALING
	if cfg.noSeals {
		seals = 0
	}
	g.memfd = must(unix.MemfdCreate("guest", seals|unix.MFD_CLOEXEC))(tb)
	check(tb, unix.Ftruncate(g.memfd, guestMemory))
	g.mem = must(unix.Mmap(g.memfd, 0, guestMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED))(tb)
	for i := range g.rings {
		q := &driverRing{index: i, next: cfg.base, lastUsed: cfg.base, eventIdx: cfg.features&featureEventIdx != 0}
		at := i * 0x10000
		q.desc, q.avail, q.used = g.mem[at:at+16*ringSize], g.mem[at+0x4000:at+0x4000+6+2*ringSize], g.mem[at+0x8000:at+0x8000+6+8*ringSize]
		q.kick = must(unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK))(tb)
		call := must(unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK))(tb)
		q.call = os.NewFile(uintptr(call), "call")
		g.rings[i] = q
		binary.LittleEndian.PutUint16(q.avail[2:], cfg.base)
		binary.LittleEndian.PutUint16(q.used[2:], cfg.base)
		q.enableInterrupt()
		for s := range slots {
			g.describe(q, s, cfg.indirect, rxBuffer)
			if i == txRing {
				q.free = append(q.free, s)
			}
		}
	}
	tb.Cleanup(g.close)
	if cfg.noStart {
		return g
	}
	g.start(cfg)
	return g
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(tb testing.TB) T {
		tb.Helper()
		check(tb, err)
		return v
	}
}

func check(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func socketPair(tb testing.TB) (a, b *net.UnixConn) {
	tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(tb, err)
	conn := func(fd int) *net.UnixConn {
		f := os.NewFile(uintptr(fd), "pair")
		defer f.Close()
		return must(net.FileConn(f))(tb).(*net.UnixConn)
	}
	return conn(fds[0]), conn(fds[1])
}

func (g *guest) close() {
	if g.closing.Swap(true) {
		return
	}
	check(g.tb, g.d.Close())
	select {
	case err := <-g.served:
		if err != nil && !g.tb.Failed() {
			g.tb.Errorf("Serve: %v", err)
		}
	case <-time.After(10 * time.Second):
		g.tb.Error("Serve did not return within 10 s of Close")
	}
	g.fe.Close()
	for _, q := range g.rings {
		q.call.SetReadDeadline(time.Unix(1, 0))
	}
	g.mu.Lock()
	for _, c := range g.conns {
		c.err = net.ErrClosed
		c.cond.Broadcast()
	}
	g.freed.Broadcast()
	g.mu.Unlock()
	g.loops.Wait()
	for _, q := range g.rings {
		q.call.Close()
		unix.Close(q.kick)
	}
	unix.Munmap(g.mem)
	unix.Close(g.memfd)
}

// expectFailure waits for Serve to fail and returns why.
func (g *guest) expectFailure() error {
	g.tb.Helper()
	select {
	case err := <-g.served:
		g.served <- nil
		if err == nil {
			g.tb.Fatal("Serve returned nil, want an error")
		}
		return err
	case <-time.After(10 * time.Second):
		g.tb.Fatal("Serve did not fail within 10 s")
	}
	return nil
}

// The front-end.

func (g *guest) request(req uint32, flags uint32, body []byte, fds ...int) error {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, req)
	b = le.AppendUint32(b, messageVersion|flags)
	b = le.AppendUint32(b, uint32(len(body)))
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := g.fe.WriteMsgUnix(append(b, body...), oob, nil)
	return err
}

func (g *guest) reply(req uint32) ([]byte, error) {
	var h [12]byte
	g.fe.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadFull(g.fe, h[:]); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if le.Uint32(h[:]) != req || le.Uint32(h[4:]) != messageVersion|messageReply {
		return nil, fmt.Errorf("reply % x to request %d", h, req)
	}
	b := make([]byte, le.Uint32(h[8:]))
	_, err := io.ReadFull(g.fe, b)
	return b, err
}

func (g *guest) call(req uint32, body []byte, fds ...int) []byte {
	g.tb.Helper()
	check(g.tb, g.request(req, 0, body, fds...))
	return must(g.reply(req))(g.tb)
}

// acked sends a request that has no reply of its own and returns whether it worked.
func (g *guest) acked(req uint32, body []byte, fds ...int) bool {
	g.tb.Helper()
	check(g.tb, g.request(req, messageNeedReply, body, fds...))
	return binary.LittleEndian.Uint64(must(g.reply(req))(g.tb)) == 0
}

func (g *guest) must(req uint32, body []byte, fds ...int) {
	g.tb.Helper()
	if !g.acked(req, body, fds...) {
		g.tb.Fatalf("vhost-user request %d: not acknowledged", req)
	}
}

func u32s(v ...uint32) (b []byte) {
	for _, x := range v {
		b = binary.LittleEndian.AppendUint32(b, x)
	}
	return b
}

func u64s(v ...uint64) (b []byte) {
	for _, x := range v {
		b = binary.LittleEndian.AppendUint64(b, x)
	}
	return b
}

// start does what QEMU 7.2 does from realize to DRIVER_OK.
func (g *guest) start(cfg guestConfig) {
	g.tb.Helper()
	u := binary.LittleEndian.Uint64
	if f := u(g.call(reqGetFeatures, nil)); f&cfg.features != cfg.features {
		g.tb.Fatalf("features %#x offered, want at least %#x", f, cfg.features)
	}
	pf := u(g.call(reqGetProtocolFeatures, nil))
	check(g.tb, g.request(reqSetProtocolFeatures, 0, u64s(pf)))
	if n := u(g.call(reqGetQueueNum, nil)); n != rings {
		g.tb.Fatalf("%d queues", n)
	}
	g.must(reqSetOwner, nil)
	for i, q := range g.rings {
		raw := must(q.call.SyscallConn())(g.tb)
		raw.Control(func(fd uintptr) { g.must(reqSetVringCall, u64s(uint64(i)), int(fd)) })
	}
	config := g.call(reqGetConfig, append(u32s(0, 8, 0), make([]byte, 8)...))
	if cid := u(config[12:]); cid != guestCID {
		g.tb.Fatalf("configuration says CID %d", cid)
	}
	g.must(reqSetFeatures, u64s(cfg.features))
	if cfg.slots {
		half := uint64(guestMemory / 2)
		g.must(reqAddMemReg, u64s(0, guestBase, half, userBase, 0), g.memfd)
		g.must(reqAddMemReg, u64s(0, guestBase+half, half, userBase+half, half), g.memfd)
	} else {
		g.must(reqSetMemTable, append(u32s(1, 0), u64s(guestBase, guestMemory, userBase, 0)...), g.memfd)
	}
	g.startRings(cfg.features, cfg.base)
	for i := range g.rings {
		g.loops.Add(1)
		go g.interrupts(g.rings[i])
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for s := range slots {
		g.offer(g.rings[rxRing], s)
	}
}

// intercept shows f each packet before the guest's stream layer, which does not get
// it if f returns true.
func (g *guest) intercept(f func(p packet, data []byte) bool) {
	g.mu.Lock()
	g.hook = f
	g.mu.Unlock()
}

func (g *guest) startRings(features uint64, base uint16) {
	g.tb.Helper()
	for i, q := range g.rings {
		at := uint64(userBase + i*0x10000)
		g.must(reqSetVringNum, u32s(uint32(i), ringSize))
		g.must(reqSetVringBase, u32s(uint32(i), uint32(base)))
		g.must(reqSetVringAddr, append(u32s(uint32(i), 0), u64s(at, at+0x8000, at+0x4000, 0)...))
		g.must(reqSetVringKick, u64s(uint64(i)), q.kick)
	}
	if features&featureProtocolFeatures != 0 {
		for i := range g.rings {
			g.must(reqSetVringEnable, u32s(uint32(i), 1))
		}
	}
}

// The driver.

func (q *driverRing) describeAt(i int, addr uint64, n uint32, flags, next uint16) {
	putDescriptor(q.desc[16*i:], addr, n, flags, next)
}

func putDescriptor(b []byte, addr uint64, n uint32, flags, next uint16) {
	le := binary.LittleEndian
	le.PutUint64(b, addr)
	le.PutUint32(b[8:], n)
	le.PutUint16(b[12:], flags)
	le.PutUint16(b[14:], next)
}

func (g *guest) slot(q *driverRing, s int) (at int) {
	if q.index == rxRing {
		return rxSlotBase + s*rxSlotSize
	}
	return txSlotBase + s*txSlotSize
}

// describe makes slot s of the ring a header and n bytes of payload.
func (g *guest) describe(q *driverRing, s int, indirect bool, n uint32) {
	at := uint64(guestBase + g.slot(q, s))
	flags := uint16(0)
	if q.index == rxRing {
		flags = descWrite
	}
	if indirect {
		t := indirectBase + q.index*0x8000 + 32*s
		putDescriptor(g.mem[t:], at, headerSize, flags|descNext, 1)
		putDescriptor(g.mem[t+16:], at+64, n, flags, 0)
		q.describeAt(2*s, uint64(guestBase+t), 32, descIndirect, 0)
		return
	}
	q.describeAt(2*s, at, headerSize, flags|descNext, uint16(2*s+1))
	q.describeAt(2*s+1, at+64, n, flags, 0)
}

func (q *driverRing) barrier() {
	atomic.StoreUint32(&q.fence, 0)
	atomic.LoadUint32(&q.fence)
}

func (q *driverRing) offerHead(head uint16) {
	le := binary.LittleEndian
	le.PutUint16(q.avail[4+2*(int(q.next)%ringSize):], head)
	old := q.next
	q.next++
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&q.avail[0])), uint32(q.next)<<16)
	q.barrier()
	if event := le.Uint16(q.used[4+8*ringSize:]); !q.eventIdx || q.next-event-1 < q.next-old {
		q.doKick()
	}
}

func (q *driverRing) doKick() { unix.Write(q.kick, u64s(1)) }

// offer is called with g.mu held, or before the device runs.
func (g *guest) offer(q *driverRing, s int) { q.offerHead(uint16(2 * s)) }

func (q *driverRing) usedIndex() uint16 {
	return uint16(atomic.LoadUint32((*uint32)(unsafe.Pointer(&q.used[0]))) >> 16)
}

func (q *driverRing) enableInterrupt() {
	binary.LittleEndian.PutUint16(q.avail[4+2*ringSize:], q.lastUsed)
	q.barrier()
}

func (g *guest) interrupts(q *driverRing) {
	defer g.loops.Done()
	var b [8]byte
	for {
		if _, err := q.call.Read(b[:]); err != nil {
			return
		}
		for {
			for q.lastUsed != q.usedIndex() {
				e := q.used[4+8*(int(q.lastUsed)%ringSize):]
				s, n := int(binary.LittleEndian.Uint32(e))/2, int(binary.LittleEndian.Uint32(e[4:]))
				q.lastUsed++
				g.used(q, s, n)
			}
			q.enableInterrupt()
			if q.lastUsed == q.usedIndex() {
				break
			}
		}
	}
}

func (g *guest) used(q *driverRing, s, n int) {
	if q.index == txRing {
		g.mu.Lock()
		q.free = append(q.free, s)
		g.freed.Signal()
		g.mu.Unlock()
		return
	}
	at := g.slot(q, s)
	p := decodePacket((*[headerSize]byte)(g.mem[at : at+headerSize]))
	data := append([]byte(nil), g.mem[at+64:at+64+n-headerSize]...)
	if int(p.size) != len(data) || p.srcCID != hostCID && p.op != opReset || p.dstCID != guestCID {
		g.tb.Errorf("device wrote %d bytes with header %+v", n, p)
	}
	g.mu.Lock()
	if g.holding {
		g.held = append(g.held, s)
	} else {
		g.offer(q, s)
	}
	if g.record {
		g.seen = append(g.seen, p)
	}
	hook := g.hook
	g.mu.Unlock()
	if hook != nil && hook(p, data) {
		return
	}
	g.receive(p, data)
}

// hold makes the driver keep the buffers that the device fills, until give.
func (g *guest) hold() {
	g.mu.Lock()
	g.holding = true
	g.mu.Unlock()
}

// give offers at most n of the held buffers (all: -1).
func (g *guest) give(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if n < 0 {
		n = len(g.held)
		g.holding = false
	}
	for ; n > 0 && len(g.held) > 0; n-- {
		g.offer(g.rings[rxRing], g.held[0])
		g.held = g.held[1:]
	}
}

// transmit puts a packet on the tx ring; size says what the header claims if not -1.
func (g *guest) transmit(p packet, data []byte) {
	q := g.rings[txRing]
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(q.free) == 0 {
		if g.closing.Load() {
			return
		}
		g.freed.Wait()
	}
	s := q.free[0]
	q.free = q.free[1:]
	at := g.slot(q, s)
	p.encode((*[headerSize]byte)(g.mem[at : at+headerSize]))
	copy(g.mem[at+64:], data)
	le := binary.LittleEndian
	if d := q.desc[32*s:]; le.Uint16(d[12:])&descIndirect != 0 {
		le.PutUint32(g.mem[indirectBase+q.index*0x8000+32*s+16+8:], uint32(len(data)))
	} else {
		le.PutUint32(d[16+8:], uint32(len(data)))
	}
	g.offer(q, s)
}

// The stream layer.

type guestConn struct {
	g    *guest
	flow flow
	cond *sync.Cond // on g.mu

	in             []byte
	window         uint32
	fwdCnt, told   uint32
	txCnt          uint32
	peerAlloc      uint32
	peerFwd        uint32
	peerShut, shut uint32
	err            error
	closed, gone   bool
}

// accept makes the guest listen on a port, and hands each stream to f in a goroutine
// of its own.
func (g *guest) accept(port uint32, f func(*guestConn)) {
	g.mu.Lock()
	g.listen[port] = f
	g.mu.Unlock()
}

func (g *guest) reset(f flow) {
	g.transmit(packet{srcCID: guestCID, dstCID: hostCID, srcPort: f.guest, dstPort: f.host, kind: typeStream, op: opReset}, nil)
}

func (g *guest) receive(p packet, data []byte) {
	f := flow{host: p.srcPort, guest: p.dstPort}
	g.mu.Lock()
	c := g.conns[f]
	handler := g.listen[p.dstPort]
	if c == nil {
		if p.op != opRequest || handler == nil {
			g.mu.Unlock()
			if p.op != opReset {
				g.reset(f)
			}
			return
		}
		c = &guestConn{g: g, flow: f, cond: sync.NewCond(&g.mu), window: guestWindow, peerAlloc: p.bufAlloc, peerFwd: p.fwdCnt}
		g.conns[f] = c
		h := c.header(opResponse)
		g.mu.Unlock()
		g.transmit(h, nil)
		g.loops.Add(1)
		go func() { defer g.loops.Done(); handler(c) }()
		return
	}
	defer g.mu.Unlock()
	c.peerAlloc, c.peerFwd = p.bufAlloc, p.fwdCnt
	switch p.op {
	case opData:
		if c.fwdCnt+c.window-uint32(len(c.in))-c.fwdCnt < p.size {
			g.tb.Errorf("device overruns the guest's credit: %d bytes, %d buffered of %d", p.size, len(c.in), c.window)
		}
		c.in = append(c.in, data...)
	case opShutdown:
		c.peerShut |= p.flags
		if c.peerShut == shutBoth {
			c.remove()
			h := c.header(opReset)
			g.mu.Unlock()
			g.transmit(h, nil)
			g.mu.Lock()
		}
	case opReset:
		if c.peerShut&shutSend == 0 && !c.closed {
			c.err = syscall.ECONNRESET
		}
		c.remove()
	case opCreditUpdate:
	default:
		g.tb.Errorf("device sends %+v on a connected stream", p)
	}
	c.cond.Broadcast()
}

func (c *guestConn) header(op uint16) packet {
	c.told = c.fwdCnt
	return packet{
		srcCID: guestCID, dstCID: hostCID, srcPort: c.flow.guest, dstPort: c.flow.host,
		kind: typeStream, op: op, bufAlloc: c.window, fwdCnt: c.fwdCnt,
	}
}

func (c *guestConn) remove() {
	c.gone = true
	delete(c.g.conns, c.flow)
}

func (c *guestConn) Read(p []byte) (int, error) {
	c.g.mu.Lock()
	for len(c.in) == 0 {
		err := c.err
		switch {
		case c.closed:
			err = net.ErrClosed
		case err != nil:
		case c.gone || c.peerShut&shutSend != 0:
			err = io.EOF
		}
		if err != nil {
			c.g.mu.Unlock()
			return 0, err
		}
		c.cond.Wait()
	}
	n := copy(p, c.in)
	c.in = append(c.in[:0], c.in[n:]...)
	c.fwdCnt += uint32(n)
	update := !c.gone && c.window-(c.fwdCnt-c.told) < 64<<10 // as Linux
	var h packet
	if update {
		h = c.header(opCreditUpdate)
	}
	c.g.mu.Unlock()
	if update {
		c.g.transmit(h, nil)
	}
	return n, nil
}

func (c *guestConn) Write(p []byte) (n int, err error) {
	for n < len(p) {
		c.g.mu.Lock()
		for {
			switch {
			case c.closed:
				err = net.ErrClosed
			case c.err != nil:
				err = c.err
			case c.gone || c.shut&shutSend != 0 || c.peerShut&shutReceive != 0:
				err = syscall.EPIPE
			}
			if err != nil {
				c.g.mu.Unlock()
				return n, err
			}
			if c.txCnt-c.peerFwd < c.peerAlloc {
				break
			}
			c.cond.Wait()
		}
		k := min(len(p)-n, maxPayload, int(c.peerAlloc-(c.txCnt-c.peerFwd)))
		h := c.header(opData)
		h.size = uint32(k)
		c.txCnt += uint32(k)
		c.g.mu.Unlock()
		c.g.transmit(h, p[n:n+k])
		n += k
	}
	return n, nil
}

func (c *guestConn) shutdown(flags uint32) {
	c.g.mu.Lock()
	c.shut |= flags
	h := c.header(opShutdown)
	h.flags = c.shut
	gone := c.gone
	c.cond.Broadcast()
	c.g.mu.Unlock()
	if !gone {
		c.g.transmit(h, nil)
	}
}

func (c *guestConn) CloseWrite() error { c.shutdown(shutSend); return nil }

func (c *guestConn) Close() error {
	c.g.mu.Lock()
	was := c.closed
	c.closed = true
	c.cond.Broadcast()
	c.g.mu.Unlock()
	if !was {
		c.shutdown(shutBoth)
	}
	return nil
}

func (c *guestConn) LocalAddr() net.Addr              { return addr{guestCID, c.flow.guest} }
func (c *guestConn) RemoteAddr() net.Addr             { return addr{hostCID, c.flow.host} }
func (c *guestConn) SetDeadline(time.Time) error      { return errors.ErrUnsupported }
func (c *guestConn) SetReadDeadline(time.Time) error  { return errors.ErrUnsupported }
func (c *guestConn) SetWriteDeadline(time.Time) error { return errors.ErrUnsupported }
