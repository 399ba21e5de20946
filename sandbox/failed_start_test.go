package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A start that failed leaves its console and nothing else; the oldest go first.
func TestConsoleOfAFailedStartIsKept(t *testing.T) {
	p := &Pods{o: Options{Root: t.TempDir()}}
	fail := func(i int, name, console string) bool {
		pod := &Pod{id: fmt.Sprintf("%064x", i), dir: filepath.Join(p.o.Root, "pods", fmt.Sprint(i))}
		pod.rec = &podRecord{ID: pod.id, config: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: name}}}
		if err := os.MkdirAll(pod.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if console != "" {
			if err := os.WriteFile(pod.ConsolePath(), []byte(console), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return p.keepConsole(pod)
	}
	if fail(0, "silent", "") {
		t.Error("a console without a byte was kept")
	}
	if _, err := p.FailedConsole("silent"); !errdefs.IsNotFound(err) {
		t.Errorf("FailedConsole without any: %v", err)
	}
	if !fail(1, "../../etc/x", "panic") {
		t.Fatal("not kept")
	}
	for _, ref := range []string{fmt.Sprintf("%064x", 1), "../../etc/x", strings.Repeat("0", 12)} {
		path, err := p.FailedConsole(ref)
		if err != nil {
			t.Errorf("FailedConsole(%q): %v", ref, err)
			continue
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != "panic" || filepath.Dir(path) != p.failedStarts() {
			t.Errorf("FailedConsole(%q) = %s: %q, %v", ref, path, b, err)
		}
	}
	for i := range 2 * maxFailedStarts {
		fail(100+i, "busy", fmt.Sprint(i))
	}
	kept, err := p.listFailedStarts()
	if err != nil || len(kept) != maxFailedStarts {
		t.Errorf("%d consoles are kept, %v", len(kept), err)
	}
	if path, err := p.FailedConsole("busy"); err != nil {
		t.Error(err)
	} else if b, _ := os.ReadFile(path); string(b) != fmt.Sprint(2*maxFailedStarts-1) {
		t.Errorf("the newest is %q", b)
	}
	if _, err := p.FailedConsole("../../etc/x"); !errdefs.IsNotFound(err) {
		t.Errorf("the oldest is still there: %v", err)
	}
}
