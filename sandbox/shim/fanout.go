package shim

import (
	"sync"
	"time"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

const (
	// attachQueue is how many bytes an attach client may be behind the container.
	attachQueue = 1 << 20
	// attachPatience is for how long, in sum, a client that is so far behind may
	// hold the container up before it is disconnected (T18). One that catches up
	// in between gets it anew.
	attachPatience = time.Second
	// attachWrite bounds one write to an attach client.
	attachWrite = 10 * time.Second
)

// fanout hands one output stream of a container to whoever is attached. It has
// one writer.
type fanout struct {
	mu     sync.Mutex
	subs   map[*subscriber]struct{}
	closed bool
}

// subscriber is one attached client's output.
type subscriber struct {
	wake chan struct{} // there is something to send
	room chan struct{} // something was taken to be sent
	left chan struct{} // nobody sends any more

	waited time.Duration // that the container waited; the writer's only

	mu       sync.Mutex
	queue    []byte
	caughtUp bool
	end      bool   // no more comes after the queue
	fate     string // not empty: break off with this reason
}

// Write gives p to every client; those that lag too far are broken off.
func (f *fanout) Write(p []byte) (int, error) {
	f.mu.Lock()
	subs := make([]*subscriber, 0, len(f.subs))
	for s := range f.subs {
		subs = append(subs, s)
	}
	f.mu.Unlock()
	for _, s := range subs {
		if !s.put(p) {
			f.mu.Lock()
			delete(f.subs, s)
			f.mu.Unlock()
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
	s := &subscriber{wake: make(chan struct{}, 1), room: make(chan struct{}, 1), left: make(chan struct{})}
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

// unsubscribe is called once by whoever subscribed.
func (f *fanout) unsubscribe(s *subscriber) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.subs, s)
	close(s.left)
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
			s.sent()
		}
		if end {
			_ = stream.CloseWrite()
			return
		}
	}
}

// put queues p, and waits for room within what is left of the patience.
func (s *subscriber) put(p []byte) bool {
	for {
		s.mu.Lock()
		if s.caughtUp {
			s.caughtUp, s.waited = false, 0
		}
		ok := len(s.queue)+len(p) <= attachQueue
		if ok {
			s.queue = append(s.queue, p...)
		} else if s.waited >= attachPatience {
			s.fate = "attach client reads too slowly: it is more than 1 MiB behind the container"
		}
		done := ok || s.fate != ""
		s.mu.Unlock()
		if done {
			s.poke()
			return ok
		}
		start := time.Now()
		t := time.NewTimer(attachPatience - s.waited)
		select {
		case <-s.room:
		case <-s.left:
			t.Stop()
			return false
		case <-t.C:
		}
		t.Stop()
		s.waited += time.Since(start)
	}
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
	b, s.queue = s.queue, nil
	end, fate = s.end, s.fate
	s.mu.Unlock()
	select {
	case s.room <- struct{}{}:
	default:
	}
	return b, end, fate
}

// sent notes whether the client has all there is.
func (s *subscriber) sent() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.caughtUp = s.caughtUp || len(s.queue) == 0
}

func (s *subscriber) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}
