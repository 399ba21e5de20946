//go:build linux

package vhostvsock

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/net/nettest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	echoPort = 1024
	sinkPort = 1025
	mutePort = 1026 // accepts and does nothing
)

func echo(c *guestConn) {
	io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
	c.Close()
}

func testContext(tb testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	tb.Cleanup(cancel)
	return ctx
}

func (g *guest) dial(port uint32) *stream {
	g.tb.Helper()
	c, err := g.d.Dial(testContext(g.tb), port)
	check(g.tb, err)
	c.SetDeadline(time.Now().Add(30 * time.Second)) // no test hangs
	g.tb.Cleanup(func() { c.Close() })
	return c.(*stream)
}

// pair is a stream and its guest's end.
func (g *guest) pair() (*stream, *guestConn) {
	g.tb.Helper()
	ch := make(chan *guestConn, 1)
	g.accept(mutePort, func(c *guestConn) { ch <- c })
	st := g.dial(mutePort)
	return st, <-ch
}

// eventually waits for a state that comes after packets which the test can't see.
func eventually(tb testing.TB, what string, f func() bool) {
	tb.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("not within 10 s: %s", what)
		}
	}
}

func (g *guest) expectEmpty() {
	g.tb.Helper()
	eventually(g.tb, "all state of streams is freed", func() bool {
		g.d.mu.Lock()
		defer g.d.mu.Unlock()
		return len(g.d.streams) == 0 && g.d.reserved == 0 && g.d.first == nil && len(g.d.resets) == 0
	})
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return b
}

func TestEcho(t *testing.T) {
	for name, mod := range map[string]func(*guestConfig){
		"as QEMU":              nil,
		"indirect":             func(c *guestConfig) { c.indirect = true },
		"no event index":       func(c *guestConfig) { c.features &^= featureEventIdx },
		"no protocol features": func(c *guestConfig) { c.features &^= featureProtocolFeatures },
		"memory slots":         func(c *guestConfig) { c.slots = true },
		"indices wrap":         func(c *guestConfig) { c.base = 65500 },
		"no seals":             func(c *guestConfig) { c.noSeals = true },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, mod)
			g.accept(echoPort, echo)
			c := g.dial(echoPort)
			want := random(3 << 20)
			go func() {
				if n, err := c.Write(want); n != len(want) || err != nil {
					t.Errorf("Write: %d, %v", n, err)
				}
				if err := c.CloseWrite(); err != nil {
					t.Errorf("CloseWrite: %v", err)
				}
			}()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("read %d bytes of %d, equal %v: %v", len(got), len(want), bytes.Equal(got, want), err)
			}
			c.Close()
			g.expectEmpty()
		})
	}
}

func TestNetConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		g := newGuest(t, nil)
		ch := make(chan *guestConn, 1)
		g.accept(1, func(c *guestConn) { ch <- c })
		c1, err = g.d.Dial(testContext(t), 1)
		if err != nil {
			return nil, nil, nil, err
		}
		c2 = <-ch
		return c1, c2, func() { c1.Close(); c2.Close(); g.close() }, nil
	})
}

// The ring indices wrap three times, in packets of one byte.
func TestIndicesWrap(t *testing.T) {
	g := newGuest(t, nil)
	g.accept(echoPort, echo)
	c := g.dial(echoPort)
	const n = 3 * 65536
	go func() {
		b := []byte{0}
		for i := range n {
			b[0] = byte(i)
			if _, err := c.Write(b); err != nil {
				t.Errorf("Write %d: %v", i, err)
				return
			}
		}
		c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || len(got) != n {
		t.Fatalf("read %d of %d: %v", len(got), n, err)
	}
	for i, b := range got {
		if b != byte(i) {
			t.Fatalf("byte %d is %d", i, b)
		}
	}
}

func TestManyStreams(t *testing.T) {
	g := newGuest(t, nil)
	g.accept(echoPort, echo)
	want := random(256 << 10)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			c, err := g.d.Dial(testContext(t), echoPort)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(60 * time.Second))
			wg.Go(func() {
				if _, err := c.Write(want); err != nil {
					t.Error(err)
				}
				c.(*stream).CloseWrite()
			})
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("read %d bytes of %d: %v", len(got), len(want), err)
			}
		})
	}
	wg.Wait()
	g.expectEmpty()
}

