//go:build linux

package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestLog(t *testing.T) {
	p := sharedPodOf(t)
	t.Run("streams", func(t *testing.T) {
		r := p.run(t, "log-both", command("/bin/cat", "/etc/hostname", "/nothing"))
		if r.stdout != "shared\n" || !strings.Contains(r.stderr, "/nothing") {
			t.Errorf("%+v", r)
		}
	})
	t.Run("a long line comes in parts", func(t *testing.T) {
		id := p.start(t, "log-long", command("/bin/long", "50000"))
		st := p.waitExit(t, id, 10*time.Second)
		if r := readLog(t, st.GetLogPath()); r.stdout != strings.Repeat("x", 50000)+"\n" {
			t.Errorf("%d bytes", len(r.stdout))
		}
		b, err := os.ReadFile(st.GetLogPath())
		if err != nil {
			t.Fatal(err)
		}
		if parts := strings.Count(string(b), " P "); parts < 3 {
			t.Errorf("%d partial lines", parts)
		}
		if want := filepath.Join(p.config.GetLogDirectory(), "log-long.log"); st.GetLogPath() != want {
			t.Errorf("log path %s, want %s", st.GetLogPath(), want)
		}
	})
	t.Run("reopen", func(t *testing.T) {
		id := p.start(t, "log-reopen", command("/bin/count", "200", "10ms"))
		path := p.container(t, id).GetLogPath()
		waitForLog(t, path, "line 20\n")
		old := path + ".1"
		if err := os.Rename(path, old); err != nil {
			t.Fatal(err)
		}
		if _, err := p.ReopenContainerLog(timeout(t, callTimeout), &runtimeapi.ReopenContainerLogRequest{ContainerId: id}); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Errorf("when ReopenContainerLog returned: %v", err)
		}
		before, err := os.ReadFile(old)
		if err != nil {
			t.Fatal(err)
		}
		p.waitExit(t, id, 10*time.Second)
		if after, err := os.ReadFile(old); err != nil || string(after) != string(before) {
			t.Errorf("the old log was written to after ReopenContainerLog returned (%v)", err)
		}
		wantCount(t, readLog(t, old).stdout+readLog(t, path).stdout, 200)
	})
}

// wantCount checks that every line of `count` came once and in order.
func wantCount(t *testing.T, got string, n int) {
	t.Helper()
	var want strings.Builder
	for i := range n {
		fmt.Fprintf(&want, "line %d\n", i+1)
	}
	if got != want.String() {
		g, w := strings.Split(got, "\n"), strings.Split(want.String(), "\n")
		for i := range min(len(g), len(w)) {
			if g[i] != w[i] {
				t.Errorf("line %d of %d is %q, want %q", i+1, len(g)-1, g[i], w[i])
				return
			}
		}
		t.Errorf("%d lines, want %d", len(g)-1, n)
	}
}
