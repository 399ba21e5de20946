package api

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// relaySizes are the buffers of one direction of a forwarded port: it has a larger
// one while it fills the one it has. Each buffer's worth is a switch to the process
// that it is for and one back, which is what a byte costs in a guest that is
// emulated: with 256 KiB it is 60% of what it is with 64 KiB, more gain little.
var relaySizes = [...]int{16 << 10, FrameData, 4 * FrameData}

// maxLarge bounds the largest buffers of all connections, to 8 MiB.
const maxLarge = 32

var (
	relayBuffers [len(relaySizes)]sync.Pool // of *[]byte
	largeSlots   = make(chan struct{}, maxLarge)
)

// TCP is what [Join] needs of a TCP connection.
type TCP interface {
	net.Conn
	CloseWrite() error
	SetLinger(sec int) error
}

// Join copies both ways between s and target until both have ended, and closes
// target. An end of file of one side becomes the other's; a break becomes a reset.
// Whoever closes both ends it.
func Join(s *Stream, target TCP) {
	defer target.Close()
	abort := sync.OnceFunc(func() {
		_ = target.SetLinger(0) // close sends RST
		target.Close()
		_ = s.Conn().SetDeadline(time.Unix(1, 0))
	})
	fail := func(err error) {
		if err != nil {
			s.Reset("connection broken: " + err.Error())
			abort()
		}
	}
	var both sync.WaitGroup
	both.Go(func() {
		err := relay(target, s)
		if err == nil {
			err = target.CloseWrite()
			if errors.Is(err, syscall.ENOTCONN) {
				err = nil
			}
		}
		fail(err)
	})
	both.Go(func() {
		err := relay(s, target)
		if err == nil {
			err = s.CloseWrite()
		}
		fail(err)
	})
	both.Wait()
}

// relay copies src to dst until src ends, which is no error.
func relay(dst io.Writer, src io.Reader) error {
	size, buf := 0, relayBuffer(0)
	defer func() { releaseRelayBuffer(size, buf) }()
	for {
		n, err := src.Read(*buf)
		if n > 0 {
			if _, err := dst.Write((*buf)[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		want := size
		switch {
		case size > 0 && n <= relaySizes[size-1]/2:
			want--
		case size < len(relaySizes)-1 && n > relaySizes[size]/2:
			want++
		}
		if want != size {
			if b := relayBuffer(want); b != nil {
				releaseRelayBuffer(size, buf)
				size, buf = want, b
			}
		}
	}
}

// relayBuffer returns a buffer of relaySizes[size], or nil if there are as many of
// the largest as there may be.
func relayBuffer(size int) *[]byte {
	if size == len(relaySizes)-1 {
		select {
		case largeSlots <- struct{}{}:
		default:
			return nil
		}
	}
	if b, ok := relayBuffers[size].Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, relaySizes[size])
	return &b
}

func releaseRelayBuffer(size int, b *[]byte) {
	relayBuffers[size].Put(b)
	if size == len(relaySizes)-1 {
		<-largeSlots
	}
}
