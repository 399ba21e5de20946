//go:build linux

package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/test/images"
)

// boots counts the VMs that tests started (T46).
var boots atomic.Int64

// pod is a pod sandbox of a test.
type pod struct {
	*node
	id     string
	config *runtimeapi.PodSandboxConfig
}

func timeout(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// podConfig is a pod of that name; its logs are kept below the node's directory.
func podConfig(n *node, name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "e2e", Uid: "uid-" + name},
		Hostname:     name,
		LogDirectory: filepath.Join(n.dir, "logs", name),
		Labels:       map[string]string{"suite": "e2e", "pod": name},
		Annotations:  map[string]string{"example.org/why": "test"},
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"192.0.2.53"}, Searches: []string{"example.test"}, Options: []string{"ndots:3"}},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			Sysctls:         map[string]string{"kernel.shm_rmid_forced": "1"},
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{}},
		},
	}
}

func (n *node) runPod(ctx context.Context, cfg *runtimeapi.PodSandboxConfig) (*pod, error) {
	boots.Add(1)
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r, err := n.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		return nil, err
	}
	return &pod{node: n, id: r.GetPodSandboxId(), config: cfg}, nil
}

// newPod runs a pod for one test.
func newPod(t *testing.T, cfg *runtimeapi.PodSandboxConfig) *pod {
	t.Helper()
	p, err := suite.node.runPod(t.Context(), cfg)
	if err != nil {
		t.Fatalf("run pod %s: %v", cfg.GetMetadata().GetName(), err)
	}
	t.Cleanup(func() { p.remove(t) })
	return p
}

func (p *pod) remove(t *testing.T) {
	t.Helper()
	ctx := timeout(t, callTimeout)
	if _, err := p.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Errorf("stop pod %s: %v", p.config.GetMetadata().GetName(), err)
	}
	if _, err := p.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Errorf("remove pod %s: %v", p.config.GetMetadata().GetName(), err)
	}
}

// shared is the pod that most tests put their containers into, so that one boot
// serves them; it lives until the suite ends. With it comes a container that
// runs as root and does nothing.
var shared = sync.OnceValues(func() (*sharedPod, error) {
	p, err := suite.node.runPod(context.Background(), podConfig(suite.node, "shared"))
	if err != nil {
		return nil, fmt.Errorf("run the shared pod: %w", err)
	}
	if _, err := webImage(); err != nil {
		return nil, err
	}
	id, err := p.createAndStart(context.Background(), "idle", asRoot, command("/bin/sleep", "infinity"))
	if err != nil {
		return nil, fmt.Errorf("start the idle container: %w", err)
	}
	return &sharedPod{p, id}, nil
})

type sharedPod struct {
	*pod
	idle string // container id
}

func sharedPodOf(t *testing.T) *sharedPod {
	t.Helper()
	p, err := shared()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// webImage is the tag of the test image, pushed to the registry and pulled.
var webImage = sync.OnceValues(func() (string, error) {
	img, err := images.WebServer(suite.images, runtime.GOARCH)
	if err != nil {
		return "", err
	}
	ref, _, err := push("web:latest", img)
	if err != nil {
		return "", err
	}
	return ref, pull(suite.node, ref)
})

// variant is the test image with an id of its own: removing an image by one name
// removes all its names.
func variant(name string) (v1.Image, error) {
	img, err := images.WebServer(suite.images, runtime.GOARCH)
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg := cf.DeepCopy().Config
	cfg.Labels["variant"] = name
	return mutate.Config(img, cfg)
}

// push puts an image into the node's registry and returns its names by tag and
// by digest.
func push(repoTag string, img v1.Image) (tag, digest string, err error) {
	ref, err := name.ParseReference(suite.registry + "/e2e/" + repoTag)
	if err != nil {
		return "", "", err
	}
	if err := remote.Write(ref, img); err != nil {
		return "", "", fmt.Errorf("push %s: %w", ref, err)
	}
	h, err := img.Digest()
	if err != nil {
		return "", "", err
	}
	return ref.String(), ref.Context().Digest(h.String()).String(), nil
}

func pull(n *node, ref string) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if _, err := n.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}}); err != nil {
		return fmt.Errorf("pull %s: %w", ref, err)
	}
	return nil
}

type option func(*runtimeapi.ContainerConfig)

func command(args ...string) option {
	return func(c *runtimeapi.ContainerConfig) { c.Command = args }
}

func security(f func(*runtimeapi.LinuxContainerSecurityContext)) option {
	return func(c *runtimeapi.ContainerConfig) { f(c.Linux.SecurityContext) }
}

var asRoot = security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = &runtimeapi.Int64Value{} })

var privileged = security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.Privileged = true })

func mount(m *runtimeapi.Mount) option {
	return func(c *runtimeapi.ContainerConfig) { c.Mounts = append(c.Mounts, m) }
}

func (p *pod) containerConfig(name string, options ...option) (*runtimeapi.ContainerConfig, error) {
	ref, err := webImage()
	if err != nil {
		return nil, err
	}
	c := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: ref},
		LogPath:  name + ".log",
		Labels:   map[string]string{"container": name},
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			// A container's namespaces are as its pod's unless it says otherwise.
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: p.config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid()},
		}},
	}
	for _, o := range options {
		o(c)
	}
	return c, nil
}

