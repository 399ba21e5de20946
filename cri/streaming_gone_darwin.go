package cri

import (
	"net"

	"golang.org/x/sys/unix"
)

// hungUp reports whether the peer of a connection has closed it, also while bytes
// of it are unread.
func hungUp(c net.Conn) bool { return polled(c, 0) }

const hangUpEvents = unix.POLLHUP | unix.POLLERR | unix.POLLNVAL
