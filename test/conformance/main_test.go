//go:build linux

package conformance_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
	"github.com/cri-vz/cri-vz/test/images"
	"github.com/cri-vz/cri-vz/test/testnode"
)

// suite is what all tests share.
var suite struct {
	*cri.Client
	base     string           // private directory
	registry string           // host:port
	daemon   *testnode.Daemon // nil if the runtime is not ours to restart
}

func TestMain(m *testing.M) {
	flag.Parse()
	if l := flag.Lookup("test.list"); l != nil && l.Value.String() != "" {
		os.Exit(m.Run())
	}
	var code int
	var err error
	if socket := os.Getenv("CRI_SOCKET"); socket != "" {
		code, err = against(m, socket)
	} else {
		code, err = testnode.Run("cvc", func(base string) (int, error) { return withDaemon(m, base) })
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// against runs the tests with a runtime that is there.
func against(m *testing.M, socket string) (code int, err error) {
	base, err := os.MkdirTemp("/tmp", "cvc")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(base)
	if suite.Client, err = cri.Dial(socket); err != nil {
		return 1, err
	}
	return run(m, base)
}

// withDaemon runs the tests with a daemon of their own, and judges what it leaves.
func withDaemon(m *testing.M, base string) (code int, err error) {
	bin, err := testnode.BuildBinary(base)
	if err != nil {
		return 1, err
	}
	guests, settings, err := platform(bin, base)
	if err != nil {
		return 1, err
	}
	d, err := testnode.NewDaemon(bin, filepath.Join(base, "daemon"), guests, settings...)
	if err != nil {
		return 1, err
	}
	if err := d.Start(); err != nil {
		return 1, err
	}
	if suite.Client, err = cri.Dial(d.Socket); err != nil {
		return 1, err
	}
	suite.daemon = d
	code, err = run(m, base)
	if code != 0 || err != nil {
		d.PrintLog(os.Stderr, 25)
	}
	err = errors.Join(err, settle(d), d.Leftovers(), d.Stop(), suite.Close())
	for _, p := range d.Processes() {
		err = errors.Join(err, fmt.Errorf("process %d is left: %.200s", p.PID, p.Command))
	}
	return code, err
}

// run runs the tests; afterwards the runtime has the objects that it had before.
func run(m *testing.M, base string) (code int, err error) {
	began := time.Now()
	suite.base = base
	if suite.registry, err = images.Serve(); err != nil {
		return 1, err
	}
	http.DefaultTransport.(*http.Transport).Proxy = nil
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	before, err := objects(ctx)
	if err != nil {
		return 1, err
	}
	prepared := time.Since(began)
	code = m.Run()
	for _, p := range pods {
		if _, err := suite.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
			return 1, err
		}
		if _, err := suite.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
			return 1, err
		}
	}
	after, err := objects(ctx)
	if err == nil && !slices.Equal(before, after) {
		err = fmt.Errorf("pods and containers after the tests: %v, before: %v", after, before)
	}
	fmt.Printf("conformance: %d boots, %.0f s (of which %.0f s to prepare)\n", suite.Boots(), time.Since(began).Seconds(), prepared.Seconds())
	return code, err
}

// objects lists the ids of all pods and containers.
func objects(ctx context.Context) ([]string, error) {
	var ids []string
	p, err := suite.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	for _, i := range p.GetItems() {
		ids = append(ids, "pod "+i.GetId())
	}
	c, err := suite.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	for _, i := range c.GetContainers() {
		ids = append(ids, "container "+i.GetId())
	}
	slices.Sort(ids)
	return ids, nil
}

// podConfig is a pod of that name with a log directory of its own.
func podConfig(name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "conformance", Uid: "uid-" + name},
		Hostname:     name,
		LogDirectory: filepath.Join(suite.base, "logs", name),
		Labels:       map[string]string{"suite": "conformance", "pod": name},
		Annotations:  map[string]string{"example.org/why": "test"},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{}},
		},
	}
}

