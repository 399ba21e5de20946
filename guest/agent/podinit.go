//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"syscall"
)

// Roles in which the agent's binary executes itself: the first argument.
const (
	RolePodInit       = "pod-init"
	RoleContainerInit = "container-init"
	RoleExecInit      = "exec-init"
	// RoleModprobe is the kernel's choice: it calls modprobe -q -- NAME.
	RoleModprobe = "-q"
)

// podInitFD is pod-init's end of its control socket.
const podInitFD = 3

// podSetup is what is done once, inside the pod's namespaces: by PID 1 if they are its
// own, else by pod-init.
type podSetup struct {
	Hostname   string            `json:"hostname"`
	Interfaces []podInterface    `json:"interfaces,omitempty"`
	Routes     []podRoute        `json:"routes,omitempty"`
	Sysctls    map[string]string `json:"sysctls,omitempty"`
}

// podInit is the process that holds the pod's namespaces, where they are not the
// guest's own, and is the parent of every container and exec (T21). It decides
// nothing: PID 1 tells it what to fork, and it tells PID 1 what ended.
type podInit struct {
	reaper *reaper
	pidns  int // its own, to come back to

	mu   sync.Mutex // serialises sends
	conn *packetConn
}

// RunPodInit is the main function of pod-init; it returns the exit status when
// PID 1 has closed the control socket, which only tests do.
func RunPodInit() int {
	// In a shared pid namespace pod-init is every container's PID 1. Signals
	// that it handles would reach it from them; all are swallowed. (Ignoring
	// them instead would be inherited by the containers.)
	swallow := make(chan os.Signal, 1)
	signal.Notify(swallow)
	if err := runPodInit(); err != nil {
		fmt.Fprintln(os.Stderr, "cri-vz-agent: pod-init:", err)
		return 1
	}
	return 0
}

func runPodInit() error {
	unix.CloseOnExec(podInitFD)
	conn, err := newPacketConn(os.NewFile(podInitFD, "control socket"))
	if err != nil {
		return fmt.Errorf("descriptor %d: %w", podInitFD, err)
	}
	defer conn.close()
	pidns, err := unix.Open("/proc/self/ns/pid", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("own pid namespace: %w", err)
	}
	p := &podInit{reaper: newReaper(), pidns: pidns, conn: conn}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go p.reaper.run(ctx, childSignals())
	for {
		m, fds, err := conn.receive()
		if err != nil {
			if isClosed(err) {
				return nil
			}
			return err
		}
		switch m.Op {
		case opSetup:
			closeAll(fds)
			go p.setup(m)
		case opStart:
			go p.start(m, fds)
		default:
			closeAll(fds)
		}
	}
}

func (p *podInit) send(m *message, fds ...int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.conn.send(m, fds...); err != nil && !isClosed(err) {
		// PID 1 would wait for ever for what was lost.
		fmt.Fprintln(os.Stderr, "cri-vz-agent: pod-init: send to PID 1:", err)
		os.Exit(1)
	}
}

func (p *podInit) reply(seq uint64, steps []namedStep, err error, fds ...int) {
	m := &message{Seq: seq, Op: opReply, Steps: steps}
	if err != nil {
		m.Error, m.Class = err.Error(), classOf(err)
		if len(m.Error) > 4096 {
			m.Error = m.Error[:4096]
		}
	}
	p.send(m, fds...)
}

func (p *podInit) setup(m *message) {
	var s stepper
	m.Setup.apply(&s)
	p.reply(m.Seq, s.steps, s.err)
}

// apply sets the caller's namespaces up.
func (setup *podSetup) apply(s *stepper) {
	s.run("hostname", func() error {
		if setup.Hostname == "" {
			return nil
		}
		return os.NewSyscallError("sethostname", unix.Sethostname([]byte(setup.Hostname)))
	})
	s.run("interfaces", func() error { return setUpInterfaces(setup.Interfaces) })
	s.run("routes", func() error { return setUpRoutes(setup.Routes, setup.Interfaces) })
	s.run("sysctls", func() error { return setSysctls("/proc/sys", setup.Sysctls) })
}

