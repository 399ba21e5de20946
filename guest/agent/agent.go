//go:build linux && (amd64 || arm64)

// Package agent is the software of a pod's guest: PID 1, which serves the API
// of package api, and pod-init, which holds the pod's namespaces and is the
// parent of all containers. What runs between a fork and a container's command
// is package container.
//
// The host is trusted, because it made the VM. Containers are not: nothing that
// they write, name or leave running may make the agent wait without a bound,
// follow a path out of their root, or grow.
package agent

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Version is set by the linker.
var Version = "devel"

// paths are where things are in the guest; tests put them elsewhere.
type paths struct {
	exe     string // the agent's binary, on a read-only mount
	run     string // a tmpfs for the agent's own files
	layers  string // the share of layer images
	mounts  string // a tmpfs for layer mount points
	volumes string // the share of volumes
	scratch string // the scratch disk
	cgroup  string // the cgroup v2 hierarchy
	devpts  string
}

var guestPaths = paths{
	exe:     "/agent",
	run:     "/run",
	layers:  "/run/layers",
	mounts:  "/l",
	volumes: "/run/volumes",
	scratch: "/run/scratch",
	cgroup:  "/sys/fs/cgroup",
	devpts:  "/dev/pts",
}

// Agent implements the API; its methods may be called concurrently.
type Agent struct {
	paths  paths
	reaper *reaper
	layers *layerStore
	log    *logger
	end    func() // powers the machine off; does not return in a guest

	// networked is closed when a sandbox can be set up, booted when containers
	// can be created.
	networked, booted chan struct{}
	// setUpBegun and setUpEnded are closed by the first SetUpSandbox.
	setUpBegun, setUpEnded chan struct{}
	// answered is closed when the host has been sent the answer to that, by sent.
	answered chan struct{}
	sent     func()
	// wantBooted ends what the rest of the boot waits for.
	wantBooted func()
	bootWanted chan struct{}
	// emptyDirTurn is a semaphore of one.
	emptyDirTurn chan struct{}

	bootMu  sync.Mutex // guards what boot finds out
	steps   []namedStep
	missing map[string]error // by part: "layers", "volumes", "scratch", "cgroup"
	scratch *scratch

	mu         sync.Mutex // guards what follows
	sandbox    *sandbox
	containers map[string]*ctr
	counter    int // numbers containers
}

// sandbox is what SetUpSandbox made.
type sandbox struct {
	forked  chan struct{} // closed when there is pod, or will never be one
	pod     *podClient
	pidMode api.NamespaceMode
	pidsMax int64  // of all containers together; 0: no bound
	proc    string // of a process in the pod's namespaces: /proc/PID
	netns   *os.File
	ids     *idMaps // nil: no user namespace
	dhcp    *dhcp   // nil: the host gave the addresses
	address netip.Addr
	ready   bool // set up completely
}

func newAgent(p paths, log *logger) *Agent {
	a := &Agent{
		paths:      p,
		reaper:     newReaper(),
		layers:     newLayerStore(p.layers, p.mounts),
		log:        log,
		end:        powerOff,
		networked:  make(chan struct{}),
		booted:     make(chan struct{}),
		setUpBegun: make(chan struct{}),
		setUpEnded: make(chan struct{}),
		answered:   make(chan struct{}),
		bootWanted: make(chan struct{}),

		emptyDirTurn: make(chan struct{}, 1),

		missing:    map[string]error{},
		containers: map[string]*ctr{},
	}
	a.sent = sync.OnceFunc(func() { close(a.answered) })
	a.wantBooted = sync.OnceFunc(func() { close(a.bootWanted) })
	return a
}

// isName tells whether s is 1 to most letters, digits, _, . and -. It is no regular
// expression: every process of this binary would compile that before main, and in
// an emulated guest each container and exec waits for two of them.
func isName(s string, most int) bool {
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '.' && c != '-' {
			return false
		}
	}
	return 1 <= len(s) && len(s) <= most
}

func checkID(what, id string) error {
	if !isName(id, api.MaxID) || id == "." || id == ".." {
		return invalidf("%s id %q: want 1 to 128 letters, digits, _, . and -", what, id)
	}
	return nil
}

// bootTimeout bounds the wait for the parts of the boot that come after the
// listeners: modules and mounts, well under a second where nothing is wrong.
const bootTimeout = 30 * time.Second

