package api

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// Kind says what a data connection carries.
type Kind uint8

// Kinds of streams. Stdin flows to the process only, Stdout and Stderr from it
// only; Terminal and Port flow both ways.
const (
	Stdin    Kind = 1
	Stdout   Kind = 2
	Stderr   Kind = 3
	Port     Kind = 4
	Terminal Kind = 5
)

func (k Kind) String() string {
	switch k {
	case Stdin:
		return "stdin"
	case Stdout:
		return "stdout"
	case Stderr:
		return "stderr"
	case Port:
		return "port"
	case Terminal:
		return "terminal"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Header opens a data connection: the dialler sends it first, and the listener
// answers with an open frame or a reset frame.
type Header struct {
	Kind      Kind
	Container string // empty for Port
	Exec      string // empty: the container's own process
	Port      uint16 // for Port: on the pod's loopback
}

// Limits of the stream protocol.
const (
	// MaxFrame is the longest payload of one frame, in bytes.
	MaxFrame = 64 << 10
	// MaxID is the longest container or exec id in a header, in bytes.
	MaxID = 128

	headerMagic = "CVZ1"
)

// Frame types.
const (
	frameData  = 1
	frameEOF   = 2
	frameReset = 3 // payload: reason
	frameOpen  = 4 // answer to a header
)

// ErrProtocol is wrapped by every error that the peer's bytes deserve.
var ErrProtocol = errors.New("stream protocol violated")

// ResetError is how a stream ends that its peer broke off; Reason is the peer's
// text and must be treated as such. Error quotes it.
type ResetError struct{ Reason string }

func (e *ResetError) Error() string { return fmt.Sprintf("stream reset by peer: %q", e.Reason) }

// WriteHeader sends h on c.
func WriteHeader(w io.Writer, h Header) error {
	if len(h.Container) > MaxID || len(h.Exec) > MaxID {
		return fmt.Errorf("stream header: id longer than %d bytes", MaxID)
	}
	b := make([]byte, 0, 16+len(h.Container)+len(h.Exec))
	b = append(b, headerMagic...)
	b = append(b, byte(h.Kind), byte(len(h.Container)), byte(len(h.Exec)), 0)
	b = binary.LittleEndian.AppendUint16(b, h.Port)
	b = append(b, h.Container...)
	b = append(b, h.Exec...)
	_, err := w.Write(b)
	return err
}

// ReadHeader reads a header; its errors wrap [ErrProtocol] or the connection's.
func ReadHeader(r io.Reader) (Header, error) {
	var fixed [10]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return Header{}, fmt.Errorf("read stream header: %w", err)
	}
	nc, ne := int(fixed[5]), int(fixed[6])
	h := Header{Kind: Kind(fixed[4]), Port: binary.LittleEndian.Uint16(fixed[8:])}
	switch {
	case string(fixed[:4]) != headerMagic:
		return Header{}, fmt.Errorf("%w: not a stream header: %q", ErrProtocol, fixed[:4])
	case h.Kind < Stdin || h.Kind > Terminal:
		return Header{}, fmt.Errorf("%w: unknown stream %v", ErrProtocol, h.Kind)
	case nc > MaxID || ne > MaxID:
		return Header{}, fmt.Errorf("%w: id longer than %d bytes", ErrProtocol, MaxID)
	}
	ids := make([]byte, nc+ne)
	if _, err := io.ReadFull(r, ids); err != nil {
		return Header{}, fmt.Errorf("read stream header: %w", err)
	}
	h.Container, h.Exec = string(ids[:nc]), string(ids[nc:])
	return h, nil
}

// Stream is a byte stream in both directions over one connection, with an end
// of file and a reset of its own, because the connections of Apple's
// Virtualization framework have no half-close.
//
// Read returns io.EOF only after the peer's [Stream.CloseWrite]; a connection
// that breaks without it gives io.ErrUnexpectedEOF, and a [Stream.Reset] by the
// peer a [ResetError]. One reader and one writer may work at the same time;
// CloseWrite, Reset and Close may be called concurrently with both.
type Stream struct {
	conn net.Conn

	in   *bufio.Reader // reader only
	left int           // payload bytes of the current data frame; reader only
	rerr error         // sticky; reader only

	mu      sync.Mutex // serialises frames
	out     []byte     // the frame being written; kept, for there are many
	wclosed bool
}

// NewStream wraps a connection after its header was exchanged. The Stream owns
// the connection.
func NewStream(conn net.Conn) *Stream {
	// Room for a frame's header and the payload behind it in one read: in a guest
	// that is emulated, system calls are what streams cost.
	return &Stream{conn: conn, in: bufio.NewReaderSize(conn, 32<<10)}
}

// Open sends h on conn and waits for the listener's answer. The caller bounds
// the wait with a deadline on conn and clears it afterwards. On error conn is
// closed; a refusal is a [ResetError].
func Open(conn net.Conn, h Header) (*Stream, error) {
	err := WriteHeader(conn, h)
	if err == nil {
		var typ byte
		var payload []byte
		if typ, payload, err = readControl(conn); err == nil {
			switch typ {
			case frameOpen:
				return NewStream(conn), nil
			case frameReset:
				err = &ResetError{Reason: string(payload)}
			default:
				err = fmt.Errorf("%w: frame type %d in answer to a header", ErrProtocol, typ)
			}
		}
	}
	conn.Close()
	return nil, err
}

// readControl reads one whole frame of at most 4 KiB.
func readControl(r io.Reader) (byte, []byte, error) {
	var hdr [5]byte
	if _, err := io.ReadFull(r, hdr[:]); err != nil {
		return 0, nil, fmt.Errorf("read answer to stream header: %w", err)
	}
	n := binary.LittleEndian.Uint32(hdr[1:])
	if n > 4096 {
		return 0, nil, fmt.Errorf("%w: control frame of %d bytes", ErrProtocol, n)
	}
	p := make([]byte, n)
	_, err := io.ReadFull(r, p)
	return hdr[0], p, err
}

// Accept answers a header that was read with [ReadHeader]: with refusal == nil
// the stream is open; otherwise the peer's Open fails with that text and conn is
// closed.
func Accept(conn net.Conn, refusal error) (*Stream, error) {
	s := NewStream(conn)
	if refusal == nil {
		if err := s.frame(frameOpen, nil); err != nil {
			conn.Close()
			return nil, err
		}
		return s, nil
	}
	s.Reset(refusal.Error())
	return nil, refusal
}

// Read implements io.Reader; see [Stream] for its errors.
func (s *Stream) Read(p []byte) (int, error) {
	if s.rerr != nil {
		return 0, s.rerr
	}
	for s.left == 0 {
		var hdr [5]byte
		if _, err := io.ReadFull(s.in, hdr[:]); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			s.rerr = err
			return 0, err
		}
		n := binary.LittleEndian.Uint32(hdr[1:])
		switch {
		case n > MaxFrame:
			s.rerr = fmt.Errorf("%w: frame of %d bytes", ErrProtocol, n)
		case hdr[0] == frameData:
			s.left = int(n)
		case hdr[0] == frameEOF && n == 0:
			s.rerr = io.EOF
		case hdr[0] == frameReset && n <= 4096:
			reason := make([]byte, n)
			if _, err := io.ReadFull(s.in, reason); err != nil {
				s.rerr = io.ErrUnexpectedEOF
			} else {
				s.rerr = &ResetError{Reason: string(reason)}
			}
		default:
			s.rerr = fmt.Errorf("%w: frame type %d of %d bytes", ErrProtocol, hdr[0], n)
		}
		if s.rerr != nil {
			return 0, s.rerr
		}
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := s.in.Read(p[:min(len(p), s.left)])
	s.left -= n
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		s.rerr = err
	}
	return n, err
}

