//go:build linux

package vhostvsock

import (
	"encoding/binary"
	"io"
	"math"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// checkBounds fails if the device holds more than it may.
func (d *Device) checkBounds(t *testing.T) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.reserved < 0 || d.reserved > d.budget {
		t.Fatalf("%d bytes of %d promised", d.reserved, d.budget)
	}
	if len(d.resets) > 2*maxResets {
		t.Fatalf("%d resets", len(d.resets))
	}
	for _, st := range d.streams {
		if st.in.n > st.window || len(st.in.chunks) > st.window/chunkSize+1 {
			t.Fatalf("%d bytes in %d chunks for a window of %d", st.in.n, len(st.in.chunks), st.window)
		}
	}
}

// FuzzGuestPackets: any sequence of packets leaves the device within its bounds (T16).
// The input is operations: a byte that says what happens, and a header for a packet.
func FuzzGuestPackets(f *testing.F) {
	header := func(p packet) []byte {
		var b [headerSize]byte
		p.encode(&b)
		return append([]byte{0}, b[:]...)
	}
	valid := packet{srcCID: guestCID, dstCID: hostCID, srcPort: 1, dstPort: firstPort + 1, kind: typeStream, bufAlloc: 1 << 16}
	for op := range uint16(9) {
		p := valid
		p.op, p.size, p.flags = op, 1000, uint32(op)
		f.Add(append(header(p), header(p)...))
		p.dstPort++
		f.Add(append(header(p), 1, 2, 3, 4, 5))
	}
	payload := make([]byte, maxPayload)
	f.Fuzz(func(t *testing.T, in []byte) {
		d := New(guestCID, WithReceiveBudget(1<<20))
		d.linger = time.Hour
		defer d.Close()
		var streams []*stream
		for i := range uint32(3) {
			st, err := d.newStream(i + 1)
			if err != nil {
				t.Fatal(err)
			}
			st.requested, st.connecting = true, i == 2
			st.told = minWindow
			streams = append(streams, st)
			defer st.Close()
		}
		buf := make([]byte, 4096)
		for len(in) > 0 {
			what := in[0]
			in = in[1:]
			st := streams[int(what>>4)%len(streams)]
			switch what & 0xf {
			case 1, 2:
				st.mu.Lock()
				ready := st.readError() != nil || st.in.n > 0
				st.mu.Unlock()
				if ready {
					st.Read(buf)
				}
			case 3:
				d.send(&chain{segs: [][]byte{make([]byte, 30), make([]byte, 4096)}, size: 30 + 4096})
			case 4:
				st.CloseWrite()
			case 5:
				st.Close()
			case 6:
				st.mu.Lock()
				if !st.closed {
					st.out = payload
				}
				st.schedule()
				st.mu.Unlock()
			default:
				if len(in) < headerSize {
					return
				}
				c := chain{segs: [][]byte{in[:10], in[10:headerSize], payload}, size: headerSize + maxPayload}
				in = in[headerSize:]
				if !d.resetsFull() {
					d.receive(&c)
				}
			}
			d.checkBounds(t)
		}
	})
}

// FuzzRing: any content of a ring and its tables is an error or chains that lie within
// the guest's memory (T16). The input is the start of the memory, with the rings in it.
func FuzzRing(f *testing.F) {
	const (
		size    = 1 << 16
		n       = 16
		availAt = 16 * n
		usedAt  = 0x200
	)
	seed := func(idx uint16, desc ...[]byte) []byte {
		b := make([]byte, usedAt)
		for i, d := range desc {
			copy(b[16*i:], d)
		}
		binary.LittleEndian.PutUint16(b[availAt+2:], idx)
		for i := range n {
			binary.LittleEndian.PutUint16(b[availAt+4+2*i:], uint16(i))
		}
		return b
	}
	desc := func(addr uint64, n uint32, flags, next uint16) []byte {
		b := make([]byte, 16)
		putDescriptor(b, addr, n, flags, next)
		return b
	}
	f.Add(seed(1, desc(guestBase+0x1000, 44, descNext, 1), desc(guestBase+0x2000, 4096, 0, 0)), uint16(0), true)
	f.Add(seed(3, desc(guestBase, 48, descIndirect, 0), desc(guestBase+size-4, 8, 0, 0)), uint16(2), false)
	f.Add(seed(17, desc(math.MaxUint64, math.MaxUint32, descNext, 0)), uint16(1), false)
	f.Add(seed(2, desc(guestBase+0x1000, 4096, descWrite, 0), desc(guestBase+0x1000, 4096, descWrite, 0)), uint16(0), true)

	fd, err := unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC)
	check(f, err)
	defer unix.Close(fd)
	check(f, unix.Ftruncate(fd, size))
	var mem memory
	// Two adjacent regions, so that buffers cross from one into the other.
	check(f, mem.add(regionSpec{guest: guestBase, size: size / 2, user: userBase}, fd))
	check(f, mem.add(regionSpec{guest: guestBase + size/2, size: size / 2, user: userBase + size/2, offset: size / 2}, fd))
	defer mem.clear()
	q, err := newRing("fuzz", &mem)
	check(f, err)
	defer q.close()

	f.Fuzz(func(t *testing.T, in []byte, next uint16, write bool) {
		start := must(mem.user(userBase, size/2))(t)
		clear(start)
		copy(start, in)
		q.size, q.descAddr, q.availAddr, q.usedAddr = n, userBase, userBase+availAt, userBase+usedAt
		q.next, q.signalled, q.eventIdx = next, next, write
		check(t, q.resolve())
		d := New(guestCID)
		defer d.Close()
		for range 2 * n {
			ok, err := q.ready()
			if err != nil || !ok {
				return
			}
			c, err := q.peek(write)
			if err != nil {
				return
			}
			var sum uint64
			for _, s := range c.segs {
				sum += uint64(len(s))
			}
			if sum != c.size || len(c.segs) > 3*n {
				t.Fatalf("%d bytes in %d pieces, said %d", sum, len(c.segs), c.size)
			}
			head, written := c.head, 0
			if !write {
				d.receive(&c)
			} else if c.size > headerSize {
				d.reset(packet{op: opReset})
				written = d.send(&c)
			}
			q.complete(head, uint32(written))
			q.notify()
		}
	})
}

