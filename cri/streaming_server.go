package cri

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

const (
	// streamIdle ends a session in which nothing was said for so long; it is the
	// kubelet's own default.
	streamIdle = 4 * time.Hour
	// streamCreation is how long a client may take to open its streams.
	streamCreation = 30 * time.Second
	// tokenLife is how long a URL that nobody used is good for.
	tokenLife = time.Minute
	// maxTokens bounds the URLs that nobody has used yet.
	maxTokens = 1000
	// streamLinger is how long the last bytes may take to reach a client that is
	// still sending.
	streamLinger = time.Second
	// goneCheck is how often a session looks whether its client is still there
	// while what the client sent isn't read.
	goneCheck = 2 * time.Second
)

// tokens are URLs that were given out and not used yet. The zero value is ready.
type tokens struct {
	life time.Duration

	mu   sync.Mutex
	open map[string]token
}

type token struct {
	request any
	until   time.Time
}

// give makes a one-use token for a request. It is errdefs.ErrResourceExhausted
// when too many are open.
func (t *tokens) give(request any) (string, error) {
	name := rand.Text()
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.open == nil {
		t.open = make(map[string]token)
	}
	maps.DeleteFunc(t.open, func(_ string, old token) bool { return now.After(old.until) })
	if len(t.open) >= maxTokens {
		return "", fmt.Errorf("%d streaming URLs were asked for and not used yet; they expire after %v: %w", maxTokens, t.life, errdefs.ErrResourceExhausted)
	}
	t.open[name] = token{request, now.Add(t.life)}
	return name, nil
}

// take gives what a token was made for, once, while it is fresh, and only to
// whoever expects such a request.
func take[R any](t *tokens, name string) (request R, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tok, found := t.open[name]
	delete(t.open, name)
	if !found || time.Now().After(tok.until) {
		return request, false
	}
	request, ok = tok.request.(R)
	return request, ok
}

// streamer carries out what a one-use URL was made for. Contexts end when the
// client is gone; writes to it that hang end when the call has returned.
type streamer interface {
	Exec(ctx context.Context, container string, cmd []string, in io.Reader, out, errw io.WriteCloser, tty bool, sizes <-chan remotecommand.TerminalSize) error
	Attach(ctx context.Context, container string, in io.Reader, out, errw io.WriteCloser, sizes <-chan remotecommand.TerminalSize) error
	PortForward(ctx context.Context, pod string, port int32, client io.ReadWriteCloser) error
}

// streamServer is the HTTP server that carries exec, attach and port-forward
// streams over SPDY, as the kubelet's proxy and older clients speak it, and over
// WebSocket.
type streamServer struct {
	runtime streamer
	tokens  tokens
	http    *http.Server
	ln      net.Listener
}

// newStreamServer opens the streaming server's port: loopback only, because its
// URLs carry one-use tokens over plain HTTP.
func newStreamServer(address string, r streamer) (*streamServer, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("streaming address %q: %w", address, err)
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("streaming address %q: the host must be a loopback address such as 127.0.0.1: %w", address, errdefs.ErrInvalidArgument)
	}
	s := &streamServer{runtime: r, tokens: tokens{life: tokenLife}}
	if s.ln, err = net.Listen("tcp", address); err != nil {
		return nil, fmt.Errorf("streaming server: %w", err)
	}
	mux := http.NewServeMux()
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		mux.HandleFunc(method+" /exec/{token}", session(s, s.exec))
		mux.HandleFunc(method+" /attach/{token}", session(s, s.attach))
		mux.HandleFunc(method+" /portforward/{token}", session(s, s.portForward))
	}
	s.http = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	return s, nil
}

// url gives out a one-use URL.
func (s *streamServer) url(kind string, request any) (string, error) {
	t, err := s.tokens.give(request)
	if err != nil {
		return "", err
	}
	return (&url.URL{Scheme: "http", Host: s.ln.Addr().String(), Path: "/" + kind + "/" + t}).String(), nil
}

// session serves one use of a token. The request's context ends when the client
// is gone, and the connection when serve returns.
func session[R any](s *streamServer, serve func(http.ResponseWriter, *http.Request, R)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		request, ok := take[R](&s.tokens, r.PathValue("token"))
		if !ok {
			http.Error(w, "this URL was used before, has expired, or never was: ask for a new one", http.StatusNotFound)
			return
		}
		ctx, gone := context.WithCancel(r.Context())
		defer gone()
		h := &hijacker{ResponseWriter: w, ctx: ctx, gone: gone}
		defer h.close()
		serve(h, r.WithContext(ctx), request)
	}
}

func (s *streamServer) exec(w http.ResponseWriter, r *http.Request, req *runtimeapi.ExecRequest) {
	opts := &remotecommand.Options{Stdin: req.GetStdin(), Stdout: req.GetStdout(), Stderr: req.GetStderr(), TTY: req.GetTty()}
	if wsstream.IsWebSocketRequest(r) {
		serveWebSocket(w, r, opts, func(ctx context.Context, c *wsCommand) error {
			return s.runtime.Exec(ctx, req.GetContainerId(), req.GetCmd(), c.in, c.out, c.err, opts.TTY, c.sizes)
		})
		return
	}
	remotecommand.ServeExec(w, r, spdyStreamer{s.runtime}, "", "", req.GetContainerId(), req.GetCmd(), opts, streamIdle, streamCreation, remotecommand.SupportedStreamingProtocols)
}

