//go:build linux && (amd64 || arm64)

package agent

import (
	"io"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// directConn reads and writes a non-blocking socket by system calls of which the
// Go scheduler knows nothing. It would take the only processor of a small guest
// away from a goroutine whose call lasts more than 20 µs, as any does in a guest
// that is emulated, and keep a thread awake to look for such goroutines: half of
// all context switches of a busy stream. The calls don't block, so nothing is
// held up; waiting is the poller's as ever.
type directConn struct {
	net.Conn
	raw syscall.RawConn
}

// direct returns c as a directConn if it is a socket, else c.
func direct(c net.Conn) net.Conn {
	if s, ok := c.(syscall.Conn); ok {
		if raw, err := s.SyscallConn(); err == nil {
			return &directConn{c, raw}
		}
	}
	return c
}

// directTCP is a TCP connection whose bytes go by way of a directConn.
type directTCP struct {
	*net.TCPConn
	bytes net.Conn
}

func (c *directTCP) Read(p []byte) (int, error)  { return c.bytes.Read(p) }
func (c *directTCP) Write(p []byte) (int, error) { return c.bytes.Write(p) }

func (c *directConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n, err := transfer(unix.SYS_READ, c.raw.Read, p)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

func (c *directConn) Write(p []byte) (int, error) {
	total := 0
	for total < len(p) {
		n, err := transfer(unix.SYS_WRITE, c.raw.Write, p[total:])
		if err != nil {
			return total, err
		}
		total += n
	}
	return total, nil
}

// transfer makes the call call(fd, p, len(p)) when wait says that it is time.
func transfer(call uintptr, wait func(func(fd uintptr) bool) error, p []byte) (int, error) {
	var n uintptr
	var errno syscall.Errno
	err := wait(func(fd uintptr) bool {
		for errno = unix.EINTR; errno == unix.EINTR; {
			n, _, errno = unix.RawSyscall(call, fd, uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		}
		return errno != unix.EAGAIN
	})
	switch {
	case err != nil:
		return 0, err
	case errno != 0:
		return 0, errno
	}
	return int(n), nil
}