// FuzzVhostUser: any sequence of messages ends in an error or with the connection
// (T16). The input is messages: request, flags, which descriptors, length, body.
func FuzzVhostUser(f *testing.F) {
	msg := func(req, fds byte, body []byte) []byte {
		return append([]byte{req, messageVersion | messageNeedReply, fds, byte(len(body))}, body...)
	}
	var start []byte
	for _, m := range [][]byte{
		msg(reqGetFeatures, 0, nil),
		msg(reqSetProtocolFeatures, 0, u64s(offeredProtocolFeatures)),
		msg(reqSetFeatures, 0, u64s(featureVersion1)),
		msg(reqSetMemTable, 1, append(u32s(1, 0), u64s(guestBase, 1<<20, userBase, 0)...)),
		msg(reqSetVringNum, 0, u32s(1, 16)),
		msg(reqSetVringBase, 0, u32s(1, 0)),
		msg(reqSetVringAddr, 0, append(u32s(1, 0), u64s(userBase, userBase+0x2000, userBase+0x1000, 0)...)),
		msg(reqSetVringCall, 2, u64s(1)),
		msg(reqSetVringKick, 2, u64s(1)),
	} {
		start = append(start, m...)
		f.Add(append([]byte(nil), start...))
	}
	f.Add(append(start, msg(reqGetVringBase, 0, u32s(1, 0))...))
	f.Add(append(start, msg(reqSetMemTable, 0, u32s(0, 0))...))
	f.Add(msg(reqGetConfig, 0, append(u32s(0, 8, 0), make([]byte, 8)...)))
	f.Add(append(msg(reqAddMemReg, 1, u64s(0, guestBase, 4096, userBase, 4096)), msg(reqRemMemReg, 1, u64s(0, guestBase, 4096, userBase, 4096))...))

	f.Fuzz(func(t *testing.T, in []byte) {
		fe, be := socketPair(t)
		defer fe.Close()
		d := New(guestCID)
		served := make(chan error, 1)
		go func() { served <- d.Serve(be) }()
		go io.Copy(io.Discard, fe)
		memfd := must(unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC))(t)
		defer unix.Close(memfd)
		check(t, unix.Ftruncate(memfd, 1<<20))
		event := must(unix.Eventfd(1, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK))(t)
		defer unix.Close(event)
		for len(in) >= 4 {
			req, flags, which, n := in[0], in[1], in[2], min(int(in[3]), len(in)-4)
			var fds []int
			for i := range which % 10 {
				if which>>4&1<<(i%4) != 0 || which&0xf == 1 {
					fds = append(fds, memfd)
				} else {
					fds = append(fds, event)
				}
			}
			var oob []byte
			if len(fds) > 0 {
				oob = unix.UnixRights(fds...)
			}
			b := append(u32s(uint32(req), uint32(flags), uint32(n)), in[4:4+n]...)
			in = in[4+n:]
			if _, _, err := fe.WriteMsgUnix(b, oob, nil); err != nil {
				break // the device hung up
			}
		}
		fe.CloseWrite()
		select {
		case <-served:
		case <-time.After(10 * time.Second):
			t.Fatal("Serve goes on after the front-end hung up")
		}
	})
}
