//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/cri-vz/cri-vz/guest/agent/container"
	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// startTimeout bounds the life of container-init and exec-init: mounts, and
// one look at each directory of PATH.
const startTimeout = 60 * time.Second

// StartContainer runs the container's process. When it fails the container is
// stopped and says so in Wait too, with the exit code a shell would have.
func (a *Agent) StartContainer(ctx context.Context, r *api.StartContainerRequest) (*api.StartContainerResponse, error) {
	c, err := a.container(r.Id)
	if err != nil {
		return nil, err
	}
	sb, err := a.pod()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	if c.state != created {
		defer c.mu.Unlock()
		return nil, preconditionf("start container %q: it is %v", r.Id, c.state)
	}
	c.state, c.settled = starting, make(chan struct{})
	settled := c.settled
	p, spec := c.init, *c.spec
	c.mu.Unlock()
	defer close(settled)

	start := &podStart{Role: RoleContainerInit, NewMounts: true, NewCgroup: true, NewPID: c.ownPID, JoinPID: c.target != nil}
	config := &container.Config{Spec: spec, User: c.runAs()}
	var join *os.File
	if c.target != nil {
		join = c.target.pidfd
	}
	err = a.launch(ctx, sb, p, c.cgroup, start, config, join, func() {
		// The pid namespace's processes are dying with their init, if it has one
		// of its own; others of the container, or execs, die here.
		if err := c.cgroup.kill(); err != nil {
			a.log.Printf("container %s: kill what is left: %v", c.id, err)
		}
		if err := c.syncVolumes(); err != nil {
			a.log.Printf("container %s: %v", c.id, err)
			p.amiss = err.Error()
		}
		p.oom = c.cgroup.flat("memory.events")["oom_kill"] > 0
		c.mu.Lock()
		if c.state != removing {
			c.state = stopped
		}
		c.mu.Unlock()
	})
	if err != nil {
		c.mu.Lock()
		if c.state == starting {
			c.state = stopped
		}
		c.mu.Unlock()
		return nil, err // the host says of which container
	}
	c.mu.Lock()
	if c.state == starting {
		c.state = running
	}
	c.mu.Unlock()
	return &api.StartContainerResponse{Pid: uint32(p.pid), StartedAt: p.startedAt.UnixNano()}, nil
}

// launch forks p through pod-init and waits until its command is executing.
// ended is called once when the process has ended, before its output is
// drained. On error p has ended, or never was.
func (a *Agent) launch(ctx context.Context, sb *sandbox, p *process, cg cgroup, start *podStart, config *container.Config, join *os.File, ended func()) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	pod, err := sb.podInit(ctx)
	if err != nil {
		p.fail()
		return err
	}
	conn, child, err := configSocket()
	if err != nil {
		p.fail()
		return err
	}
	defer conn.Close()
	fd, err := unix.Open(string(cg), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		child.Close()
		err = fmt.Errorf("open cgroup: %w", err)
		p.fail()
		return err
	}
	fds := []int{int(p.child[0].Fd()), int(p.child[1].Fd()), int(p.child[2].Fd()), int(child.Fd()), fd}
	if join != nil {
		fds = append(fds, int(join.Fd()))
		if start.Role == RoleExecInit {
			if !start.JoinPID {
				fds = fds[:5]
			}
			fds = append(fds, int(join.Fd())) // descriptor 4 of the child: see exec
		}
	}
	if p.devpts != nil {
		fds = append(fds, int(p.devpts.Fd()))
		config.TerminalsFD = 4
	}
	reply, err := pod.call(ctx, &message{Op: opStart, Start: start}, func(ws unix.WaitStatus, at time.Time) {
		go a.finish(p, ws, at, ended)
	}, fds...)
	unix.Close(fd)
	child.Close()
	// From here on the other ends are the process's alone, so that its end is
	// the end of its output.
	p.closeChild()
	if err == nil && reply.pidfd == nil {
		err = errors.New("pod-init sent no pidfd")
	}
	if err != nil {
		p.fail()
		return err
	}
	p.pidfd = reply.pidfd
	if p.pid, err = pidOf(int(p.pidfd.Fd())); err != nil || p.pid < 0 {
		p.pid = 0 // gone already; finish tells
	}
	p.startedAt = time.Now()
	close(p.started)

	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(past) })
	defer stop()
	err = p.limitOOMScore(config.Spec.Process)
	if err == nil {
		err = container.WriteConfig(conn, config)
	}
	if err == nil || isClosed(err) {
		err = container.ReadReport(conn)
	}
	if err == nil {
		return nil
	}
	var report *container.Error
	if errors.As(err, &report) {
		err = reportError(report)
		// It is about to end by itself, with an exit code that says why.
		if wait(p.exited, time.Second) {
			return err
		}
	}
	if e := p.signal(unix.SIGKILL); e != nil {
		a.log.Printf("kill a process that failed to start: %v", e)
	}
	wait(p.exited, 5*time.Second)
	return err
}

// limitOOMScore gives a process that waits for its configuration its OOM score, and
// with it the lowest one that it can give itself. It inherits pod-init's, and only
// PID 1, which has CAP_SYS_RESOURCE also over user namespaces, moves that (T25).
func (p *process) limitOOMScore(spec *specs.Process) error {
	if p.pid == 0 || spec.OOMScoreAdj == nil {
		return nil
	}
	err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", p.pid), []byte(strconv.Itoa(*spec.OOMScoreAdj)), 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil // it is gone, and ReadReport or Wait says so
	}
	return err
}

// wait reports whether c was closed within d.
func wait(c <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-c:
		return true
	case <-t.C:
		return false
	}
}

// reportError gives the report of container-init the class that the host needs.
func reportError(r *container.Error) error {
	switch r.Class {
	case container.ClassNotFound:
		return &classError{errdefs.ErrNotFound, r}
	case container.ClassPermission:
		return &classError{errdefs.ErrPermissionDenied, r}
	case container.ClassInvalid:
		return &classError{errdefs.ErrInvalidArgument, r}
	}
	return r
}

// fail ends a process that never was.
func (p *process) fail() {
	p.closeChild()
	if !p.ended.CompareAndSwap(false, true) {
		return
	}
	p.status, p.exitedAt = 255, time.Now()
	p.stdio.close()
	close(p.exited)
	close(p.done)
}

// finish records the end of a process and waits for its output.
func (a *Agent) finish(p *process, ws unix.WaitStatus, at time.Time, ended func()) {
	defer a.crash()
	if !p.ended.CompareAndSwap(false, true) {
		return
	}
	p.status, p.exitedAt = exitCode(ws), at
	ended()
	close(p.exited)
	p.stdio.drain(at, p.drop)
	close(p.done)
}

// configSocket returns the socket to a child's init and the child's end.
func configSocket() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	child := os.NewFile(uintptr(fds[1]), "configuration")
	f := os.NewFile(uintptr(fds[0]), "configuration")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		child.Close()
		return nil, nil, err
	}
	return conn, child, nil
}