func roundTrip(tb testing.TB, c net.Conn) {
	tb.Helper()
	if _, err := c.Write([]byte("ping")); err != nil {
		tb.Fatal(err)
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "ping" {
		tb.Fatalf("read %q: %v", b, err)
	}
}

// T16: a host reader that reads nothing costs one window and holds up nobody.
func TestSlowHostReader(t *testing.T) {
	g := newGuest(t, nil)
	g.accept(echoPort, echo)
	slow, source := g.pair()
	want := random(2 << 20)
	sent := make(chan error, 1)
	go func() { _, err := source.Write(want); source.Close(); sent <- err }()
	eventually(t, "the slow reader's window is full", func() bool {
		slow.mu.Lock()
		defer slow.mu.Unlock()
		return slow.in.n == minWindow
	})
	c := g.dial(echoPort)
	for range 100 {
		roundTrip(t, c)
	}
	slow.mu.Lock()
	if got := len(slow.in.chunks); got > minWindow/chunkSize+1 {
		t.Errorf("%d chunks for a window of %d", got, minWindow)
	}
	slow.mu.Unlock()
	got, err := io.ReadAll(slow)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d of %d: %v", len(got), len(want), err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if slow.window != maxWindow {
		t.Errorf("window %d after a bulk transfer, want %d", slow.window, maxWindow)
	}
}

// A guest reader that reads nothing takes its credit and holds up nobody.
func TestSlowGuestReader(t *testing.T) {
	g := newGuest(t, nil)
	g.accept(echoPort, echo)
	slow, sink := g.pair()
	want := random(1 << 20)
	wrote := make(chan error, 1)
	go func() { _, err := slow.Write(want); slow.CloseWrite(); wrote <- err }()
	eventually(t, "the guest's credit is used up", func() bool {
		slow.mu.Lock()
		defer slow.mu.Unlock()
		return slow.txCnt == guestWindow
	})
	c := g.dial(echoPort)
	for range 100 {
		roundTrip(t, c)
	}
	got, err := io.ReadAll(sink)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("guest read %d of %d: %v", len(got), len(want), err)
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
}

