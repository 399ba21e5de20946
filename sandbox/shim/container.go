package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"k8s.io/klog/v2"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/shim/crilog"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// Reasons of ended containers; the first three are the ones kubelet knows.
const (
	ReasonCompleted   = "Completed"
	ReasonError       = "Error"
	ReasonOOMKilled   = "OOMKilled"
	ReasonStartError  = "StartError"
	ReasonSandboxGone = "SandboxGone"
)

const (
	// exitSandboxGone is the exit code of what nobody saw ending.
	exitSandboxGone = 255
	// exitStartError is the exit code of what never started, as containerd's.
	exitStartError = 128
	exitSIGKILL    = 128 + int32(syscall.SIGKILL)

	// createTimeout bounds mounting a root file system in the guest.
	createTimeout = 2 * time.Minute
	startTimeout  = time.Minute
	// streamTimeout bounds opening a stream to the guest.
	streamTimeout = 10 * time.Second
	// maxGroups is how many groups of a user are taken from the guest: the record
	// of a container must stay within maxStatus, or its exit is forgotten.
	maxGroups = 4096
	// drainTimeout bounds how long after a container's end its output may still
	// come; the agent has handed it over by then.
	drainTimeout = 5 * time.Second
)

// isName tells whether s, which becomes the name of a file or directory, is 1 to
// most letters, digits, _, . and -, the first of them a letter or digit. A regular
// expression for it takes a tenth of a shim's start to compile.
func isName(s string, most int) bool {
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && (i == 0 || c != '_' && c != '.' && c != '-') {
			return false
		}
	}
	return 1 <= len(s) && len(s) <= most
}

func checkID(what, id string) error {
	if !isName(id, 128) {
		return fmt.Errorf("%s id %q: %w", what, id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// container is one container of the pod.
type container struct {
	id        string
	dir       string // of the status record
	logPath   string
	tty       bool
	stdin     bool
	stdinOnce bool
	volumes   []string

	// token is held while the container is made, started or removed, and record while
	// its record is written and its state changed, so that both keep one order.
	token  chan struct{}
	giveUp context.CancelFunc // ends the making
	record chan struct{}
	// ended is closed when the guest said that the process ended; exited when
	// the exit is on record and public.
	ended  chan struct{}
	exited chan struct{}

	// What can be attached to; stdout is the terminal's output, too.
	stdout, stderr fanout
	// input is for the terminal, from attached clients.
	input chan []byte

	// mu guards what follows. Shim.mu guards state.
	mu  sync.Mutex
	log *crilog.Writer

	state *shimapi.ContainerState // nil: not created yet
}

func newContainer(req *shimapi.CreateContainerRequest, dir string) *container {
	g := req.GetContainer()
	return &container{
		id: g.GetId(), dir: dir, logPath: req.GetLogPath(),
		tty: g.GetTty() || req.GetTty(), stdin: g.GetStdin(), stdinOnce: g.GetStdinOnce(),
		token: make(chan struct{}, 1), record: make(chan struct{}, 1),
		ended: make(chan struct{}), exited: make(chan struct{}),
		input: make(chan []byte),
	}
}

// acquire takes a token, bounded by ctx; release gives it back.
func acquire(ctx context.Context, token chan struct{}, what string) (release func(), err error) {
	select {
	case token <- struct{}{}:
		return func() { <-token }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waited for another call on %s to end: %w", what, ctx.Err())
	}
}

// find returns a created container.
func (s *Shim) find(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[id]; c != nil && c.state != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
}

// stateOf is a copy of a container's state.
func (s *Shim) stateOf(c *container) *shimapi.ContainerState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return proto.CloneOf(c.state)
}

// commit changes a container's state: on record first, and only then in public
// (T10). A record that can't be written is tried again in the background; the
// state is public all the same, because it is the truth.
func (s *Shim) commit(c *container, f func(*shimapi.ContainerState)) *shimapi.ContainerState {
	c.record <- struct{}{}
	defer func() { <-c.record }()
	s.mu.Lock()
	next := proto.CloneOf(c.state)
	s.mu.Unlock()
	if next == nil {
		next = &shimapi.ContainerState{Id: c.id}
	}
	f(next)
	if err := WriteStatus(c.dir, next); err != nil {
		klog.ErrorS(err, "Writing a container's record failed", "pod", s.cfg.ID, "container", c.id)
		s.tasks.Go(func() { s.recordLater(c) })
	}
	s.change(func() {
		next.Revision = s.revision + 1
		c.state = next
	})
	return proto.CloneOf(next)
}

// recordLater tries to get a container's state on record until that works or
// the shim ends.
func (s *Shim) recordLater(c *container) {
	for {
		select {
		case <-time.After(time.Second):
		case <-s.gone:
			// One last try below; then it is the daemon's.
		}
		c.record <- struct{}{}
		err := WriteStatus(c.dir, s.stateOf(c))
		<-c.record
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return
		}
		select {
		case <-s.gone:
			return
		default:
		}
	}
}

// WriteStatus puts a container's state on record in its directory.
func WriteStatus(dir string, state *shimapi.ContainerState) error {
	b, err := protojson.Marshal(state)
	if err != nil {
		return err
	}
	return WriteFile(filepath.Join(dir, StatusFile), b)
}

// maxStatus bounds a status record.
const maxStatus = 256 << 10

// ReadStatus reads the record that WriteStatus made.
func ReadStatus(dir string) (*shimapi.ContainerState, error) {
	path := filepath.Join(dir, StatusFile)
	b, err := readCapped(path, maxStatus)
	if err != nil {
		return nil, err
	}
	state, err := parseStatus(b)
	if err != nil {
		return nil, fmt.Errorf("container record %s: %w", path, err)
	}
	return state, nil
}

func parseStatus(b []byte) (*shimapi.ContainerState, error) {
	var state shimapi.ContainerState
	// A newer build's fields are no reason to forget an exit code.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, &state); err != nil {
		return nil, err
	}
	return &state, nil
}

