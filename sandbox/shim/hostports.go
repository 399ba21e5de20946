package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"syscall"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// publish listens on the pod's host ports, until the VM is gone: whoever wants to know
// early that a port is taken learns it before a VM was started. A connection that comes
// before the pod is ready is closed.
func (s *Shim) publish(ctx context.Context) error {
	var listeners []net.Listener
	for _, p := range s.cfg.HostPorts {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", net.JoinHostPort(p.Address, strconv.Itoa(int(p.Port))))
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			advice := "choose another"
			switch {
			case errors.Is(err, syscall.EADDRINUSE):
				advice = "another pod or program has it: stop that, or choose another port"
			case errors.Is(err, syscall.EADDRNOTAVAIL):
				advice = "the host has no such address"
			case errors.Is(err, syscall.EACCES):
				advice = "macOS keeps ports below 1024 of a single address for root: leave the host IP out, or choose another port"
			}
			return fmt.Errorf("host port %d: %w; %s: %w", p.Port, err, advice, errdefs.ErrFailedPrecondition)
		}
		listeners = append(listeners, l)
	}
	for i, l := range listeners {
		port := s.cfg.HostPorts[i].PodPort
		s.tasks.Go(func() {
			s.serveConns(l, s.gone, func(ctx context.Context, conn net.Conn) {
				if err := s.proxy(ctx, conn.(*net.TCPConn), port); err != nil {
					klog.V(1).InfoS("A connection to a host port ended", "pod", s.cfg.ID, "address", l.Addr(), "err", err)
				}
			})
		})
	}
	return nil
}

// proxy joins a connection to the pod's port. An end of file of one side becomes the
// other's, and anything else that ends one a reset of the other.
func (s *Shim) proxy(ctx context.Context, conn *net.TCPConn, port uint16) (err error) {
	reset := func() {
		_ = conn.SetLinger(0) // close sends RST
		conn.Close()
	}
	_, m, err := s.running()
	if err != nil {
		reset()
		return err
	}
	st, err := dialStream(ctx, m, guestapi.Header{Kind: guestapi.PodPort, Port: port})
	if err != nil {
		reset()
		return err
	}
	defer st.Close()
	stop := context.AfterFunc(ctx, func() { st.Close(); reset() })
	defer stop()
	toGuest := make(chan error, 1)
	go func() {
		err := copyBytes(st, conn)
		if err == nil {
			err = st.CloseWrite()
		} else {
			st.Reset("the connection to the host port broke")
		}
		toGuest <- err
	}()
	if err = copyBytes(conn, st); err == nil {
		err = conn.CloseWrite()
	}
	if err != nil {
		reset() // which ends the other direction, too
		st.Close()
	}
	return errors.Join(err, <-toGuest)
}

func copyBytes(dst io.Writer, src io.Reader) error {
	buf := largeBuffers.Get().(*[]byte)
	defer largeBuffers.Put(buf)
	_, err := io.CopyBuffer(struct{ io.Writer }{dst}, onlyReader{src}, *buf)
	return err
}