// Write implements io.Writer.
func (s *Stream) Write(p []byte) (int, error) {
	total := 0
	for len(p) > 0 {
		n := min(len(p), MaxFrame)
		if err := s.frame(frameData, p[:n]); err != nil {
			return total, err
		}
		total += n
		p = p[n:]
	}
	return total, nil
}

// CloseWrite tells the peer that no more bytes come. Reading goes on.
func (s *Stream) CloseWrite() error {
	err := s.frame(frameEOF, nil)
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Reset breaks the stream off with a reason for the peer, and closes it.
func (s *Stream) Reset(reason string) {
	_ = s.frame(frameReset, []byte(reason[:min(len(reason), 1024)]))
	s.conn.Close()
}

// Close closes the connection. Without a CloseWrite before it, the peer sees a
// broken stream.
func (s *Stream) Close() error { return s.conn.Close() }

// Conn is the connection below, for deadlines.
func (s *Stream) Conn() net.Conn { return s.conn }

func (s *Stream) frame(typ byte, p []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wclosed {
		return net.ErrClosed
	}
	if typ == frameEOF || typ == frameReset {
		s.wclosed = true
	}
	var hdr [5]byte
	hdr[0] = typ
	binary.LittleEndian.PutUint32(hdr[1:], uint32(len(p)))
	// One write per frame: a vsock packet costs more than a copy of it.
	s.out = append(append(s.out[:0], hdr[:]...), p...)
	_, err := s.conn.Write(s.out)
	return err
}
