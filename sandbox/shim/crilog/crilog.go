// Package crilog writes a container's log file in the CRI's format (kubelet's
// "<RFC 3339 time> <stream> <P|F> <line>"). It never stalls the container that
// writes because of the disk: what a full or hanging disk can't take waits in
// a bounded buffer, and then whole lines are dropped, counted, and reported by
// one line in the log once there is room again.
//
// It doesn't rotate: kubelet renames the file and calls Reopen.
package crilog

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// MaxLine is the longest content of one log line, in bytes; longer lines
	// are cut into partial ones. containerd's and CRI-O's value.
	MaxLine = 16 << 10
	// maxQueue bounds the bytes that wait for the disk.
	maxQueue = 1 << 20
	// stallAfter: a disk that hasn't taken a write for so long counts as full,
	// so that lines are dropped instead of stalling the container.
	stallAfter = time.Second
	// retryEvery is how often a disk that refused a write is tried again.
	retryEvery = 200 * time.Millisecond
	// reopenWait bounds how long Reopen waits for the disk.
	reopenWait = 5 * time.Second
	// closeWait bounds how long Close waits for the disk.
	closeWait = time.Second
	// maxBatch is how much one write takes from the queue.
	maxBatch = 128 << 10

	timeFormat = "2006-01-02T15:04:05.000000000Z07:00"
)

// file is what a Writer needs of an *os.File; tests put a full disk there.
type file interface {
	Write(p []byte) (int, error)
	Close() error
}

// Writer is one container's log. Its methods may be called concurrently.
type Writer struct {
	path string
	open func(path string) (file, error)
	now  func() time.Time

	wake   chan struct{} // the queue has something, or it is time to close
	reopen chan chan error
	quit   chan struct{}
	done   chan struct{} // the writing goroutine has ended

	mu      sync.Mutex
	queue   [][]byte // whole lines
	size    int
	failing bool
	room    chan struct{} // closed and replaced whenever the queue gets shorter
	dropped uint64        // in total
	unsaid  uint64        // of those, not yet reported in the log
	closed  bool
}

// Open opens or creates the log file at path for appending. The path must not
// be a symbolic link, and what it names must be a regular file.
func Open(path string) (*Writer, error) {
	return newWriter(path, func(path string) (file, error) { return openFile(path) }, time.Now)
}

func newWriter(path string, open func(string) (file, error), now func() time.Time) (*Writer, error) {
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	w := &Writer{
		path: path, open: open, now: now,
		wake:   make(chan struct{}, 1),
		reopen: make(chan chan error),
		quit:   make(chan struct{}),
		done:   make(chan struct{}),
		room:   make(chan struct{}),
	}
	go w.run(f)
	return w, nil
}

