//go:build linux

package vhostvsock

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tx makes the guest offer a chain on its tx ring that starts at head.
func (g *guest) tx(head uint16) {
	g.mu.Lock()
	g.rings[txRing].offerHead(head)
	g.mu.Unlock()
}

// T16: descriptors and indices that break the ring end the device with an error that
// says what was wrong, and nothing else.
func TestHostileRing(t *testing.T) {
	const data = guestBase + txSlotBase
	const table = guestBase + indirectBase
	for name, tt := range map[string]struct {
		f    func(g *guest, q *driverRing)
		want string
	}{
		"head beyond the ring": {func(g *guest, q *driverRing) { g.tx(ringSize) }, "descriptor 128 of 128"},
		"next beyond the ring": {func(g *guest, q *driverRing) {
			q.describeAt(0, data, 44, descNext, 0xffff)
			g.tx(0)
		}, "descriptor 65535 of 128"},
		"loop": {func(g *guest, q *driverRing) {
			q.describeAt(0, data, 44, descNext, 1)
			q.describeAt(1, data, 44, descNext, 0)
			g.tx(0)
		}, "longer than the ring"},
		"loop of empty buffers": {func(g *guest, q *driverRing) {
			q.describeAt(0, data, 0, descNext, 0)
			g.tx(0)
		}, "longer than the ring"},
		"address not memory": {func(g *guest, q *driverRing) {
			q.describeAt(0, 0x1000, 44, 0, 0)
			g.tx(0)
		}, "is not memory"},
		"runs out of memory": {func(g *guest, q *driverRing) {
			q.describeAt(0, guestBase+guestMemory-8, 44, 0, 0)
			g.tx(0)
		}, "is not memory"},
		"address overflows": {func(g *guest, q *driverRing) {
			q.describeAt(0, 1<<64-8, 44, 0, 0)
			g.tx(0)
		}, "address 0xfffffffffffffff8"},
		"length of 4 GiB": {func(g *guest, q *driverRing) {
			q.describeAt(0, data, 0xffffffff, 0, 0)
			g.tx(0)
		}, "is not memory"},
		"writable buffer to send": {func(g *guest, q *driverRing) {
			q.describeAt(0, data, 44, descWrite, 0)
			g.tx(0)
		}, "wrong direction"},
		"readable buffer to receive": {func(g *guest, q *driverRing) {
			for i := range ringSize {
				g.rings[rxRing].describeAt(i, guestBase+rxSlotBase, 4096, 0, 0)
			}
			go g.d.Dial(testContext(g.tb), 1)
		}, "wrong direction"},
		"buffer too small to receive": {func(g *guest, q *driverRing) {
			for i := range ringSize {
				g.rings[rxRing].describeAt(i, guestBase+rxSlotBase, headerSize, descWrite, 0)
			}
			go g.d.Dial(testContext(g.tb), 1)
		}, "holds no packet"},
		"index too far ahead": {func(g *guest, q *driverRing) {
			g.mu.Lock()
			q.next += ringSize
			g.mu.Unlock()
			g.tx(0)
			q.doKick()
		}, "offers 129 chains"},
		"indirect in indirect": {func(g *guest, q *driverRing) {
			putDescriptor(g.mem[indirectBase:], table, 16, descIndirect, 0)
			q.describeAt(0, table, 16, descIndirect, 0)
			g.tx(0)
		}, "indirect descriptor within a table"},
		"indirect with a successor": {func(g *guest, q *driverRing) {
			q.describeAt(0, table, 16, descIndirect|descNext, 1)
			g.tx(0)
		}, "with a successor"},
		"indirect loop": {func(g *guest, q *driverRing) {
			putDescriptor(g.mem[indirectBase:], data, 1, descNext, 0)
			q.describeAt(0, table, 16, descIndirect, 0)
			g.tx(0)
		}, "longer than the ring"},
		"indirect next beyond the table": {func(g *guest, q *driverRing) {
			putDescriptor(g.mem[indirectBase:], data, 1, descNext, 1)
			q.describeAt(0, table, 16, descIndirect, 0)
			g.tx(0)
		}, "descriptor 1 of 1"},
		"indirect table empty": {func(g *guest, q *driverRing) {
			q.describeAt(0, table, 0, descIndirect, 0)
			g.tx(0)
		}, "indirect table of 0 bytes"},
		"indirect table uneven": {func(g *guest, q *driverRing) {
			q.describeAt(0, table, 17, descIndirect, 0)
			g.tx(0)
		}, "indirect table of 17 bytes"},
		"indirect table too long": {func(g *guest, q *driverRing) {
			q.describeAt(0, table, 16*(ringSize+1), descIndirect, 0)
			g.tx(0)
		}, "indirect table of 2064 bytes"},
		"indirect table not memory": {func(g *guest, q *driverRing) {
			q.describeAt(0, 16, 16, descIndirect, 0)
			g.tx(0)
		}, "is not memory"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, nil)
			st, _ := g.pair()
			tt.f(g, g.rings[txRing])
			if err := g.expectFailure(); !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q in it", err, tt.want)
			}
			if _, err := st.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("Read: %v", err)
			}
		})
	}
}