func (p *podInit) start(m *message, fds []int) {
	defer closeAll(fds)
	pidfd := -1
	_, err := p.reaper.start(func() (int, error) {
		return fork(m.Start, fds, p.pidns, &pidfd)
	}, func(ws unix.WaitStatus, at time.Time) {
		go p.send(&message{Seq: m.Seq, Op: opExit, Status: uint32(ws), At: at.UnixNano()})
	})
	if err != nil {
		p.reply(m.Seq, nil, err)
		return
	}
	p.reply(m.Seq, nil, nil, pidfd)
	unix.Close(pidfd)
}

// fork starts container-init or exec-init. ownPIDNS is the caller's pid
// namespace.
func fork(s *podStart, fds []int, ownPIDNS int, pidfd *int) (int, error) {
	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{},
		Files: []uintptr{uintptr(fds[0]), uintptr(fds[1]), uintptr(fds[2]), uintptr(fds[3])},
		Sys: &syscall.SysProcAttr{
			Setsid:      true,
			UseCgroupFD: true,
			CgroupFD:    fds[4],
			PidFD:       pidfd,
		},
	}
	extra := fds[s.fds():]
	for _, fd := range extra {
		attr.Files = append(attr.Files, uintptr(fd))
	}
	if s.NewMounts {
		attr.Sys.Cloneflags |= unix.CLONE_NEWNS
	}
	if s.NewPID {
		attr.Sys.Cloneflags |= unix.CLONE_NEWPID
	}
	if s.NewCgroup {
		// Not a clone flag: clone(NEWCGROUP|INTO_CGROUP) makes the parent's cgroup
		// the namespace's root (create_cgroup_ns reads current's). The child
		// unshares when it is in its own.
		attr.Sys.Unshareflags |= unix.CLONE_NEWCGROUP
	}
	run := func() (int, error) {
		pid, err := syscall.ForkExec("/proc/self/exe", []string{"cri-vz-agent", s.Role}, attr)
		if err != nil {
			return 0, fmt.Errorf("fork %s: %w", s.Role, err)
		}
		return pid, nil
	}
	if !s.JoinPID {
		return run()
	}
	// Only children enter the namespace; the thread itself never does, and it
	// must not make threads meanwhile, which a locked one does not.
	runtime.LockOSThread()
	if err := unix.Setns(fds[5], unix.CLONE_NEWPID); err != nil {
		runtime.UnlockOSThread()
		if errors.Is(err, unix.ESRCH) {
			return 0, preconditionf("the container is not running")
		}
		return 0, fmt.Errorf("enter the container's pid namespace: %w", err)
	}
	pid, err := run()
	if back := unix.Setns(ownPIDNS, unix.CLONE_NEWPID); back == nil {
		runtime.UnlockOSThread()
	} // else the thread ends with its goroutine
	return pid, err
}

// setSysctls writes sysctls below root (/proc/sys), in the caller's namespaces.
func setSysctls(root string, sysctls map[string]string) error {
	for name, value := range sysctls {
		path, err := sysctlPath(name)
		if err != nil {
			return err
		}
		f, err := os.OpenFile(root+"/"+path, os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString(value)
			f.Close()
		}
		if err != nil {
			return invalidf("sysctl %s = %q: %w", name, value, err)
		}
	}
	return nil
}

// sysctlPath turns a.b.c or a/b/c into a path; in the first form a "/" stands
// for a "." inside a name, as in sysctl(8). Only what a namespace of the pod
// owns is allowed: anything else would be the whole guest's.
func sysctlPath(name string) (string, error) {
	path := name
	if dot, slash := strings.IndexByte(name, '.'), strings.IndexByte(name, '/'); slash < 0 || dot >= 0 && dot < slash {
		path = strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, name)
	}
	for part := range strings.SplitSeq(path, "/") {
		if part == "" || part == "." || part == ".." {
			return "", invalidf("sysctl %q: not a name", name)
		}
	}
	switch {
	case strings.HasPrefix(path, "net/"), strings.HasPrefix(path, "fs/mqueue/"),
		strings.HasPrefix(path, "kernel/shm"), strings.HasPrefix(path, "kernel/msg"), path == "kernel/sem",
		path == "kernel/hostname", path == "kernel/domainname":
		return path, nil
	}
	return "", invalidf("sysctl %q belongs to no namespace of the pod", name)
}

// pidOf returns the pid of a pidfd as /proc's pid namespace counts, which is
// the guest's root one.
func pidOf(pidfd int) (int, error) {
	b, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(pidfd))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Pid:"); ok {
			return strconv.Atoi(strings.TrimSpace(v))
		}
	}
	return 0, errors.New("not a pidfd")
}
