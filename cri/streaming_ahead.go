package cri

import (
	"context"
	"io"
	"sync"
)

// maxAhead is how much a client may type that the process hasn't read.
const maxAhead = 1 << 20

// ahead is input that was read before it is wanted: the protocols carry it and
// the terminal's size over one connection, and a process that doesn't read must
// not delay the size (T17). Input past maxAhead waits, and what follows it on the
// connection with it.
type ahead struct {
	mu   sync.Mutex
	buf  []byte
	err  error // sticky; after buf
	more chan struct{}
	room chan struct{}
}

// readAhead begins to read in, until it ends; while it waits for room, until ctx
// does. The result has one reader.
func readAhead(ctx context.Context, in io.Reader) io.Reader {
	a := &ahead{more: make(chan struct{}, 1), room: make(chan struct{}, 1)}
	go a.fill(ctx, in)
	return a
}

func (a *ahead) fill(ctx context.Context, in io.Reader) {
	chunk := make([]byte, 32<<10)
	for {
		n, err := in.Read(chunk)
		a.mu.Lock()
		a.buf = append(a.buf, chunk[:n]...)
		a.err = err
		full := len(a.buf) >= maxAhead
		a.mu.Unlock()
		poke(a.more)
		if err != nil {
			return
		}
		for full {
			select {
			case <-a.room:
			case <-ctx.Done():
				a.mu.Lock()
				a.err = ctx.Err()
				a.mu.Unlock()
				poke(a.more)
				return
			}
			a.mu.Lock()
			full = len(a.buf) >= maxAhead
			a.mu.Unlock()
		}
	}
}

func (a *ahead) Read(p []byte) (int, error) {
	for {
		a.mu.Lock()
		n := copy(p, a.buf)
		if a.buf = a.buf[n:]; len(a.buf) == 0 {
			a.buf = nil
		}
		err := a.err
		a.mu.Unlock()
		if n > 0 {
			poke(a.room)
			return n, nil
		}
		if err != nil {
			return 0, err
		}
		<-a.more // fill always ends, and says so
	}
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
