package cri

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"

	"golang.org/x/net/websocket"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
	utilexec "k8s.io/utils/exec"
)

// The channels of a WebSocket session of exec or attach: the first byte of each
// message says to which one the rest belongs.
const (
	channelStdin = iota
	channelStdout
	channelStderr
	channelStatus
	channelResize
	channelCount
)

const (
	// v5Protocol can close a single channel, and so end stdin: what kubectl speaks.
	v5Protocol = remotecommand.StreamProtocolV5Name
	v4Protocol = remotecommand.StreamProtocolV4Name
	v4Base64   = "v4." + wsstream.Base64ChannelWebSocketProtocol
	// tunnelProtocol is a SPDY connection in the messages of a WebSocket.
	tunnelProtocol = portforward.WebsocketsSPDYTunnelingPortForwardV1
)

// wsCommand is the client's end of an exec or attach; nil fields are not
// connected.
type wsCommand struct {
	in       io.Reader
	out, err io.WriteCloser
	sizes    <-chan remotecommand.TerminalSize
}

// serveWebSocket runs a command with the channels of a WebSocket and sends its
// status over the status channel.
func serveWebSocket(w http.ResponseWriter, r *http.Request, opts *remotecommand.Options, run func(context.Context, *wsCommand) error) {
	channels := make([]wsstream.ChannelType, channelCount)
	channels[channelStdin] = channelIf(opts.Stdin, wsstream.ReadChannel)
	channels[channelStdout] = channelIf(opts.Stdout, wsstream.WriteChannel)
	channels[channelStderr] = channelIf(opts.Stderr, wsstream.WriteChannel)
	channels[channelStatus] = wsstream.WriteChannel
	channels[channelResize] = channelIf(opts.TTY, wsstream.ReadChannel)
	binary := wsstream.ChannelProtocolConfig{Binary: true, Channels: channels}
	text := wsstream.ChannelProtocolConfig{Binary: false, Channels: channels}
	conn := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{
		"": binary, wsstream.ChannelWebSocketProtocol: binary, wsstream.Base64ChannelWebSocketProtocol: text,
		v4Protocol: binary, v4Base64: text, v5Protocol: binary,
	})
	conn.SetIdleTimeout(streamIdle)
	protocol, streams, err := conn.Open(w, r)
	if err != nil {
		klog.InfoS("No WebSocket session", "protocols", r.Header.Values("Sec-WebSocket-Protocol"), "err", err)
		return
	}
	defer conn.Close()
	// An empty message tells the client that it is connected.
	hello := channelStatus
	switch {
	case opts.Stdout:
		hello = channelStdout
	case opts.Stderr:
		hello = channelStderr
	}
	_, _ = streams[hello].Write(nil)
	c := &wsCommand{}
	if opts.Stdin {
		c.in = streams[channelStdin]
	}
	if opts.Stdout {
		c.out = streams[channelStdout]
	}
	if opts.Stderr {
		c.err = streams[channelStderr]
	}
	if opts.TTY {
		c.sizes = readSizes(r.Context(), streams[channelResize])
	}
	err = run(r.Context(), c)
	switch protocol {
	case v4Protocol, v4Base64, v5Protocol:
		_, _ = streams[channelStatus].Write(commandStatus(err))
	default: // before v4 there is text, and none for success
		if err != nil {
			_, _ = io.WriteString(streams[channelStatus], err.Error())
		}
	}
}

func channelIf(wanted bool, t wsstream.ChannelType) wsstream.ChannelType {
	if wanted {
		return t
	}
	return wsstream.IgnoreChannel
}

// readSizes decodes a client's terminal sizes until ctx ends or the client has no
// more.
func readSizes(ctx context.Context, from io.Reader) <-chan remotecommand.TerminalSize {
	sizes := make(chan remotecommand.TerminalSize)
	go func() {
		defer close(sizes)
		d := json.NewDecoder(from)
		for {
			var size remotecommand.TerminalSize
			if d.Decode(&size) != nil {
				// The connection's reader must not be held up by what isn't read.
				_, _ = io.Copy(io.Discard, from)
				return
			}
			select {
			case sizes <- size:
			case <-ctx.Done():
				return
			}
		}
	}()
	return sizes
}

// commandStatus is how a command ended as the Kubernetes Status that clients
// read.
func commandStatus(err error) []byte {
	type cause struct {
		Type    string `json:"reason"`
		Message string `json:"message"`
	}
	type details struct {
		Causes []cause `json:"causes"`
	}
	status := struct {
		Status  string   `json:"status"`
		Message string   `json:"message,omitempty"`
		Reason  string   `json:"reason,omitempty"`
		Details *details `json:"details,omitempty"`
		Code    int32    `json:"code,omitempty"`
	}{Status: "Success"}
	var exit utilexec.ExitError
	switch {
	case errors.As(err, &exit) && exit.Exited():
		status.Status, status.Reason = "Failure", remotecommand.NonZeroExitCodeReason
		status.Message = fmt.Sprintf("command terminated with non-zero exit code: %v", err)
		status.Details = &details{[]cause{{remotecommand.ExitCodeCauseType, strconv.Itoa(exit.ExitStatus())}}}
	case err != nil:
		status.Status, status.Reason, status.Code = "Failure", "InternalError", http.StatusInternalServerError
		status.Message = "Internal error occurred: " + err.Error()
	}
	b, _ := json.Marshal(status) // of strings and numbers: never fails
	return b
}

// serveTunnel lets serve talk SPDY inside of a WebSocket.
func serveTunnel(w http.ResponseWriter, r *http.Request, serve func(http.ResponseWriter, *http.Request)) {
	websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			if !slices.Contains(c.Protocol, tunnelProtocol) {
				return fmt.Errorf("WebSocket protocols %q: not %s: %w", c.Protocol, tunnelProtocol, websocket.ErrBadWebSocketProtocol)
			}
			c.Protocol = []string{tunnelProtocol}
			return nil
		},
		Handler: func(ws *websocket.Conn) {
			ws.PayloadType = websocket.BinaryFrame
			inner := r.Clone(r.Context())
			inner.Header = http.Header{}
			inner.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
			inner.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
			inner.Header.Set(httpstream.HeaderProtocolVersion, portforward.ProtocolV1Name)
			serve(&tunnel{ws: ws, header: http.Header{}}, inner)
		},
	}.ServeHTTP(w, r)
}

// tunnel is the response to a request for SPDY that was made by opening a
// WebSocket: its status and headers are the WebSocket's, which are sent.
type tunnel struct {
	ws     *websocket.Conn
	header http.Header
}

func (t *tunnel) Header() http.Header         { return t.header }
func (t *tunnel) WriteHeader(int)             {}
func (t *tunnel) Write(p []byte) (int, error) { return len(p), nil }
func (t *tunnel) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c := tunnelConn{t.ws}
	return c, bufio.NewReadWriter(bufio.NewReader(c), bufio.NewWriter(c)), nil
}

// tunnelConn has addresses that can be printed: a WebSocket's are its URLs, which
// a client need not give.
type tunnelConn struct{ *websocket.Conn }

// Close never fails: SPDY would wait for somebody to hear of it, and a client that
// is gone takes no farewell.
func (c tunnelConn) Close() error { _ = c.Conn.Close(); return nil }

func (tunnelConn) LocalAddr() net.Addr  { return tunnelAddr{} }
func (tunnelConn) RemoteAddr() net.Addr { return tunnelAddr{} }

type tunnelAddr struct{}

func (tunnelAddr) Network() string { return "websocket" }
func (tunnelAddr) String() string  { return "tunnel" }
