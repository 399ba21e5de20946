//go:build linux

package e2e_test

import (
	"testing"
	"time"
)

// A container without a limit meets the VM's own; the agent lives on (T25).
func TestOutOfMemoryInTheWholeVM(t *testing.T) {
	p := sharedPodOf(t)
	id := p.start(t, "oom-vm", command("/bin/oom"))
	st := p.waitExit(t, id, 60*time.Second)
	if st.GetExitCode() != 137 {
		t.Errorf("%v", st)
	}
	if got := p.output(t, p.idle, "/bin/echo", "alive"); got != "alive\n" {
		t.Errorf("%q", got)
	}
}