// T16: a stream on which the guest does not keep to the protocol is reset; the other
// streams and the device go on.
func TestHostilePackets(t *testing.T) {
	big := make([]byte, maxPayload)
	for name, tt := range map[string]struct {
		f         func(g *guest, p packet) // p is a valid header of the stream's
		want      error                    // of Read; nil: the stream lives
		unrelated bool                     // the packet is not the stream's
	}{
		"more than the credit": {f: func(g *guest, p packet) {
			p.op, p.size = opData, maxPayload
			g.transmit(p, big)
			p.size = 1
			g.transmit(p, big[:1])
		}, want: syscall.EPROTO},
		"claims more than it has": {f: func(g *guest, p packet) {
			p.op, p.size = opData, 100
			g.transmit(p, big[:99])
		}, want: syscall.EPROTO},
		"claims 4 GiB": {f: func(g *guest, p packet) {
			p.op, p.size = opData, 0xffffffff
			g.transmit(p, big)
		}, want: syscall.EPROTO},
		"data after shutdown": {f: func(g *guest, p packet) {
			p.op, p.flags = opShutdown, shutSend
			g.transmit(p, nil)
			p.op, p.size = opData, 1
			g.transmit(p, big[:1])
		}, want: io.EOF},
		"read what was never sent": {f: func(g *guest, p packet) {
			p.op, p.fwdCnt = opCreditUpdate, 1
			g.transmit(p, nil)
		}, want: syscall.EPROTO},
		"response twice": {f: func(g *guest, p packet) {
			p.op = opResponse
			g.transmit(p, nil)
		}, want: syscall.EPROTO},
		"request of a connected stream": {f: func(g *guest, p packet) {
			p.op = opRequest
			g.transmit(p, nil)
		}, want: syscall.EPROTO},
		"operation unknown": {f: func(g *guest, p packet) {
			p.op = 99
			g.transmit(p, nil)
		}, want: syscall.EPROTO},
		"operation 0": {f: func(g *guest, p packet) {
			p.op = 0
			g.transmit(p, nil)
		}, want: syscall.EPROTO},
		"more bytes than it says": {f: func(g *guest, p packet) {
			p.op = opCreditUpdate
			g.transmit(p, big)
		}},
		"unknown shutdown flags": {f: func(g *guest, p packet) {
			p.op, p.flags = opShutdown, ^uint32(shutBoth)
			g.transmit(p, nil)
		}},
		"credit of 4 GiB": {f: func(g *guest, p packet) {
			p.op, p.bufAlloc = opCreditUpdate, 0xffffffff
			g.transmit(p, nil)
			p.op = opCreditRequest
			g.transmit(p, nil)
		}},
		"someone else's address": {f: func(g *guest, p packet) {
			p.op, p.srcCID = opReset, 4
			g.transmit(p, nil)
			p.op = opRequest
			g.transmit(p, nil)
		}},
		"to another guest": {f: func(g *guest, p packet) {
			p.op, p.dstCID = opRequest, 4
			g.transmit(p, nil)
		}},
		"datagram": {f: func(g *guest, p packet) {
			p.op, p.kind, p.size = opData, 3, 1
			g.transmit(p, big[:1])
		}},
		"reset of nothing": {f: func(g *guest, p packet) {
			p.op, p.srcPort = opReset, 77
			g.transmit(p, nil)
		}},
		"short of a header": {f: func(g *guest, p packet) {
			q := g.rings[txRing]
			g.mu.Lock()
			s := q.free[0]
			q.free = q.free[1:]
			q.describeAt(2*s, guestBase+txSlotBase, 43, 0, 0)
			g.offer(q, s)
			g.mu.Unlock()
			time.Sleep(10 * time.Millisecond)
			g.mu.Lock()
			g.describe(q, s, false, rxBuffer)
			g.mu.Unlock()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, nil)
			g.accept(echoPort, echo)
			st, gc := g.pair()
			other := g.dial(echoPort)
			// What the device answers is not for the guest's stream layer to judge.
			g.mu.Lock()
			g.hook = func(p packet, _ []byte) bool { return p.srcPort == gc.flow.host && p.op != opData }
			p := gc.header(opCreditUpdate)
			g.mu.Unlock()
			tt.f(g, p)
			roundTrip(t, other)
			if tt.want == nil {
				g.transmit(packet{srcCID: guestCID, dstCID: hostCID, srcPort: gc.flow.guest, dstPort: gc.flow.host, kind: typeStream, op: opData, size: 2, bufAlloc: 1 << 16}, []byte("ok"))
				b := make([]byte, 10)
				if n, err := st.Read(b); err != nil || string(b[:n]) != "ok" {
					t.Errorf("Read: %q, %v", b[:n], err)
				}
				return
			}
			if _, err := io.Copy(io.Discard, st); tt.want != io.EOF && !errors.Is(err, tt.want) {
				t.Errorf("Read: %v, want %v", err, tt.want)
			}
			if _, err := st.Write([]byte("x")); !errors.Is(err, syscall.EPROTO) {
				t.Errorf("Write: %v, want EPROTO", err)
			}
			st.Close()
			other.Close()
			g.expectEmpty()
		})
	}
}