// require waits for the boot and says whether the named parts came up.
func (a *Agent) require(ctx context.Context, parts ...string) error {
	a.wantBooted()
	if err := a.await(ctx, a.booted); err != nil {
		return err
	}
	a.bootMu.Lock()
	defer a.bootMu.Unlock()
	for _, p := range parts {
		if err := a.missing[p]; err != nil {
			return unavailablef("the guest has no %s: %w", p, err)
		}
	}
	return nil
}

// await waits for a part of the boot.
func (a *Agent) await(ctx context.Context, part <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	select {
	case <-part:
		return nil
	case <-ctx.Done():
		return unavailablef("wait for the guest's boot: %w", ctx.Err())
	}
}

// pod returns the sandbox once it is set up.
func (a *Agent) pod() (*sandbox, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sandbox == nil || !a.sandbox.ready {
		return nil, preconditionf("the sandbox has not been set up")
	}
	return a.sandbox, nil
}

// container finds a container.
func (a *Agent) container(id string) (*ctr, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.containers[id]
	if c == nil {
		return nil, notFoundf("container %q: no such container in the guest", id)
	}
	return c, nil
}

// process finds a container's process or one of its execs.
func (a *Agent) process(id, exec string) (*process, error) {
	c, err := a.container(id)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if exec == "" {
		if c.init == nil {
			return nil, preconditionf("container %q: being created", id)
		}
		return c.init, nil
	}
	p := c.execs[exec]
	if p == nil {
		return nil, notFoundf("container %q: no exec %q", id, exec)
	}
	return p, nil
}

// state of a container.
type state int

const (
	creating state = iota
	created
	starting
	running
	stopped
	removing
)

func (s state) String() string {
	return [...]string{"being created", "created", "being started", "running", "stopped", "being removed"}[s]
}

// ctr is a container.
type ctr struct {
	id     string
	number int // in this VM; names its directories
	cgroup cgroup
	spec   *specs.Spec
	dir    string // its directory below paths.run
	user   *api.ResolvedUser
	ownPID bool
	target *process // whose pid namespace it shares, if not nil

	layers   []*layer
	writable *writable
	mounts   []string // to unmount, the last one first
	volumes  []string // those of them that are the host's
	shared   []string // the places of those in the share "volumes"

	mu       sync.Mutex // guards what follows
	state    state
	init     *process
	execs    map[string]*process
	reserved map[string]bool // exec ids being started, and whether they are still wanted
	settled  chan struct{}   // closed when creating, starting or removing is over
}

// process is a container's process or an exec.
type process struct {
	stdio  *stdio
	child  [3]*os.File // the process's ends until it starts
	devpts *os.File    // likewise, of a container with a terminal; may be nil
	cgroup cgroup      // of an exec

	// started is closed when pid and pidfd are set, exited when the process has
	// ended, done when its output has been drained too. drop ends the draining.
	started, exited, done, drop chan struct{}

	pid       int
	pidfd     *os.File
	startedAt time.Time

	ended    atomic.Bool // whoever sets it closes exited and done
	status   int32       // after exited
	exitedAt time.Time
	oom      bool
	amiss    string // what the host should know of its end
	dropOnce sync.Once
}

func newProcess(s *stdio, child [3]*os.File) *process {
	return &process{
		stdio: s, child: child,
		started: make(chan struct{}), exited: make(chan struct{}),
		done: make(chan struct{}), drop: make(chan struct{}),
	}
}

// discard gives up what the process holds; its streams end.
func (p *process) discard() {
	p.dropOnce.Do(func() {
		close(p.drop)
		p.stdio.close()
		p.closeChild()
		if p.hasStarted() {
			p.pidfd.Close()
		}
	})
}

// closeChild closes what is the process's alone once it has been forked.
func (p *process) closeChild() {
	closeFiles(p.child[:])
	if p.devpts != nil {
		p.devpts.Close()
	}
}

func (p *process) hasStarted() bool { return isDone(p.started) }
func (p *process) hasExited() bool  { return isDone(p.exited) }

func isDone(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// signal sends a signal through the pidfd: never to a stranger with the same
// number. A process that has ended is not an error.
func (p *process) signal(sig unix.Signal) error {
	if p.hasExited() {
		return nil
	}
	c, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := c.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		return err
	}
	if sent == unix.ESRCH {
		return nil
	}
	return os.NewSyscallError("pidfd_send_signal", sent)
}
