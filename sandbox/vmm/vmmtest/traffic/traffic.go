// Package traffic is what measurements send through a stream, and the server that
// takes it, for paths of which the far end is in a guest. It promises nothing but
// that each path carries the same bytes.
package traffic

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Requests are an operation and a number of bytes.
const (
	ping    = 1 // answered by one byte
	send    = 2 // that many bytes follow and are answered by one
	receive = 3 // answered by that many bytes

	requestSize = 9
	// bufferSize is large, so that a path is measured and not its far end.
	bufferSize = 256 << 10
)

// Serve answers requests until c ends.
func Serve(c io.ReadWriter) error {
	var buf []byte
	var request [requestSize]byte
	for {
		if _, err := io.ReadFull(c, request[:]); err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return err
		}
		if buf == nil && request[0] != ping {
			buf = make([]byte, bufferSize)
		}
		n := binary.LittleEndian.Uint64(request[1:])
		var err error
		switch request[0] {
		case ping:
			_, err = c.Write(request[:1])
		case send:
			if err = discard(c, n, buf); err == nil {
				_, err = c.Write(request[:1])
			}
		case receive:
			err = fill(c, n, buf)
		default:
			err = fmt.Errorf("operation %d", request[0])
		}
		if err != nil {
			return err
		}
	}
}

// Ping sends a byte there and back.
func Ping(c io.ReadWriter) error { return do(c, ping, 0, nil, nil) }

// Send sends n bytes to the server and returns when it has them.
func Send(c io.ReadWriter, n int64) error {
	return do(c, send, n, func(buf []byte) error { return fill(c, uint64(n), buf) }, nil)
}

// Receive has the server send n bytes.
func Receive(c io.ReadWriter, n int64) error {
	return do(c, receive, n, nil, func(buf []byte) error { return discard(c, uint64(n), buf) })
}

// Measure opens streams to servers by dial, one after the other, and returns how
// long it takes then to move bytes in all over them, in equal parts. move is Send or
// Receive.
func Measure(dial func() (io.ReadWriteCloser, error), streams int, bytes int64, move func(io.ReadWriter, int64) error) (time.Duration, error) {
	conns := make([]io.ReadWriteCloser, 0, streams)
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for range streams {
		c, err := dial()
		if err != nil {
			return 0, err
		}
		conns = append(conns, c)
		if err := Ping(c); err != nil {
			return 0, err
		}
	}
	errs := make([]error, streams)
	var all sync.WaitGroup
	began := time.Now()
	for i, c := range conns {
		all.Go(func() { errs[i] = move(c, bytes/int64(streams)) })
	}
	all.Wait()
	return time.Since(began), errors.Join(errs...)
}

func do(c io.ReadWriter, op byte, n int64, out, in func(buf []byte) error) error {
	request := binary.LittleEndian.AppendUint64([]byte{op}, uint64(n))
	if _, err := c.Write(request); err != nil {
		return err
	}
	if in != nil {
		return in(make([]byte, bufferSize))
	}
	if out != nil {
		if err := out(make([]byte, bufferSize)); err != nil {
			return err
		}
	}
	_, err := io.ReadFull(c, request[:1])
	return err
}

func fill(w io.Writer, n uint64, buf []byte) error {
	for n > 0 {
		k, err := w.Write(buf[:min(n, uint64(len(buf)))])
		if err != nil {
			return err
		}
		n -= uint64(k)
	}
	return nil
}

func discard(r io.Reader, n uint64, buf []byte) error {
	for n > 0 {
		k, err := r.Read(buf[:min(n, uint64(len(buf)))])
		n -= uint64(k)
		if err != nil && n > 0 {
			return err
		}
	}
	return nil
}