// T16: replies to unwanted packets are bounded: the device stops reading the guest's
// ring, and goes on when the guest takes them.
func TestResetsAreBounded(t *testing.T) {
	g := newGuest(t, nil)
	g.accept(echoPort, echo)
	g.accept(sinkPort, func(c *guestConn) { io.Copy(io.Discard, c) })
	c := g.dial(echoPort)
	filler := g.dial(sinkPort)
	g.hold()
	if _, err := filler.Write(make([]byte, slots*rxBuffer)); err != nil {
		t.Fatal(err)
	}
	const flood = 4 * maxResets
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		for i := range flood {
			g.transmit(packet{srcCID: guestCID, dstCID: hostCID, srcPort: uint32(i), dstPort: 22, kind: typeStream, op: opRequest}, nil)
		}
	}()
	eventually(t, "the resets are full", g.d.resetsFull)
	time.Sleep(20 * time.Millisecond)
	g.d.mu.Lock()
	if n := len(g.d.resets); n != maxResets {
		t.Errorf("%d resets wait, want %d", n, maxResets)
	}
	g.d.mu.Unlock()
	select {
	case <-flooded:
		t.Error("the guest could send everything")
	default:
	}
	g.mu.Lock()
	resets := 0
	g.hook = func(p packet, _ []byte) bool {
		if p.op == opReset && p.srcPort == 22 {
			g.mu.Lock()
			resets++
			g.mu.Unlock()
			return true
		}
		return false
	}
	g.mu.Unlock()
	g.give(-1)
	<-flooded
	roundTrip(t, c)
	eventually(t, "each request is reset", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return resets == flood
	})
}

