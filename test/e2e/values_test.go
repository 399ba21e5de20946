//go:build linux

package e2e_test

import (
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/test/streamclient"
)

// A variable's value is bytes, in the container's own process and in an exec.
func TestEnvironmentOfBytes(t *testing.T) {
	p := sharedPodOf(t)
	value := "caf\xe9 \xff=\"\n"
	ownPid := security(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
	})
	id := p.start(t, "bytes", ownPid, command("/bin/sleep", "infinity"), func(c *runtimeapi.ContainerConfig) {
		c.Envs = []*runtimeapi.KeyValue{{Key: "BYTES", Value: []byte(value)}, {Key: "TEXT", Value: []byte("é")}}
	})
	for name, out := range map[string]string{
		"process": p.output(t, id, "/bin/cat", "/proc/1/environ"), "exec": p.output(t, id, "/bin/cat", "/proc/self/environ"),
	} {
		if vars := strings.Split(out, "\x00"); !slices.Contains(vars, "BYTES="+value) || !slices.Contains(vars, "TEXT=é") {
			t.Errorf("%s: environment %q", name, vars)
		}
	}
}

// A stop begins with the request's signal, else with the image's.
func TestStopSignals(t *testing.T) {
	p := sharedPodOf(t)
	img, err := variant("sighup")
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.Config.StopSignal = "SIGHUP"
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		image  v1.Image
		signal runtimeapi.Signal
		code   int32
	}{
		{"default", nil, runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT, 128 + 15},
		{"image", img, runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT, 128 + 1},
		{"request", img, runtimeapi.Signal_SIGNAL_SIGINT, 128 + 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			options := []option{command("/bin/sleep", "infinity"), func(cfg *runtimeapi.ContainerConfig) { cfg.StopSignal = c.signal }}
			if c.image != nil {
				ref, _, err := push("sighup:latest", c.image)
				if err != nil {
					t.Fatal(err)
				}
				if err := pull(suite.node, ref); err != nil {
					t.Fatal(err)
				}
				options = append(options, func(cfg *runtimeapi.ContainerConfig) { cfg.Image = &runtimeapi.ImageSpec{Image: ref} })
			}
			id := p.start(t, "signal-"+c.name, options...)
			if got := p.container(t, id).GetStopSignal(); c.signal != 0 && got != c.signal {
				t.Errorf("status: stop signal %v", got)
			}
			began := time.Now()
			if _, err := p.StopContainer(timeout(t, callTimeout), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 20}); err != nil {
				t.Fatal(err)
			}
			if st := p.container(t, id); st.GetExitCode() != c.code || time.Since(began) > 10*time.Second {
				t.Errorf("exit code %d after %v, want %d", st.GetExitCode(), time.Since(began), c.code)
			}
		})
	}
}

// A container's terminal has a name that is that terminal's, for its own process
// and for an exec.
func TestTerminalsHaveNames(t *testing.T) {
	p := sharedPodOf(t)
	id := p.start(t, "named-tty", command("/app/web", "tty"), func(c *runtimeapi.ContainerConfig) { c.Tty = true })
	st := p.waitExit(t, id, 30*time.Second)
	if log := readLog(t, st.GetLogPath()); st.GetExitCode() != 0 || strings.TrimSpace(log.stdout) != "/dev/pts/0" {
		t.Errorf("exit code %d, log %+v", st.GetExitCode(), log)
	}
	r, err := p.Exec(timeout(t, callTimeout), &runtimeapi.ExecRequest{ContainerId: p.idle, Cmd: []string{"/app/web", "tty"}, Stdin: true, Stdout: true, Tty: true})
	if err != nil {
		t.Fatal(err)
	}
	s, err := streamclient.WebSocket(r.GetUrl(), streamclient.Options{Stdin: true, Stdout: true, TTY: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	out := make(chan string, 1)
	go func() { b, _ := io.ReadAll(s.Stdout); out <- string(b) }()
	if code, err := s.ExitCode(); code != 0 || err != nil {
		t.Errorf("exit code %d, %v", code, err)
	}
	if name := strings.TrimSpace(<-out); !strings.HasPrefix(name, "/dev/pts/") {
		t.Errorf("an exec's terminal is %q", name)
	}
}
