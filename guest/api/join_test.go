package api

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// joined returns a stream that Join has joined to a TCP connection, and that
// connection's other end.
func joined(t *testing.T) (*Stream, *net.TCPConn) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	target, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "stream")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer ends[1].Close()
		Join(NewStream(ends[1]), target.(*net.TCPConn))
	}()
	t.Cleanup(func() {
		ends[0].Close()
		server.Close()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Error("Join has not ended 10 s after both its ends")
		}
		if n := len(largeSlots); n != 0 {
			t.Errorf("%d large buffers are still taken", n)
		}
	})
	for _, c := range []net.Conn{ends[0], server} {
		if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	return NewStream(ends[0]), server.(*net.TCPConn)
}

// Megabytes both ways at one time, then each end of file in turn.
func TestRelayCarriesAllBytes(t *testing.T) {
	s, server := joined(t)
	out, back := make([]byte, 5<<20+1), make([]byte, 3<<20+7)
	_, _ = rand.Read(out)
	_, _ = rand.Read(back)
	sent := make(chan error, 2)
	go func() {
		_, err := s.Write(out)
		sent <- errors.Join(err, s.CloseWrite())
	}()
	go func() {
		_, err := server.Write(back)
		sent <- errors.Join(err, server.CloseWrite())
	}()
	received := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(server)
		received <- b
	}()
	if b, err := io.ReadAll(s); err != nil || !bytes.Equal(b, back) {
		t.Errorf("from the server came %d bytes of %d, %v", len(b), len(back), err)
	}
	if b := <-received; !bytes.Equal(b, out) {
		t.Errorf("to the server went %d bytes of %d", len(b), len(out))
	}
	for range 2 {
		if err := <-sent; err != nil {
			t.Error(err)
		}
	}
}

func TestRelayPassesResetsOn(t *testing.T) {
	t.Run("of the server", func(t *testing.T) {
		s, server := joined(t)
		if err := server.SetLinger(0); err != nil {
			t.Fatal(err)
		}
		server.Close()
		var reset *ResetError
		if _, err := io.ReadAll(s); !errors.As(err, &reset) {
			t.Errorf("the host reads %v, want a reset", err)
		}
	})
	t.Run("of the host", func(t *testing.T) {
		s, server := joined(t)
		s.Close() // without an end of file
		if _, err := io.ReadAll(server); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the server reads %v, want a reset", err)
		}
	})
}
