//go:build linux

package e2e_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/test/images"
)

// The journey of a user without Kubernetes: `cri-vz run` of an archive, a look
// at it with the other commands, Ctrl-C.
func TestRun(t *testing.T) {
	n := suite.node
	img, err := variant("run")
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(suite.base, "app.tar.gz")
	if err := images.SaveDockerArchive(archive, "docker.io/library/app:1", img); err != nil {
		t.Fatal(err)
	}
	t.Run("port in use", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		port := l.Addr().(*net.TCPAddr).Port
		out, err := n.cli("run", archive, "-p", fmt.Sprintf("%d:3000", port)).CombinedOutput()
		if err == nil || !strings.Contains(string(out), fmt.Sprintf("port %d", port)) || !strings.Contains(string(out), "in use") {
			t.Errorf("%v: %s", err, out)
		}
		if r, err := n.images.ImageStatus(timeout(t, callTimeout), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: "docker.io/library/app:1"}}); err != nil || r.GetImage() != nil {
			t.Errorf("it loaded the image first: %v, %v", r, err)
		}
	})

	t.Run("no such file", func(t *testing.T) {
		out, err := n.cli("run", "./nosuch.tar.gz").CombinedOutput()
		if err == nil || !strings.Contains(string(out), "no such file") {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("pull", func(t *testing.T) {
		ref, err := webImage()
		if err != nil {
			t.Fatal(err)
		}
		r, err := n.images.ImageStatus(timeout(t, callTimeout), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
		if err != nil {
			t.Fatal(err)
		}
		out, err := n.cli("image", "pull", ref).CombinedOutput()
		if want := strings.TrimPrefix(r.GetImage().GetId(), "sha256:"); err != nil || want == "" || string(out) != want[:12]+"\n" {
			t.Errorf("%v: %s, want the image's id %s", err, out, want)
		}
		if out, err := n.cli("image", "pull", suite.registry+"/no/such:image").CombinedOutput(); err == nil || !strings.Contains(string(out), "/no/such:image") {
			t.Errorf("%v: %s", err, out)
		}
	})

	boots.Add(1)
	cmd := n.cli("run", archive, "-p", "3000:3000", "--name", "app")
	out := startRecorded(t, cmd)
	// The third fault of the proof of concept: the first connection works, even
	// while nothing listens yet, because the port is the command line's.
	eventually(t, 30*time.Second, "port 3000 to be open", func() error {
		c, err := net.DialTimeout("tcp", "127.0.0.1:3000", time.Second)
		if err == nil {
			c.Close()
		}
		return err
	})
	answer, err := (func() (string, error) {
		for deadline := time.Now().Add(30 * time.Second); ; {
			got, err := get("http://127.0.0.1:3000/")
			var ne net.Error
			if err == nil || time.Now().After(deadline) || !errors.As(err, &ne) || !ne.Timeout() {
				return got, err
			}
		}
	})()
	if err != nil || answer != "hello from app\n" {
		t.Errorf("the first request: %q, %v\n%s", answer, err, out.String())
	}
	for _, step := range []string{"image", "network", "start container"} {
		if !strings.Contains(out.String(), step) {
			t.Errorf("no step %q in the output:\n%s", step, out.String())
		}
	}

	ps, err := n.cli("ps", "-o", "json").Output()
	if err != nil {
		t.Errorf("ps: %v", err)
	}
	var pods []struct {
		Name, State, IP string
		Containers      []struct{ Name, State string }
	}
	if err := json.Unmarshal(ps, &pods); err != nil {
		t.Fatalf("ps: %v: %s", err, ps)
	}
	found := false
	for _, p := range pods {
		found = found || p.Name == "app" && p.State == "ready" && p.IP != "" && len(p.Containers) == 1 && p.Containers[0].State == "running"
	}
	if !found {
		t.Errorf("ps does not show it: %s", ps)
	}
	if table, err := n.cli("ps").Output(); err != nil || !strings.Contains(string(table), "app") {
		t.Errorf("ps: %v: %s", err, table)
	}
	if got, err := n.cli("exec", "app", "/bin/id").Output(); err != nil || !strings.HasPrefix(string(got), "uid=1000") {
		t.Errorf("exec: %q, %v", got, err)
	}
	var exit *exec.ExitError
	if err := n.cli("exec", "app", "/bin/exit", "9").Run(); !errors.As(err, &exit) || exit.ExitCode() != 9 {
		t.Errorf("exec's exit status: %v", err)
	}
	for path, want := range map[string]int{"/no/such/command": 127, "/etc/passwd": 126} {
		out, err := n.cli("exec", "app", path).CombinedOutput()
		if !errors.As(err, &exit) || exit.ExitCode() != want || !strings.Contains(string(out), path) {
			t.Errorf("exec of %s: %v: %s, want exit status %d", path, err, out, want)
		}
	}
	in := n.cli("exec", "-i", "app", "/bin/cat")
	in.Stdin = strings.NewReader("through")
	if got, err := in.Output(); err != nil || string(got) != "through" {
		t.Errorf("exec -i: %q, %v", got, err)
	}
	if got, err := n.cli("logs", "app").Output(); err != nil || !strings.Contains(string(got), "listening on") || !strings.Contains(string(got), `GET "/"`) {
		t.Errorf("logs: %q, %v", got, err)
	}
	if got, err := n.cli("console", "app").Output(); err != nil || len(got) == 0 {
		t.Errorf("console: %q, %v", got, err)
	}
	if got, err := n.cli("image", "list", "-o", "json").Output(); err != nil || !json.Valid(got) || strings.Contains(string(got), "null") {
		t.Errorf("image list -o json: %s, %v", got, err)
	}
	if got, err := n.cli("image", "list").Output(); err != nil || !strings.Contains(string(got), "app") {
		t.Errorf("image list: %q, %v", got, err)
	}

	began := time.Now()
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := out.wait(30 * time.Second); err != nil {
		t.Errorf("run after Ctrl-C: %v\n%s", err, out.String())
	}
	t.Logf("Ctrl-C to the end: %v", time.Since(began))
	if r, err := n.ListPodSandbox(timeout(t, callTimeout), &runtimeapi.ListPodSandboxRequest{}); err != nil {
		t.Error(err)
	} else {
		for _, p := range r.GetItems() {
			if p.GetMetadata().GetName() == "app" {
				t.Errorf("the pod is left: %v", p)
			}
		}
	}
	if left := filesBelow(filepath.Join(n.root, "logs")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	boots.Add(1)
	if b, err := n.cli("run", "docker.io/library/app:1", "--name", "ends", "--", "exit", "7").CombinedOutput(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("a container that ends with 7: %v: %s", err, b)
	}
	if b, err := n.cli("ps", "-a").CombinedOutput(); err != nil || strings.Contains(string(b), "ends") {
		t.Errorf("its pod is left: %v: %s", err, b)
	}
	if b, err := n.cli("image", "remove", "docker.io/library/app:1").CombinedOutput(); err != nil || string(b) != "docker.io/library/app:1\n" {
		t.Errorf("image remove: %v: %s", err, b)
	}
	if b, err := n.cli("exec", "app", "/bin/id").CombinedOutput(); err == nil || !strings.Contains(string(b), `"app"`) {
		t.Errorf("exec in what is gone: %v: %s", err, b)
	}
}

// recorded is a running command with its output.
type recorded struct {
	mu   sync.Mutex
	text strings.Builder
	done chan error
}

func (r *recorded) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}

func (r *recorded) wait(bound time.Duration) error {
	select {
	case err := <-r.done:
		return err
	case <-time.After(bound):
		return fmt.Errorf("it did not end within %v", bound)
	}
}

// startRecorded starts cmd, and kills it when the test ends.
func startRecorded(t *testing.T, cmd *exec.Cmd) *recorded {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	rec := &recorded{done: make(chan error, 1)}
	read := make(chan struct{})
	go func() {
		defer close(read)
		lines := bufio.NewReader(r)
		for {
			line, err := lines.ReadString('\n')
			rec.mu.Lock()
			rec.text.WriteString(line)
			rec.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	go func() {
		err := cmd.Wait()
		<-read
		rec.done <- err
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		r.Close()
	})
	return rec
}
