package cri

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// polled reports whether one of hangUpEvents has happened to a connection; events
// are those that have to be asked for.
func polled(c net.Conn, events int16) bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	var hup bool
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: events}}
		_, err := unix.Poll(p, 0)
		hup = err == nil && p[0].Revents&hangUpEvents != 0
	})
	return err != nil || hup
}