// CreateContainer implements shim/api.
func (s *Shim) CreateContainer(ctx context.Context, req *shimapi.CreateContainerRequest) (*shimapi.CreateContainerResponse, error) {
	id := req.GetContainer().GetId()
	if err := checkID("container", id); err != nil {
		return nil, err
	}
	for _, l := range req.GetContainer().GetLayers() {
		if l != filepath.Base(l) || l == "." || l == ".." {
			return nil, fmt.Errorf("container %s: layer %q is not a file name: %w", id, l, errdefs.ErrInvalidArgument)
		}
	}
	a, _, err := s.running()
	if err != nil {
		return nil, err
	}
	c := newContainer(req, filepath.Join(s.cfg.PodDir, ContainersDir, id))
	cctx, cancel := context.WithTimeout(ctx, createTimeout)
	defer cancel()
	c.giveUp = cancel
	c.token <- struct{}{} // nobody knows it yet
	defer func() { <-c.token }()
	s.mu.Lock()
	_, exists := s.containers[id]
	if !exists {
		s.containers[id] = c
	}
	s.mu.Unlock()
	if exists {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrAlreadyExists)
	}
	undo := func() {
		_ = s.volumes.release(c.volumes) // what went wrong first is what matters
		s.mu.Lock()
		delete(s.containers, id)
		s.mu.Unlock()
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		undo()
		return nil, fmt.Errorf("container %s: %w", id, err)
	}
	for _, v := range req.GetVolumes() {
		if err := s.volumes.add(v); err != nil {
			undo()
			return nil, fmt.Errorf("container %s: volume %s: %w", id, v.GetHostPath(), err)
		}
		c.volumes = append(c.volumes, v.GetName())
	}
	resp, err := call(cctx, a, "create container", a.CreateContainer, req.GetContainer())
	if n := len(resp.GetUser().GetSupplementalGroups()); err == nil && n > maxGroups {
		err = fmt.Errorf("the guest says that its user has %d groups, which is more than %d: %w", n, maxGroups, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		// The guest may have made a part of it, or all of it after the bound.
		rctx, rcancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Duration(s.cfg.Timeouts.Agent))
		_, rerr := call(rctx, a, "remove container", a.RemoveContainer, &guestapi.RemoveContainerRequest{Id: id})
		rcancel()
		if rerr != nil {
			klog.ErrorS(rerr, "Undoing a failed create", "pod", s.cfg.ID, "container", id)
		}
		undo()
		return nil, fmt.Errorf("container %s: %w", id, err)
	}
	state := s.commit(c, func(st *shimapi.ContainerState) {
		st.Phase = shimapi.Phase_CREATED
		st.CreatedAt = time.Now().UnixNano()
		st.User = resp.GetUser()
	})
	return &shimapi.CreateContainerResponse{State: state}, nil
}

