//go:build linux

package node_test

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

const survivor = `
apiVersion: v1
kind: Pod
metadata: {name: survivor}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    command: [sh, -c, "i=0; while sleep 0.5; do i=$((i+1)); echo $i; done"]
    volumeMounts: [{name: token, mountPath: /token}]
  - name: mortal
    image: IMAGE
    command: [sh, -c, "while [ ! -e /tmp/end ]; do sleep 0.2; done"]
  volumes:
  - name: token
    projected: {sources: [{serviceAccountToken: {path: token, expirationSeconds: 600}}]}
`

const containerStates = `{range .status.containerStatuses[*]}{.name} {.containerID} {.restartCount} {end}`

// Pods go on while the kubelet is away; the next one takes them over, starts
// what ended meanwhile, and gives them a new token (T45).
func TestKubeletRestart(t *testing.T) {
	n := newNamespace(t)
	n.ready("survivor", survivor)
	before := strings.Fields(n.get("pod/survivor", containerStates))
	token := n.token("survivor", "/token/token")
	// The container's end comes when nobody looks.
	n.run("exec", "survivor", "-c", "mortal", "--", "sh", "-c", "sleep 3 && touch /tmp/end & ")
	if err := suite.kubelet.stop(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Second)
	if err := suite.kubelet.start(); err != nil {
		t.Fatal(err)
	}
	n.becomes(2*time.Minute, "pod/survivor", `{.status.containerStatuses[?(@.name=="mortal")].restartCount}`, "1")
	n.want("the other container", strings.Join(strings.Fields(n.get("pod/survivor", containerStates))[:3], " "), strings.Join(before[:3], " "))
	n.waitFor("condition=Ready", "pod/survivor")
	n.want("exec", n.run("exec", "survivor", "-c", "main", "--", "echo", "here"), "here\n")
	n.eventually(150*time.Second, "a token of the new kubelet", func() error {
		if now := n.token("survivor", "/token/token"); now.Issued <= token.Issued {
			return fmt.Errorf("it was issued at %d, the first at %d", now.Issued, token.Issued)
		}
		return nil
	})
	checkCount(n)
}

// Pods go on while the runtime's daemon is away, killed without a warning; the
// next one finds them.
func TestDaemonRestart(t *testing.T) {
	onlyCRIVZ(t, "its daemon is not this test's to kill")
	n := newNamespace(t)
	n.ready("survivor", survivor)
	before := strings.Fields(n.get("pod/survivor", containerStates))
	n.run("exec", "survivor", "-c", "mortal", "--", "sh", "-c", "sleep 3 && touch /tmp/end & ")
	suite.runtime.daemon.kill()
	time.Sleep(5 * time.Second)
	if err := suite.runtime.start(); err != nil {
		t.Fatal(err)
	}
	n.becomes(2*time.Minute, "pod/survivor", `{.status.containerStatuses[?(@.name=="mortal")].restartCount}`, "1")
	n.want("the other container", strings.Join(strings.Fields(n.get("pod/survivor", containerStates))[:3], " "), strings.Join(before[:3], " "))
	n.waitFor("condition=Ready", "pod/survivor")
	n.waitFor("condition=Ready", "node/"+nodeName)
	n.want("exec", n.run("exec", "survivor", "-c", "main", "--", "echo", "here"), "here\n")
	checkCount(n)
	// A pod whose object goes while the daemon is away is stopped by the next one.
	suite.runtime.daemon.kill()
	n.run("delete", "pod", "survivor", "--wait=false")
	time.Sleep(3 * time.Second)
	if err := suite.runtime.start(); err != nil {
		t.Fatal(err)
	}
	n.run("wait", "--for=delete", "pod/survivor", "--timeout=120s")
}

// checkCount checks that the survivor's log lacks no line and repeats none.
func checkCount(n *namespace) {
	n.Helper()
	for i, line := range strings.Fields(n.run("logs", "survivor", "-c", "main")) {
		if line != fmt.Sprint(i+1) {
			n.Fatalf("line %d of the log is %q", i+1, line)
		}
	}
}
