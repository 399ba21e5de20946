//go:build linux && (amd64 || arm64)

package agent

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/cri-vz/cri-vz/guest/api"
	"golang.org/x/sys/unix"
)

const (
	// headerTimeout bounds how long a data connection may say nothing.
	headerTimeout = 10 * time.Second
	// lingerTimeout bounds how long an ended stream waits for the host to close.
	lingerTimeout = 10 * time.Second
	// maxStreams caps data connections, each of which costs two buffers.
	maxStreams = 1024
	// dialTimeout bounds a connect to the pod's loopback, which only a full
	// backlog delays.
	dialTimeout = 10 * time.Second
)

// streamBuffers are as long as a frame.
var streamBuffers = sync.Pool{New: func() any { b := make([]byte, api.MaxFrame); return &b }}

// serveStreams accepts data connections until l is closed.
func (a *Agent) serveStreams(l net.Listener) error {
	slots := make(chan struct{}, maxStreams)
	for {
		conn, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ECONNABORTED) {
				time.Sleep(10 * time.Millisecond)
				continue
			}
			return fmt.Errorf("accept stream: %w", err)
		}
		select {
		case slots <- struct{}{}:
			go func() {
				defer a.crash()
				defer func() { <-slots }()
				a.serveStream(conn)
			}()
		default:
			conn.Close()
		}
	}
}

func (a *Agent) serveStream(conn net.Conn) {
	defer conn.Close()
	conn = direct(conn)
	_ = conn.SetDeadline(time.Now().Add(headerTimeout))
	h, err := api.ReadHeader(conn)
	if err != nil {
		return
	}
	if h.Kind == api.Port || h.Kind == api.PodPort {
		a.forwardPort(conn, h)
		return
	}
	p, err := a.process(h.Container, h.Exec)
	var e *endpoint
	if err == nil {
		e, err = p.stdio.endpoint(h.Kind)
	}
	s, err := api.Accept(conn, err)
	if err != nil {
		return
	}
	_ = conn.SetDeadline(time.Time{})
	if err := e.attach(s); err != nil {
		s.Reset(err.Error())
		return
	}
	switch h.Kind {
	case api.Stdin:
		serveInput(e, s)
	case api.Terminal:
		serveOutput(e, s, true)
	default:
		serveOutput(e, s, false)
	}
}

func serveInput(e *endpoint, s *api.Stream) {
	buf := streamBuffers.Get().(*[]byte)
	err := e.pumpIn(s, *buf)
	streamBuffers.Put(buf)
	ended := errors.Is(err, io.EOF)
	e.release()
	if ended && e.once {
		e.close()
	}
	if ended {
		_ = s.CloseWrite()
	} else if errors.Is(err, unix.EPIPE) || errors.Is(err, os.ErrClosed) {
		s.Reset("the process has closed its standard input")
	}
}

// serveOutput sends e's output; with input it is a terminal, and s's bytes are
// its input.
func serveOutput(e *endpoint, s *api.Stream, input bool) {
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		buf := streamBuffers.Get().(*[]byte)
		defer streamBuffers.Put(buf)
		var err error
		if input {
			err = e.pumpIn(s, *buf)
		} else {
			_, err = io.CopyBuffer(io.Discard, onlyReader{s}, *buf)
			if err == nil {
				err = io.EOF
			}
		}
		if !errors.Is(err, io.EOF) {
			// Nobody is there any more: stop reading the process's output.
			e.interrupt(s)
		}
	}()
	buf := streamBuffers.Get().(*[]byte)
	ended := e.pumpOut(s, *buf)
	streamBuffers.Put(buf)
	if ended {
		// The host closes when it has read all; a frame in flight survives that.
		_ = s.Conn().SetReadDeadline(time.Now().Add(lingerTimeout))
	} else {
		_ = s.Conn().SetDeadline(past)
	}
	if input {
		e.interrupt(s) // a write to a terminal that nobody reads
	}
	<-watched
	e.release()
}

// onlyReader hides everything but Read.
type onlyReader struct{ io.Reader }

// forwardPort joins conn to a port of the pod's: on its loopback, or, as who comes over
// the network does, at its address.
func (a *Agent) forwardPort(conn net.Conn, h api.Header) {
	var target *net.TCPConn
	sb, err := a.pod()
	switch {
	case err != nil:
	case h.Kind == api.Port:
		target, err = dialPort(int(sb.netns.Fd()), h.Port, loopback...)
	case !sb.address.IsValid():
		err = preconditionf("the pod has no address")
	default:
		target, err = dialPort(int(sb.netns.Fd()), h.Port, sb.address)
	}
	s, err := api.Accept(conn, err)
	if err != nil {
		return
	}
	_ = conn.SetDeadline(time.Time{})
	api.Join(s, &directTCP{target, direct(target)})
}

var loopback = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}

// dialPort connects to a port at the first of the addresses where something listens,
// in a network namespace.
func dialPort(netns int, port uint16, addresses ...netip.Addr) (*net.TCPConn, error) {
	var refused error
	for _, a := range addresses {
		c, err := dialIn(netns, sockaddr(a, port))
		if err == nil {
			return c, nil
		}
		if refused == nil || !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.EAFNOSUPPORT) {
			refused = err
		}
	}
	if errors.Is(refused, unix.ECONNREFUSED) {
		return nil, unavailablef("nothing listens on port %d of the pod", port)
	}
	return nil, fmt.Errorf("connect to port %d of the pod: %w", port, refused)
}

func sockaddr(a netip.Addr, port uint16) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Port: int(port), Addr: a.As4()}
	}
	return &unix.SockaddrInet6{Port: int(port), Addr: a.As16()}
}

func dialIn(netns int, addr unix.Sockaddr) (*net.TCPConn, error) {
	domain := unix.AF_INET
	if _, ok := addr.(*unix.SockaddrInet6); ok {
		domain = unix.AF_INET6
	}
	fd, err := socketIn(netns, domain, unix.SOCK_STREAM, 0)
	if err != nil {
		return nil, err
	}
	err = connect(fd, addr)
	f := os.NewFile(uintptr(fd), "port")
	defer f.Close()
	if err != nil {
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// connect connects a non-blocking socket within dialTimeout.
func connect(fd int, addr unix.Sockaddr) error {
	err := unix.Connect(fd, addr)
	if err != unix.EINPROGRESS {
		return err
	}
	deadline := time.Now().Add(dialTimeout)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(time.Until(deadline).Milliseconds()))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("no answer in %v: %w", dialTimeout, unix.ETIMEDOUT)
		}
		code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = unix.Errno(code)
		}
		return err
	}
}

// socketIn makes a socket, which doesn't block, in a network namespace; it stays
// there whoever uses it.
func socketIn(netns, domain, kind, protocol int) (int, error) {
	type result struct {
		fd  int
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			done <- result{-1, err}
			return
		}
		defer unix.Close(own)
		if err := unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- result{-1, fmt.Errorf("enter the pod's network namespace: %w", err)}
			return
		}
		fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
		if unix.Setns(own, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		} // else the thread ends with its goroutine
		done <- result{fd, err}
	}()
	r := <-done
	return r.fd, r.err
}
