package shim

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// vanished reports whether the peer of a unix socket has closed it, also while
// bytes of it are unread.
func vanished(c net.Conn) bool {
	u, ok := c.(*net.UnixConn)
	return ok && polled(u, hangUp)&(unix.POLLHUP|hangUp|unix.POLLERR|unix.POLLNVAL) != 0
}

// broken reports whether a TCP connection was reset, also while bytes of it are
// unread. A peer that has closed it may have closed one direction only.
func broken(c *net.TCPConn) bool {
	return polled(c, 0)&(unix.POLLERR|unix.POLLNVAL) != 0
}

// polled returns what poll says of c at this moment: of events, and of what is
// never masked.
func polled(c syscall.Conn, events int16) (returned int16) {
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			p := []unix.PollFd{{Fd: int32(fd), Events: events}}
			if _, err := unix.Poll(p, 0); err == nil {
				returned = p[0].Revents
			}
		})
	}
	if err != nil { // closed here
		return unix.POLLNVAL
	}
	return returned
}
