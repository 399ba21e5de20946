package api

import (
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
// only; the others flow both ways.
const (
	Stdin    Kind = 1
	Stdout   Kind = 2
	Stderr   Kind = 3
	Port     Kind = 4
	Terminal Kind = 5
	PodPort  Kind = 6
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
	case PodPort:
		return "pod port"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Header opens a data connection: the dialler sends it first, and the listener
// answers with an open frame or a reset frame.
type Header struct {
	Kind      Kind
	Container string // empty for Port and PodPort
	Exec      string // empty: the container's own process
	Port      uint16 // for Port: on the pod's loopback; for PodPort: at the pod's address
}

// Limits of the stream protocol.
const (
	// MaxFrame is the longest payload of one frame, in bytes.
	MaxFrame = 64 << 10
	// MaxID is the longest container or exec id in a header, in bytes.
	MaxID = 128

	headerMagic = "CVZ1"

	// FrameData is the longest payload that is sent: Linux cuts what is written to a
	// vsock into packets of 64 KiB, and a frame should be one. A [Stream.Write] of
	// a multiple of it, up to four, is one write of full packets.
	FrameData = 64<<10 - frameHeader

	frameHeader = 5 // type, length
	// writeBatch is how many frames go into one write.
	writeBatch = 4
	// smallRead is how much is read ahead for a caller who asks for less.
	smallRead = 4 << 10
	maxReason = 4 << 10
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
	case h.Kind < Stdin || h.Kind > PodPort:
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

	// Reader only.
	in     []byte // read and not parsed, a part of small
	small  []byte
	head   [frameHeader]byte // of a frame that is not all there
	headN  int
	left   int    // payload bytes of the current data frame
	reason []byte // of a reset that is not all there, else nil
	rerr   error  // sticky

	mu      sync.Mutex // serialises frames
	wclosed bool
}

// NewStream wraps a connection after its header was exchanged. The Stream owns
// the connection.
func NewStream(conn net.Conn) *Stream { return &Stream{conn: conn} }

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

// Read implements io.Reader; see [Stream] for its errors. It returns the payload
// of as many frames as there are: in a guest that is emulated, what a stream costs
// is system calls, and switches to whom the bytes go next.
func (s *Stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, s.rerr
	}
	n := 0
	for n == 0 && s.rerr == nil {
		raw := s.in
		if len(raw) == 0 {
			buf := p // frames are unpacked in place
			if len(p) < smallRead {
				if s.small == nil {
					s.small = make([]byte, smallRead)
				}
				buf = s.small
			}
			k, err := s.conn.Read(buf)
			if k == 0 && err != nil { // else it comes again
				if errors.Is(err, io.EOF) {
					err = io.ErrUnexpectedEOF
				}
				s.rerr = err
			}
			raw = buf[:k]
		}
		n, s.in = s.unpack(p, raw)
	}
	if n > 0 {
		return n, nil
	}
	return 0, s.rerr
}

// unpack parses raw and puts the payload into p, which raw may be the beginning
// of. It returns how much that is, and what is left of raw when p is full.
func (s *Stream) unpack(p, raw []byte) (n int, rest []byte) {
	for len(raw) > 0 {
		switch {
		case s.left > 0:
			if n == len(p) {
				return n, raw
			}
			k := copy(p[n:], raw[:min(len(raw), s.left)])
			n, raw, s.left = n+k, raw[k:], s.left-k
		case s.reason != nil:
			k := min(len(raw), cap(s.reason)-len(s.reason))
			s.reason, raw = append(s.reason, raw[:k]...), raw[k:]
		default:
			k := copy(s.head[s.headN:], raw)
			if s.headN, raw = s.headN+k, raw[k:]; s.headN < frameHeader {
				return n, nil
			}
			s.headN = 0
			s.begin(s.head[0], binary.LittleEndian.Uint32(s.head[1:]))
		}
		if s.reason != nil && len(s.reason) == cap(s.reason) {
			s.rerr = &ResetError{Reason: string(s.reason)}
		}
		if s.rerr != nil {
			break // nothing counts after that
		}
	}
	return n, nil
}

// begin starts a frame.
func (s *Stream) begin(typ byte, n uint32) {
	switch {
	case n > MaxFrame:
		s.rerr = fmt.Errorf("%w: frame of %d bytes", ErrProtocol, n)
	case typ == frameData:
		s.left = int(n)
	case typ == frameEOF && n == 0:
		s.rerr = io.EOF
	case typ == frameReset && n <= maxReason:
		s.reason = make([]byte, 0, n)
	default:
		s.rerr = fmt.Errorf("%w: frame type %d of %d bytes", ErrProtocol, typ, n)
	}
}

// batches are buffers for writeBatch frames.
var batches = sync.Pool{New: func() any { b := make([]byte, 0, writeBatch*(frameHeader+FrameData)); return &b }}

// Write implements io.Writer.
func (s *Stream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out *[]byte
	if len(p) > smallRead {
		out = batches.Get().(*[]byte)
		defer batches.Put(out)
	} else {
		b := make([]byte, 0, frameHeader+len(p))
		out = &b
	}
	total := 0
	for len(p) > 0 {
		if s.wclosed {
			return total, net.ErrClosed
		}
		// One write: a vsock packet costs more than a copy of it.
		b, n := (*out)[:0], 0
		for range writeBatch {
			k := min(len(p), FrameData)
			if k == 0 {
				break
			}
			b = append(appendHeader(b, frameData, k), p[:k]...)
			p, n = p[k:], n+k
		}
		if _, err := s.conn.Write(b); err != nil {
			return total, err
		}
		total += n
	}
	return total, nil
}

func appendHeader(b []byte, typ byte, n int) []byte {
	return binary.LittleEndian.AppendUint32(append(b, typ), uint32(n))
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
	_, err := s.conn.Write(append(appendHeader(nil, typ, len(p)), p...))
	return err
}
