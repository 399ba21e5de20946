//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/cri-vz/cri-vz/guest/agent/container"
	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Exec starts a process in a running container: same user, capabilities,
// seccomp profile and limits as the container's own.
func (a *Agent) Exec(ctx context.Context, r *api.ExecRequest) (*api.ExecResponse, error) {
	if err := checkID("exec", r.ExecId); err != nil {
		return nil, err
	}
	if len(r.Args) == 0 || r.Args[0] == "" {
		return nil, invalidf("exec in container %q: no command", r.Id)
	}
	c, err := a.container(r.Id)
	if err != nil {
		return nil, err
	}
	sb, err := a.pod()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	_, taken := c.reserved[r.ExecId]
	switch {
	case c.state != running:
		defer c.mu.Unlock()
		return nil, preconditionf("exec in container %q: it is %v, not running", r.Id, c.state)
	case c.execs[r.ExecId] != nil || taken:
		c.mu.Unlock()
		return nil, existsf("exec in container %q: exec %q exists", r.Id, r.ExecId)
	}
	c.reserved[r.ExecId] = true
	init, spec := c.init, c.spec
	c.mu.Unlock()

	p, err := a.exec(ctx, sb, c, spec, init, r)
	c.mu.Lock()
	unwanted := !c.reserved[r.ExecId]
	delete(c.reserved, r.ExecId)
	gone := c.state == removing
	if err == nil && !gone && !unwanted {
		c.execs[r.ExecId] = p
	}
	c.mu.Unlock()
	if err == nil && unwanted {
		if e := p.cgroup.remove(); e != nil {
			a.log.Printf("container %s: %v", c.id, e)
		}
		p.discard()
		return nil, preconditionf("exec in container %q: exec %q was removed before it had started", r.Id, r.ExecId)
	}
	if err == nil && gone {
		p.discard()
		err = preconditionf("the container has been removed")
	}
	if err != nil {
		return nil, err // the host says in which container
	}
	return &api.ExecResponse{Pid: uint32(p.pid)}, nil
}

func (a *Agent) exec(ctx context.Context, sb *sandbox, c *ctr, spec *specs.Spec, init *process, r *api.ExecRequest) (*process, error) {
	command := *spec.Process
	command.Args = r.Args
	command.Env = append(append([]string(nil), command.Env...), r.Env...)
	command.Terminal = r.Tty
	if r.Tty && !slices.ContainsFunc(command.Env, func(e string) bool { return strings.HasPrefix(e, "TERM=") }) {
		// What containers with a terminal have, and editors and the like insist on.
		command.Env = append(command.Env, "TERM=xterm")
	}
	command.ConsoleSize = &specs.Box{Width: uint(r.Width), Height: uint(r.Height)}
	if r.Cwd != "" {
		command.Cwd = r.Cwd
	}
	cg := cgroup(c.cgroup.file("exec-" + r.ExecId))
	if err := os.Mkdir(string(cg), 0o755); err != nil {
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	if err := sb.ids.mayForkInto(a.paths.cgroup, cg); err != nil {
		_ = cg.remove()
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	var p *process
	var err error
	if r.Tty {
		if s, slave, terr := containerTerminal(init, command.ConsoleSize); terr == nil {
			p, err = sb.ids.owned(newProcess(s, [3]*os.File{slave, slave, slave}))
		} else {
			// An image without a devpts has terminals too, without a name.
			a.log.Debugf("container %s: %v", c.id, terr)
		}
	}
	if p == nil && err == nil {
		p, err = a.newStdio(r.Tty, r.Stdin, command.ConsoleSize, sb.ids)
	}
	if err != nil {
		_ = cg.remove()
		return nil, fmt.Errorf("standard streams: %w", err)
	}
	p.cgroup = cg
	if p.stdio.stdin != nil {
		p.stdio.stdin.once = true
	}
	config := &container.Config{
		Spec: specs.Spec{Process: &command, Linux: &specs.Linux{Seccomp: spec.Linux.Seccomp}},
		User: c.runAs(),
		// Descriptor 4 is the container's pidfd, which stands for all of its
		// namespaces.
		Namespaces: []container.Namespace{
			{Type: specs.CgroupNamespace, FD: 4},
			{Type: specs.MountNamespace, FD: 4},
		},
	}
	start := &podStart{Role: RoleExecInit, JoinPID: c.ownPID || c.target != nil}
	err = a.launch(ctx, sb, p, cg, start, config, init.pidfd, func() {})
	if err != nil {
		p.discard()
		if e := cg.remove(); e != nil {
			a.log.Printf("container %s: %v", c.id, e)
		}
		if strings.Contains(err.Error(), "no such process") && init.hasExited() {
			err = preconditionf("the container has stopped")
		}
		return nil, err
	}
	return p, nil
}

// RemoveExec forgets an exec; one that still runs is killed with all it has
// forked, and one that is being started as soon as it runs. What an ended exec has
// left running lives on as the container's.
func (a *Agent) RemoveExec(_ context.Context, r *api.RemoveExecRequest) (*api.RemoveExecResponse, error) {
	a.mu.Lock()
	c := a.containers[r.Id]
	a.mu.Unlock()
	if c == nil {
		return &api.RemoveExecResponse{}, nil
	}
	c.mu.Lock()
	p := c.execs[r.ExecId]
	delete(c.execs, r.ExecId)
	if c.reserved[r.ExecId] {
		c.reserved[r.ExecId] = false
	}
	c.mu.Unlock()
	if p == nil {
		return &api.RemoveExecResponse{}, nil
	}
	var err error
	if p.hasExited() {
		err = p.cgroup.disband()
	} else {
		err = p.cgroup.remove()
	}
	p.discard()
	if err != nil {
		return nil, fmt.Errorf("remove exec %q of container %q: %w", r.ExecId, r.Id, err)
	}
	return &api.RemoveExecResponse{}, nil
}
