// Package api is the service between the daemon and a pod's shim.
package api

//go:generate protoc -I../../.. --go_out=../../.. --go_opt=paths=source_relative --go-ttrpc_out=../../.. --go-ttrpc_opt=paths=source_relative sandbox/shim/api/shim.proto

// Version is this service's version. A daemon drives shims of its own and of
// the previous version.
const Version = 1

// Names of the sockets in a pod's run directory.
const (
	SocketControl = "s" // ttrpc
	SocketData    = "d" // streams, see guest/api
)
