//go:build linux

package conformance_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
	"github.com/cri-vz/cri-vz/test/streamclient"
)

func TestExecSync(t *testing.T) {
	p := sharedPodOf(t)
	for _, c := range []struct {
		promise string
		args    []string
		want    cri.Result
	}{
		{"output", []string{"/bin/echo", "out"}, cri.Result{Stdout: "out\n"}},
		{"errors", []string{"/bin/err", "oops"}, cri.Result{Stderr: "oops\n"}},
		{"exit code", []string{"/bin/exit", "42"}, cri.Result{Code: 42}},
		{"both and a code", []string{"/bin/cat", "/etc/hostname", "/nothing"}, cri.Result{Stdout: p.Config.GetHostname() + "\n", Stderr: "cat: open /nothing: no such file or directory\n", Code: 1}},
		{"a program is found by PATH", []string{"pwd"}, cri.Result{Stdout: "/app\n"}},
		{"the user is the container's", []string{"/bin/id"}, cri.Result{Stdout: "uid=0 euid=0 gid=0 groups=[0]\n"}},
	} {
		t.Run(c.promise, func(t *testing.T) {
			if got := p.Do(t, p.Idle, c.args...); got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
	t.Run("a missing program is an error", func(t *testing.T) {
		_, err := p.ExecSync(cri.Timeout(t, cri.CallTimeout), &runtimeapi.ExecSyncRequest{ContainerId: p.Idle, Cmd: []string{"/bin/nothing"}})
		cri.WantError(t, err, codes.NotFound, "/bin/nothing")
	})
	t.Run("a timeout ends the command", func(t *testing.T) { // T19
		began := time.Now()
		_, err := p.ExecSync(cri.Timeout(t, cri.CallTimeout), &runtimeapi.ExecSyncRequest{ContainerId: p.Idle, Cmd: []string{"/bin/sleep", "1234"}, Timeout: 1})
		cri.WantError(t, err, codes.DeadlineExceeded)
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("took %v", took)
		}
		ends(t, p, "1234")
	})
	t.Run("16 MiB of output, and the rest is dropped", func(t *testing.T) { // T19
		r := p.Do(t, p.Idle, "/bin/flood", "17825792")
		if len(r.Stdout) != 16<<20 || r.Stderr != "" || r.Code != 0 {
			t.Errorf("%d bytes of output, %q, exit code %d", len(r.Stdout), r.Stderr, r.Code)
		}
	})
}

// ends waits until no process with that last argument runs in the pod.
func ends(t *testing.T, p *sharedPod, arg string) {
	t.Helper()
	cri.Eventually(t, 10*time.Second, "the end of the command", func() error {
		if runs(t, p.Pod, p.Idle, arg) {
			return errors.New("it runs")
		}
		return nil
	})
}

// protocols are what kubectl speaks: since 1.31 WebSocket, SPDY before.
var protocols = []struct {
	name    string
	open    cri.Protocol
	forward func(string) (*streamclient.Forwarder, error)
}{
	{"SPDY", streamclient.SPDY, streamclient.ForwardSPDY},
	{"WebSocket", streamclient.WebSocket, streamclient.ForwardWebSocket},
}

func TestExec(t *testing.T) {
	for _, protocol := range protocols {
		t.Run(protocol.name, func(t *testing.T) { execOver(t, protocol.open) })
	}
}

func execOver(t *testing.T, protocol cri.Protocol) {
	p := sharedPodOf(t)
	open := func(t *testing.T, stdin, tty bool, cmd ...string) *cri.Terminal {
		t.Helper()
		r, err := p.Exec(cri.Timeout(t, cri.CallTimeout), &runtimeapi.ExecRequest{ContainerId: p.Idle, Cmd: cmd, Stdin: stdin, Stdout: true, Stderr: !tty, Tty: tty})
		if err != nil {
			t.Fatal(err)
		}
		return cri.OpenTerminalOver(t, protocol, r.GetUrl(), cri.Streams{Stdin: stdin, Stdout: true, Stderr: !tty, TTY: tty})
	}
	t.Run("the URL has a host", func(t *testing.T) {
		r, err := p.Exec(cri.Timeout(t, cri.CallTimeout), &runtimeapi.ExecRequest{ContainerId: p.Idle, Cmd: []string{"/bin/id"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		if u, err := url.Parse(r.GetUrl()); err != nil || u.Host == "" || u.Scheme != "http" {
			t.Errorf("%s, %v", r.GetUrl(), err)
		}
	})
	t.Run("output, errors and exit code", func(t *testing.T) {
		r, err := open(t, false, false, "/bin/cat", "/etc/hostname", "/nothing").Finish(10 * time.Second)
		if err != nil || r.Stdout != p.Config.GetHostname()+"\n" || !strings.Contains(r.Stderr, "/nothing") || r.Code != 1 {
			t.Errorf("%+v, %v", r, err)
		}
	})
	t.Run("1 MiB each way, and the input's end", func(t *testing.T) {
		s := open(t, true, false, "/bin/cat")
		text := strings.Repeat("0123456789abcdef", 64<<10)
		go func() {
			_, _ = io.WriteString(s.Stdin, text)
			s.Stdin.Close()
		}()
		r, err := s.Finish(30 * time.Second)
		if err != nil || r.Stdout != text || r.Code != 0 {
			t.Errorf("%d bytes of %d, exit code %d, %v", len(r.Stdout), len(text), r.Code, err)
		}
	})
	t.Run("a terminal echoes, and Ctrl-D ends the input", func(t *testing.T) {
		s := open(t, true, true, "/bin/cat")
		if _, err := io.WriteString(s.Stdin, "hello\n\x04"); err != nil {
			t.Fatal(err)
		}
		if r, err := s.Finish(10 * time.Second); err != nil || r.Stdout != "hello\r\nhello\r\n" || r.Code != 0 {
			t.Errorf("%+v, %v", r, err)
		}
	})
	t.Run("a terminal has a TERM", func(t *testing.T) {
		if r, err := open(t, true, true, "/bin/env").Finish(10 * time.Second); err != nil || !strings.Contains(r.Stdout, "TERM=xterm\r\n") {
			t.Errorf("%+v, %v", r, err)
		}
	})
	t.Run("a terminal has the client's size", func(t *testing.T) {
		s := open(t, true, true, "/bin/cat")
		cri.Eventually(t, 5*time.Second, "the size of a terminal", func() error {
			// A size is set when it arrives, which may be after the start.
			s := open(t, true, true, "/app/web", "winsize")
			if r, err := s.Finish(10 * time.Second); err != nil || r.Stdout != "100 40\r\n" {
				return fmt.Errorf("%+v, %w", r, err)
			}
			return nil
		})
		s.Close()
	})
	t.Run("Ctrl-C interrupts", func(t *testing.T) {
		s := open(t, true, true, "/bin/cat")
		time.Sleep(200 * time.Millisecond)
		if _, err := io.WriteString(s.Stdin, "\x03"); err != nil {
			t.Fatal(err)
		}
		if r, err := s.Finish(10 * time.Second); err != nil || r.Code != 130 {
			t.Errorf("%+v, %v", r, err)
		}
	})
	t.Run("a URL works once", func(t *testing.T) {
		r, err := p.Exec(cri.Timeout(t, cri.CallTimeout), &runtimeapi.ExecRequest{ContainerId: p.Idle, Cmd: []string{"/bin/id"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cri.OpenTerminalOver(t, protocol, r.GetUrl(), cri.Streams{Stdout: true}).Finish(10 * time.Second); err != nil {
			t.Fatal(err)
		}
		if s, err := protocol(r.GetUrl(), cri.Streams{Stdout: true}); err == nil {
			s.Close()
			t.Error("it worked a second time")
		}
	})
}

func TestAttach(t *testing.T) {
	p := sharedPodOf(t)
	attach := func(t *testing.T, id string, tty bool) *cri.Terminal {
		t.Helper()
		r, err := p.Attach(cri.Timeout(t, cri.CallTimeout), &runtimeapi.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Stderr: !tty, Tty: tty})
		if err != nil {
			t.Fatal(err)
		}
		return cri.OpenTerminal(t, r.GetUrl(), cri.Streams{Stdin: true, Stdout: true, Stderr: !tty, TTY: tty})
	}
	t.Run("input and output; stdin_once ends the input with its first client", func(t *testing.T) {
		id := p.Start(t, "attach", cri.Command("/bin/cat"), func(c *runtimeapi.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
		s := attach(t, id, false)
		if _, err := io.WriteString(s.Stdin, "hello\n"); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 6)
		if _, err := io.ReadFull(s.Stdout, buf); err != nil || string(buf) != "hello\n" {
			t.Fatalf("%q, %v", buf, err)
		}
		s.Stdin.Close()
		if r, err := s.Finish(10 * time.Second); err != nil || r.Stdout != "" {
			t.Errorf("%+v, %v", r, err)
		}
		st := p.WaitExit(t, id, 10*time.Second)
		if log := cri.ReadLog(t, st.GetLogPath()); st.GetExitCode() != 0 || log.Stdout != "hello\n" {
			t.Errorf("exit code %d, log %+v", st.GetExitCode(), log)
		}
	})
	t.Run("two clients of one terminal", func(t *testing.T) {
		id := p.Start(t, "attach-tty", cri.Command("/bin/cat"), func(c *runtimeapi.ContainerConfig) { c.Stdin, c.Tty = true, true })
		one, two := attach(t, id, true), attach(t, id, true)
		time.Sleep(300 * time.Millisecond) // both are connected
		if _, err := io.WriteString(one.Stdin, "hi\n"); err != nil {
			t.Fatal(err)
		}
		for i, s := range []*cri.Terminal{one, two} {
			buf := make([]byte, 8)
			if _, err := io.ReadFull(s.Stdout, buf); err != nil || string(buf) != "hi\r\nhi\r\n" {
				t.Errorf("client %d: %q, %v", i, buf, err)
			}
		}
		one.Close() // the other goes on
		if _, err := io.WriteString(two.Stdin, "\x04"); err != nil {
			t.Fatal(err)
		}
		if st := p.WaitExit(t, id, 10*time.Second); st.GetExitCode() != 0 {
			t.Errorf("exit code %d", st.GetExitCode())
		}
	})
}

func TestPortForward(t *testing.T) {
	p := sharedPodOf(t)
	id := p.Start(t, "echo", cri.Command("/bin/tcp-echo", "7000"))
	cri.WaitForLog(t, p.Container(t, id).GetLogPath(), "listening")
	exchange := func(f *cri.Forwarder, request []byte) error {
		c, err := f.Dial(7000)
		if err != nil {
			return err
		}
		answer, err := c.Exchange(request)
		if err == nil && !bytes.Equal(answer, request) {
			err = fmt.Errorf("%d bytes came back of %d", len(answer), len(request))
		}
		return err
	}
	request := bytes.Repeat([]byte("cri-vz! "), 8<<10) // 64 KiB
	for _, protocol := range protocols {
		t.Run("what was sent comes back to its end over "+protocol.name, func(t *testing.T) {
			if err := exchange(p.ForwardOver(t, protocol.forward), bytes.Repeat(request, 16)); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("32 connections at once", func(t *testing.T) {
		f := p.Forward(t)
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() {
				if err := exchange(f, request); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
	t.Run("nothing listens, and the client hears of it", func(t *testing.T) {
		c, err := p.Forward(t).Dial(7001)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err = c.Exchange([]byte("x")); err == nil {
			t.Error("no error")
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("after %v", took)
		}
	})
	t.Run("a client that vanishes disturbs nobody", func(t *testing.T) {
		f := p.Forward(t)
		for range 4 {
			c, err := f.Dial(7000)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Write([]byte("half")); err != nil {
				t.Fatal(err)
			}
			// SPDY's clients stop at an answer that nobody reads, the replies to what is
			// dialled next among it.
			go func() { _, _ = io.Copy(io.Discard, c) }()
		}
		f.Close()
		if err := exchange(p.Forward(t), request); err != nil {
			t.Error(err)
		}
	})
}