// StartContainer implements shim/api.
func (s *Shim) StartContainer(ctx context.Context, req *shimapi.StartContainerRequest) (*shimapi.ContainerState, error) {
	c, err := s.find(req.GetId())
	if err != nil {
		return nil, err
	}
	release, err := acquire(ctx, c.token, "container "+c.id)
	if err != nil {
		return nil, err
	}
	defer release()
	if st := s.stateOf(c); st.GetPhase() != shimapi.Phase_CREATED {
		return nil, fmt.Errorf("container %s was started before and is %v: %w", c.id, st.GetPhase(), errdefs.ErrFailedPrecondition)
	}
	a, m, err := s.running()
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.id, err)
	}
	// From here on the caller's patience no longer matters: whether it started
	// must be known.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTimeout)
	defer cancel()
	if c.logPath != "" {
		w, err := crilog.Open(c.logPath)
		if err != nil {
			return nil, s.failStart(c, err)
		}
		c.mu.Lock()
		c.log = w
		c.mu.Unlock()
	}
	if _, err := call(ctx, a, "start container", a.StartContainer, &guestapi.StartContainerRequest{Id: c.id}); err != nil {
		return nil, s.failStart(c, err)
	}
	state := s.commit(c, func(st *shimapi.ContainerState) {
		st.Phase = shimapi.Phase_RUNNING
		st.StartedAt = time.Now().UnixNano()
	})
	output := s.openOutput(ctx, m, c)
	s.tasks.Go(func() { s.supervise(a, c, output) })
	return state, nil
}

// failStart records that a container never ran.
func (s *Shim) failStart(c *container, err error) error {
	c.mu.Lock()
	if c.log != nil {
		c.log.Close()
	}
	c.mu.Unlock()
	s.commit(c, func(st *shimapi.ContainerState) {
		st.Phase = shimapi.Phase_EXITED
		st.FinishedAt = time.Now().UnixNano()
		st.ExitCode = exitStartError
		st.Reason, st.Message = ReasonStartError, err.Error()
	})
	close(c.ended)
	c.stdout.close("")
	c.stderr.close("")
	close(c.exited)
	return err
}

// output is one stream from the guest and where it goes.
type output struct {
	stream *guestapi.Stream // nil: could not be opened
	err    error
	log    *crilog.Stream // nil: no log
	fan    *fanout
}

// openOutput connects to what the process writes. The guest keeps the bytes
// until somebody does.
func (s *Shim) openOutput(ctx context.Context, m vmm.Machine, c *container) []*output {
	outs := []*output{{fan: &c.stdout}, {fan: &c.stderr}}
	kinds := []guestapi.Kind{guestapi.Stdout, guestapi.Stderr}
	if c.tty {
		outs, kinds = outs[:1], []guestapi.Kind{guestapi.Terminal}
		c.stderr.close("") // has nothing to say, ever
	}
	for i, o := range outs {
		o.stream, o.err = dialStream(ctx, m, guestapi.Header{Kind: kinds[i], Container: c.id})
		if o.err != nil {
			klog.ErrorS(o.err, "Connecting to a container's output failed", "pod", s.cfg.ID, "container", c.id, "stream", kinds[i])
		}
		c.mu.Lock()
		if c.log != nil {
			o.log = c.log.Stream([]string{"stdout", "stderr"}[i])
		}
		c.mu.Unlock()
		if terminal := o.stream; c.tty && terminal != nil {
			s.tasks.Go(func() { c.typeInput(terminal) })
		}
	}
	return outs
}

// dialStream opens a stream to the guest, bounded.
func dialStream(ctx context.Context, m vmm.Machine, h guestapi.Header) (*guestapi.Stream, error) {
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	conn, err := m.Dial(ctx, guestapi.PortData)
	if err != nil {
		return nil, fmt.Errorf("dial the guest's data port: %w", err)
	}
	_ = conn.SetDeadline(time.Now().Add(streamTimeout))
	st, err := guestapi.Open(conn, h)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Time{})
	return st, nil
}