// T16: memory that is truncated under the device is an error of the device.
func TestMemoryTruncated(t *testing.T) {
	t.Run("not sealable", func(t *testing.T) {
		g := newGuest(t, func(c *guestConfig) { c.noSeals = true })
		st, _ := g.pair()
		// The guest's side must not touch the memory any more, either.
		for _, q := range g.rings {
			q.call.SetReadDeadline(time.Unix(1, 0))
		}
		g.loops.Wait()
		check(t, unix.Ftruncate(g.memfd, 0))
		g.rings[txRing].doKick()
		if err := g.expectFailure(); !strings.Contains(err.Error(), "vanished") {
			t.Errorf("Serve: %v", err)
		}
		if _, err := st.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Write: %v", err)
		}
	})
	t.Run("while a Write is under way", func(t *testing.T) {
		g := newGuest(t, func(c *guestConfig) { c.noSeals = true })
		st, _ := g.pair()
		for _, q := range g.rings {
			q.call.SetReadDeadline(time.Unix(1, 0))
		}
		g.loops.Wait()
		check(t, unix.Ftruncate(g.memfd, rxSlotBase)) // the rings stay
		if _, err := st.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Write: %v", err)
		}
		if err := g.expectFailure(); !strings.Contains(err.Error(), "vanished") {
			t.Errorf("Serve: %v", err)
		}
		st.Close()
	})
	t.Run("sealed by the device", func(t *testing.T) {
		g := newGuest(t, nil)
		if err := unix.Ftruncate(g.memfd, 0); !errors.Is(err, unix.EPERM) {
			t.Errorf("truncate: %v, want EPERM", err)
		}
	})
}

