package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// Bounds of the daemon's own waits.
const (
	// shimStart is how long a shim may take to serve its socket.
	shimStart = 15 * time.Second
	// shimHello bounds the first questions to a shim: it answers from memory.
	shimHello = 5 * time.Second
	// shimStop is what Stop may take by its contract, and a margin.
	shimStop = 8 * time.Second
	// shimEnd is how long a shim may take to exit after Stop.
	shimEnd = 5 * time.Second
	// undoTimeout bounds the inverse of one start-up step.
	undoTimeout = 30 * time.Second
	// tearDown is the bound of CNI DEL, apart from all others (T12).
	tearDown = 60 * time.Second
	// streamOpen bounds opening a stream through shim and guest.
	streamOpen = 15 * time.Second
)

// client is a connection to a pod's shim.
type client struct {
	shimapi.ShimClient
	conn  *ttrpc.Client
	watch shimapi.Shim_WatchClient
	// cancel ends the watch.
	cancel context.CancelFunc
}

// connect dials a shim and returns when it has told the pod's state.
func connect(ctx context.Context, run string) (*client, *shimapi.PodState, error) {
	ctx, cancel := context.WithTimeout(ctx, shimHello)
	defer cancel()
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", filepath.Join(run, shimapi.SocketControl))
	if err != nil {
		return nil, nil, err
	}
	conn := ttrpc.NewClient(nc)
	c := &client{ShimClient: shimapi.NewShimClient(conn), conn: conn}
	hello, err := ask(ctx, c.Hello, &shimapi.HelloRequest{Version: shimapi.Version})
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	if v := hello.GetVersion(); v > shimapi.Version || v+1 < shimapi.Version {
		conn.Close()
		return nil, nil, fmt.Errorf("the shim speaks version %d of its API and this build %d: %w", v, shimapi.Version, errdefs.ErrFailedPrecondition)
	}
	wctx, wcancel := context.WithCancel(context.Background())
	c.cancel = wcancel
	stop := context.AfterFunc(ctx, wcancel)
	c.watch, err = c.Watch(wctx, &shimapi.WatchRequest{})
	var state *shimapi.PodState
	if err == nil {
		state, err = c.watch.Recv()
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		wcancel()
		conn.Close()
		return nil, nil, fmt.Errorf("watch the shim: %w", err)
	}
	return c, state, nil
}

func (c *client) close() {
	c.cancel()
	c.conn.Close()
}

// ask makes one call; its error has errdefs' class.
func ask[Req, Resp any](ctx context.Context, f func(context.Context, Req) (Resp, error), req Req) (Resp, error) {
	resp, err := f(ctx, req)
	if err != nil {
		var none Resp
		return none, native(err)
	}
	return resp, nil
}

// native turns what ttrpc returns into an error of errdefs' classes.
func native(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ttrpc.ErrClosed):
		return fmt.Errorf("the pod's shim is gone: %w", errdefs.ErrUnavailable)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return err
	}
	return errgrpc.ToNative(err)
}

// HandOver gives a client's TCP connection to the shim that serves the socket (see
// [Pod.DataSocket]), which joins it to a port on the pod's loopback. It returns
// when something there has answered. The caller closes local afterwards in any
// case, and not before. Errors are those of [Pod.Stream], and
// errdefs.ErrUnavailable if the socket can't be had.
func HandOver(ctx context.Context, socket string, port uint16, local *net.TCPConn) error {
	s, err := openStreamAt(ctx, socket, guestapi.Header{Kind: guestapi.Port, Port: port}, local)
	if err != nil {
		return err
	}
	return s.Close()
}

// openStream opens a stream through the shim in the run directory.
func openStream(ctx context.Context, run string, h guestapi.Header) (*guestapi.Stream, error) {
	return openStreamAt(ctx, filepath.Join(run, shimapi.SocketData), h, nil)
}

// openStreamAt opens a stream through a shim's data socket, or hands tcp over.
func openStreamAt(ctx context.Context, socket string, h guestapi.Header, tcp *net.TCPConn) (*guestapi.Stream, error) {
	ctx, cancel := context.WithTimeout(ctx, streamOpen)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("dial the pod's shim: %w: %w", err, errdefs.ErrUnavailable)
	}
	if tcp != nil {
		if conn, err = shimapi.WithTCP(conn.(*net.UnixConn), tcp); err != nil {
			return nil, err
		}
	}
	// The deadline alone would leave a cancelled caller waiting for it.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	s, err := guestapi.Open(conn, h)
	if !stop() && err == nil {
		s.Close()
		err = ctx.Err()
	}
	if err != nil {
		var refused *guestapi.ResetError
		if errors.As(err, &refused) {
			// Quoted: the words may be a guest's, and end up on a terminal.
			return nil, fmt.Errorf("open %v stream: refused: %q: %w", h.Kind, refused.Reason, errdefs.ErrFailedPrecondition)
		}
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("open %v stream: %w", h.Kind, err)
	}
	return s, nil
}
