//go:build linux

package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
	"github.com/cri-vz/cri-vz/test/streamclient"
)

// Exec, attach and port-forward over both protocols, all the way into a guest.
func TestStreamingProtocols(t *testing.T) {
	p := sharedPodOf(t)
	echo := p.start(t, "echo", command("/bin/tcp-echo", "7070"))
	waitForLog(t, p.container(t, echo).GetLogPath(), "listening")
	before := daemonFiles(t)
	for name, tr := range map[string]struct {
		open    func(string, streamclient.Options) (*streamclient.Session, error)
		forward func(string) (*streamclient.Forwarder, error)
	}{
		"SPDY":      {streamclient.SPDY, streamclient.ForwardSPDY},
		"WebSocket": {streamclient.WebSocket, streamclient.ForwardWebSocket},
	} {
		t.Run(name, func(t *testing.T) {
			open := func(t *testing.T, id string, o streamclient.Options, cmd ...string) *streamclient.Session {
				t.Helper()
				var url string
				if cmd == nil {
					r, err := p.Attach(timeout(t, callTimeout), &runtimeapi.AttachRequest{ContainerId: id, Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr, Tty: o.TTY})
					if err != nil {
						t.Fatal(err)
					}
					url = r.GetUrl()
				} else {
					r, err := p.Exec(timeout(t, callTimeout), &runtimeapi.ExecRequest{ContainerId: id, Cmd: cmd, Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr, Tty: o.TTY})
					if err != nil {
						t.Fatal(err)
					}
					url = r.GetUrl()
				}
				s, err := tr.open(url, o)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { s.Close() })
				return s
			}
			t.Run("64 MiB both ways, then the end of the input", func(t *testing.T) {
				s := open(t, p.idle, streamclient.Options{Stdin: true, Stdout: true}, "/bin/cat")
				wantEcho(t, s.Stdin, s.Stdout, 64<<20)
				if code, err := s.ExitCode(); code != 0 || err != nil {
					t.Errorf("exit code %d, %v", code, err)
				}
			})
			t.Run("exit code and errors", func(t *testing.T) {
				s := open(t, p.idle, streamclient.Options{Stdout: true, Stderr: true}, "/bin/cat", "/nothing")
				go func() { _, _ = io.Copy(io.Discard, s.Stdout) }()
				text := make(chan string, 1)
				go func() { b, _ := io.ReadAll(s.Stderr); text <- string(b) }()
				if code, err := s.ExitCode(); code != 1 || err != nil {
					t.Errorf("exit code %d, %v", code, err)
				}
				if got := <-text; !strings.Contains(got, "/nothing") {
					t.Errorf("stderr %q", got)
				}
			})
			t.Run("size of the terminal", func(t *testing.T) {
				s := open(t, p.idle, streamclient.Options{Stdin: true, Stdout: true, TTY: true}, "/app/web", "window", "101x33")
				go func() { _, _ = io.Copy(io.Discard, s.Stdout) }()
				if err := s.Resize(101, 33); err != nil {
					t.Fatal(err)
				}
				if code, err := s.ExitCode(); code != 0 || err != nil {
					t.Errorf("exit code %d, %v", code, err)
				}
			})
			for kind, o := range map[string]streamclient.Options{
				"without terminal": {Stdin: true, Stdout: true}, "output alone": {Stdout: true}, "terminal": {Stdin: true, Stdout: true, TTY: true},
			} {
				t.Run("a client that vanishes silently, "+kind, func(t *testing.T) {
					arg := fmt.Sprint(4000 + len(name) + len(kind))
					s := open(t, p.idle, o, "/bin/sleep", arg)
					eventually(t, 5*time.Second, "the command", func() error {
						if !commandRuns(t, p, arg) {
							return errors.New("it does not run")
						}
						return nil
					})
					s.Close()
					eventually(t, 5*time.Second, "the end of the command", func() error {
						if commandRuns(t, p, arg) {
							return errors.New("it runs")
						}
						return nil
					})
				})
			}
			t.Run("attach", func(t *testing.T) {
				id := p.start(t, "attach-"+name, command("/bin/cat"), func(c *runtimeapi.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
				s := open(t, id, streamclient.Options{Stdin: true, Stdout: true})
				wantEcho(t, s.Stdin, s.Stdout, 1<<20)
				if code, err := s.ExitCode(); code != 0 || err != nil {
					t.Errorf("status %d, %v", code, err)
				}
				p.waitExit(t, id, 10*time.Second)
			})
			t.Run("port-forward", func(t *testing.T) {
				r, err := p.PortForward(timeout(t, callTimeout), &runtimeapi.PortForwardRequest{PodSandboxId: p.id})
				if err != nil {
					t.Fatal(err)
				}
				f, err := tr.forward(r.GetUrl())
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				data, failure, err := f.Dial(7070)
				if err != nil {
					t.Fatal(err)
				}
				wantEcho(t, data, data, 64<<20)
				if b, err := io.ReadAll(failure); len(b) > 0 {
					t.Errorf("%q, %v", b, err)
				}
				if _, failure, err = f.Dial(7071); err != nil {
					t.Fatal(err)
				}
				if b, err := io.ReadAll(failure); !strings.Contains(string(b), "nothing listens on port 7071") {
					t.Errorf("%q, %v", b, err)
				}
			})
			t.Run("forwarded and attached clients that vanish", func(t *testing.T) {
				r, err := p.PortForward(timeout(t, callTimeout), &runtimeapi.PortForwardRequest{PodSandboxId: p.id})
				if err != nil {
					t.Fatal(err)
				}
				f, err := tr.forward(r.GetUrl())
				if err != nil {
					t.Fatal(err)
				}
				for range 4 {
					if _, _, err := f.Dial(7070); err != nil {
						t.Fatal(err)
					}
				}
				s := open(t, p.idle, streamclient.Options{Stdout: true, Stderr: true})
				time.Sleep(100 * time.Millisecond)
				f.Close()
				s.Close()
			})
		})
	}
	// Whatever vanished has left nothing in the daemon.
	eventually(t, 10*time.Second, "the end of all sessions in the daemon", func() error {
		if now := daemonFiles(t); now > before {
			return fmt.Errorf("it has %d files open, and had %d", now, before)
		}
		return nil
	})
}

// daemonFiles is how many files the daemon has open: its clients' and shims'
// connections among them.
func daemonFiles(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", suite.node.daemon.PID()))
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// wantEcho sends n bytes, ends the input, and wants them back.
func wantEcho(t *testing.T, to io.WriteCloser, from io.Reader, n int) {
	t.Helper()
	block := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
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

// T17: what is typed into a terminal that nobody reads doesn't delay its size.
func TestResizeOvertakesInput(t *testing.T) {
	p := sharedPodOf(t)
	s, err := suite.node.api.ExecStream(timeout(t, callTimeout))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&nodeapi.ExecRequest{ContainerId: p.idle, Cmd: []string{"/app/web", "window", "133x44"}, Tty: true, Stdin: true, Width: 80, Height: 24}); err != nil {
		t.Fatal(err)
	}
	for range 16 { // 512 KiB; a terminal takes 4 KiB
		if err := s.Send(&nodeapi.ExecRequest{Data: bytes.Repeat([]byte("x"), 32<<10)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Send(&nodeapi.ExecRequest{Width: 133, Height: 44}); err != nil {
		t.Fatal(err)
	}
	for {
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if m.GetExited() {
			if m.GetExitCode() != 0 {
				t.Errorf("exit code %d: the window did not get its size", m.GetExitCode())
			}
			return
		}
	}
}
