package cri

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"github.com/cri-vz/cri-vz/test/streamclient"
)

// commands is a streamer without pods: its commands are the test's.
type commands struct {
	ended chan string // which command's client was gone
}

func (c commands) Exec(ctx context.Context, _ string, cmd []string, in io.Reader, out, errw io.WriteCloser, tty bool, sizes <-chan remotecommand.TerminalSize) error {
	if tty && in != nil {
		in = readAhead(ctx, in)
	}
	switch cmd[0] {
	case "cat":
		_, err := io.Copy(out, in)
		return err
	case "exit":
		if errw != nil {
			_, _ = io.WriteString(errw, "leaving\n")
		}
		code, _ := strconv.Atoi(cmd[1])
		return utilexec.CodeExitError{Err: errors.New("exit"), Code: code}
	case "size":
		sz := <-sizes
		_, err := fmt.Fprintf(out, "%dx%d", sz.Width, sz.Height)
		return err
	case "wait":
		<-ctx.Done()
		c.ended <- cmd[1]
		return ctx.Err()
	}
	return fmt.Errorf("exec %q: %w", cmd[0], errdefs.ErrNotFound)
}

func (c commands) Attach(ctx context.Context, _ string, in io.Reader, out, _ io.WriteCloser, _ <-chan remotecommand.TerminalSize) error {
	return c.Exec(ctx, "", []string{"cat"}, in, out, nil, false, nil)
}

func (c commands) PortForward(ctx context.Context, _ string, port int32, client io.ReadWriteCloser) error {
	switch port {
	case 7:
		defer client.Close()
		_, err := io.Copy(client, client)
		return err
	case 9: // takes everything, answers nothing, never ends
		go func() { _, _ = io.Copy(io.Discard, client) }()
		<-ctx.Done()
		c.ended <- "port"
		return nil
	}
	time.Sleep(20 * time.Millisecond) // the protocol's handler may answer before it has accepted
	return fmt.Errorf("nothing listens on port %d", port)
}

type execDialer func(string, streamclient.Options) (*streamclient.Session, error)

var transports = map[string]struct {
	exec    execDialer
	forward func(string) (*streamclient.Forwarder, error)
}{
	"SPDY":      {streamclient.SPDY, streamclient.ForwardSPDY},
	"WebSocket": {streamclient.WebSocket, streamclient.ForwardWebSocket},
}