// Streams take turns of turnPackets, and what a stream wants besides data waits no
// longer than for one turn of each.
func TestFairness(t *testing.T) {
	g := newGuest(t, nil)
	g.accept(sinkPort, func(c *guestConn) { io.Copy(io.Discard, c) })
	const n = 3
	var streams []*stream
	for range n {
		streams = append(streams, g.dial(sinkPort))
	}
	last, filler := g.dial(sinkPort), g.dial(sinkPort)
	g.hold()
	if _, err := filler.Write(make([]byte, slots*rxBuffer)); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, st := range streams {
		wg.Go(func() {
			if _, err := st.Write(make([]byte, 128<<10)); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "all buffers are used", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return len(g.held) == slots
	})
	eventually(t, "all streams wait", func() bool {
		for _, st := range streams {
			g.d.mu.Lock()
			queued := st.queued
			g.d.mu.Unlock()
			if !queued {
				return false
			}
		}
		return true
	})
	g.mu.Lock()
	g.record, g.seen = true, nil
	g.mu.Unlock()
	if err := last.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	const turns, packets = 2, 2*n*turnPackets + 1
	given := 0
	eventually(t, "packets came", func() bool {
		g.mu.Lock()
		more := min(packets-given, len(g.held))
		came := len(g.seen)
		g.mu.Unlock()
		g.give(more)
		given += more
		return came == packets
	})
	count := map[uint32]int{}
	g.mu.Lock()
	for i, p := range g.seen {
		count[p.srcPort]++
		if p.op == opShutdown && i > n*turnPackets {
			t.Errorf("the shutdown came after %d packets of %d streams", i, n)
		}
		if p.op == opData && i > 0 && p.srcPort != g.seen[i-1].srcPort && count[p.srcPort]%turnPackets != 1 {
			t.Errorf("packet %d is the %dth of its stream: another's turn was cut short", i, count[p.srcPort])
		}
	}
	g.record = false
	g.mu.Unlock()
	for _, st := range streams {
		if count[st.flow.host] != turns*turnPackets {
			t.Errorf("%d packets of a stream in %d turns: %v", count[st.flow.host], turns, count)
		}
	}
	g.give(-1)
	wg.Wait()
}

func TestHalfClose(t *testing.T) {
	t.Run("host first", func(t *testing.T) {
		g := newGuest(t, nil)
		st, gc := g.pair()
		check(t, st.CloseWrite())
		check(t, st.CloseWrite())
		if _, err := st.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("Write after CloseWrite: %v", err)
		}
		if b, err := io.ReadAll(gc); err != nil || len(b) > 0 {
			t.Errorf("guest read %q, %v", b, err)
		}
		gc.Write([]byte("late"))
		gc.Close()
		if b, err := io.ReadAll(st); err != nil || string(b) != "late" {
			t.Errorf("read %q, %v", b, err)
		}
		st.Close()
		g.expectEmpty()
	})
	t.Run("guest first", func(t *testing.T) {
		g := newGuest(t, nil)
		st, gc := g.pair()
		gc.Write([]byte("early"))
		gc.CloseWrite()
		if b, err := io.ReadAll(st); err != nil || string(b) != "early" {
			t.Errorf("read %q, %v", b, err)
		}
		if _, err := st.Write([]byte("late")); err != nil {
			t.Error(err)
		}
		st.CloseWrite()
		if b, err := io.ReadAll(gc); err != nil || string(b) != "late" {
			t.Errorf("guest read %q, %v", b, err)
		}
		st.Close()
		g.expectEmpty()
	})
	t.Run("guest stops reading", func(t *testing.T) {
		g := newGuest(t, nil)
		st, gc := g.pair()
		wrote := make(chan error, 1)
		go func() { _, err := st.Write(make([]byte, 1<<20)); wrote <- err }()
		gc.shutdown(shutReceive)
		if err := <-wrote; !errors.Is(err, syscall.EPIPE) {
			t.Errorf("Write: %v", err)
		}
		// In two packets it is as much of a shutdown as in one (§5.10.6.6).
		gc.shutdown(shutSend)
		st.Close()
		g.expectEmpty()
	})
}

// A guest that closes gets its reset at once, and what it sent before is read.
func TestGuestCloses(t *testing.T) {
	g := newGuest(t, nil)
	st, gc := g.pair()
	g.mu.Lock()
	g.record = true
	g.mu.Unlock()
	gc.Write([]byte("last words"))
	gc.Close()
	eventually(t, "the device resets the stream", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return len(g.seen) == 1 && g.seen[0].op == opReset && len(g.conns) == 0
	})
	if b, err := io.ReadAll(st); err != nil || string(b) != "last words" {
		t.Errorf("read %q, %v", b, err)
	}
	if _, err := st.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("Write: %v", err)
	}
	st.Close()
	g.expectEmpty()
}

func TestGuestResets(t *testing.T) {
	g := newGuest(t, nil)
	st, gc := g.pair()
	gc.Write([]byte("last words"))
	g.reset(gc.flow)
	b, err := io.ReadAll(st)
	if string(b) != "last words" || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %q, %v", b, err)
	}
	if _, err := st.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Write: %v", err)
	}
	st.Close()
	g.expectEmpty()
}

// A guest that never agrees to a shutdown is reset when the linger time is over.
func TestCloseIsBounded(t *testing.T) {
	g := newGuest(t, func(c *guestConfig) {
		c.options = []Option{func(d *Device) { d.linger = 50 * time.Millisecond }}
	})
	st, gc := g.pair()
	reset := make(chan struct{})
	g.mu.Lock()
	g.hook = func(p packet, _ []byte) bool {
		if p.op == opReset {
			close(reset)
		}
		return p.op == opShutdown
	}
	g.mu.Unlock()
	// Data that was under way is dropped without harm.
	st.Close()
	gc.Write([]byte("nobody reads this"))
	if _, err := st.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read after Close: %v", err)
	}
	select {
	case <-reset:
	case <-time.After(10 * time.Second):
		t.Error("no reset within 10 s")
	}
	g.expectEmpty()
}

