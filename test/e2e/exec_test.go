//go:build linux

package e2e_test

import (
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
	"github.com/cri-vz/cri-vz/test/criclient"
)

func TestExecSync(t *testing.T) {
	p := sharedPodOf(t)
	for _, c := range []struct {
		name           string
		args           []string
		stdout, stderr string
		code           int32
	}{
		{"output", []string{"/bin/echo", "out"}, "out\n", "", 0},
		{"errors", []string{"/bin/err", "oops"}, "", "oops\n", 0},
		{"exit code", []string{"/bin/exit", "42"}, "", "", 42},
		{"both and a code", []string{"/bin/cat", "/etc/hostname", "/nothing"}, "shared\n", "cat: open /nothing: no such file or directory\n", 1},
		{"by PATH", []string{"pwd"}, "/app\n", "", 0},
		{"user of the container", []string{"/bin/id"}, "uid=0 euid=0 gid=0 groups=[0]\n", "", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got, want := p.exec(t, p.idle, c.args...), (result{c.stdout, c.stderr, c.code}); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
	t.Run("command not found", func(t *testing.T) {
		_, err := p.ExecSync(timeout(t, callTimeout), &runtimeapi.ExecSyncRequest{ContainerId: p.idle, Cmd: []string{"/bin/nothing"}})
		wantError(t, err, codes.NotFound, "/bin/nothing")
	})
	t.Run("a timeout kills", func(t *testing.T) { // T19
		began := time.Now()
		_, err := p.ExecSync(timeout(t, callTimeout), &runtimeapi.ExecSyncRequest{ContainerId: p.idle, Cmd: []string{"/bin/sleep", "1234"}, Timeout: 1})
		wantError(t, err, codes.DeadlineExceeded, "1 s")
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("took %v", took)
		}
		eventually(t, 5*time.Second, "the end of the command", func() error {
			if commandRuns(t, p, "1234") {
				return errors.New("it runs")
			}
			return nil
		})
	})
	t.Run("16 MiB of output", func(t *testing.T) { // T19
		r := p.exec(t, p.idle, "/bin/flood", "17825792")
		if len(r.stdout) != 16<<20 || r.stderr != "" || r.code != 0 {
			t.Errorf("%d bytes of output, %q, exit code %d", len(r.stdout), r.stderr, r.code)
		}
	})
}

// commandRuns tells whether a process with that last argument runs in the pod.
func commandRuns(t *testing.T, p *sharedPod, arg string) bool {
	t.Helper()
	for line := range strings.Lines(p.output(t, p.idle, "/bin/ls", "/proc")) {
		f := strings.Fields(line)
		pid := f[len(f)-1]
		if pid == "" || strings.Trim(pid, "0123456789") != "" {
			continue
		}
		if r := p.exec(t, p.idle, "/bin/cat", "/proc/"+pid+"/cmdline"); strings.HasSuffix(r.stdout, "\x00"+arg+"\x00") {
			return true
		}
	}
	return false
}

func TestExecStream(t *testing.T) {
	p := sharedPodOf(t)
	open := func(t *testing.T, stdin, tty bool, cmd ...string) *terminal {
		t.Helper()
		r, err := p.Exec(timeout(t, callTimeout), &runtimeapi.ExecRequest{ContainerId: p.idle, Cmd: cmd, Stdin: stdin, Stdout: true, Stderr: !tty, Tty: tty})
		if err != nil {
			t.Fatal(err)
		}
		return openTerminal(t, r.GetUrl(), stdin, tty)
	}
	t.Run("output, errors and exit code", func(t *testing.T) {
		r, err := open(t, false, false, "/bin/cat", "/etc/hostname", "/nothing").finish(10 * time.Second)
		if err != nil || r.stdout != "shared\n" || !strings.Contains(r.stderr, "/nothing") || r.code != 1 {
			t.Errorf("%+v, %v", r, err)
		}
	})
	t.Run("input to its end", func(t *testing.T) {
		s := open(t, true, false, "/bin/cat")
		text := strings.Repeat("0123456789abcdef", 64<<10) // 1 MiB
		go func() {
			_, _ = io.WriteString(s.Stdin, text)
			s.Stdin.Close()
		}()
		r, err := s.finish(30 * time.Second)
		if err != nil || r.stdout != text || r.code != 0 {
			t.Errorf("%d bytes of %d, exit code %d, %v", len(r.stdout), len(text), r.code, err)
		}
	})
	t.Run("terminal", func(t *testing.T) {
		s := open(t, true, true, "/bin/cat")
		if _, err := io.WriteString(s.Stdin, "hello\n\x04"); err != nil { // Ctrl-D
			t.Fatal(err)
		}
		r, err := s.finish(10 * time.Second)
		if err != nil || r.stdout != "hello\r\nhello\r\n" || r.code != 0 {
			t.Errorf("%+v, %v", r, err)
		}
	})
	t.Run("Ctrl-C", func(t *testing.T) {
		s := open(t, true, true, "/bin/cat")
		time.Sleep(200 * time.Millisecond)
		if _, err := io.WriteString(s.Stdin, "\x03"); err != nil {
			t.Fatal(err)
		}
		if r, err := s.finish(10 * time.Second); err != nil || r.code != 130 {
			t.Errorf("%+v, %v", r, err)
		}
	})
	t.Run("a client that vanishes ends its command", func(t *testing.T) {
		s := open(t, true, true, "/bin/sleep", "4321")
		eventually(t, 5*time.Second, "the command", func() error {
			if !commandRuns(t, p, "4321") {
				return errors.New("it does not run")
			}
			return nil
		})
		s.Close()
		eventually(t, 10*time.Second, "the end of the command", func() error {
			if commandRuns(t, p, "4321") {
				return errors.New("it runs")
			}
			return nil
		})
	})
	t.Run("a URL works once", func(t *testing.T) {
		r, err := p.Exec(timeout(t, callTimeout), &runtimeapi.ExecRequest{ContainerId: p.idle, Cmd: []string{"/bin/id"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := openTerminalOutput(t, r.GetUrl()).finish(10 * time.Second); err != nil {
			t.Fatal(err)
		}
		if conn, err := dialSPDY(r.GetUrl(), remotecommand.StreamProtocolV4Name); err == nil {
			conn.Close()
			t.Error("the URL worked a second time")
		}
	})
	t.Run("input that nobody reads", func(t *testing.T) { // T17
		s, err := suite.node.api.ExecStream(timeout(t, 20*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&nodeapi.ExecRequest{ContainerId: p.idle, Cmd: []string{"/bin/sleep", "1"}, Stdin: true}); err != nil {
			t.Fatal(err)
		}
		go func() {
			for range 256 { // 8 MiB
				if s.Send(&nodeapi.ExecRequest{Data: make([]byte, 32<<10)}) != nil {
					return
				}
			}
		}()
		began := time.Now()
		for {
			m, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if m.GetExited() {
				break
			}
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("took %v", took)
		}
	})
}

// openTerminalOutput opens a session that asked for standard output alone.
func openTerminalOutput(t *testing.T, url string) *terminal {
	t.Helper()
	return &terminal{criclient.OpenTerminal(t, url, criclient.Streams{Stdout: true})}
}

func TestAttach(t *testing.T) {
	p := sharedPodOf(t)
	attach := func(t *testing.T, id string, tty bool) *terminal {
		t.Helper()
		r, err := p.Attach(timeout(t, callTimeout), &runtimeapi.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Stderr: !tty, Tty: tty})
		if err != nil {
			t.Fatal(err)
		}
		return openTerminal(t, r.GetUrl(), true, tty)
	}
	t.Run("streams", func(t *testing.T) {
		id := p.start(t, "attach", command("/bin/cat"), func(c *runtimeapi.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
		s := attach(t, id, false)
		if _, err := io.WriteString(s.Stdin, "hello\n"); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 6)
		if _, err := io.ReadFull(s.Stdout, buf); err != nil || string(buf) != "hello\n" {
			t.Fatalf("%q, %v", buf, err)
		}
		s.Stdin.Close() // stdin_once: the container's input ends with the first client's
		if r, err := s.finish(10 * time.Second); err != nil || r.stdout != "" {
			t.Errorf("%+v, %v", r, err)
		}
		st := p.waitExit(t, id, 10*time.Second)
		if log := readLog(t, st.GetLogPath()); st.GetExitCode() != 0 || log.stdout != "hello\n" {
			t.Errorf("exit code %d, log %+v", st.GetExitCode(), log)
		}
	})
	t.Run("terminal, two clients", func(t *testing.T) {
		id := p.start(t, "attach-tty", command("/bin/cat"), func(c *runtimeapi.ContainerConfig) { c.Stdin, c.Tty = true, true })
		one, two := attach(t, id, true), attach(t, id, true)
		time.Sleep(300 * time.Millisecond) // both are connected
		if _, err := io.WriteString(one.Stdin, "hi\n"); err != nil {
			t.Fatal(err)
		}
		for i, s := range []*terminal{one, two} {
			buf := make([]byte, 8)
			if _, err := io.ReadFull(s.Stdout, buf); err != nil || string(buf) != "hi\r\nhi\r\n" {
				t.Errorf("client %d: %q, %v", i, buf, err)
			}
		}
		one.Close() // the other goes on
		if _, err := io.WriteString(two.Stdin, "\x04"); err != nil {
			t.Fatal(err)
		}
		if st := p.waitExit(t, id, 10*time.Second); st.GetExitCode() != 0 {
			t.Errorf("exit code %d", st.GetExitCode())
		}
	})
}