// T16: what QEMU says is not believed either.
func TestHostileFrontEnd(t *testing.T) {
	const base, size = guestBase, guestMemory
	table := func(v ...uint64) []byte { return append(u32s(uint32(len(v)/4), 0), u64s(v...)...) }
	pr, pw, err := os.Pipe()
	check(t, err)
	defer pr.Close()
	defer pw.Close()
	pipe := int(pr.Fd())
	for name, tt := range map[string]struct {
		f    func(t *testing.T, g *guest)
		want string
	}{
		"region larger than its file": {func(t *testing.T, g *guest) {
			g.request(reqSetMemTable, 0, table(base, size+4096, userBase, 0), g.memfd)
		}, "of a file of"},
		"region starts beyond its file": {func(t *testing.T, g *guest) {
			g.request(reqSetMemTable, 0, table(base, 4096, userBase, size), g.memfd)
		}, "of a file of"},
		"offset overflows": {func(t *testing.T, g *guest) {
			g.request(reqSetMemTable, 0, table(base, 4096, userBase, 1<<64-4096), g.memfd)
		}, "out of range"},
		"empty region": {func(t *testing.T, g *guest) {
			g.request(reqSetMemTable, 0, table(base, 0, userBase, 0), g.memfd)
		}, "out of range"},
		"address overflows": {func(t *testing.T, g *guest) {
			g.request(reqSetMemTable, 0, table(1<<64-4096, size, userBase, 0), g.memfd)
		}, "out of range"},
		"regions overlap": {func(t *testing.T, g *guest) {
			g.request(reqSetMemTable, 0, table(base, 8192, userBase, 0, base+4096, 4096, userBase+size, 0), g.memfd, g.memfd)
		}, "overlaps"},
		"region of a pipe": {func(t *testing.T, g *guest) {
			g.request(reqSetMemTable, 0, table(base, 4096, userBase, 0), pipe)
		}, "not a file"},
		"regions without descriptors": {func(t *testing.T, g *guest) {
			g.request(reqSetMemTable, 0, table(base, 4096, userBase, 0))
		}, "1 regions and 0 descriptors"},
		"regions that are not there": {func(t *testing.T, g *guest) {
			g.request(reqSetMemTable, 0, u32s(1, 0), g.memfd)
		}, "body of 8 bytes, not 40"},
		"4 billion regions": {func(t *testing.T, g *guest) {
			g.request(reqSetMemTable, 0, u32s(0xffffffff, 0), g.memfd)
		}, "4294967295 regions"},
		"too many regions": {func(t *testing.T, g *guest) {
			for i := range uint64(maxRegions + 1) {
				g.request(reqAddMemReg, 0, u64s(0, base+i*4096, 4096, userBase+i*4096, i*4096), g.memfd)
			}
		}, "the most there can be"},
		"removes what is not there": {func(t *testing.T, g *guest) {
			g.request(reqRemMemReg, 0, u64s(0, base, 4096, userBase, 0))
		}, "not mapped"},
		"kick is a pipe": {func(t *testing.T, g *guest) {
			g.request(reqSetVringKick, 0, u64s(0), pipe)
		}, "not an eventfd"},
		"call is a file": {func(t *testing.T, g *guest) {
			g.request(reqSetVringCall, 0, u64s(0), g.memfd)
		}, "not an eventfd"},
		"kick without a descriptor": {func(t *testing.T, g *guest) {
			g.request(reqSetVringKick, 0, u64s(0))
		}, "0 descriptors"},
		"kick polled": {func(t *testing.T, g *guest) {
			g.request(reqSetVringKick, 0, u64s(vringNoFD))
		}, "polled"},
		"ring out of range": {func(t *testing.T, g *guest) {
			g.request(reqSetVringNum, 0, u32s(2, 128))
		}, "ring 2 of 2"},
		"ring size 0": {func(t *testing.T, g *guest) {
			g.request(reqSetVringNum, 0, u32s(0, 0))
		}, "power of two"},
		"ring size 100": {func(t *testing.T, g *guest) {
			g.request(reqSetVringNum, 0, u32s(0, 100))
		}, "power of two"},
		"ring size huge": {func(t *testing.T, g *guest) {
			g.request(reqSetVringNum, 0, u32s(0, 1<<31))
		}, "power of two"},
		"ring index huge": {func(t *testing.T, g *guest) {
			g.request(reqSetVringBase, 0, u32s(0, 1<<16))
		}, "index 65536"},
		"features never offered": {func(t *testing.T, g *guest) {
			g.request(reqSetFeatures, 0, u64s(1<<34))
		}, "were offered"},
		"protocol features never offered": {func(t *testing.T, g *guest) {
			g.request(reqSetProtocolFeatures, 0, u64s(1<<5))
		}, "were offered"},
		"configuration out of range": {func(t *testing.T, g *guest) {
			g.request(reqGetConfig, 0, append(u32s(0xffffffff, 8, 0), make([]byte, 8)...))
		}, "of the configuration"},
		"configuration longer than its body": {func(t *testing.T, g *guest) {
			g.request(reqGetConfig, 0, append(u32s(0, 256, 0), make([]byte, 8)...))
		}, "of the configuration"},
		"request unknown": {func(t *testing.T, g *guest) {
			g.request(99, 0, nil)
		}, "not supported"},
		"short body": {func(t *testing.T, g *guest) {
			g.request(reqSetVringAddr, 0, u64s(0))
		}, "body of 8 bytes"},
		"huge body": {func(t *testing.T, g *guest) {
			g.fe.Write(u32s(reqSetOwner, messageVersion, 1<<30))
		}, "body of 1073741824 bytes"},
		"wrong version": {func(t *testing.T, g *guest) {
			g.fe.Write(u32s(reqSetOwner, 2, 0))
		}, "flags 0x2"},
		"too many descriptors": {func(t *testing.T, g *guest) {
			fds := make([]int, maxMessageFDs+5)
			for i := range fds {
				fds[i] = g.memfd
			}
			g.request(reqSetOwner, 0, nil, fds...)
		}, "more than 8 descriptors"},
		"hangs up within a message": {func(t *testing.T, g *guest) {
			g.fe.Write(u32s(reqSetOwner, messageVersion, 8))
			g.fe.Close()
		}, "unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, func(c *guestConfig) { c.noStart = true })
			g.call(reqGetFeatures, nil) // the device has opened what it needs
			before := descriptors(t)
			tt.f(t, g)
			if err := g.expectFailure(); !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q in it", err, tt.want)
			}
			// The device's end of the socket and its two eventfds are closed too.
			if after := descriptors(t); after > before-3 {
				t.Errorf("%d descriptors before, %d after, want 3 less", before, after)
			}
		})
	}
	// Addresses of rings, which are looked at when a ring starts.
	for name, tt := range map[string]struct {
		desc, used, avail uint64
		want              string
	}{
		"descriptors not aligned":    {userBase + 8, userBase + 0x8000, userBase + 0x4000, "not aligned"},
		"used ring not aligned":      {userBase, userBase + 0x8002, userBase + 0x4000, "not aligned"},
		"available ring not aligned": {userBase, userBase + 0x8000, userBase + 0x4001, "not aligned"},
		"descriptors not memory":     {16, userBase + 0x8000, userBase + 0x4000, "not in the guest's memory"},
		"used ring sticks out":       {userBase, userBase + size - 512, userBase + 0x4000, "not in the guest's memory"},
		"available ring sticks out":  {userBase, userBase + 0x8000, userBase + size - 16, "not in the guest's memory"},
		"address overflows":          {userBase, 1<<64 - 4, userBase + 0x4000, "not in the guest's memory"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, func(c *guestConfig) { c.noStart = true })
			g.request(reqSetFeatures, 0, u64s(featureVersion1))
			g.request(reqSetMemTable, 0, table(base, size, userBase, 0), g.memfd)
			g.request(reqSetVringNum, 0, u32s(0, ringSize))
			g.request(reqSetVringAddr, 0, append(u32s(0, 0), u64s(tt.desc, tt.used, tt.avail, 0)...))
			g.request(reqSetVringKick, 0, u64s(0), g.rings[0].kick)
			if err := g.expectFailure(); !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q in it", err, tt.want)
			}
		})
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	return len(must(os.ReadDir("/proc/self/fd"))(t))
}

