//go:build linux

package e2e_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
	"github.com/cri-vz/cri-vz/test/criclient"
)

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
	open := func(t *testing.T, stdin, tty bool, cmd ...string) *criclient.Terminal {
		t.Helper()
		r, err := p.Exec(timeout(t, callTimeout), &runtimeapi.ExecRequest{ContainerId: p.idle, Cmd: cmd, Stdin: stdin, Stdout: true, Stderr: !tty, Tty: tty})
		if err != nil {
			t.Fatal(err)
		}
		return criclient.OpenTerminal(t, r.GetUrl(), criclient.Streams{Stdin: stdin, Stdout: true, Stderr: !tty, TTY: tty})
	}
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
