// Package cri is the node's front: the Kubernetes CRI v1 (RuntimeService and
// ImageService) and cri-vz's own Node service on one gRPC server, and the HTTP
// server that carries exec, attach and port-forward streams.
//
// A handler validates, translates and calls package sandbox or imageservice; it
// keeps no state of its own. One RPC, one file. Calls that are not there answer
// Unimplemented and name themselves.
package cri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
	"github.com/cri-vz/cri-vz/imageservice"
	"github.com/cri-vz/cri-vz/sandbox"
)

// RuntimeName is what Version reports.
const RuntimeName = "cri-vz"

// Options are what a [Server] needs; all of it stays the caller's.
type Options struct {
	Pods   *sandbox.Pods
	Images *imageservice.Store
	// NetworkStatus says why pods can't get a network, or nil.
	NetworkStatus func(context.Context) error
	// ImageRoot is the image store's directory, a path of the host (T41).
	ImageRoot string
	// Spool is where LoadImage keeps an archive while it is read.
	Spool string
	// Handlers are the names of the runtime handlers besides the default "".
	Handlers []string
	// Version is the build's version.
	Version string
	// StreamAddress is host:port of the streaming server; port 0 picks one.
	// Anything but a loopback host is refused: the URLs are handed to the
	// kubelet of the same machine, and the server speaks plain HTTP.
	StreamAddress string
	// NoUserNamespaces says why this node offers none, or nil.
	NoUserNamespaces error
	// LogRoot is where the node's own command line keeps the logs of its pods.
	LogRoot string
	// SystemdCgroups is what RuntimeConfig answers (T5).
	SystemdCgroups bool
}

// Server implements the CRI and the Node service. Create it with [New].
type Server struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer
	nodeapi.UnimplementedNodeServer

	Options
	streams *streamServer
	grpc    *grpc.Server
	rates   cpuRates
}

const (
	// maxMessage bounds what a client may send, as the kubelet's own client does.
	maxMessage = 16 << 20
	// streamWindow is what one stream of the Node service may have in flight.
	streamWindow = 1 << 20
	// streamBuffer is what one system call moves of it: with gRPC's own 32 KiB they
	// are most of what a forwarded port costs the daemon.
	streamBuffer = 256 << 10
	// maxAnswer has room for the largest answer, an ExecSync with both outputs at
	// their cap (T19). What the client takes is the client's bound.
	maxAnswer = 2*maxExecSyncOutput + 1<<20
)

// New makes the server and opens the streaming listener.
func New(o Options) (*Server, error) {
	s := &Server{Options: o}
	var err error
	if s.streams, err = newStreamServer(s.StreamAddress, streamRuntime{s}); err != nil {
		return nil, err
	}
	s.grpc = grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxAnswer),
		// gRPC's own 64 KiB would be what limits a forwarded port.
		grpc.InitialWindowSize(streamWindow), grpc.InitialConnWindowSize(4*streamWindow),
		grpc.ReadBufferSize(streamBuffer), grpc.WriteBufferSize(streamBuffer),
		grpc.ChainUnaryInterceptor(unaryErrors),
		grpc.ChainStreamInterceptor(streamErrors),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	runtimeapi.RegisterRuntimeServiceServer(s.grpc, s)
	runtimeapi.RegisterImageServiceServer(s.grpc, s)
	nodeapi.RegisterNodeServer(s.grpc, s)
	return s, nil
}

// Serve answers on l until ctx ends, then lets running calls finish for a
// moment. It returns nil when it ended because of ctx.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	errs := make(chan error, 2)
	go func() { errs <- s.grpc.Serve(l) }()
	go func() {
		if err := s.streams.http.Serve(s.streams.ln); !errors.Is(err, http.ErrServerClosed) {
			errs <- fmt.Errorf("streaming server on %s: %w", s.streams.ln.Addr(), err)
		}
	}()
	var err error
	select {
	case <-ctx.Done():
	case err = <-errs:
	}
	stopped := make(chan struct{})
	go func() { s.grpc.GracefulStop(); close(stopped) }()
	select {
	case <-stopped:
	case <-time.After(2 * time.Second): // an ExecSync or a watch may last for hours
		s.grpc.Stop()
	}
	if cerr := s.streams.http.Close(); cerr != nil {
		klog.ErrorS(cerr, "Close the streaming server")
	}
	return err
}