// pump moves one stream's bytes to the log and to attached clients until it
// ends. Neither can hold it up for long.
func (o *output) pump() {
	if o.stream == nil {
		o.fan.close("the container's output is not connected: " + o.err.Error())
		return
	}
	defer o.stream.Close()
	bp := smallBuffers.Get().(*[]byte)
	defer smallBuffers.Put(bp)
	for {
		n, err := o.stream.Read(*bp)
		if n > 0 {
			if o.log != nil {
				_, _ = o.log.Write((*bp)[:n])
			}
			_, _ = o.fan.Write((*bp)[:n])
		}
		if err == nil {
			continue
		}
		if o.log != nil {
			o.log.Flush()
		}
		if errors.Is(err, io.EOF) {
			o.fan.close("")
		} else {
			o.fan.close("the container's output broke off: " + escape(err.Error(), 512))
		}
		return
	}
}

// supervise follows a running container to its end and records that.
func (s *Shim) supervise(a *agent, c *container, outs []*output) {
	var pumps sync.WaitGroup
	for _, o := range outs {
		pumps.Go(o.pump)
	}
	type result struct {
		resp *guestapi.WaitResponse
		err  error
	}
	answer := make(chan result, 1)
	wctx, cancel := context.WithCancel(context.Background())
	go func() {
		resp, err := a.Wait(wctx, &guestapi.WaitRequest{Id: c.id})
		answer <- result{resp, err}
	}()
	var r result
	gone := false
	select {
	case r = <-answer:
	case <-s.gone:
		// An answer that came with the VM's last breath counts.
		select {
		case r = <-answer:
		case <-time.After(100 * time.Millisecond):
			gone = true
		}
	}
	if !gone && r.err != nil {
		// The guest doesn't know how its container ended, or can't say.
		err := agentError("wait for container", r.err)
		select {
		case <-s.gone:
			gone = true
		case <-time.After(lastBreath):
			if errdefs.IsUnavailable(err) || errors.Is(r.err, net.ErrClosed) {
				s.killVM(err.Error())
				gone = true
			} else {
				klog.ErrorS(err, "The agent lost a container", "pod", s.cfg.ID, "container", c.id)
			}
		}
	}
	cancel()
	close(c.ended)

	if gone || !waitFor(&pumps, drainTimeout) {
		// What hasn't come by now won't: break the streams off.
		for _, o := range outs {
			if o.stream != nil {
				o.stream.Close()
			}
		}
	}
	pumps.Wait()
	var dropped uint64
	c.mu.Lock()
	w := c.log
	c.mu.Unlock()
	if w != nil {
		w.Close()
		dropped = w.Dropped()
	}
	s.commit(c, func(st *shimapi.ContainerState) {
		st.Phase = shimapi.Phase_EXITED
		st.FinishedAt = time.Now().UnixNano()
		st.LogLinesDropped = dropped
		switch {
		case gone:
			s.mu.Lock()
			reason, stopping := s.reason, s.stopping
			s.mu.Unlock()
			st.ExitCode, st.Reason, st.Message = exitSandboxGone, ReasonSandboxGone, reason
			if stopping {
				// The stop of its pod killed it, as it was meant to.
				st.ExitCode = exitSIGKILL
			}
		case r.err != nil:
			st.ExitCode, st.Reason = exitSandboxGone, ReasonError
			st.Message = agentError("wait for container", r.err).Error()
		default:
			st.ExitCode = r.resp.GetExitCode()
			switch {
			case r.resp.GetOomKilled():
				st.Reason = ReasonOOMKilled
			case st.ExitCode == 0:
				st.Reason = ReasonCompleted
			default:
				st.Reason = ReasonError
				s.mu.Lock()
				st.Message = s.diskError
				s.mu.Unlock()
			}
			if amiss := r.resp.GetMessage(); amiss != "" && st.Message == "" {
				st.Message = escape(amiss, 512)
				klog.InfoS("A container's end leaves something amiss", "pod", s.cfg.ID, "container", c.id, "message", st.Message)
			}
		}
	})
	close(c.exited)
}