func (p *pod) createContext(ctx context.Context, name string, options ...option) (string, error) {
	c, err := p.containerConfig(name, options...)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r, err := p.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, Config: c, SandboxConfig: p.config})
	return r.GetContainerId(), err
}

func (p *pod) createAndStart(ctx context.Context, name string, options ...option) (string, error) {
	id, err := p.createContext(ctx, name, options...)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err = p.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	return id, err
}

// create makes a container for one test.
func (p *pod) create(t *testing.T, name string, options ...option) string {
	t.Helper()
	id, err := p.createContext(t.Context(), name, options...)
	if err != nil {
		t.Fatalf("create container %s: %v", name, err)
	}
	t.Cleanup(func() { p.removeContainer(t, id) })
	return id
}

func (p *pod) removeContainer(t *testing.T, id string) {
	t.Helper()
	if _, err := p.RemoveContainer(timeout(t, callTimeout), &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		t.Errorf("remove container %.12s: %v", id, err)
	}
}

// start makes and starts a container for one test.
func (p *pod) start(t *testing.T, name string, options ...option) string {
	t.Helper()
	id := p.create(t, name, options...)
	p.startContainer(t, id)
	return id
}

func (p *pod) startContainer(t *testing.T, id string) {
	t.Helper()
	if _, err := p.StartContainer(timeout(t, callTimeout), &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		t.Fatalf("start container %.12s: %v", id, err)
	}
}

func (n *node) container(t *testing.T, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	r, err := n.ContainerStatus(timeout(t, callTimeout), &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatalf("status of container %.12s: %v", id, err)
	}
	return r.GetStatus()
}

func (n *node) sandbox(t *testing.T, id string) *runtimeapi.PodSandboxStatus {
	t.Helper()
	r, err := n.PodSandboxStatus(timeout(t, callTimeout), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		t.Fatalf("status of pod %.12s: %v", id, err)
	}
	return r.GetStatus()
}

// waitExit waits until a container has ended.
func (n *node) waitExit(t *testing.T, id string, bound time.Duration) *runtimeapi.ContainerStatus {
	t.Helper()
	var st *runtimeapi.ContainerStatus
	eventually(t, bound, "end of container "+id[:12], func() error {
		if st = n.container(t, id); st.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("it is %v", st.GetState())
		}
		return nil
	})
	return st
}

// result is what a command in a container did.
type result struct {
	stdout, stderr string
	code           int32
}

// run runs a container to its end.
func (p *pod) run(t *testing.T, name string, options ...option) result {
	t.Helper()
	id := p.start(t, name, options...)
	st := p.waitExit(t, id, 30*time.Second)
	r := readLog(t, st.GetLogPath())
	r.code = st.GetExitCode()
	return r
}

// exec is ExecSync.
func (n *node) exec(t *testing.T, id string, args ...string) result {
	t.Helper()
	r, err := n.ExecSync(timeout(t, callTimeout), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: args, Timeout: 60})
	if err != nil {
		t.Fatalf("exec %q: %v", args, err)
	}
	return result{string(r.GetStdout()), string(r.GetStderr()), r.GetExitCode()}
}

// output is the standard output of a command that must succeed.
func (n *node) output(t *testing.T, id string, args ...string) string {
	t.Helper()
	r := n.exec(t, id, args...)
	if r.code != 0 || r.stderr != "" {
		t.Fatalf("exec %q: exit code %d: %s", args, r.code, r.stderr)
	}
	return r.stdout
}

var logLine = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(Z|[+-]\d\d:\d\d) (stdout|stderr) ([PF]) (.*)$`)

// readLog reads a log in the CRI's format.
func readLog(t *testing.T, path string) result {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out, errs strings.Builder
	for line := range strings.Lines(string(b)) {
		m := logLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			t.Fatalf("%s: not a line of the CRI's log format: %.100q", path, line)
		}
		var w io.StringWriter = &out
		if m[2] == "stderr" {
			w = &errs
		}
		end := "\n"
		if m[3] == "P" {
			end = ""
		}
		_, _ = w.WriteString(m[4] + end)
	}
	return result{stdout: out.String(), stderr: errs.String()}
}

// eventually polls until check succeeds.
func eventually(t *testing.T, bound time.Duration, what string, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(bound); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("waited %v for %s: %v", bound, what, err)
}

// wantError checks an error's code and that its text has all words.
func wantError(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	switch {
	case err == nil:
		t.Errorf("no error, want %v with %q", code, words)
		return
	case errors.Is(err, context.DeadlineExceeded):
		t.Errorf("the call did not end: %v", err)
		return
	}
	s := status.Convert(err)
	if s.Code() != code {
		t.Errorf("code %v, want %v: %v", s.Code(), code, s.Message())
	}
	for _, w := range words {
		if !strings.Contains(s.Message(), w) {
			t.Errorf("the error does not say %q: %v", w, s.Message())
		}
	}
}