func streamServerOf(t *testing.T, stays ...goleak.Option) (*streamServer, commands) {
	t.Helper()
	// Everything that a session started ends with it, and what the clients here
	// start with them; a connection that is closed lingers.
	stays = append(stays, goleak.IgnoreAnyFunction("github.com/go-logr/logr.test"))
	t.Cleanup(func() { goleak.VerifyNone(t, stays...) })
	c := commands{make(chan string, 1)}
	s, err := newStreamServer("127.0.0.1:0", c)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.http.Serve(s.ln) }()
	t.Cleanup(func() {
		s.http.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	return s, c
}

func (s *streamServer) execURL(t *testing.T, o streamclient.Options, cmd ...string) string {
	t.Helper()
	u, err := s.url("exec", &runtimeapi.ExecRequest{ContainerId: "c", Cmd: cmd, Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr, Tty: o.TTY})
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestStreams(t *testing.T) {
	for name, tr := range transports {
		t.Run(name, func(t *testing.T) {
			s, c := streamServerOf(t)
			open := func(t *testing.T, o streamclient.Options, cmd ...string) *streamclient.Session {
				t.Helper()
				session, err := tr.exec(s.execURL(t, o, cmd...), o)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { session.Close() })
				return session
			}
			t.Run("8 MiB both ways, then the end of the input", func(t *testing.T) {
				session := open(t, streamclient.Options{Stdin: true, Stdout: true}, "cat")
				echo(t, session.Stdin, session.Stdout, 8<<20)
				if code, err := session.ExitCode(); code != 0 || err != nil {
					t.Errorf("exit code %d, %v", code, err)
				}
			})
			t.Run("exit code and errors", func(t *testing.T) {
				session := open(t, streamclient.Options{Stdout: true, Stderr: true}, "exit", "42")
				go func() { _, _ = io.Copy(io.Discard, session.Stdout) }()
				text := reading(session.Stderr)
				if code, err := session.ExitCode(); code != 42 || err != nil || <-text != "leaving\n" {
					t.Errorf("exit code %d, %v", code, err)
				}
			})
			t.Run("a command that is not there", func(t *testing.T) {
				session := open(t, streamclient.Options{Stdout: true}, "nothing")
				if _, err := session.ExitCode(); err == nil || !strings.Contains(err.Error(), `exec "nothing": not found`) {
					t.Error(err)
				}
			})
			// T17
			t.Run("the size overtakes input that nobody reads", func(t *testing.T) {
				session := open(t, streamclient.Options{Stdin: true, Stdout: true, TTY: true}, "size")
				if _, err := session.Stdin.Write(make([]byte, maxAhead/2)); err != nil {
					t.Fatal(err)
				}
				if err := session.Resize(120, 50); err != nil {
					t.Fatal(err)
				}
				text := reading(session.Stdout)
				if code, err := session.ExitCode(); code != 0 || err != nil {
					t.Errorf("exit code %d, %v", code, err)
				}
				if got := <-text; got != "120x50" {
					t.Errorf("%q", got)
				}
			})
			t.Run("a client that vanishes", func(t *testing.T) {
				session := open(t, streamclient.Options{Stdin: true, Stdout: true}, "wait", "quiet")
				time.Sleep(20 * time.Millisecond)
				session.Close()
				wantEnd(t, c, "quiet", time.Second)
			})
			t.Run("a client that vanishes with unread input", func(t *testing.T) {
				session := open(t, streamclient.Options{Stdin: true, Stdout: true}, "wait", "behind")
				go func() { _, _ = session.Stdin.Write(make([]byte, 96<<10)) }()
				time.Sleep(200 * time.Millisecond)
				session.Close()
				wantEnd(t, c, "behind", 2*goneCheck)
			})
			t.Run("attach", func(t *testing.T) {
				u, err := s.url("attach", &runtimeapi.AttachRequest{ContainerId: "c", Stdin: true, Stdout: true})
				if err != nil {
					t.Fatal(err)
				}
				session, err := tr.exec(u, streamclient.Options{Stdin: true, Stdout: true})
				if err != nil {
					t.Fatal(err)
				}
				defer session.Close()
				echo(t, session.Stdin, session.Stdout, 1<<20)
			})
			t.Run("port-forward", func(t *testing.T) {
				f := s.forward(t, tr.forward)
				data, failure, err := f.Dial(7)
				if err != nil {
					t.Fatal(err)
				}
				echo(t, data, data, 8<<20)
				if text, err := readAll(failure); text != "" {
					t.Errorf("%q, %v", text, err)
				}
				if _, failure, err = f.Dial(8); err != nil {
					t.Fatal(err)
				}
				if text, err := readAll(failure); !strings.Contains(text, "nothing listens on port 8") {
					t.Errorf("%q, %v", text, err)
				}
			})
			t.Run("a forwarder that vanishes", func(t *testing.T) {
				f := s.forward(t, tr.forward)
				if _, _, err := f.Dial(9); err != nil {
					t.Fatal(err)
				}
				time.Sleep(20 * time.Millisecond)
				f.Close()
				wantEnd(t, c, "port", time.Second)
			})
			t.Run("a URL works once, for what it is", func(t *testing.T) {
				o := streamclient.Options{Stdout: true}
				u := s.execURL(t, o, "exit", "0")
				session, err := tr.exec(u, o)
				if err != nil {
					t.Fatal(err)
				}
				session.Close()
				if session, err := tr.exec(u, o); err == nil {
					session.Close()
					t.Error("it worked twice")
				}
				u = strings.Replace(s.execURL(t, o, "exit", "0"), "/exec/", "/attach/", 1)
				if session, err := tr.exec(u, o); err == nil {
					session.Close()
					t.Error("an exec's token attached")
				}
			})
		})
	}
}

func (s *streamServer) forward(t *testing.T, dial func(string) (*streamclient.Forwarder, error)) *streamclient.Forwarder {
	t.Helper()
	u, err := s.url("portforward", &runtimeapi.PortForwardRequest{PodSandboxId: "p"})
	if err != nil {
		t.Fatal(err)
	}
	f, err := dial(u)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func wantEnd(t *testing.T, c commands, what string, bound time.Duration) {
	t.Helper()
	select {
	case got := <-c.ended:
		if got != what {
			t.Errorf("%s ended, not %s", got, what)
		}
	case <-time.After(bound + time.Second):
		t.Fatalf("%s goes on %v after its client is gone", what, bound)
	}
}

// echo sends n bytes, ends the input, and wants them back.
func echo(t *testing.T, to io.WriteCloser, from io.Reader, n int) {
	t.Helper()
	block := make([]byte, 1<<20)
	_, _ = rand.Read(block)
	go func() {
		for sent := 0; sent < n; sent += len(block) {
			if _, err := to.Write(block); err != nil {
				return
			}
		}
		to.Close()
	}()
	got := make([]byte, len(block))
	for read := 0; read < n; read += len(block) {
		if _, err := io.ReadFull(from, got); err != nil || !bytes.Equal(got, block) {
			t.Fatalf("%d of %d bytes came back, then others, or %v", read, n, err)
		}
	}
}

// reading reads to the end in the background.
func reading(r io.Reader) <-chan string {
	c := make(chan string, 1)
	go func() { b, _ := io.ReadAll(r); c <- string(b) }()
	return c
}

func readAll(r io.Reader) (string, error) {
	b, err := io.ReadAll(r)
	return string(b), err
}

// WebSocket clients of before v5 get what they understand.
func TestOldWebSocketProtocols(t *testing.T) {
	s, _ := streamServerOf(t)
	o := streamclient.Options{Stdout: true, Stderr: true}
	session, err := streamclient.WebSocketProtocol(s.execURL(t, o, "exit", "3"), v4Protocol, o)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, session.Stderr) }()
	if code, err := session.ExitCode(); code != 3 || err != nil {
		t.Errorf("v4: exit code %d, %v", code, err)
	}
	session.Close()
	session, err = streamclient.WebSocketProtocol(s.execURL(t, o, "nothing"), "channel.k8s.io", o)
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := readAll(session.Status); !strings.HasPrefix(text, `exec "nothing"`) {
		t.Errorf("v1: status %q", text)
	}
	session.Close()
	if session, err := streamclient.WebSocketProtocol(s.execURL(t, o, "exit", "0"), "v9.channel.k8s.io", o); err == nil {
		session.Close()
		t.Error("a protocol of the future was accepted")
	}
}

