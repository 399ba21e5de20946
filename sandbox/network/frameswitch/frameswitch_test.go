package frameswitch

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// TestMain is the switch's process, too.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "switch" {
		os.Exit(Main(os.Args[2:]))
	}
	goleak.VerifyTestMain(m)
}

var (
	macA      = mac{2, 0, 0, 0, 0, 0xa}
	macB      = mac{2, 0, 0, 0, 0, 0xb}
	macC      = mac{2, 0, 0, 0, 0, 0xc}
	broadcast = mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

// serve runs a switch at path until the returned function is called.
func serve(t testing.TB, path string) (stop func()) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	s, done := New(), make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		s.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

// machine is the guest's side of a port.
type machine struct {
	t    testing.TB
	mac  mac
	port *Port
	conn net.Conn
}

func join(t testing.TB, path string, m mac) *machine {
	t.Helper()
	p, err := Join(t.Context(), path, m[:])
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.FileConn(p.File())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); p.Close() })
	return &machine{t, m, p, conn}
}

func frame(to, from mac, payload string) []byte {
	return append(append(append([]byte{}, to[:]...), from[:]...), "\x08\x00"+payload...)
}

func (m *machine) send(f []byte) {
	m.t.Helper()
	if _, err := m.conn.Write(f); err != nil {
		m.t.Fatalf("%s sends: %v", m.mac, err)
	}
}

// receive returns the payload of the next frame, "" when none comes.
func (m *machine) receive(within time.Duration) string {
	m.t.Helper()
	buf := make([]byte, maxFrame+1)
	m.conn.SetReadDeadline(time.Now().Add(within))
	n, err := m.conn.Read(buf)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ""
	}
	if err != nil || n < headerSize {
		m.t.Fatalf("%s receives: %d bytes, %v", m.mac, n, err)
	}
	return string(buf[headerSize:n])
}

func (m *machine) expect(want string) {
	m.t.Helper()
	if got := m.receive(5 * time.Second); got != want {
		m.t.Fatalf("%s received %d bytes %.40q, want %d bytes %.40q", m.mac, len(got), got, len(want), want)
	}
}

func (m *machine) expectNothing() {
	m.t.Helper()
	if got := m.receive(50 * time.Millisecond); got != "" {
		m.t.Fatalf("%s received %.40q, want nothing", m.mac, got)
	}
}

func TestForward(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	serve(t, path)
	a, b, c := join(t, path, macA), join(t, path, macB), join(t, path, macC)

	t.Run("to one station", func(t *testing.T) {
		a.send(frame(macB, macA, "for b"))
		b.expect("for b")
		c.expectNothing()
	})
	t.Run("broadcast, but not back", func(t *testing.T) {
		a.send(frame(broadcast, macA, "for all"))
		b.expect("for all")
		c.expect("for all")
		a.expectNothing()
	})
	t.Run("nobody has that address", func(t *testing.T) {
		a.send(frame(mac{2, 9}, macA, "lost"))
		a.send(frame(macA, macA, "to itself"))
		b.expectNothing()
		a.expectNothing()
	})
	t.Run("another's address as source", func(t *testing.T) {
		a.send(frame(macC, macB, "forged"))
		c.expectNothing()
		c.send(frame(macB, macC, "b's traffic is still b's"))
		b.expect("b's traffic is still b's")
	})
	t.Run("the largest frame, one byte more, and too short", func(t *testing.T) {
		largest := strings.Repeat("x", maxFrame-headerSize)
		a.send(frame(macB, macA, largest))
		b.expect(largest)
		a.send(frame(macB, macA, largest+"y"))
		a.send(macB[:])
		b.expectNothing()
	})
}

// A machine that takes nothing loses its own frames and nobody else's.
func TestSlowMachine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	serve(t, path)
	a, b, _ := join(t, path, macA), join(t, path, macB), join(t, path, macC)
	big := strings.Repeat("x", 60000)
	for range 500 {
		a.send(frame(macC, macA, big))
	}
	a.send(frame(macB, macA, "in time"))
	b.expect("in time")
}

