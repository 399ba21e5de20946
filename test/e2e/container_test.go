//go:build linux

package e2e_test

import (
	"regexp"
	"testing"
)

// What a process finds that the CRI does not say.
func TestContainerProcess(t *testing.T) {
	p := sharedPodOf(t)
	for _, c := range []struct{ name, file, want string }{
		// Go raises its own soft limit, so that only the hard one is as it was set.
		{"limits", "/proc/self/limits", `Max open files\s+\d+\s+52428[78]\s`},
		{"hosts", "/etc/hosts", `127\.0\.0\.1\s+localhost`},
		{"cgroup namespace", "/proc/self/cgroup", `^0::/\n$`}, // T26
	} {
		t.Run(c.name, func(t *testing.T) {
			if r := p.run(t, "process", command("/bin/cat", c.file), freshLog); !regexp.MustCompile(c.want).MatchString(r.stdout) {
				t.Errorf("got %.2000q, want it to match %s", r.stdout, c.want)
			}
		})
	}
}
