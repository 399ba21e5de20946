package frameswitch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// Switch forwards frames between ports. Use [New].
type Switch struct {
	// ports is replaced as a whole, so that forwarding takes no lock.
	ports atomic.Pointer[map[mac]*port]

	mu     sync.Mutex
	closed bool
	// open holds the listeners and the connections of ports.
	open map[io.Closer]struct{}
	work sync.WaitGroup
}

type mac [6]byte

func (m mac) String() string { return net.HardwareAddr(m[:]).String() }

// isGroup tells broadcast and multicast addresses from those of one station.
func (m mac) isGroup() bool { return m[0]&1 != 0 }

// New makes a switch without ports.
func New() *Switch {
	s := &Switch{open: map[io.Closer]struct{}{}}
	s.ports.Store(&map[mac]*port{})
	return s
}

// Serve joins a port for each connection to ln, for as long as the connection
// lasts. It closes ln, and returns nil after [Switch.Close].
func (s *Switch) Serve(ln *net.UnixListener) error {
	defer ln.Close()
	if !s.track(ln) {
		return nil
	}
	defer s.untrack(ln)
	for {
		conn, err := ln.AcceptUnix()
		if err != nil {
			s.mu.Lock()
			closed := s.closed
			s.mu.Unlock()
			if closed {
				return nil
			}
			return fmt.Errorf("frame switch: accept on %s: %w", ln.Addr(), err)
		}
		if !s.track(conn) {
			conn.Close()
			continue
		}
		s.work.Go(func() {
			defer s.untrack(conn)
			defer conn.Close()
			s.serveConn(conn)
		})
	}
}

// Close ends Serve and every port, and waits for both.
func (s *Switch) Close() {
	s.mu.Lock()
	s.closed = true
	for c := range s.open {
		c.Close()
	}
	s.mu.Unlock()
	s.work.Wait()
}

func (s *Switch) track(c io.Closer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.open) > maxPorts {
		return false
	}
	s.open[c] = struct{}{}
	return true
}

func (s *Switch) untrack(c io.Closer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
}

// serveConn is the life of one port: hello, welcome, frames until the
// connection ends.
func (s *Switch) serveConn(conn *net.UnixConn) {
	p, err := receiveHello(conn)
	if err != nil {
		klog.ErrorS(err, "A port could not join the frame switch")
		_ = answer(conn, err) // whether it arrives or not, the connection ends
		return
	}
	if earlier := s.add(p); earlier != nil {
		earlier.conn.Close()
	}
	forwarding := make(chan struct{})
	go func() {
		defer close(forwarding)
		// A socket that can't be read is worth nothing: its owner joins again.
		defer conn.Close()
		s.forward(p)
	}()
	if err := answer(conn, nil); err == nil {
		// Nothing more is said: what ends this read is the port's end.
		_, _ = conn.Read(make([]byte, 1))
	}
	s.remove(p)
	p.conn.Close()
	<-forwarding
	klog.InfoS("A port left the frame switch", "mac", p.mac, "forwarded", p.forwarded.Load(), "dropped", p.dropped.Load(), "refused", p.refused.Load())
}

// add lets a port take the place of an earlier one with its address, which it
// returns: that is the same machine's, whose owner joined again before the
// switch saw it leave.
func (s *Switch) add(p *port) (earlier *port) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ports := maps.Clone(*s.ports.Load())
	earlier = ports[p.mac]
	ports[p.mac] = p
	s.ports.Store(&ports)
	return earlier
}

func (s *Switch) remove(p *port) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ports := maps.Clone(*s.ports.Load())
	if ports[p.mac] == p {
		delete(ports, p.mac)
		s.ports.Store(&ports)
	}
}

// forward passes on what a machine sends until its port is closed.
func (s *Switch) forward(from *port) {
	buf := make([]byte, maxFrame+1)
	for {
		n, err := from.conn.Read(buf)
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				klog.ErrorS(err, "A port of the frame switch can't be read", "mac", from.mac)
			}
			return
		}
		if n < headerSize || n > maxFrame || mac(buf[6:12]) != from.mac {
			from.refused.Add(1)
			continue
		}
		frame, to, taken := buf[:n], mac(buf[:6]), false
		ports := *s.ports.Load()
		if to.isGroup() {
			for _, p := range ports {
				if p != from && p.send(frame) {
					taken = true
				}
			}
		} else if p := ports[to]; p != nil && p != from {
			taken = p.send(frame)
		}
		if taken {
			from.forwarded.Add(1)
		} else {
			from.dropped.Add(1)
		}
	}
}

// port is one machine's NIC as the switch sees it.
type port struct {
	mac  mac
	conn net.Conn
	raw  interface {
		Write(func(uintptr) bool) error
	}

	forwarded, dropped, refused atomic.Uint64

	// mu guards frame and sent, which write uses instead of captured variables:
	// a closure for each frame would be an allocation for each frame.
	mu    sync.Mutex
	frame []byte
	sent  bool
	write func(fd uintptr) bool
}

// send hands a frame to the machine without waiting, and reports whether there
// was room for it.
func (p *port) send(frame []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frame, p.sent = frame, false
	err := p.raw.Write(p.write)
	p.frame = nil
	return err == nil && p.sent
}

func newPort(m mac, f *os.File) (*port, error) {
	// The socket of a stream, or a file, would run frames together.
	kind, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_DGRAM {
		return nil, fmt.Errorf("what came with the port %s is no datagram socket", m)
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("socket of the port %s: %w", m, err)
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("what came with the port %s is no unix socket", m)
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("socket of the port %s: %w", m, err)
	}
	p := &port{mac: m, conn: unixConn, raw: raw}
	p.write = func(fd uintptr) bool {
		// The descriptor does not block: net.FileConn has seen to that.
		_, err := unix.Write(int(fd), p.frame)
		p.sent = err == nil
		return true
	}
	return p, nil
}

func receiveHello(conn *net.UnixConn) (*port, error) {
	_ = conn.SetReadDeadline(time.Now().Add(helloTimeout))
	defer func() { _ = conn.SetReadDeadline(time.Time{}) }()
	buf, oob := make([]byte, maxHello), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, fmt.Errorf("read what a new port says: %w", err)
	}
	files, err := receivedFiles(oob[:oobn])
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	var h hello
	if err := json.Unmarshal(buf[:n], &h); err != nil {
		return nil, fmt.Errorf("what a new port says is not understood: %w", err)
	}
	hw, err := net.ParseMAC(h.MAC)
	if err != nil || len(hw) != len(mac{}) || mac(hw).isGroup() || mac(hw) == (mac{}) {
		return nil, fmt.Errorf("%q is not the MAC address of a machine", h.MAC)
	}
	if len(files) != 1 {
		return nil, fmt.Errorf("the port %s came without its socket", hw)
	}
	return newPort(mac(hw), files[0])
}

func receivedFiles(oob []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("read the socket of a new port: %w", err)
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "port"))
		}
	}
	return files, nil
}

func answer(conn net.Conn, refusal error) error {
	var w welcome
	if refusal != nil {
		w.Error = refusal.Error()
	}
	_ = conn.SetWriteDeadline(time.Now().Add(helloTimeout))
	return json.NewEncoder(conn).Encode(w)
}
