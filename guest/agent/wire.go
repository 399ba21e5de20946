//go:build linux && (amd64 || arm64)

package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Limits of the conversation between PID 1 and pod-init. Configurations of
// containers, which may be large, go past pod-init on a socket of their own.
const (
	maxMessage = 128 << 10
	maxFDs     = 16
)

// Operations of a message.
const (
	opSetup = "setup" // PID 1 asks: name and connect the pod
	opStart = "start" // PID 1 asks: fork a process
	opReply = "reply" // pod-init answers the request with the same Seq
	opExit  = "exit"  // pod-init tells: the process started by Seq has ended
)

// message is one datagram between PID 1 and pod-init. Descriptors travel beside
// it (SCM_RIGHTS).
type message struct {
	Seq    uint64      `json:"seq"`
	Op     string      `json:"op"`
	Setup  *podSetup   `json:"setup,omitempty"`
	Start  *podStart   `json:"start,omitempty"`
	Error  string      `json:"error,omitempty"`
	Class  string      `json:"class,omitempty"` // of Error: see classOf
	Status uint32      `json:"status,omitempty"`
	At     int64       `json:"at,omitempty"` // unix nanoseconds
	Steps  []namedStep `json:"steps,omitempty"`
}

// namedStep is a finished step and its duration in nanoseconds.
type namedStep struct {
	Name  string `json:"name"`
	Nanos int64  `json:"nanos"`
}

// podStart asks pod-init to fork. Its descriptors are, in this order: standard
// input, output and error, the child's end of the configuration socket, the
// cgroup directory, with JoinPID a pidfd whose pid namespace the child enters,
// and then whatever else the child inherits as descriptors 4 and up.
type podStart struct {
	Role      string `json:"role"` // RoleContainerInit or RoleExecInit
	NewMounts bool   `json:"new_mounts,omitempty"`
	NewCgroup bool   `json:"new_cgroup,omitempty"`
	NewPID    bool   `json:"new_pid,omitempty"`
	JoinPID   bool   `json:"join_pid,omitempty"`
}

// fds is how many descriptors the request needs at least.
func (s *podStart) fds() int {
	if s.JoinPID {
		return 6
	}
	return 5
}

// decodeMessage checks a datagram; whatever it returns is safe to act on.
func decodeMessage(b []byte, fds int) (*message, error) {
	if len(b) > maxMessage {
		return nil, fmt.Errorf("message of %d bytes is larger than %d", len(b), maxMessage)
	}
	var m message
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(&m); err != nil {
		return nil, fmt.Errorf("message: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("message: more than one object")
	}
	switch m.Op {
	case opSetup:
		if m.Setup == nil {
			return nil, errors.New("setup message without a setup")
		}
	case opStart:
		switch {
		case m.Start == nil:
			return nil, errors.New("start message without a start")
		case m.Start.Role != RoleContainerInit && m.Start.Role != RoleExecInit:
			return nil, fmt.Errorf("start message with role %q", m.Start.Role)
		case fds < m.Start.fds():
			return nil, fmt.Errorf("start message with %d descriptors, %d are needed", fds, m.Start.fds())
		}
	case opReply, opExit:
	default:
		return nil, fmt.Errorf("message with operation %q", m.Op)
	}
	return &m, nil
}

// packetConn exchanges messages over a SOCK_SEQPACKET socket. Send and receive
// may be called concurrently, receive by one goroutine only.
type packetConn struct{ c *net.UnixConn }

// packetPair returns a connected pair; the second half is for a child.
func packetPair() (*packetConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	child := os.NewFile(uintptr(fds[1]), "control socket")
	c, err := newPacketConn(os.NewFile(uintptr(fds[0]), "control socket"))
	if err != nil {
		child.Close()
		return nil, nil, err
	}
	return c, child, nil
}

// newPacketConn takes ownership of f.
func newPacketConn(f *os.File) (*packetConn, error) {
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("control socket is a %T", c)
	}
	return &packetConn{u}, nil
}

// send does not take ownership of the descriptors.
func (p *packetConn) send(m *message, fds ...int) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return invalidf("message of %d bytes is larger than %d", len(b), maxMessage)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err = p.c.WriteMsgUnix(b, oob, nil)
	return err
}

// receive returns the next message; the caller owns the descriptors, which are
// close-on-exec.
func (p *packetConn) receive() (*message, []int, error) {
	b := make([]byte, maxMessage+1)
	oob := make([]byte, unix.CmsgSpace(maxFDs*4))
	n, on, flags, _, err := p.c.ReadMsgUnix(b, oob)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return nil, nil, err
	}
	fds, err := rights(oob[:on])
	if err == nil && flags&unix.MSG_CTRUNC != 0 {
		err = fmt.Errorf("message with more than %d descriptors", maxFDs)
	}
	var m *message
	if err == nil {
		m, err = decodeMessage(b[:n], len(fds))
	}
	if err != nil {
		closeAll(fds)
		return nil, nil, err
	}
	return m, fds, nil
}

func (p *packetConn) close() error { return p.c.Close() }

func rights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for i := range msgs {
		got, err := syscall.ParseUnixRights(&msgs[i])
		if err != nil {
			closeAll(fds)
			return nil, err
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
