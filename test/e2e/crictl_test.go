//go:build linux

package e2e_test

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/console"
)

// The real crictl, where it is on PATH: the same journey with the tool that
// people use.
func TestCrictl(t *testing.T) {
	tool, err := exec.LookPath("crictl")
	if err != nil {
		t.Skip("crictl is not on PATH: its journey is not part of this run")
	}
	n := suite.node
	dir := t.TempDir()
	config := filepath.Join(dir, "crictl.yaml")
	if err := os.WriteFile(config, []byte("runtime-endpoint: unix://"+n.socket+"\nimage-endpoint: unix://"+n.socket+"\ntimeout: 60\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	crictl := func(args ...string) *exec.Cmd {
		return exec.Command(tool, append([]string{"--config", config}, args...)...)
	}
	run := func(t *testing.T, args ...string) string {
		t.Helper()
		var stderr strings.Builder
		cmd := crictl(args...)
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("crictl %q: %v: %s", args, err, stderr.String())
		}
		return strings.TrimSpace(string(out))
	}
	write := func(name string, v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	img, err := variant("crictl")
	if err != nil {
		t.Fatal(err)
	}
	ref, _, err := push("crictl:latest", img)
	if err != nil {
		t.Fatal(err)
	}

	if got := run(t, "version"); !strings.Contains(got, "cri-vz") {
		t.Errorf("version: %s", got)
	}
	run(t, "pull", ref)
	if got := run(t, "images"); !strings.Contains(got, "e2e/crictl") {
		t.Errorf("images: %s", got)
	}
	logs := filepath.Join(n.dir, "logs", "crictl")
	pod := write("pod.json", map[string]any{
		"metadata": map[string]any{"name": "crictl", "namespace": "e2e", "uid": "u1"}, "hostname": "crictl", "log_directory": logs, "linux": map[string]any{},
	})
	boots.Add(1)
	podID := run(t, "runp", pod)
	container := func(name string, more map[string]any) string {
		c := map[string]any{"metadata": map[string]any{"name": name}, "image": map[string]any{"image": ref}, "log_path": name + ".log", "linux": map[string]any{}}
		for k, v := range more {
			c[k] = v
		}
		id := run(t, "create", podID, write(name+".json", c), pod)
		run(t, "start", id)
		return id
	}
	web := container("web", nil)
	if got := run(t, "pods", "--name", "crictl"); !strings.Contains(got, "Ready") {
		t.Errorf("pods: %s", got)
	}
	if got := run(t, "ps"); !strings.Contains(got, "Running") || !strings.Contains(got, "web") {
		t.Errorf("ps: %s", got)
	}
	run(t, "inspect", web)
	run(t, "inspectp", podID)

	if got := run(t, "exec", web, "/bin/hostname"); got != "crictl" {
		t.Errorf("exec: %q", got)
	}
	if got := run(t, "exec", "-s", web, "/bin/hostname"); got != "crictl" {
		t.Errorf("exec -s: %q", got)
	}
	var exit *exec.ExitError
	if err := crictl("exec", web, "/bin/exit", "3").Run(); !errors.As(err, &exit) {
		t.Errorf("exec of a failing command: %v", err)
	}
	t.Run("exec -it", func(t *testing.T) {
		got := inTerminal(t, crictl("exec", "-it", web, "/bin/cat"), "typed\n\x04")
		if !strings.Contains(got, "typed\r\ntyped\r\n") {
			t.Errorf("%q", got)
		}
	})
	t.Run("attach", func(t *testing.T) {
		id := container("cat", map[string]any{"command": []string{"/bin/cat"}, "stdin": true, "stdin_once": true})
		cmd := crictl("attach", "-i", id)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out := startRecorded(t, cmd)
		if _, err := io.WriteString(in, "attached\n"); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "the answer", func() error {
			if !strings.Contains(out.String(), "attached\n") {
				return errors.New(out.String())
			}
			return nil
		})
		in.Close()
		if err := out.wait(15 * time.Second); err != nil {
			t.Errorf("%v: %s", err, out.String())
		}
	})
	t.Run("logs -f", func(t *testing.T) {
		id := container("count", map[string]any{"command": []string{"/bin/count", "30", "50ms"}})
		out := startRecorded(t, crictl("logs", "-f", id))
		if err := out.wait(30 * time.Second); err != nil {
			t.Errorf("%v: %s", err, out.String())
		}
		wantCount(t, out.String(), 30)
	})
	t.Run("port-forward", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		l.Close()
		out := startRecorded(t, crictl("port-forward", podID, port+":3000"))
		eventually(t, 10*time.Second, "crictl to listen", func() error {
			if !strings.Contains(out.String(), "Forwarding from") {
				return errors.New(out.String())
			}
			return nil
		})
		if got, err := get("http://127.0.0.1:" + port + "/"); err != nil || got != "hello from crictl\n" {
			t.Errorf("%q, %v", got, err)
		}
	})
	run(t, "stop", web)
	if got := run(t, "ps", "-a"); !strings.Contains(got, "Exited") {
		t.Errorf("ps -a: %s", got)
	}
	for _, id := range strings.Fields(run(t, "ps", "-a", "-q", "--pod", podID)) {
		run(t, "rm", "-f", id)
	}
	run(t, "stopp", podID)
	run(t, "rmp", podID)
	run(t, "rmi", ref)
	if got := run(t, "pods", "-q", "--name", "crictl"); got != "" {
		t.Errorf("pods after rmp: %s", got)
	}
}

// inTerminal runs cmd in a pseudo-terminal, types input, and returns what it
// showed.
func inTerminal(t *testing.T, cmd *exec.Cmd, input string) string {
	t.Helper()
	pty, path, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer pty.Close()
	tty, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := pty.Resize(console.WinSize{Width: 100, Height: 40}); err != nil {
		t.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(time.Second, func() { _, _ = io.WriteString(pty, input) }) // the client must have made its terminal raw
	timer := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	shown := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(pty) // EIO when the last holder of tty is gone
		shown <- string(b)
	}()
	err = cmd.Wait()
	timer.Stop()
	tty.Close()
	got := <-shown
	if err != nil {
		t.Errorf("%v: %q", err, got)
	}
	return got
}
