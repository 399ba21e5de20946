package shim

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// vanishCheck is how often a write that the guest doesn't take is interrupted
// to see whether its client is still there.
const vanishCheck = 2 * time.Second

// linger bounds how long a client may take to close what the guest has closed.
const linger = 5 * time.Second

// largeBuffer is for a direction that fills a small one: what goes to the guest in
// one write is worked on there in one go.
const (
	smallBuffer = 16 << 10
	largeBuffer = 256 << 10
)

var (
	smallBuffers = sync.Pool{New: func() any { b := make([]byte, smallBuffer); return &b }}
	largeBuffers = sync.Pool{New: func() any { b := make([]byte, largeBuffer); return &b }}
)

// splice copies the bytes of one data connection both ways, frames and all, until
// the client closes it, or the guest; then both are closed. Ends of file are frames,
// so that a client that closes ends both directions. A guest that takes no more
// has perhaps not said all: what it wrote before it closed reaches the client.
func splice(client net.Conn, guest net.Conn) {
	var wg sync.WaitGroup
	wg.Go(func() {
		if !copyUntilVanished(guest, client, client) {
			// A connection that is closed with unread bytes breaks off at the client.
			_, _ = io.Copy(io.Discard, onlyReader{client})
		}
		guest.Close() // the client has ended, or the guest has long since
	})
	wg.Go(func() {
		copyUntilVanished(client, guest, client)
		guest.Close()
		_ = client.SetReadDeadline(time.Now().Add(linger))
		if c, ok := client.(interface{ CloseWrite() error }); ok {
			_ = c.CloseWrite()
		}
	})
	wg.Wait()
	client.Close()
}

// copyUntilVanished copies src to dst; while dst doesn't take bytes it looks
// whether client is still there. It tells whether src has ended; else dst takes no
// more.
func copyUntilVanished(dst, src, client net.Conn) (ended bool) {
	small := smallBuffers.Get().(*[]byte)
	defer smallBuffers.Put(small)
	var large *[]byte
	release := func() {
		if large != nil {
			largeBuffers.Put(large)
			large = nil
		}
	}
	defer release()
	for {
		buf := *small
		if large != nil {
			buf = *large
		}
		n, err := src.Read(buf)
		for p := buf[:n]; len(p) > 0; {
			_ = dst.SetWriteDeadline(time.Now().Add(vanishCheck))
			m, werr := dst.Write(p)
			p = p[m:]
			if werr == nil {
				continue
			}
			if !errors.Is(werr, os.ErrDeadlineExceeded) || vanished(client) {
				return false
			}
		}
		if err != nil {
			return true
		}
		if n <= smallBuffer/2 {
			release()
		} else if large == nil {
			large = largeBuffers.Get().(*[]byte)
		}
	}
}