// QEMU stops the rings when it pauses the guest, and starts them where they stopped.
func TestPause(t *testing.T) {
	g := newGuest(t, nil)
	g.accept(echoPort, echo)
	c := g.dial(echoPort)
	roundTrip(t, c)
	bases := [rings]uint16{}
	for i := range g.rings {
		bases[i] = uint16(binary.LittleEndian.Uint32(g.call(reqGetVringBase, u32s(uint32(i), 0))[4:]))
	}
	read := make(chan error, 1)
	go func() {
		_, err := c.Write([]byte("ping"))
		read <- err
	}()
	select {
	case err := <-read:
		t.Errorf("Write while the guest is paused: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	for i, q := range g.rings {
		g.must(reqSetVringBase, u32s(uint32(i), uint32(bases[i])))
		g.must(reqSetVringKick, u64s(uint64(i)), q.kick)
	}
	check(t, <-read)
	if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c)
}

// A guest whose driver starts anew has forgotten its streams.
func TestGuestRestarts(t *testing.T) {
	g := newGuest(t, nil)
	st, _ := g.pair()
	for i := range g.rings {
		g.call(reqGetVringBase, u32s(uint32(i), 0))
	}
	for i := range g.rings {
		g.must(reqSetVringBase, u32s(uint32(i), 0))
	}
	if _, err := st.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Read: %v", err)
	}
	st.Close()
	g.expectEmpty()
}

// The memory map and the interrupt change while streams run.
func TestChangesWhileRunning(t *testing.T) {
	g := newGuest(t, nil)
	g.accept(echoPort, echo)
	c := g.dial(echoPort)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 500 {
			roundTrip(t, c)
		}
	}()
	extra := must(unix.MemfdCreate("extra", unix.MFD_CLOEXEC))(t)
	defer unix.Close(extra)
	check(t, unix.Ftruncate(extra, 1<<20))
	silent := must(unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK))(t)
	defer unix.Close(silent)
	calls := [rings]int{}
	for i, q := range g.rings {
		raw := must(q.call.SyscallConn())(t)
		raw.Control(func(fd uintptr) { calls[i] = int(fd) })
	}
	region := u64s(0, guestBase+guestMemory, 1<<20, userBase+guestMemory, 0)
	for range 20 {
		g.must(reqAddMemReg, region, extra)
		g.must(reqRemMemReg, region, extra)
		for i := range g.rings {
			// Masked, and unmasked again with the interrupt that was lost.
			g.must(reqSetVringCall, u64s(uint64(i)), silent)
			g.must(reqSetVringCall, u64s(uint64(i)|vringNoFD))
			g.must(reqSetVringCall, u64s(uint64(i)), calls[i])
			unix.Write(calls[i], u64s(1))
		}
	}
	<-done
}
