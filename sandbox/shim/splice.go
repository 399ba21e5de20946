package shim

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// vanishCheck is how often a write that the guest doesn't take is interrupted
// to see whether its client is still there.
const vanishCheck = 2 * time.Second

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

// splice copies the bytes of one data connection both ways, frames and all,
// until either side closes, and closes both. Ends of file are frames, so that a
// closed connection is always the end of both directions.
func splice(client net.Conn, guest net.Conn) {
	var wg sync.WaitGroup
	wg.Go(func() {
		copyUntilVanished(guest, client, client)
		guest.Close()
		client.Close()
	})
	wg.Go(func() {
		copyUntilVanished(client, guest, client)
		guest.Close()
		client.Close()
	})
	wg.Wait()
}

// copyUntilVanished copies src to dst; while dst doesn't take bytes it looks
// whether client is still there.
func copyUntilVanished(dst, src, client net.Conn) {
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
				return
			}
		}
		if err != nil {
			return
		}
		if n <= smallBuffer/2 {
			release()
		} else if large == nil {
			large = largeBuffers.Get().(*[]byte)
		}
	}
}
