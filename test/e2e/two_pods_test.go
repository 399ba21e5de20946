//go:build linux

package e2e_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// hack/mac-first-run has a Mac run this script; here it runs with QEMU, in a network
// namespace that the script's daemon has for itself.
func TestTwoPodsScript(t *testing.T) {
	boots.Add(2)
	script, err := filepath.Abs("../../hack/two-pods")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "--net", "--", "sh", "-c", `ip link set lo up && exec "$@"`, "sh", script, suite.bin)
	cmd.Env = append(os.Environ(), "CRI_VZ_CACHE="+suite.guests)
	out, err := cmd.CombinedOutput()
	if err != nil || !regexp.MustCompile(`(?s)FIGURE: two pods at [0-9.]+ and [0-9.]+ in .*FIGURE: this host reached both`).Match(out) {
		t.Errorf("%v: %s", err, out)
	}
}