// Ports outlive the switch and join the next one; a machine sends and receives
// on the socket that it had.
func TestSwitchRestarts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	stop := serve(t, path)
	a, b := join(t, path, macA), join(t, path, macB)
	a.send(frame(macB, macA, "before"))
	b.expect("before")
	stop()
	serve(t, path)
	rejoined(t, a, b)
}

// rejoined waits until both are joined to a second switch.
func rejoined(t *testing.T, a, b *machine) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		a.send(frame(b.mac, a.mac, "after"))
		if b.receive(100*time.Millisecond) == "after" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no frame passes the second switch")
		}
	}
}

// The owner of a machine that restarts joins with the same address before the
// switch has seen the first connection end, or after.
func TestJoinAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	serve(t, path)
	a, b := join(t, path, macA), join(t, path, macB)
	again := join(t, path, macB)
	a.send(frame(macB, macA, "for the second"))
	again.expect("for the second")
	b.port.Close()
	a.send(frame(macB, macA, "still for the second"))
	again.expect("still for the second")
	again.port.Close()
	third := join(t, path, macB)
	a.send(frame(macB, macA, "for the third"))
	third.expect("for the third")
}

func TestNoSwitch(t *testing.T) {
	_, err := Join(t.Context(), filepath.Join(t.TempDir(), "s"), macA[:])
	if !errors.Is(err, syscall.ENOENT) {
		t.Errorf("Join without a switch: %v, want ENOENT", err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	path := filepath.Join(t.TempDir(), "s")
	serve(t, path)
	if _, err := Join(cancelled, path, macA[:]); !errors.Is(err, context.Canceled) {
		t.Errorf("Join with a cancelled context: %v", err)
	}
}

// What a client gets wrong costs it its connection, and the switch nothing.
func TestBadHello(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	serve(t, path)
	datagrams, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer datagrams[0].Close()
	defer datagrams[1].Close()
	stream, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(stream[0])
	defer unix.Close(stream[1])
	fd := int(datagrams[1].Fd())
	for _, tt := range []struct {
		name, said string
		fds        []int
		want       string
	}{
		{"no JSON", "hello", []int{fd}, "not understood"},
		{"no address", `{}`, []int{fd}, "not the MAC address"},
		{"a group's address", `{"mac":"ff:ff:ff:ff:ff:ff"}`, []int{fd}, "not the MAC address"},
		{"an address of 8 bytes", `{"mac":"02:00:00:00:00:00:00:01"}`, []int{fd}, "not the MAC address"},
		{"no socket", `{"mac":"02:00:00:00:00:01"}`, nil, "without its socket"},
		{"a stream socket", `{"mac":"02:00:00:00:00:01"}`, []int{stream[0]}, "no datagram socket"},
		{"two sockets", `{"mac":"02:00:00:00:00:01"}`, []int{fd, fd}, "socket"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			var rights []byte
			if tt.fds != nil {
				rights = unix.UnixRights(tt.fds...)
			}
			if _, _, err := conn.WriteMsgUnix([]byte(tt.said), rights, nil); err != nil {
				t.Fatal(err)
			}
			conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			buf := make([]byte, maxWelcome)
			n, _ := conn.Read(buf)
			if !strings.Contains(string(buf[:n]), tt.want) {
				t.Errorf("answer %q, want %q in it", buf[:n], tt.want)
			}
		})
	}
	a, b := join(t, path, macA), join(t, path, macB)
	a.send(frame(macB, macA, "all is well"))
	b.expect("all is well")
}

func BenchmarkForward(b *testing.B) {
	path := filepath.Join(b.TempDir(), "s")
	serve(b, path)
	from, to := join(b, path, macA), join(b, path, macB)
	f := frame(macB, macA, string(bytes.Repeat([]byte{1}, 1500)))
	buf := make([]byte, maxFrame)
	b.SetBytes(int64(len(f)))
	b.ReportAllocs()
	for b.Loop() {
		from.send(f)
		if _, err := to.conn.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
}
