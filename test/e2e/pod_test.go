//go:build linux

package e2e_test

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/test/criclient"
	"github.com/cri-vz/cri-vz/test/images"
)

// pod is a pod sandbox of a test, and the daemon that it belongs to.
type pod struct {
	*node
	cri    *criclient.Pod
	id     string
	config *runtimeapi.PodSandboxConfig
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
	return n.runPodWith(ctx, cfg, "")
}

func (n *node) runPodWith(ctx context.Context, cfg *runtimeapi.PodSandboxConfig, handler string) (*pod, error) {
	boots.Add(1)
	p, err := n.cri.RunPod(ctx, cfg, handler)
	if err != nil {
		return nil, err
	}
	return &pod{node: n, cri: p, id: p.ID, config: cfg}, nil
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

func (p *pod) remove(t *testing.T) { t.Helper(); p.cri.Remove(t) }

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

func pull(n *node, ref string) error { return n.cri.Pull(ref) }

// What tests say of pods and containers is criclient's.
type option = criclient.Option

var (
	timeout    = criclient.Timeout
	eventually = criclient.Eventually
	wantError  = criclient.WantError
	wantCount  = criclient.WantCount
	waitForLog = criclient.WaitForLog
	command    = criclient.Command
	security   = criclient.Security
	mount      = criclient.Mount
	asRoot     = option(criclient.AsRoot)
	privileged = option(criclient.Privileged)
	freshLog   = option(criclient.FreshLog)
	boots      atomic.Int64 // the VMs that tests started (T46)
)

func (p *pod) createContext(ctx context.Context, name string, options ...option) (string, error) {
	if err := p.withImage(); err != nil {
		return "", err
	}
	return p.cri.CreateContext(ctx, name, options...)
}

func (p *pod) createAndStart(ctx context.Context, name string, options ...option) (string, error) {
	if err := p.withImage(); err != nil {
		return "", err
	}
	return p.cri.CreateAndStart(ctx, name, options...)
}

// withImage makes sure that the daemon has the test image.
func (p *pod) withImage() (err error) {
	p.cri.Image, err = webImage()
	return err
}

func (p *pod) create(t *testing.T, name string, options ...option) string {
	t.Helper()
	if err := p.withImage(); err != nil {
		t.Fatal(err)
	}
	return p.cri.Create(t, name, options...)
}

func (p *pod) start(t *testing.T, name string, options ...option) string {
	t.Helper()
	id := p.create(t, name, options...)
	p.startContainer(t, id)
	return id
}

func (p *pod) run(t *testing.T, name string, options ...option) result {
	t.Helper()
	if err := p.withImage(); err != nil {
		t.Fatal(err)
	}
	return resultOf(p.cri.Run(t, name, options...))
}

func (n *node) removeContainer(t *testing.T, id string) { t.Helper(); n.cri.RemoveByID(t, id) }

func (n *node) startContainer(t *testing.T, id string) { t.Helper(); n.cri.StartByID(t, id) }

func (n *node) container(t *testing.T, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	return n.cri.Container(t, id)
}

func (n *node) sandbox(t *testing.T, id string) *runtimeapi.PodSandboxStatus {
	t.Helper()
	return n.cri.Sandbox(t, id)
}

func (n *node) waitExit(t *testing.T, id string, bound time.Duration) *runtimeapi.ContainerStatus {
	t.Helper()
	return n.cri.WaitExit(t, id, bound)
}

// result is what a command in a container did.
type result struct {
	stdout, stderr string
	code           int32
}

func resultOf(r criclient.Result) result { return result{r.Stdout, r.Stderr, r.Code} }

func (n *node) exec(t *testing.T, id string, args ...string) result {
	t.Helper()
	return resultOf(n.cri.Do(t, id, args...))
}

func (n *node) output(t *testing.T, id string, args ...string) string {
	t.Helper()
	return n.cri.Output(t, id, args...)
}

func readLog(t *testing.T, path string) result {
	t.Helper()
	return resultOf(criclient.ReadLog(t, path))
}
