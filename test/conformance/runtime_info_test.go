//go:build linux

package conformance_test

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

func TestRuntimeInfo(t *testing.T) {
	ctx := cri.Timeout(t, cri.CallTimeout)
	t.Run("Version names runtime and API", func(t *testing.T) {
		r, err := suite.Version(ctx, &runtimeapi.VersionRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if r.GetVersion() == "" || r.GetRuntimeName() == "" || r.GetRuntimeVersion() == "" || r.GetRuntimeApiVersion() != "v1" {
			t.Errorf("%v", r)
		}
	})
	t.Run("Status says that runtime and network are ready", func(t *testing.T) {
		r, err := suite.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		ready := map[string]bool{}
		for _, c := range r.GetStatus().GetConditions() {
			ready[c.GetType()] = c.GetStatus()
		}
		if !ready[runtimeapi.RuntimeReady] || !ready[runtimeapi.NetworkReady] {
			t.Errorf("%v", r.GetStatus())
		}
		if len(r.GetInfo()) == 0 {
			t.Error("a verbose status has no info")
		}
		for _, h := range r.GetRuntimeHandlers() {
			if h.GetName() == "" {
				return
			}
		}
		t.Errorf("no default among the runtime handlers %v", r.GetRuntimeHandlers())
	})
	t.Run("RuntimeConfig names a cgroup driver", func(t *testing.T) {
		r, err := suite.RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{})
		if err != nil || r.GetLinux() == nil {
			t.Errorf("%v, %v", r, err)
		}
	})
}