// Whatever a client says that has a URL, its session ends with it, nothing stays of
// it, and the next client is served.
func TestHostileClients(t *testing.T) {
	// One that has opened no stream is waited for as long as streamCreation.
	s, _ := streamServerOf(t, goleak.IgnoreTopFunction("k8s.io/cri-streaming/pkg/streaming/remotecommand.(*v4ProtocolHandler).waitForStreams"))
	o := streamclient.Options{Stdin: true, Stdout: true, TTY: true}
	const (
		ws   = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: http://localhost\r\nSec-WebSocket-Protocol: "
		spdy = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: "
	)
	frame := func(first byte, payload string) string { // masked with zeros, as RFC 6455 has clients' frames
		return string([]byte{first, 0x80 | byte(len(payload)), 0, 0, 0, 0}) + payload
	}
	for _, c := range []struct{ name, kind, header, then, want string }{
		{"no upgrade", "exec", "", "", "HTTP/1.1 4"},
		{"a body and no upgrade", "attach", "Content-Length: 100000\r\n", strings.Repeat("x", 100000), "HTTP/1.1 4"},
		{"SPDY of an unknown protocol", "exec", spdy + "v99.channel.k8s.io\r\n", "", "HTTP/1.1 403"},
		{"SPDY and no streams", "exec", spdy + "v4.channel.k8s.io\r\n", "", "HTTP/1.1 101"},
		{"SPDY and garbage", "exec", spdy + "v4.channel.k8s.io\r\n", strings.Repeat("\x80\x03\xff\xff", 1000), "HTTP/1.1 101"},
		{"a forward and garbage", "portforward", spdy + "portforward.k8s.io\r\n", strings.Repeat("\x80\x03\x00\x01", 1000), "HTTP/1.1 101"},
		{"WebSocket of an unknown protocol", "attach", ws + "v99.channel.k8s.io\r\n", "", "HTTP/1.1 4"},
		{"WebSocket and garbage", "exec", ws + "v5.channel.k8s.io\r\n", strings.Repeat("\xff", 4096), "HTTP/1.1 101"},
		{"a frame of four exbibytes", "exec", ws + "v5.channel.k8s.io\r\n", "\x82\xff\x40\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" + strings.Repeat("x", 1<<16), "HTTP/1.1 101"},
		{"channels that aren't there", "exec", ws + "v4.channel.k8s.io\r\n", frame(0x82, "\xc8x") + frame(0x82, "\x01x") + frame(0x82, ""), "HTTP/1.1 101"},
		{"a size that is none", "exec", ws + "v4.channel.k8s.io\r\n", frame(0x82, "\x04{\"Width\": -1}") + frame(0x82, "\x04[[["), "HTTP/1.1 101"},
		{"a channel closed twice", "exec", ws + "v5.channel.k8s.io\r\n", frame(0x82, "\xff\x00") + frame(0x82, "\xff\x00") + frame(0x82, "\xff\x07"), "HTTP/1.1 101"},
		{"a tunnel and garbage", "portforward", ws + tunnelProtocol + "\r\n", frame(0x82, strings.Repeat("\x80\x03\xff\xff", 30)), "HTTP/1.1 101"},
		{"a tunnel of a tunnel", "portforward", ws + "SPDY/3.1+SPDY/3.1+portforward.k8s.io\r\n", "", "HTTP/1.1 4"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var request any = &runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"cat"}, Stdin: true, Stdout: true, Tty: true}
			switch c.kind {
			case "attach":
				request = &runtimeapi.AttachRequest{ContainerId: "c", Stdin: true, Stdout: true}
			case "portforward":
				request = &runtimeapi.PortForwardRequest{PodSandboxId: "p"}
			}
			u, err := s.url(c.kind, request)
			if err != nil {
				t.Fatal(err)
			}
			conn, err := net.Dial("tcp", s.ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			method := http.MethodPost
			if strings.HasPrefix(c.header, ws) {
				method = http.MethodGet
			}
			go func() {
				_, _ = fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n%s", method, strings.TrimPrefix(u, "http://"+s.ln.Addr().String()), c.header, c.then)
				if c.then == "" {
					_ = conn.(*net.TCPConn).CloseWrite()
				}
			}()
			answer := make([]byte, len(c.want))
			if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != c.want {
				t.Errorf("answer %q, %v; want %q", answer, err, c.want)
			}
		})
	}
	session, err := streamclient.WebSocket(s.execURL(t, o, "exit", "4"), o)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, session.Stdout) }()
	if code, err := session.ExitCode(); code != 4 || err != nil {
		t.Errorf("afterwards: exit code %d, %v", code, err)
	}
	session.Close()
}