// openFile refuses links and everything that isn't a plain file: the path lies
// in a directory that others may write to. O_NONBLOCK, lest a fifo hang it.
func openFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o640)
	if errors.Is(err, syscall.ELOOP) {
		return nil, fmt.Errorf("log file %s is a symbolic link: %w", path, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, fmt.Errorf("open container log: %w", err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("log file %s is not a regular file but %v: %w", path, st.Mode().Type(), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Reopen closes the file and opens the path anew. Lines that were written to
// the Writer after Reopen returned are in the new file. On error the Writer goes on with
// the old file.
func (w *Writer) Reopen() error {
	answer, hangs := make(chan error, 1), time.After(reopenWait)
	select {
	case w.reopen <- answer:
	case <-w.done:
		return fmt.Errorf("log %s is closed: %w", w.path, errdefs.ErrFailedPrecondition)
	case <-hangs:
		return fmt.Errorf("reopen log %s: its disk has not taken a write for %v: %w", w.path, reopenWait, errdefs.ErrUnavailable)
	}
	select {
	case err := <-answer:
		return err
	case <-hangs:
		return fmt.Errorf("reopen log %s: its disk has not answered for %v: %w", w.path, reopenWait, errdefs.ErrUnavailable)
	}
}

// Dropped is the number of lines that found no room.
func (w *Writer) Dropped() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dropped
}

// Close waits, for a bounded time, until the disk has all lines, and closes the
// file. What the disk didn't take by then counts as dropped.
func (w *Writer) Close() {
	w.mu.Lock()
	if !w.closed {
		w.closed = true
		close(w.quit)
	}
	w.mu.Unlock()
	select {
	case <-w.done:
	case <-time.After(closeWait + stallAfter):
		// A write that hangs in the kernel can't be taken back.
	}
}

// add queues one whole line; it waits while the disk is merely slower than the
// container, and drops when the disk is full or hangs.
func (w *Writer) add(line []byte) {
	var timeout <-chan time.Time
	for {
		w.mu.Lock()
		switch {
		case !w.closed && w.size+len(line) <= maxQueue:
			w.queue = append(w.queue, line)
			w.size += len(line)
			w.mu.Unlock()
			select {
			case w.wake <- struct{}{}:
			default:
			}
			return
		case w.closed || w.failing:
			w.dropped++
			w.unsaid++
			w.mu.Unlock()
			return
		}
		room := w.room
		w.mu.Unlock()
		if timeout == nil {
			t := time.NewTimer(stallAfter)
			defer t.Stop()
			timeout = t.C
		}
		select {
		case <-room:
		case <-timeout:
			w.mu.Lock()
			w.failing = true // the next round drops, as do all others until a write succeeds
			w.mu.Unlock()
		case <-w.quit:
		}
	}
}

// run writes the queue to the file, alone.
func (w *Writer) run(f file) {
	defer close(w.done)
	defer func() { f.Close() }()
	var retry <-chan time.Time
	var deadline time.Time // of closing
	off := 0               // bytes of the queue's first line that the file has
	for {
		if retry == nil {
			batch, lines := w.peek(off)
			if len(batch) > 0 {
				n, err := f.Write(batch)
				off = w.consume(lines, off, n, err)
				if err == nil && n == len(batch) {
					continue
				}
				if deadline.IsZero() {
					retry = time.After(retryEvery)
				} else {
					retry = time.After(10 * time.Millisecond)
				}
			} else if !deadline.IsZero() {
				return
			}
		}
		if !deadline.IsZero() && !time.Now().Before(deadline) {
			w.mu.Lock()
			w.dropped += uint64(len(w.queue))
			w.queue, w.size = nil, 0
			w.mu.Unlock()
			return
		}
		quit := w.quit
		if !deadline.IsZero() {
			quit = nil
		}
		wake := w.wake
		if retry != nil {
			wake = nil
		}
		select {
		case <-wake:
		case <-retry:
			retry = nil
		case <-quit:
			deadline = time.Now().Add(closeWait)
			retry = nil
		case answer := <-w.reopen:
			nf, err := w.open(w.path)
			if err == nil {
				f.Close()
				f = nf
				off = 0 // a line cut off in the old file is written whole to the new one
				retry = nil
			}
			answer <- err
		}
	}
}

// peek returns the next bytes for the file and of how many lines they are.
func (w *Writer) peek(off int) ([]byte, int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.unsaid > 0 && w.size < maxQueue/2 && off == 0 && !w.failing {
		// There is room again: say once what was lost, after what was kept.
		msg := fmt.Sprintf("[cri-vz: %d log lines were dropped here because the log's disk was full]", w.unsaid)
		line := w.format("stderr", 'F', []byte(msg))
		w.queue = append(w.queue, line)
		w.size += len(line)
		w.unsaid = 0
	}
	var b []byte
	lines := 0
	for _, l := range w.queue {
		if len(b) > 0 && len(b)+len(l) > maxBatch {
			break
		}
		b = append(b, l...)
		lines++
	}
	if lines > 0 {
		b = b[off:]
	}
	return b, lines
}

// consume takes n written bytes off the queue and returns how much of its new
// first line the file has.
func (w *Writer) consume(lines, off, n int, err error) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n += off
	for range lines {
		l := w.queue[0]
		if n < len(l) {
			break
		}
		n -= len(l)
		w.size -= len(l)
		w.queue[0] = nil
		w.queue = w.queue[1:]
	}
	w.failing = err != nil
	close(w.room)
	w.room = make(chan struct{})
	return n
}

func (w *Writer) format(stream string, tag byte, content []byte) []byte {
	b := make([]byte, 0, len(timeFormat)+len(stream)+len(content)+8)
	b = w.now().AppendFormat(b, timeFormat)
	b = append(b, ' ')
	b = append(b, stream...)
	b = append(b, ' ', tag, ' ')
	b = append(b, content...)
	return append(b, '\n')
}

// Stream turns bytes into lines of one stream of the log. It is not safe for
// concurrent use; streams of one Writer are independent of each other.
type Stream struct {
	w    *Writer
	name string
	buf  []byte // the line so far, without newline, at most MaxLine
}

// Stream returns a new stream: "stdout" or "stderr".
func (w *Writer) Stream(name string) *Stream { return &Stream{w: w, name: name} }

// Write takes any bytes; it always takes all of them and never fails.
func (s *Stream) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		// A line of exactly MaxLine bytes is whole: only a byte more that isn't
		// the newline makes it partial.
		if i := bytes.IndexByte(p, '\n'); i >= 0 && len(s.buf)+i <= MaxLine {
			s.emit('F', append(s.buf, p[:i]...))
			p = p[i+1:]
			continue
		}
		take := min(len(p), MaxLine-len(s.buf))
		s.buf = append(s.buf, p[:take]...)
		if p = p[take:]; len(p) > 0 {
			s.emit('P', s.buf)
		}
	}
	return n, nil
}

// Flush writes an unfinished last line as a partial one, as it has no newline.
func (s *Stream) Flush() {
	if len(s.buf) > 0 {
		s.emit('P', s.buf)
	}
}

func (s *Stream) emit(tag byte, line []byte) {
	s.w.add(s.w.format(s.name, tag, line))
	s.buf = s.buf[:0]
}
