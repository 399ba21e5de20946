//go:build linux

package node_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/crane"
)

// A pod that can't start says why, and starts when the reason has gone; what
// never can start ends.
func TestPending(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	later := strings.Replace(suite.image, "/busybox:", "/later:", 1)
	n.apply(strings.ReplaceAll(`
apiVersion: v1
kind: Pod
metadata: {name: no-image}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: LATER, command: [sleep, infinity]}]
---
apiVersion: v1
kind: Pod
metadata: {name: no-config}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: IMAGE, env: [{name: COLOR, valueFrom: {configMapKeyRef: {name: settings, key: color}}}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: no-command}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: IMAGE, command: [/does/not/exist]}]
---
apiVersion: v1
kind: Pod
metadata: {name: too-large}
spec:
  containers: [{name: main, image: IMAGE, resources: {requests: {cpu: 10k}}}]
`, "LATER", later))
	// The code tells the kubelet that the registry answered.
	n.warned("no-image", "code = NotFound")
	n.becomes(2*time.Minute, "pod/no-config", "{.status.containerStatuses[0].state.waiting.reason}", "CreateContainerConfigError")
	n.becomes(2*time.Minute, "pod/no-command", "{range .status.containerStatuses[0]}{.state.terminated.reason} {.state.terminated.exitCode} {.restartCount}{end}", "StartError 128 0")
	n.becomes(2*time.Minute, "pod/no-command", "{.status.phase}", "Failed")
	n.becomes(2*time.Minute, "pod/too-large", `{.status.conditions[?(@.type=="PodScheduled")].reason}`, "Unschedulable")

	if err := crane.Copy(suite.image, later, crane.Insecure); err != nil {
		t.Fatal(err)
	}
	n.run("create", "configmap", "settings", "--from-literal=color=blue")
	// The delay between pulls doubles, from ten seconds.
	n.run("wait", "--for=condition=Ready", "pod/no-image", "--timeout=170s")
	n.waitFor("condition=Ready", "pod/no-config")
	n.want("variable", n.exec("no-config", "sh", "-c", "echo $COLOR"), "blue")
}