// StopContainer implements shim/api.
func (s *Shim) StopContainer(ctx context.Context, req *shimapi.StopContainerRequest) (*shimapi.ContainerState, error) {
	c, err := s.find(req.GetId())
	if err != nil {
		return nil, err
	}
	kill := time.Duration(s.cfg.Timeouts.Kill)
	if s.stateOf(c).GetPhase() == shimapi.Phase_CREATED {
		// Its start may be under way, for a caller who gave up.
		sctx, cancel := context.WithTimeout(ctx, max(time.Duration(req.GetGraceNanos()), 0)+kill)
		release, err := acquire(sctx, c.token, "container "+c.id)
		cancel()
		if err != nil {
			return nil, fmt.Errorf("container %s: stop: %w", c.id, err)
		}
		release()
	}
	if st := s.stateOf(c); st.GetPhase() != shimapi.Phase_RUNNING {
		return st, nil
	}
	s.mu.Lock()
	a := s.agent
	s.mu.Unlock()
	sig := req.GetSignal()
	if sig == 0 {
		sig = uint32(syscall.SIGTERM)
	}
	if grace := max(time.Duration(req.GetGraceNanos()), 0); grace > 0 && sig != uint32(syscall.SIGKILL) {
		gctx, cancel := context.WithTimeout(ctx, grace)
		go func() {
			if _, err := a.Signal(gctx, &guestapi.SignalRequest{Id: c.id, Signal: sig}); err != nil && gctx.Err() == nil {
				klog.ErrorS(agentError("signal", err), "Signal failed", "pod", s.cfg.ID, "container", c.id, "signal", sig)
			}
		}()
		select {
		case <-c.ended:
		case <-s.gone:
		case <-gctx.Done():
		}
		cancel()
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("container %s: stop: waited for its grace period: %w", c.id, err)
		}
	}
	select {
	case <-c.ended:
	default:
		// Not bounded by the caller: a SIGKILL can't be taken back, so the end
		// that must follow it is enforced, too.
		kctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), kill)
		go func() {
			_, _ = a.Signal(kctx, &guestapi.SignalRequest{Id: c.id, Signal: uint32(syscall.SIGKILL), All: true})
		}()
		select {
		case <-c.ended:
		case <-s.gone:
		case <-kctx.Done():
			s.killVM(fmt.Sprintf("container %s didn't end within %v of SIGKILL", c.id, kill))
		}
		cancel()
	}
	// What is left is the output's way to the log, which has bounds of its own.
	select {
	case <-c.exited:
		return s.stateOf(c), nil
	case <-ctx.Done():
		return nil, fmt.Errorf("container %s: stop: waited for its exit to be recorded: %w", c.id, ctx.Err())
	}
}

// RemoveContainer implements shim/api.
func (s *Shim) RemoveContainer(ctx context.Context, req *shimapi.RemoveContainerRequest) (*shimapi.RemoveContainerResponse, error) {
	s.mu.Lock()
	c := s.containers[req.GetId()]
	made := c != nil && c.state != nil
	s.mu.Unlock()
	if c == nil {
		return &shimapi.RemoveContainerResponse{}, nil
	}
	if !made {
		// Whoever has it made doesn't want it any more: a caller's end is not told
		// over ttrpc, unless it was a deadline.
		c.giveUp()
	}
	release, err := acquire(ctx, c.token, "container "+c.id)
	if err != nil {
		return nil, err
	}
	defer release()
	if _, err := s.find(c.id); err != nil {
		return &shimapi.RemoveContainerResponse{}, nil
	}
	if s.stateOf(c).GetPhase() == shimapi.Phase_RUNNING {
		if _, err := s.StopContainer(ctx, &shimapi.StopContainerRequest{Id: c.id}); err != nil {
			return nil, err
		}
	}
	if a, _, err := s.running(); err == nil {
		if _, err := call(ctx, a, "remove container", a.RemoveContainer, &guestapi.RemoveContainerRequest{Id: c.id}); err != nil {
			// A VM that died meanwhile has nothing left to remove.
			if _, _, gone := s.running(); gone == nil {
				return nil, fmt.Errorf("container %s: %w", c.id, err)
			}
		}
	}
	if err := s.volumes.release(c.volumes); err != nil {
		return nil, fmt.Errorf("container %s: %w", c.id, err)
	}
	s.change(func() { delete(s.containers, c.id) })
	return &shimapi.RemoveContainerResponse{}, nil
}

// ReopenLog implements shim/api.
func (s *Shim) ReopenLog(_ context.Context, req *shimapi.ReopenLogRequest) (*shimapi.ReopenLogResponse, error) {
	c, err := s.find(req.GetId())
	if err != nil {
		return nil, err
	}
	if s.stateOf(c).GetPhase() != shimapi.Phase_RUNNING {
		return nil, fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	c.mu.Lock()
	w := c.log
	c.mu.Unlock()
	if w != nil {
		if err := w.Reopen(); err != nil {
			return nil, fmt.Errorf("container %s: %w", c.id, err)
		}
	}
	return &shimapi.ReopenLogResponse{}, nil
}