// A URL that nobody used is good for a time, and there are so many.
func TestTokens(t *testing.T) {
	ts := tokens{life: tokenLife}
	name, err := ts.give(&runtimeapi.ExecRequest{})
	if err != nil || len(name) < 20 {
		t.Fatalf("token %q, %v", name, err)
	}
	if _, ok := take[*runtimeapi.AttachRequest](&ts, name); ok {
		t.Error("the token of an exec attached")
	}
	if _, ok := take[*runtimeapi.ExecRequest](&ts, name); ok {
		t.Error("a token that was tried for something else still works")
	}
	if name, err = ts.give(&runtimeapi.ExecRequest{}); err != nil {
		t.Fatal(err)
	}
	for range maxTokens - 1 {
		if _, err := ts.give(1); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := ts.give(1); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one token too many: %v", err)
	}
	for k, v := range ts.open {
		v.until = v.until.Add(-tokenLife - time.Second)
		ts.open[k] = v
	}
	if _, ok := take[*runtimeapi.ExecRequest](&ts, name); ok {
		t.Error("a token works after its time")
	}
	if _, err := ts.give(1); err != nil || len(ts.open) != 1 {
		t.Errorf("%d tokens are open, %v: the old ones were not forgotten", len(ts.open), err)
	}
}

func TestStreamAddress(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:0", ":0", "192.0.2.1:0", "example.test:0"} {
		if s, err := newStreamServer(addr, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", addr, err)
			if s != nil {
				s.ln.Close()
			}
		}
	}
}
