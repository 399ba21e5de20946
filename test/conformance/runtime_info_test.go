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
	t.Run("Status says what there is, which other tests use", func(t *testing.T) {
		if suite.daemon == nil {
			t.Skip("a promise of this runtime")
		}
		r, err := suite.Status(ctx, &runtimeapi.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if f := r.GetFeatures(); !f.GetSupplementalGroupsPolicy() || !f.GetMountOptions() {
			t.Errorf("%v", f)
		}
		for _, h := range r.GetRuntimeHandlers() {
			if f := h.GetFeatures(); !f.GetRecursiveReadOnlyMounts() || !f.GetUserNamespaces() {
				t.Errorf("handler %q: %v", h.GetName(), f)
			}
		}
	})
	t.Run("RuntimeConfig names a cgroup driver", func(t *testing.T) {
		r, err := suite.RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{})
		if err != nil || r.GetLinux() == nil {
			t.Errorf("%v, %v", r, err)
		}
	})
}