// newPod runs a pod for one test.
func newPod(t *testing.T, cfg *runtimeapi.PodSandboxConfig) *cri.Pod {
	t.Helper()
	p, err := runPod(t.Context(), cfg)
	if err != nil {
		t.Fatalf("run pod %s: %v", cfg.GetMetadata().GetName(), err)
	}
	t.Cleanup(func() { p.Remove(t) })
	return p
}

func runPod(ctx context.Context, cfg *runtimeapi.PodSandboxConfig) (*cri.Pod, error) {
	image, err := testImage()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.GetLogDirectory(), 0o755); err != nil { // as the kubelet does
		return nil, err
	}
	p, err := suite.RunPod(ctx, cfg, "")
	if err == nil {
		p.Image = image
	}
	return p, err
}

// sharedPod is a pod for the containers of many tests, so that one boot serves
// them. With it comes a container that runs as root and does nothing.
type sharedPod struct {
	*cri.Pod
	Idle string // container id
}

// pods are the shared pods by name; they live until the suite ends.
var pods = map[string]*sharedPod{}

// shared is the shared pod with that mode of its pid namespace.
func shared(t *testing.T, pid runtimeapi.NamespaceMode) *sharedPod {
	t.Helper()
	name := "shared-" + strings.ToLower(pid.String())
	if p := pods[name]; p != nil {
		return p
	}
	cfg := podConfig(name)
	cfg.Linux.SecurityContext.NamespaceOptions.Pid = pid
	cfg.Linux.SecurityContext.Privileged = true // a privileged container's pod says so, too
	cfg.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "99"}
	cfg.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"192.0.2.53"}, Searches: []string{"example.test"}, Options: []string{"ndots:3"}}
	p, err := runPod(context.Background(), cfg)
	if err != nil {
		t.Fatalf("run the %s pod: %v", name, err)
	}
	s := &sharedPod{Pod: p}
	pods[name] = s
	if s.Idle, err = p.CreateAndStart(context.Background(), "idle", cri.AsRoot, cri.Command("/bin/sleep", "infinity")); err != nil {
		t.Fatalf("start the idle container of the %s pod: %v", name, err)
	}
	return s
}

// sharedPodOf is the shared pod whose containers share a pid namespace.
func sharedPodOf(t *testing.T) *sharedPod { t.Helper(); return shared(t, runtimeapi.NamespaceMode_POD) }

// testImage is the tag of the test image, pushed to the registry and pulled.
var testImage = sync.OnceValues(func() (string, error) {
	img, err := webServer()
	if err != nil {
		return "", err
	}
	ref, _, err := push("web:latest", img)
	if err != nil {
		return "", err
	}
	return ref, suite.Pull(ref)
})

func webServer() (v1.Image, error) {
	dir := filepath.Join(suite.base, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return images.WebServer(dir, runtime.GOARCH)
}

// variant is the test image with an id and a config of its own.
func variant(name string, change func(*v1.Config)) (v1.Image, error) {
	img, err := webServer()
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg := cf.DeepCopy().Config
	cfg.Labels = maps.Clone(cfg.Labels)
	cfg.Labels["variant"] = name
	if change != nil {
		change(&cfg)
	}
	return mutate.Config(img, cfg)
}

// push puts an image into the registry and returns its names by tag and by digest.
func push(repoTag string, img v1.Image) (tag, digest string, err error) {
	ref, err := name.ParseReference(suite.registry + "/conformance/" + repoTag)
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

// imageOf pushes and pulls a variant of the test image for one test.
func imageOf(t *testing.T, repoTag string, change func(*v1.Config)) (tag, digest string) {
	t.Helper()
	img, err := variant(repoTag, change)
	if err != nil {
		t.Fatal(err)
	}
	if tag, digest, err = push(repoTag, img); err != nil {
		t.Fatal(err)
	}
	if err := suite.Pull(tag); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := suite.Images.RemoveImage(cri.Timeout(t, cri.CallTimeout), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: tag}}); err != nil {
			t.Error(err)
		}
	})
	return tag, digest
}

// directory makes a directory on the host for one test, which pods may write to.
func directory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(suite.base, "volume-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err) // something is still mounted, perhaps
		}
	})
	return dir
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
