//go:build linux && (amd64 || arm64)

package agent

import (
	"errors"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// stdio is the agent's side of a process's standard streams: pipes, or the
// master of a terminal. Bytes are read from the process only while a stream is
// attached, so that a slow host makes the process wait and not the agent grow.
type stdio struct {
	stdin  *endpoint // nil: /dev/null
	stdout *endpoint
	stderr *endpoint
	master *endpoint // with a terminal it is all three
}

// endpoint is one pipe or terminal. One stream is attached at a time; a new one
// takes the place of the old one, because after a broken connection the host
// may know before the agent does.
type endpoint struct {
	f *os.File // non-blocking, so that deadlines end reads and writes
	// once says that the end of an input stream ends the process's input.
	once bool

	// eof is closed when all output has been handed to a stream.
	eof chan struct{}
	// moved is the unix time, in nanoseconds, of the last progress.
	moved atomic.Int64

	mu       sync.Mutex // guards what follows
	attached *api.Stream
	idle     chan struct{} // closed when attached has been let go
	closed   bool

	pending []byte      // read but not delivered; of whoever is attached
	stuck   atomic.Bool // pending is not empty, and nobody is attached
}

func newEndpoint(f *os.File) *endpoint {
	e := &endpoint{f: f, eof: make(chan struct{}), idle: make(chan struct{})}
	close(e.idle)
	return e
}

// newPipes makes pipes. child are the process's ends: standard input, output
// and error.
func newPipes(stdin bool) (s *stdio, child [3]*os.File, err error) {
	s = &stdio{}
	defer func() {
		if err != nil {
			s.close()
			closeFiles(child[:])
		}
	}()
	if stdin {
		var r, w *os.File
		if r, w, err = pipe(unix.O_WRONLY); err != nil {
			return
		}
		s.stdin, child[0] = newEndpoint(w), r
	} else if child[0], err = os.Open(os.DevNull); err != nil {
		return
	}
	for i, e := range []**endpoint{&s.stdout, &s.stderr} {
		var r, w *os.File
		if r, w, err = pipe(unix.O_RDONLY); err != nil {
			return
		}
		*e, child[1+i] = newEndpoint(r), w
	}
	return
}

// pipe returns a pipe whose end for mode is non-blocking; the other one, the
// container's, must not be.
func pipe(mode int) (r, w *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	mine := fds[0]
	if mode == unix.O_WRONLY {
		mine = fds[1]
	}
	if err := unix.SetNonblock(mine, true); err != nil {
		closeAll(fds[:])
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "pipe"), os.NewFile(uintptr(fds[1]), "pipe"), nil
}

// containerTerminal opens a terminal of the devpts that a running container has,
// so that ttyname(3) works in an exec. The container is hostile: nothing that is
// not the ptmx of a devpts is opened.
func containerTerminal(init *process, size *specs.Box) (*stdio, *os.File, error) {
	root, err := unix.Open("/proc/"+strconv.Itoa(init.pid)+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("open the container's root", err)
	}
	defer unix.Close(root)
	path, err := unix.Openat2(root, "dev/pts/ptmx", &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, nil, os.NewSyscallError("open the container's ptmx", err)
	}
	defer unix.Close(path)
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := errors.Join(unix.Fstat(path, &st), unix.Fstatfs(path, &fs)); err != nil {
		return nil, nil, err
	}
	if fs.Type != unix.DEVPTS_SUPER_MAGIC || st.Mode&unix.S_IFMT != unix.S_IFCHR || uint64(st.Rdev) != unix.Mkdev(5, 2) {
		return nil, nil, errors.New("the container's /dev/pts/ptmx is something else")
	}
	// The pid was the container's when its root was opened, if it still is.
	if err := init.signal(0); err != nil || init.hasExited() {
		return nil, nil, preconditionf("the container has stopped")
	}
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(path), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("open the container's ptmx", err)
	}
	return terminal(fd, size)
}

// newTerminal opens a terminal of the devpts at dir (/dev/pts).
func newTerminal(dir string, size *specs.Box) (*stdio, *os.File, error) {
	fd, err := unix.Open(dir+"/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: dir + "/ptmx", Err: err}
	}
	return terminal(fd, size)
}

// terminal makes the streams of a terminal from its master, which it owns, and
// opens the slave. size may be nil.
func terminal(fd int, size *specs.Box) (*stdio, *os.File, error) {
	master := os.NewFile(uintptr(fd), "ptmx")
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		master.Close()
		return nil, nil, os.NewSyscallError("unlock terminal", err)
	}
	peer, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if e != 0 {
		master.Close()
		return nil, nil, os.NewSyscallError("open terminal", e)
	}
	slave := os.NewFile(uintptr(peer), "terminal")
	s := &stdio{master: newEndpoint(master)}
	width, height := uint32(80), uint32(24)
	if size != nil && size.Width > 0 && size.Height > 0 {
		width, height = uint32(min(size.Width, 0xffff)), uint32(min(size.Height, 0xffff))
	}
	if err := s.resize(width, height); err != nil {
		s.close()
		slave.Close()
		return nil, nil, err
	}
	return s, slave, nil
}

func (s *stdio) resize(width, height uint32) error {
	if s.master == nil {
		return preconditionf("the process has no terminal")
	}
	c, err := s.master.f.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = c.Control(func(fd uintptr) {
		set = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(min(height, 0xffff)), Col: uint16(min(width, 0xffff))})
	})
	return errors.Join(err, set)
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// endpoints lists what there is.
func (s *stdio) endpoints() []*endpoint {
	var all []*endpoint
	for _, e := range []*endpoint{s.stdin, s.stdout, s.stderr, s.master} {
		if e != nil {
			all = append(all, e)
		}
	}
	return all
}

