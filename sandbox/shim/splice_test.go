package shim

import (
	"bytes"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// pair is both ends of a unix socket.
func pair(t *testing.T) (a, b *net.UnixConn) {
	dialled, accepted := ends(t, "unix", filepath.Join(t.TempDir(), "s"))
	return dialled.(*net.UnixConn), accepted.(*net.UnixConn)
}

// ends are both ends of a connection; what is left open is closed with the test.
func ends(t *testing.T, network, address string) (dialled, accepted net.Conn) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if dialled, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialled.Close() })
	if accepted, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { accepted.Close() })
	return dialled, accepted
}

// T17: a process that ends without having read its input has still said its last
// words to a client that goes on sending.
func TestOutputOutlivesInput(t *testing.T) {
	client, ours := pair(t)
	guest, theirs := pair(t)
	done := make(chan struct{})
	go func() { defer close(done); splice(ours, theirs) }()

	if err := guest.CloseRead(); err != nil { // writes to it fail from now on
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() { _, err := client.Write(make([]byte, 1<<20)); sent <- err }()
	if err := <-sent; err != nil {
		t.Fatalf("the client's input after the guest takes no more: %v", err)
	}
	last := bytes.Repeat([]byte("last words "), 50_000)
	go func() {
		st := guestapi.NewStream(guest)
		_, _ = st.Write(last)
		_ = st.CloseWrite()
		st.Close()
	}()
	_ = client.SetReadDeadline(time.Now().Add(10 * time.Second))
	got, err := io.ReadAll(guestapi.NewStream(client))
	if err != nil || !bytes.Equal(got, last) {
		t.Errorf("%d of %d bytes, %v", len(got), len(last), err)
	}
	if n, err := client.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("after the end: %d bytes, %v", n, err)
	}
	client.Close()
	select {
	case <-done:
	case <-time.After(linger / 2):
		t.Error("the client has closed, and its connection is still served")
	}
}

// A client that vanishes while the guest takes nothing and says nothing ends the
// connection for the guest, too.
func TestVanishedClientEndsTheGuestsStream(t *testing.T) {
	client, ours := pair(t)
	guest, theirs := pair(t)
	done := make(chan struct{})
	go func() { defer close(done); splice(ours, theirs) }()
	_ = client.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for block := make([]byte, 64<<10); ; {
		if _, err := client.Write(block); err != nil {
			break // everything on the way is full
		}
	}
	client.Close()
	select {
	case <-done:
	case <-time.After(3 * vanishCheck):
		t.Fatal("the guest's side goes on")
	}
	_ = guest.SetReadDeadline(time.Now().Add(time.Second))
	if _, err := io.Copy(io.Discard, guest); err != nil {
		t.Errorf("the guest's connection: %v", err)
	}
}
