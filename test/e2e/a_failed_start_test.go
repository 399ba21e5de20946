//go:build linux

package e2e_test

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/guest/image"
)

// A start that fails leaves nothing, says why, and the next one works without
// any restart: the first fault of the proof of concept.
func TestStartAfterFailedStart(t *testing.T) {
	n := suite.node
	g, err := image.Locate(suite.guests, runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, file string
		words      []string
		console    string
	}{
		// T7: the VM dies at once; the error quotes the console's last lines.
		{"initramfs of zeros", g.InitrdPath, []string{"panic"}, "panic"},
		{"kernel of zeros", g.KernelPath, []string{"kernel"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			damage(t, c.file)
			began := time.Now()
			p, err := n.runPod(t.Context(), podConfig(n, "failed"))
			if err == nil {
				p.remove(t)
				t.Fatal("RunPodSandbox succeeded")
			}
			t.Logf("failed after %.1f s: %v", time.Since(began).Seconds(), err)
			for _, w := range c.words {
				if !bytes.Contains(bytes.ToLower([]byte(status.Convert(err).Message())), []byte(w)) {
					t.Errorf("the error does not mention %q: %v", w, err)
				}
			}
			if c.console != "" {
				if out, err := n.cli("console", "failed").CombinedOutput(); err != nil || !bytes.Contains(out, []byte(c.console)) {
					t.Errorf("console of a pod that failed to start: %v: %.500s", err, out)
				}
			}
		})
	}
	r, err := n.ListPodSandbox(timeout(t, callTimeout), &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.GetItems()) != 0 {
		t.Errorf("failed starts left %d pods: %v", len(r.GetItems()), r.GetItems())
	}
	if err := n.leftovers(); err != nil {
		t.Error(err)
	}
	sharedPodOf(t)
}

// damage replaces a file's content by zeros until the test ends.
func damage(t *testing.T, path string) {
	t.Helper()
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	replace := func(b []byte) {
		tmp := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(tmp, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, path); err != nil {
			t.Fatal(err)
		}
	}
	replace(make([]byte, len(good)))
	t.Cleanup(func() { replace(good) })
}
