package sandbox

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// Exec is a process that was started in a running container. Close must be
// called. Its methods may be called concurrently.
type Exec struct {
	c    *Container
	id   string
	once sync.Once
	err  error
}

// Exec starts a process. req's Id and ExecId are filled in. Its output waits in
// the guest for the streams to be opened.
func (c *Container) Exec(ctx context.Context, req *guestapi.ExecRequest) (*Exec, error) {
	client, err := c.pod.shimClient()
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	req = proto.CloneOf(req)
	req.Id = c.id
	// A daemon that starts anew counts anew, but its predecessor's processes may
	// still run.
	req.ExecId = "e" + strconv.FormatInt(time.Now().UnixNano(), 36) + "-" + strconv.FormatUint(c.execs.Add(1), 10)
	if _, err := ask(ctx, client.Exec, req); err != nil {
		e := &Exec{c: c, id: req.ExecId}
		if ctx.Err() != nil {
			go e.Close() // it may have started after all
		}
		return nil, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	return &Exec{c: c, id: req.ExecId}, nil
}

// ID is the process's id within the container.
func (e *Exec) ID() string { return e.id }

// Stream opens one of the process's streams: Stdin, Stdout and Stderr, or
// Terminal. The caller closes it.
func (e *Exec) Stream(ctx context.Context, kind guestapi.Kind) (*guestapi.Stream, error) {
	return e.c.pod.Stream(ctx, guestapi.Header{Kind: kind, Container: e.c.id, Exec: e.id})
}

// Resize sets the size of the process's terminal.
func (e *Exec) Resize(ctx context.Context, width, height uint32) error {
	return e.c.resize(ctx, e.id, width, height)
}

// Wait returns the exit code when the process has ended and its output was
// handed to the streams.
func (e *Exec) Wait(ctx context.Context) (int32, error) {
	client, err := e.c.pod.shimClient()
	if err != nil {
		return 0, err
	}
	resp, err := ask(ctx, client.WaitExec, &guestapi.WaitRequest{Id: e.c.id, ExecId: e.id})
	if err != nil {
		return 0, err
	}
	return resp.GetExitCode(), nil
}

// Close kills the process if it runs, and forgets it. It is bounded by itself,
// and calling it again is fine.
func (e *Exec) Close() error {
	e.once.Do(func() {
		client, err := e.c.pod.shimClient()
		if err != nil {
			return // gone with the pod
		}
		ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
		defer cancel()
		_, e.err = ask(ctx, client.RemoveExec, &guestapi.RemoveExecRequest{Id: e.c.id, ExecId: e.id})
	})
	return e.err
}