func (s *streamServer) attach(w http.ResponseWriter, r *http.Request, req *runtimeapi.AttachRequest) {
	opts := &remotecommand.Options{Stdin: req.GetStdin(), Stdout: req.GetStdout(), Stderr: req.GetStderr(), TTY: req.GetTty()}
	if wsstream.IsWebSocketRequest(r) {
		serveWebSocket(w, r, opts, func(ctx context.Context, c *wsCommand) error {
			return s.runtime.Attach(ctx, req.GetContainerId(), c.in, c.out, c.err, c.sizes)
		})
		return
	}
	remotecommand.ServeAttach(w, r, spdyStreamer{s.runtime}, "", "", req.GetContainerId(), opts, streamIdle, streamCreation, remotecommand.SupportedStreamingProtocols)
}

func (s *streamServer) portForward(w http.ResponseWriter, r *http.Request, req *runtimeapi.PortForwardRequest) {
	forward := sessionForwarder{r.Context(), s.runtime}
	if wsstream.IsWebSocketRequestWithTunnelingProtocol(r) {
		serveTunnel(w, r, func(w http.ResponseWriter, r *http.Request) {
			portforward.ServePortForward(w, r, forward, req.GetPodSandboxId(), "", &portforward.V4Options{}, streamIdle, streamCreation, portforward.SupportedProtocols)
		})
		return
	}
	if wsstream.IsWebSocketRequest(r) && len(req.GetPort()) == 0 {
		http.Error(w, "without a port in the PortForwardRequest the only WebSocket protocol is "+tunnelProtocol, http.StatusBadRequest)
		return
	}
	portforward.ServePortForward(w, r, forward, req.GetPodSandboxId(), "", &portforward.V4Options{Ports: req.GetPort()}, streamIdle, streamCreation, portforward.SupportedProtocols)
}

// sessionForwarder ends the connections that a client forwards with the client:
// the protocol's own handler gives them no context that ends.
type sessionForwarder struct {
	ctx     context.Context
	runtime streamer
}

func (f sessionForwarder) PortForward(_ context.Context, pod, _ string, port int32, client io.ReadWriteCloser) error {
	return f.runtime.PortForward(f.ctx, pod, port, client)
}

// spdyStreamer is a streamer as the SPDY handlers call it.
type spdyStreamer struct{ streamer }

func (r spdyStreamer) ExecInContainer(ctx context.Context, _, _, container string, cmd []string, in io.Reader, out, errw io.WriteCloser, tty bool, sizes <-chan remotecommand.TerminalSize, _ time.Duration) error {
	return r.Exec(ctx, container, cmd, in, out, errw, tty, sizes)
}

func (r spdyStreamer) AttachContainer(ctx context.Context, _, _, container string, in io.Reader, out, errw io.WriteCloser, _ bool, sizes <-chan remotecommand.TerminalSize) error {
	return r.Attach(ctx, container, in, out, errw, sizes)
}

// hijacker hands out a connection that is watched: what takes a connection over
// from net/http takes over its context's end, too.
type hijacker struct {
	http.ResponseWriter
	ctx  context.Context
	gone context.CancelFunc
	conn *watchedConn
}

func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	under, ok := h.ResponseWriter.(http.Hijacker)
	if !ok {
		return nil, nil, errors.ErrUnsupported
	}
	conn, rw, err := under.Hijack()
	if err != nil {
		return nil, nil, err
	}
	h.conn = &watchedConn{Conn: conn, gone: h.gone}
	go h.conn.watch(h.ctx)
	// What net/http has read ahead comes first.
	ahead, _ := rw.Reader.Peek(rw.Reader.Buffered())
	r := io.MultiReader(bytes.NewReader(bytes.Clone(ahead)), h.conn)
	return h.conn, bufio.NewReadWriter(bufio.NewReader(r), bufio.NewWriter(h.conn)), nil
}

func (h *hijacker) close() {
	if h.conn != nil {
		h.conn.Close()
	}
}

// watchedConn calls gone as soon as the client is no longer there.
type watchedConn struct {
	net.Conn
	gone context.CancelFunc

	once   sync.Once
	closed atomic.Bool
}

func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.closed.Load() {
		n, err = 0, net.ErrClosed // it is Close's to read now
	}
	if err != nil {
		c.gone()
	}
	return n, err
}

func (c *watchedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err != nil {
		c.gone()
	}
	return n, err
}

// watch looks for a hang-up that no Read can see, because nobody reads while a
// process doesn't take its input. A client with more of it than the kernel's
// buffers hold hangs up behind that: its kernel gives up after some minutes.
func (c *watchedConn) watch(ctx context.Context) {
	t := time.NewTicker(goneCheck)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if hungUp(c.Conn) {
				c.gone()
				return
			}
		}
	}
}

// Close ends the connection. Its last bytes still reach a client that is
// sending: closing at once would answer that with a reset, which overtakes them.
func (c *watchedConn) Close() error {
	c.once.Do(func() {
		c.closed.Store(true)
		c.gone()
		tcp, ok := c.Conn.(*net.TCPConn)
		if !ok || tcp.CloseWrite() != nil {
			c.Conn.Close()
			return
		}
		_ = c.Conn.SetDeadline(time.Now().Add(streamLinger))
		go func() {
			defer c.Conn.Close()
			_, _ = io.Copy(io.Discard, onlyReader{c.Conn})
		}()
	})
	return nil
}

// onlyReader hides everything but Read.
type onlyReader struct{ io.Reader }
