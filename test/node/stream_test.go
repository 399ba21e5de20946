//go:build linux

package node_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"
)

const toolbox = `
apiVersion: v1
kind: Pod
metadata: {name: toolbox}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    command: [/bin/web]
  - name: cat
    image: IMAGE
    stdin: true
    stdinOnce: true
    command: [cat]
`

// exec, logs -f, cp, attach, port-forward and debug do what they do on any node.
func TestStreams(t *testing.T) {
	n := newNamespace(t)
	n.ready("toolbox", toolbox)

	t.Run("exec", func(t *testing.T) {
		out, err := kubectlWith("from stdin", "-n", n.name, "exec", "-i", "toolbox", "--", "sh", "-c", "cat; echo to stderr >&2; exit 7")
		if err == nil || out != "from stdin" || !strings.Contains(err.Error(), "to stderr") || !strings.Contains(err.Error(), "exit code 7") {
			t.Errorf("got %q, %v", out, err)
		}
	})
	t.Run("exec on a terminal", func(t *testing.T) { execTerminal(n.in(t)) })
	t.Run("cp", func(t *testing.T) {
		n := n.in(t)
		dir := filepath.Join(suite.base, "cp")
		sent := make([]byte, 5<<20)
		_, _ = rand.Read(sent) // never fails
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "sent"), sent, 0o644); err != nil {
			t.Fatal(err)
		}
		n.run("cp", filepath.Join(dir, "sent"), "toolbox:/tmp/file")
		n.run("cp", "toolbox:/tmp/file", filepath.Join(dir, "received"))
		received, err := os.ReadFile(filepath.Join(dir, "received"))
		if err != nil || !bytes.Equal(sent, received) {
			t.Errorf("sent %d bytes, received %d others, %v", len(sent), len(received), err)
		}
	})
	t.Run("logs -f", func(t *testing.T) {
		n := n.in(t)
		n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: counter}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: IMAGE, command: [/bin/web, count, "30", 100ms]}
`)
		n.eventually(time.Minute, "the start of the counter", func() error {
			_, err := kubectl("-n", n.name, "logs", "counter")
			return err
		})
		// It ends with the container, and has every line once.
		var want strings.Builder
		for i := range 30 {
			fmt.Fprintf(&want, "line %d\n", i+1)
		}
		n.want("log", n.run("logs", "-f", "counter"), want.String())
		n.want("last line", n.run("logs", "--tail=1", "counter"), "line 30\n")
	})
	t.Run("attach", func(t *testing.T) {
		n := n.in(t)
		out, err := kubectlWith("over attach\n", "-n", n.name, "attach", "-i", "toolbox", "-c", "cat")
		if err != nil || !strings.Contains(out, "over attach") {
			t.Errorf("got %q, %v", out, err)
		}
		// cat's input was for one client: its end is the end of cat, which restarts.
		n.becomes(time.Minute, "pod/toolbox", `{.status.containerStatuses[?(@.name=="cat")].restartCount}`, "1")
	})
	t.Run("port-forward", func(t *testing.T) { portForward(n.in(t)) })
	t.Run("debug", func(t *testing.T) {
		n := n.in(t)
		// T27
		n.run("debug", "toolbox", "--image="+suite.image, "--target=main", "-c", "debugger", "--", "sh", "-c", "cat /proc/1/cmdline; cat /proc/1/root/data/from-image")
		n.becomes(time.Minute, "pod/toolbox", `{.status.ephemeralContainerStatuses[?(@.name=="debugger")].state.terminated.reason}`, "Completed")
		n.want("what the debugger saw", n.run("logs", "toolbox", "-c", "debugger"), "/bin/web\x00of the image\n")
	})
}

// execTerminal types into a shell, which sees the terminal's size and each change
// of it.
func execTerminal(t *namespace) {
	master, path, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	slave, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	if err := master.Resize(console.WinSize{Height: 30, Width: 100}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := kubectlCommand(ctx, "-n", t.name, "exec", "-it", "toolbox", "--", "sh")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var mu sync.Mutex
	var screen strings.Builder
	go func() { // until master is closed
		buf := make([]byte, 4096)
		for {
			k, err := master.Read(buf)
			mu.Lock()
			screen.Write(buf[:k])
			mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	shows := func(want string) {
		t.eventually(30*time.Second, "the terminal", func() error {
			mu.Lock()
			defer mu.Unlock()
			if !strings.Contains(screen.String(), want) {
				return fmt.Errorf("no %q on it: %q", want, screen.String())
			}
			return nil
		})
	}
	typed := func(line string) {
		if _, err := io.WriteString(master, line+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	// The sum is on the screen only if a shell computed it.
	typed("echo $((40+2)) on $(tty)")
	shows("42 on /dev/pts/")
	t.eventually(30*time.Second, "the size of the terminal", func() error {
		typed("stty size")
		time.Sleep(300 * time.Millisecond)
		mu.Lock()
		defer mu.Unlock()
		if !strings.Contains(screen.String(), "30 100\r\n") {
			return fmt.Errorf("got %q", screen.String())
		}
		return nil
	})
	if err := master.Resize(console.WinSize{Height: 40, Width: 120}); err != nil {
		t.Fatal(err)
	}
	typed("while [ \"$(stty size)\" != '40 120' ]; do sleep 0.1; done; echo size-$((20*2))")
	shows("size-40")
	typed("exit 9")
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 9 {
			t.Errorf("kubectl ended with %v, want exit status 9", err)
		}
	case <-ctx.Done():
		t.Error("kubectl did not end after the shell")
	}
}

func portForward(t *namespace) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := kubectlCommand(ctx, "-n", t.name, "port-forward", "--address=127.0.0.1", "pod/toolbox", ":3000")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = cmd.Wait() }()
	line, err := bufio.NewReader(out).ReadString('\n')
	port := regexp.MustCompile(`^Forwarding from 127.0.0.1:(\d+) -> 3000\n$`).FindStringSubmatch(line)
	if port == nil {
		t.Fatalf("kubectl port-forward said %q, %v", line, err)
	}
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for range 3 {
		resp, err := client.Get("http://127.0.0.1:" + port[1] + "/healthz")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(body) != "ok\n" {
			t.Fatalf("got %q, %v", body, err)
		}
	}
}

// A pod's host port is the node's.
func TestHostPort(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.ready("port", `
apiVersion: v1
kind: Pod
metadata: {name: port}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    command: [/bin/web]
    ports: [{containerPort: 3000, hostPort: 18080}]
    readinessProbe: {httpGet: {path: /healthz, port: 3000}, periodSeconds: 1}
`)
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + address + ":18080/healthz")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("got %s", resp.Status)
	}
}