// close ends all streams; what is still in the pipes is lost.
func (s *stdio) close() {
	for _, e := range s.endpoints() {
		e.close()
	}
}

// endpoint finds what a kind of stream attaches to.
func (s *stdio) endpoint(k api.Kind) (*endpoint, error) {
	var e *endpoint
	switch k {
	case api.Stdin:
		e = s.stdin
	case api.Stdout:
		e = s.stdout
	case api.Stderr:
		e = s.stderr
	case api.Terminal:
		e = s.master
	}
	if e == nil {
		if s.master != nil {
			return nil, preconditionf("the process has a terminal and no separate %s", k)
		}
		return nil, preconditionf("the process has no %s", k)
	}
	return e, nil
}

// Bounds of drain.
const (
	// drainIdle is how long nothing may move while a stream is attached:
	// processes that outlive an exec may keep its pipes open for ever.
	drainIdle = time.Second
	// drainUnattached is how long output waits for a stream that has not come.
	drainUnattached = 5 * time.Second
	// drainMax is how long output may go on altogether.
	drainMax = 10 * time.Second
)

// drain waits until all output has been handed over, or until one of the bounds
// above says that it never will be. It returns at once when stop is closed.
func (s *stdio) drain(exited time.Time, stop <-chan struct{}) {
	for _, e := range []*endpoint{s.stdout, s.stderr, s.master} {
		if e != nil {
			e.drain(exited, stop)
		}
	}
}

func (e *endpoint) drain(exited time.Time, stop <-chan struct{}) {
	for {
		e.mu.Lock()
		attached := e.attached != nil
		e.mu.Unlock()
		last := time.Unix(0, max(e.moved.Load(), exited.UnixNano()))
		until := last.Add(drainIdle)
		if !attached {
			data, open := e.peek()
			if !data && !open {
				return // nobody misses an end of file alone
			}
			if data {
				until = last.Add(drainUnattached)
			}
		}
		if far := exited.Add(drainMax); far.Before(until) {
			until = far
		}
		left := time.Until(until)
		if left <= 0 {
			return
		}
		t := time.NewTimer(min(left, drainIdle/4))
		select {
		case <-e.eof:
			t.Stop()
			return
		case <-stop:
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// peek says whether there is output to be read, and whether there are writers
// that may make more. Only for an endpoint without a stream.
func (e *endpoint) peek() (data, open bool) {
	c, err := e.f.SyscallConn()
	if err != nil {
		return false, false // closed
	}
	_ = c.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, 0); err == nil {
			data, open = p[0].Revents&unix.POLLIN != 0, p[0].Revents&unix.POLLHUP == 0
		}
	})
	return data || e.stuck.Load(), open
}

// past is a deadline that ends whatever is blocked.
var past = time.Unix(1, 0)

// attach makes s the stream of e and ends the one before. release must be
// called when s has ended.
func (e *endpoint) attach(s *api.Stream) error {
	for {
		e.mu.Lock()
		if e.closed {
			e.mu.Unlock()
			return preconditionf("the stream has been closed")
		}
		old, idle := e.attached, e.idle
		if old == nil {
			e.attached, e.idle = s, make(chan struct{})
			_ = e.f.SetDeadline(time.Time{})
			e.moved.Store(time.Now().UnixNano())
			e.mu.Unlock()
			return nil
		}
		e.mu.Unlock()
		_ = old.Conn().SetDeadline(past) // fails on a closed one, which is as good
		e.interrupt(old)
		<-idle // both deadlines are past
	}
}

// interrupt ends reads and writes of e's file if s is still attached to it.
func (e *endpoint) interrupt(s *api.Stream) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.attached == s {
		_ = e.f.SetDeadline(past)
	}
}

func (e *endpoint) release() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.attached = nil
	e.moved.Store(time.Now().UnixNano())
	close(e.idle)
}

func (e *endpoint) close() {
	e.mu.Lock()
	closed := e.closed
	e.closed = true
	s := e.attached
	e.mu.Unlock()
	if closed {
		return
	}
	e.f.Close()
	if s != nil {
		_ = s.Conn().SetDeadline(past)
	}
}

// pumpOut sends what the process writes to s until the end of either. It
// reports whether the output has ended.
func (e *endpoint) pumpOut(s *api.Stream, buf []byte) bool {
	for {
		if len(e.pending) == 0 {
			n, err := e.f.Read(buf)
			if n > 0 {
				e.pending = buf[:n]
				e.moved.Store(time.Now().UnixNano())
			} else if err != nil {
				// A terminal's master reads EIO when no process has it open.
				if errors.Is(err, io.EOF) || errors.Is(err, unix.EIO) {
					if s.CloseWrite() == nil {
						e.finish()
					}
					return true
				}
				return false
			}
		}
		n, err := s.Write(e.pending)
		e.pending = e.pending[n:]
		if err != nil {
			e.pending = append([]byte(nil), e.pending...) // buf is not e's
			e.stuck.Store(true)
			return false
		}
		e.stuck.Store(false)
		e.moved.Store(time.Now().UnixNano())
	}
}

func (e *endpoint) finish() {
	e.mu.Lock()
	defer e.mu.Unlock()
	select {
	case <-e.eof:
	default:
		close(e.eof)
	}
}

// pumpIn gives the process what comes from s until the end of either.
func (e *endpoint) pumpIn(s *api.Stream, buf []byte) error {
	for {
		n, err := s.Read(buf)
		if n > 0 {
			if _, werr := e.f.Write(buf[:n]); werr != nil {
				return werr
			}
			e.moved.Store(time.Now().UnixNano())
		}
		if err != nil {
			return err
		}
	}
}