func TestDial(t *testing.T) {
	t.Run("refused", func(t *testing.T) {
		g := newGuest(t, nil)
		_, err := g.d.Dial(testContext(t), 9)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("Dial: %v", err)
		}
		g.expectEmpty()
	})
	t.Run("guest is mute", func(t *testing.T) {
		g := newGuest(t, nil)
		g.intercept(func(p packet, _ []byte) bool { return p.op == opRequest })
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		if _, err := g.d.Dial(ctx, 9); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Dial: %v", err)
		}
		g.expectEmpty()
	})
	t.Run("no driver", func(t *testing.T) {
		g := newGuest(t, func(c *guestConfig) { c.noStart = true })
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		if _, err := g.d.Dial(ctx, 9); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Dial: %v", err)
		}
	})
	t.Run("waits for the driver", func(t *testing.T) {
		var cfg guestConfig
		g := newGuest(t, func(c *guestConfig) { c.noStart = true; cfg = *c })
		g.accept(echoPort, echo)
		dialled := make(chan error, 1)
		go func() {
			c, err := g.d.Dial(testContext(t), echoPort)
			if err == nil {
				c.Close()
			}
			dialled <- err
		}()
		g.start(cfg)
		check(t, <-dialled)
	})
	t.Run("device closed", func(t *testing.T) {
		d := New(guestCID)
		d.Close()
		if _, err := d.Dial(context.Background(), 9); !errdefs.IsUnavailable(err) {
			t.Errorf("Dial: %v", err)
		}
	})
	t.Run("device closes meanwhile", func(t *testing.T) {
		for _, driver := range []bool{false, true} {
			g := newGuest(t, func(c *guestConfig) { c.noStart = !driver })
			g.intercept(func(packet, []byte) bool { return true })
			dialled := make(chan error, 1)
			go func() { _, err := g.d.Dial(testContext(t), echoPort); dialled <- err }()
			time.Sleep(20 * time.Millisecond)
			g.d.Close()
			if err := <-dialled; !errdefs.IsUnavailable(err) {
				t.Errorf("driver %v: Dial: %v", driver, err)
			}
		}
	})
	t.Run("budget", func(t *testing.T) { // T16
		g := newGuest(t, func(c *guestConfig) {
			c.options = []Option{WithReceiveBudget(2 * (minWindow + chunkSize))}
		})
		g.accept(echoPort, echo)
		a, _ := g.dial(echoPort), g.dial(echoPort)
		if _, err := g.d.Dial(testContext(t), echoPort); !errdefs.IsResourceExhausted(err) {
			t.Errorf("third Dial: %v", err)
		}
		a.Close()
		g.dial(echoPort)
	})
}

// Everything ends when the device does.
func TestDeviceCloses(t *testing.T) {
	g := newGuest(t, nil)
	st, _ := g.pair()
	read, wrote := make(chan error, 1), make(chan error, 1)
	go func() { _, err := st.Read(make([]byte, 1)); read <- err }()
	go func() { _, err := st.Write(make([]byte, 1<<20)); wrote <- err }()
	time.Sleep(10 * time.Millisecond)
	g.d.Close()
	g.d.Close()
	for _, err := range []error{<-read, <-wrote} {
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Error(err)
		}
	}
	fe, be := socketPair(t)
	defer fe.Close()
	if err := g.d.Serve(be); !errdefs.IsUnavailable(err) {
		t.Errorf("Serve after Close: %v", err)
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	g := newGuest(b, nil)
	g.accept(echoPort, echo)
	c, err := g.d.Dial(testContext(b), echoPort)
	check(b, err)
	defer c.Close()
	for b.Loop() {
		roundTrip(b, c)
	}
}

func BenchmarkHostToGuest(b *testing.B) {
	g := newGuest(b, nil)
	g.accept(sinkPort, func(c *guestConn) { io.CopyBuffer(io.Discard, struct{ io.Reader }{c}, make([]byte, 64<<10)) })
	c, err := g.d.Dial(testContext(b), sinkPort)
	check(b, err)
	defer c.Close()
	buf := make([]byte, 32<<10)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGuestToHost(b *testing.B) {
	g := newGuest(b, nil)
	g.accept(sinkPort, func(c *guestConn) {
		for buf := make([]byte, 64<<10); ; {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	})
	c, err := g.d.Dial(testContext(b), sinkPort)
	check(b, err)
	defer c.Close()
	buf := make([]byte, 32<<10)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
	}
}
