// Package api is the service between the daemon and a pod's shim.
package api

import (
	"net"

	"golang.org/x/sys/unix"
)

//go:generate protoc -I../../.. --go_out=../../.. --go_opt=paths=source_relative --go-ttrpc_out=../../.. --go-ttrpc_opt=paths=source_relative sandbox/shim/api/shim.proto

// Version is this service's version. A daemon drives shims of its own and of
// the previous version.
const Version = 1

// Names of the sockets in a pod's run directory.
const (
	SocketControl = "s" // ttrpc
	SocketData    = "d" // streams, see guest/api
)

// WithTCP returns c, a connection to the data socket, as one that hands tcp over
// with the header that is written to it: the shim joins tcp to the port that the
// header names, and c is only for the answer. tcp is to stay open until then.
func WithTCP(c *net.UnixConn, tcp *net.TCPConn) (net.Conn, error) {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil, err
	}
	h := &handingOver{UnixConn: c}
	if err := raw.Control(func(fd uintptr) { h.rights = unix.UnixRights(int(fd)) }); err != nil {
		return nil, err
	}
	return h, nil
}

// handingOver sends a descriptor along with the first bytes.
type handingOver struct {
	*net.UnixConn
	rights []byte
}

func (c *handingOver) Write(p []byte) (int, error) {
	rights := c.rights
	c.rights = nil
	n, _, err := c.WriteMsgUnix(p, rights, nil)
	return n, err
}
