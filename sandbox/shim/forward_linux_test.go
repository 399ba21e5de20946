package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/shim/shimtest"
)

// tcpPair is both ends of a TCP connection.
func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	dialled, accepted := ends(t, "tcp", "127.0.0.1:0")
	_ = dialled.SetDeadline(time.Now().Add(20 * time.Second))
	return dialled.(*net.TCPConn), accepted.(*net.TCPConn)
}

// handOver hands a connection over as a client does, which then closes its own.
func (r *rig) handOver(h guestapi.Header, tcp *net.TCPConn) error {
	defer tcp.Close()
	conn, err := net.Dial("unix", filepath.Join(r.cfg.RunDir, shimapi.SocketData))
	if err != nil {
		return err
	}
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	with, err := shimapi.WithTCP(conn.(*net.UnixConn), tcp)
	if err != nil {
		return err
	}
	s, err := guestapi.Open(with, h)
	if err != nil {
		return err
	}
	return s.Close()
}

// Many at one time, some of which break off; goleak sees what stays.
func TestHandedOverConnections(t *testing.T) {
	r := newRig(t, &shimtest.Driver{}, Timeouts{})
	r.boot()
	port := guestapi.Header{Kind: guestapi.Port, Port: 7}
	var wg sync.WaitGroup
	for i := range 80 {
		c, tcp := tcpPair(t)
		wg.Go(func() {
			defer c.Close()
			if err := r.handOver(port, tcp); err != nil {
				t.Errorf("%d: %v", i, err)
				return
			}
			if i%4 == 3 {
				_, _ = c.Write(make([]byte, 1<<16))
				_ = c.SetLinger(0)
				return
			}
			msg := bytes.Repeat(fmt.Append(nil, i), 500_000)
			go func() {
				_, _ = c.Write(msg)
				_ = c.CloseWrite()
			}()
			if b, err := io.ReadAll(c); !bytes.Equal(b, msg) || err != nil {
				t.Errorf("%d: %d of %d bytes, %v", i, len(b), len(msg), err)
			}
		})
	}
	wg.Wait()

	c, tcp := tcpPair(t)
	var refused *guestapi.ResetError
	if err := r.handOver(guestapi.Header{Kind: guestapi.Port, Port: 8}, tcp); !errors.As(err, &refused) || refused.Reason != "nothing listens on port 8" {
		t.Errorf("nobody listens: %v", err)
	}
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection that was refused: %d bytes, %v", n, err)
	}
	// A descriptor where none belongs ends its connection.
	c, tcp = tcpPair(t)
	if err := r.handOver(guestapi.Header{Kind: guestapi.Stdin, Container: "x"}, tcp); err == nil || errors.As(err, &refused) {
		t.Errorf("for a container's input: %v", err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the connection for a container's input: %v", err)
	}
}

func TestHandedOverIsTCP(t *testing.T) {
	ours, theirs := pair(t)
	f, err := theirs.File()
	if err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	if _, err := tcpOf(f); err == nil || !strings.Contains(err.Error(), "not TCP") {
		t.Errorf("a unix socket: %v", err)
	}
	if _, err := ours.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("it is not closed: %v", err)
	}
	if f, err = os.Open(os.DevNull); err != nil {
		t.Fatal(err)
	}
	if _, err := tcpOf(f); err == nil {
		t.Error("a file was taken for a connection")
	}
}

// A client that breaks off while the guest takes nothing and says nothing ends the
// connection for the guest, too; and so does the end of the shim's service.
func TestBrokenClientEndsTheGuestsStream(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(c *net.TCPConn, cancel context.CancelFunc)
	}{
		{"the client breaks off", func(c *net.TCPConn, _ context.CancelFunc) { _ = c.SetLinger(0); c.Close() }},
		{"the service ends", func(_ *net.TCPConn, cancel context.CancelFunc) { cancel() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client, ours := tcpPair(t)
			guest, theirs := pair(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan struct{})
			go func() { defer close(done); joinUntilVanished(ctx, guestapi.NewStream(theirs), ours) }()
			_ = client.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
			for block := make([]byte, 64<<10); ; {
				if _, err := client.Write(block); err != nil {
					break // everything on the way is full
				}
			}
			tt.end(client, cancel)
			select {
			case <-done:
			case <-time.After(3 * vanishCheck):
				t.Fatal("the guest's side goes on")
			}
			_ = guest.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := io.Copy(io.Discard, guest); err != nil && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the guest's connection: %v", err)
			}
		})
	}
}
