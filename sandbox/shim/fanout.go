package shim

import (
	"sync"
	"time"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

const (
	// attachQueue is how far an attach client may lag behind the container
	// before it is disconnected (T18).
	attachQueue = 1 << 20
	// attachWrite bounds one write to an attach client.
	attachWrite = 10 * time.Second
)

// fanout hands one output stream of a container to whoever is attached. Write
// never waits for a client.
type fanout struct {
	mu     sync.Mutex
	subs   map[*subscriber]struct{}
	closed bool
}

// subscriber is one attached client's output.
type subscriber struct {
	wake chan struct{}

	mu    sync.Mutex
	queue []byte
	end   bool   // no more comes after the queue
	fate  string // not empty: break off with this reason
}

// Write gives p to every client; those that lag are broken off.
func (f *fanout) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for s := range f.subs {
		if !s.put(p) {
			delete(f.subs, s)
		}
	}
	return len(p), nil
}

// close tells the clients that the stream has ended; with a reason it broke off.
func (f *fanout) close(reason string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	for s := range f.subs {
		s.finish(reason)
	}
	f.subs = nil
}

// subscribe begins to collect what the container writes for a client.
func (f *fanout) subscribe() *subscriber {
	s := &subscriber{wake: make(chan struct{}, 1)}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		s.end = true
		s.wake <- struct{}{}
		return s
	}
	if f.subs == nil {
		f.subs = make(map[*subscriber]struct{})
	}
	f.subs[s] = struct{}{}
	return s
}

func (f *fanout) unsubscribe(s *subscriber) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.subs, s)
}

// send writes what was collected to the client until the container's stream
// has ended, the client has lagged, or gone is closed because it vanished. It
// closes stream.
func (s *subscriber) send(stream *guestapi.Stream, gone <-chan struct{}) {
	defer stream.Close()
	for {
		select {
		case <-gone:
			return
		case <-s.wake:
		}
		b, end, fate := s.take()
		if fate != "" {
			// The client doesn't read, so the reset may find no room either.
			_ = stream.Conn().SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
			stream.Reset(fate)
			return
		}
		if len(b) > 0 {
			_ = stream.Conn().SetWriteDeadline(time.Now().Add(attachWrite))
			if _, err := stream.Write(b); err != nil {
				return
			}
		}
		if end {
			_ = stream.CloseWrite()
			return
		}
	}
}

func (s *subscriber) put(p []byte) bool {
	s.mu.Lock()
	ok := len(s.queue)+len(p) <= attachQueue
	if ok {
		s.queue = append(s.queue, p...)
	} else {
		s.fate = "attach client reads too slowly: it is more than 1 MiB behind the container"
	}
	s.mu.Unlock()
	s.poke()
	return ok
}

func (s *subscriber) finish(reason string) {
	s.mu.Lock()
	if reason == "" {
		s.end = true
	} else {
		s.fate = reason
	}
	s.mu.Unlock()
	s.poke()
}

func (s *subscriber) take() (b []byte, end bool, fate string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, s.queue = s.queue, nil
	return b, s.end, s.fate
}

func (s *subscriber) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}
