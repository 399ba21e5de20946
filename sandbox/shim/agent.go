package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// agent is the client of a guest agent that may be slow, deaf or hostile.
type agent struct {
	guestapi.AgentService
	client *ttrpc.Client
	// patience is how long a call stays unquestioned, and a question unanswered.
	patience time.Duration
	// deaf is called, once or more, when the agent leaves that unanswered.
	deaf func(reason string)
	// broke is closed when the connection is, by either side.
	broke chan struct{}
}

func newAgent(conn net.Conn, patience time.Duration, deaf func(string)) *agent {
	broke := make(chan struct{})
	client := ttrpc.NewClient(conn, ttrpc.WithOnClose(sync.OnceFunc(func() { close(broke) })))
	return &agent{AgentService: guestapi.NewAgentClient(client), client: client, patience: patience, deaf: deaf, broke: broke}
}

func (a *agent) close() { a.client.Close() }

// call makes one call that should be answered soon. One that takes its time is
// fine as long as the agent answers Hello meanwhile; if it doesn't, it is deaf
// (T12). The call's goroutine may outlive call while its bytes don't fit into
// the connection; it ends with the connection.
func call[Req, Resp any](ctx context.Context, a *agent, what string, f func(context.Context, Req) (Resp, error), req Req) (Resp, error) {
	type result struct {
		resp Resp
		err  error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answer := make(chan result, 1)
	go func() {
		resp, err := f(ctx, req)
		answer <- result{resp, err}
	}()
	start := time.Now()
	ask := time.NewTimer(a.patience)
	defer ask.Stop()
	for {
		select {
		case r := <-answer:
			return r.resp, agentError(what, r.err)
		case <-ctx.Done():
			select {
			case r := <-answer:
				return r.resp, agentError(what, r.err)
			default:
			}
			var none Resp
			return none, fmt.Errorf("guest agent: %s: no answer after %v: %w", what, time.Since(start).Round(time.Millisecond), ctx.Err())
		case <-ask.C:
			if err := a.ping(); err != nil {
				a.deaf(fmt.Sprintf("the guest agent has not answered for %v (%s): %v", time.Since(start).Round(time.Millisecond), what, err))
				var none Resp
				return none, fmt.Errorf("guest agent: %s: no answer after %v, nor to a ping: %w", what, time.Since(start).Round(time.Millisecond), errdefs.ErrUnavailable)
			}
			ask.Reset(a.patience)
		}
	}
}

// ping asks the agent whether it lives.
func (a *agent) ping() error {
	ctx, cancel := context.WithTimeout(context.Background(), a.patience)
	defer cancel()
	answer := make(chan error, 1)
	go func() {
		_, err := a.Hello(ctx, &guestapi.HelloRequest{Version: guestapi.Version})
		answer <- err
	}()
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// agentError turns what the guest says into an error of ours: its class is
// kept, its text is escaped and capped.
func agentError(what string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("guest agent: %s: the connection broke: %w", what, errdefs.ErrUnavailable)
	}
	s, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("guest agent: %s: %w", what, err)
	}
	class := errdefs.Resolve(errgrpc.ToNative(err))
	return &guestError{text: fmt.Sprintf("guest agent: %s: %s", what, escape(s.Message(), 2048)), class: class}
}

// guestError is a guest's refusal.
type guestError struct {
	text  string
	class error
}

func (e *guestError) Error() string { return e.text }
func (e *guestError) Unwrap() error { return e.class }
