//go:build linux

package node_test

import (
	"fmt"
	"testing"
	"time"
)

// The kubelet replaces a token when 80 % of its life are over: of the shortest
// life that there is, after eight minutes (T45). The tests of files before this
// one restart kubelets, which then fetch new tokens.
func TestTokenRotation(t *testing.T) {
	n := newNamespace(t)
	n.ready("survivor", survivor)
	began := time.Now()
	first := n.token("survivor", "/token/token")
	t.Parallel()
	n.eventually(660*time.Second-time.Since(began), "a second token", func() error {
		time.Sleep(5 * time.Second)
		now := n.token("survivor", "/token/token")
		if now.Issued == first.Issued {
			return fmt.Errorf("it is of age %ds", time.Now().Unix()-now.Issued)
		}
		t.Logf("replaced at the age of %d s, of %d", now.Issued-first.Issued, first.Expires-first.Issued)
		return nil
	})
	n.want("restarts", n.get("pod/survivor", "{.status.containerStatuses[*].restartCount}"), "0 0")
}
