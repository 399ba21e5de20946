//go:build linux

package conformance_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

func TestLog(t *testing.T) {
	p := sharedPodOf(t)
	t.Run("both streams are in it, told apart", func(t *testing.T) {
		r := p.Run(t, "log-both", cri.Command("/bin/cat", "/etc/hostname", "/nothing"))
		if r.Stdout != p.Config.GetHostname()+"\n" || !strings.Contains(r.Stderr, "/nothing") {
			t.Errorf("%+v", r)
		}
	})
	t.Run("a long line comes in parts", func(t *testing.T) {
		id := p.Start(t, "log-long", cri.Command("/bin/long", "50000"))
		st := p.WaitExit(t, id, 10*time.Second)
		if r := cri.ReadLog(t, st.GetLogPath()); r.Stdout != strings.Repeat("x", 50000)+"\n" {
			t.Errorf("%d bytes", len(r.Stdout))
		}
		b, err := os.ReadFile(st.GetLogPath())
		if err != nil {
			t.Fatal(err)
		}
		if parts := strings.Count(string(b), " P "); parts < 3 {
			t.Errorf("%d partial lines", parts)
		}
		if want := filepath.Join(p.Config.GetLogDirectory(), "log-long.log"); st.GetLogPath() != want {
			t.Errorf("log path %s, want %s", st.GetLogPath(), want)
		}
	})
	t.Run("ReopenContainerLog returns with the new file", func(t *testing.T) {
		id := p.Start(t, "log-reopen", cri.Command("/bin/count", "200", "10ms"))
		path := p.Container(t, id).GetLogPath()
		cri.WaitForLog(t, path, "line 20\n")
		old := path + ".1"
		if err := os.Rename(path, old); err != nil {
			t.Fatal(err)
		}
		if _, err := p.ReopenContainerLog(cri.Timeout(t, cri.CallTimeout), &runtimeapi.ReopenContainerLogRequest{ContainerId: id}); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Errorf("when ReopenContainerLog returned: %v", err)
		}
		before, err := os.ReadFile(old)
		if err != nil {
			t.Fatal(err)
		}
		p.WaitExit(t, id, 10*time.Second)
		if after, err := os.ReadFile(old); err != nil || string(after) != string(before) {
			t.Errorf("the old log was written to after ReopenContainerLog returned (%v)", err)
		}
		cri.WantCount(t, cri.ReadLog(t, old).Stdout+cri.ReadLog(t, path).Stdout, 200)
	})
}
