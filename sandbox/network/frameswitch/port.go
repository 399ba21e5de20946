package frameswitch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// Port is a machine's NIC on the switch, from the side of the machine's owner.
type Port struct {
	nic    *os.File
	lent   *os.File
	path   string
	hello  []byte
	cancel context.CancelFunc
	done   chan struct{}
}

// Join makes the socket pair of a NIC with the address mac and joins it to the
// switch that listens at path. From then on the port joins again whenever the
// switch went away, until Close. ctx bounds Join alone. An error wraps what the
// socket said, ENOENT or ECONNREFUSED when there is no switch.
func Join(ctx context.Context, path string, mac net.HardwareAddr) (*Port, error) {
	said, err := json.Marshal(hello{MAC: mac.String()})
	if err != nil {
		return nil, err
	}
	pair, err := socketPair()
	if err != nil {
		return nil, fmt.Errorf("frame switch: sockets for the NIC %s: %w", mac, err)
	}
	life, cancel := context.WithCancel(context.Background())
	p := &Port{nic: pair[0], lent: pair[1], path: path, hello: said, cancel: cancel, done: make(chan struct{})}
	conn, err := p.join(ctx)
	if err != nil {
		close(p.done)
		p.Close()
		return nil, fmt.Errorf("join NIC %s to the frame switch at %s: %w", mac, path, err)
	}
	go p.stayJoined(life, conn)
	return p, nil
}

// File is the machine's end: a connected datagram socket. It stays the port's
// and must stay open for as long as the machine uses it.
func (p *Port) File() *os.File { return p.nic }

// Close leaves the switch and closes both ends of the NIC.
func (p *Port) Close() error {
	p.cancel()
	<-p.done
	return errors.Join(p.nic.Close(), p.lent.Close())
}

func (p *Port) stayJoined(life context.Context, conn net.Conn) {
	defer close(p.done)
	for {
		stop := context.AfterFunc(life, func() { conn.Close() })
		// The switch says nothing more: what ends this read is its end, or ours.
		_, _ = conn.Read(make([]byte, 1))
		stop()
		conn.Close()
		for conn = nil; conn == nil; {
			select {
			case <-life.Done():
				return
			case <-time.After(rejoinEvery):
			}
			var err error
			if conn, err = p.join(life); err != nil {
				klog.V(1).InfoS("The frame switch is away", "socket", p.path, "err", err)
			}
		}
	}
}

func (p *Port) join(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	var d net.Dialer
	dialed, err := d.DialContext(ctx, "unix", p.path)
	if err != nil {
		return nil, err
	}
	conn := dialed.(*net.UnixConn)
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	if _, _, err := conn.WriteMsgUnix(p.hello, unix.UnixRights(int(p.lent.Fd())), nil); err != nil {
		conn.Close()
		return nil, err
	}
	var w welcome
	if err := json.NewDecoder(io.LimitReader(conn, maxWelcome)).Decode(&w); err != nil {
		conn.Close()
		return nil, fmt.Errorf("read its answer: %w", err)
	}
	if w.Error != "" {
		conn.Close()
		return nil, fmt.Errorf("refused: %s", w.Error)
	}
	_ = conn.SetDeadline(time.Time{})
	return conn, nil
}

func socketPair() (pair [2]*os.File, err error) {
	fds, err := cloexecPair()
	if err != nil {
		return pair, err
	}
	for i, fd := range fds {
		pair[i] = os.NewFile(uintptr(fd), "nic")
		err = errors.Join(err,
			os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer)),
			os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)))
	}
	if err != nil {
		pair[0].Close()
		pair[1].Close()
	}
	return pair, err
}

// cloexecPair holds off forks meanwhile: macOS has no SOCK_CLOEXEC.
func cloexecPair() ([2]int, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return fds, os.NewSyscallError("socketpair", err)
	}
	unix.CloseOnExec(fds[0])
	unix.CloseOnExec(fds[1])
	return fds, nil
}
