package api

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"
)

func pair(t *testing.T, h Header, refusal error) (host, guest *Stream, openErr error) {
	t.Helper()
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	for _, c := range []net.Conn{a, b} {
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	got := make(chan *Stream, 1)
	go func() {
		defer close(got)
		rh, err := ReadHeader(b)
		if err != nil || rh != h {
			t.Errorf("ReadHeader = %+v, %v; want %+v", rh, err, h)
			b.Close()
			return
		}
		s, err := Accept(b, refusal)
		if err == nil {
			got <- s
		}
	}()
	host, openErr = Open(a, h)
	return host, <-got, openErr
}

// T17: end of file and reset are frames, and a connection lost without one is
// an error, never an end of file.
func TestStreamEnds(t *testing.T) {
	header := Header{Kind: Stdout, Container: "c1", Exec: "e1"}
	for _, tc := range []struct {
		name string
		end  func(*Stream)
		want func(error) bool
	}{
		{"close write", func(s *Stream) { s.CloseWrite() }, func(err error) bool { return err == nil }},
		{"connection lost", func(s *Stream) { s.Close() }, func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }},
		{"reset", func(s *Stream) { s.Reset("connection refused") }, func(err error) bool {
			var r *ResetError
			return errors.As(err, &r) && r.Reason == "connection refused"
		}},
		{"oversized frame", func(s *Stream) { s.conn.Write([]byte{frameData, 0, 0, 2, 0}) }, func(err error) bool { return errors.Is(err, ErrProtocol) }},
		{"unknown frame", func(s *Stream) { s.conn.Write([]byte{99, 0, 0, 0, 0}) }, func(err error) bool { return errors.Is(err, ErrProtocol) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			host, guest, err := pair(t, header, nil)
			if err != nil {
				t.Fatal(err)
			}
			sent := bytes.Repeat([]byte("0123456789"), 20_000) // several frames
			go func() {
				guest.Write(sent)
				tc.end(guest)
			}()
			got, err := io.ReadAll(host)
			if !bytes.Equal(got, sent) || !tc.want(err) {
				t.Errorf("read %d bytes of %d, error %v", len(got), len(sent), err)
			}
			if _, again := host.Read(make([]byte, 1)); again == nil || (err != nil && !errors.Is(again, err)) {
				t.Errorf("a read after the end gave %v", again)
			}
		})
	}
}

func TestHalfCloseLeavesTheOtherDirectionOpen(t *testing.T) {
	host, guest, err := pair(t, Header{Kind: Port, Port: 80}, nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		host.Write([]byte("GET /"))
		host.CloseWrite()
	}()
	if q, err := io.ReadAll(guest); err != nil || string(q) != "GET /" {
		t.Fatalf("request %q, %v", q, err)
	}
	go func() {
		guest.Write([]byte("200"))
		guest.CloseWrite()
	}()
	if a, err := io.ReadAll(host); err != nil || string(a) != "200" {
		t.Fatalf("answer %q, %v", a, err)
	}
	if _, err := host.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after CloseWrite: %v", err)
	}
}

func TestRefusedStreamTellsWhy(t *testing.T) {
	_, _, err := pair(t, Header{Kind: Port, Port: 81}, errors.New("nothing listens on port 81"))
	var r *ResetError
	if !errors.As(err, &r) || r.Reason != "nothing listens on port 81" {
		t.Errorf("Open: %v", err)
	}
}

func TestHeaderCapsIDs(t *testing.T) {
	if err := WriteHeader(io.Discard, Header{Kind: Stdin, Container: strings.Repeat("x", MaxID+1)}); err == nil {
		t.Error("an id that is too long was sent")
	}
}

func FuzzReadHeader(f *testing.F) {
	var b bytes.Buffer
	if err := WriteHeader(&b, Header{Kind: Terminal, Container: "c", Exec: "e", Port: 7}); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add([]byte("CVZ1"))
	f.Fuzz(func(t *testing.T, in []byte) {
		h, err := ReadHeader(bytes.NewReader(in))
		if err != nil {
			return
		}
		var out bytes.Buffer
		if err := WriteHeader(&out, h); err != nil {
			t.Fatalf("%+v was read but can't be written: %v", h, err)
		}
		if back, err := ReadHeader(&out); err != nil || back != h {
			t.Errorf("%+v came back as %+v, %v", h, back, err)
		}
	})
}

type script struct {
	net.Conn
	r io.Reader
}

func (s script) Read(p []byte) (int, error) { return s.r.Read(p) }
func (script) Close() error                 { return nil }

func FuzzStreamRead(f *testing.F) {
	f.Add([]byte{frameData, 3, 0, 0, 0, 'a', 'b', 'c', frameEOF, 0, 0, 0, 0})
	f.Add([]byte{frameReset, 2, 0, 0, 0, 'n', 'o'})
	f.Add([]byte{frameData, 255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, in []byte) {
		n, err := io.Copy(io.Discard, NewStream(script{r: bytes.NewReader(in)}))
		if n > int64(len(in)) {
			t.Errorf("%d bytes out of %d, %v", n, len(in), err)
		}
	})
}

// A peer's reason is quoted wherever it is printed.
func TestResetReasonIsQuoted(t *testing.T) {
	if got := (&ResetError{Reason: "\x1b[2J\n"}).Error(); got != `stream reset by peer: "\x1b[2J\n"` {
		t.Error(got)
	}
}

// Frames come apart and together in every way; the bytes are the same.
func TestReadUnpacksAnyFrames(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		var wire, want []byte
		for range 1 + r.IntN(20) {
			p := make([]byte, []int{0, 1, 100, 5000, MaxFrame}[r.IntN(5)])
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			wire, want = append(appendHeader(wire, frameData, len(p)), p...), append(want, p...)
		}
		end, reason := error(io.EOF), "the end"
		if r.IntN(2) == 0 {
			wire = appendHeader(wire, frameEOF, 0)
		} else {
			wire, end = append(appendHeader(wire, frameReset, len(reason)), reason...), &ResetError{Reason: reason}
		}
		wire = append(wire, "what follows does not count"...)
		s := NewStream(script{r: readerFunc(func(p []byte) (int, error) {
			n := copy(p[:1+r.IntN(len(p))], wire[:min(len(wire), 1+r.IntN(100_000))])
			wire = wire[n:]
			return n, nil
		})})
		var got []byte
		var err error
		for err == nil {
			p := make([]byte, []int{1, 3, 500, smallRead, 10_000, 256 << 10}[r.IntN(6)])
			var n int
			n, err = s.Read(p)
			got = append(got, p[:n]...)
		}
		if !bytes.Equal(got, want) || err.Error() != end.Error() {
			t.Fatalf("read %d bytes of %d, then %v, want %v", len(got), len(want), err, end)
		}
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
