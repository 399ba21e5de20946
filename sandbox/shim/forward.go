package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// headerReader reads a header from the data socket, and the connection that may
// come with it.
type headerReader struct {
	conn net.Conn
	file *os.File // or nil
}

func (r *headerReader) Read(p []byte) (int, error) {
	c, ok := r.conn.(*net.UnixConn)
	if !ok || r.file != nil {
		return r.conn.Read(p)
	}
	oob := make([]byte, unix.CmsgSpace(4)) // of one descriptor; the kernel drops others
	n, oobn, _, _, err := c.ReadMsgUnix(p, oob)
	if oobn > 0 {
		r.file = received(oob[:oobn])
	}
	return n, err
}

// received is the descriptor in a control message, or nil.
func received(oob []byte) *os.File {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range messages {
		if fds, err := unix.ParseUnixRights(&messages[i]); err == nil && len(fds) == 1 {
			return os.NewFile(uintptr(fds[0]), "forwarded connection")
		}
	}
	return nil
}

// forward joins a TCP connection that conn's peer has handed over to a port of the
// pod. The peer learns whether something listens there; the connection then is
// here, and the peer may go. It is closed in any case.
func (s *Shim) forward(ctx context.Context, conn net.Conn, h guestapi.Header, file *os.File) {
	client, err := tcpOf(file)
	var guest *guestapi.Stream
	if err == nil {
		defer client.Close()
		guest, err = s.openPort(ctx, h)
	}
	if guest != nil {
		defer guest.Close()
	}
	if _, aerr := guestapi.Accept(conn, err); err == nil && aerr == nil {
		conn.Close()
		joinUntilVanished(ctx, guest, client)
	}
}

// joinUntilVanished joins the two until both have ended, or ctx has, or the client
// has broken off while the guest takes nothing of it. It closes both.
func joinUntilVanished(ctx context.Context, guest *guestapi.Stream, client *net.TCPConn) {
	joined := make(chan struct{})
	defer close(joined)
	go func() {
		defer client.Close()
		defer guest.Close()
		for {
			select {
			case <-joined:
				return
			case <-ctx.Done():
				return
			case <-time.After(vanishCheck):
				if broken(client) {
					return
				}
			}
		}
	}()
	guestapi.Join(guest, client)
}

// tcpOf takes over file, which must be a TCP connection.
func tcpOf(file *os.File) (*net.TCPConn, error) {
	defer file.Close()
	c, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("the connection to forward: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("the connection to forward is not TCP: %w", errdefs.ErrInvalidArgument)
	}
	return tcp, nil
}

// openPort opens a stream to a port of the pod. A refusal is in the guest's words.
func (s *Shim) openPort(ctx context.Context, h guestapi.Header) (*guestapi.Stream, error) {
	conn, err := s.dialGuest(ctx, h)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(streamTimeout))
	guest, err := guestapi.Open(conn, h)
	if err != nil {
		var refused *guestapi.ResetError
		if errors.As(err, &refused) {
			return nil, errors.New(refused.Reason)
		}
		return nil, fmt.Errorf("pod %s: open port %d: %w", s.cfg.ID, h.Port, err)
	}
	_ = conn.SetDeadline(time.Time{})
	return guest, nil
}
