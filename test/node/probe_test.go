//go:build linux

package node_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// Each kind of probe passes, and its failing shows: the readiness probe takes
// the pod out of service, the liveness probe restarts the container, and the
// startup probe keeps the liveness probe from doing so too early.
func TestProbes(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: probed}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: readiness-exec
    image: IMAGE
    command: [sh, -c, "touch /tmp/ready; exec sleep infinity"]
    readinessProbe: {exec: {command: [cat, /tmp/ready]}, periodSeconds: 1, failureThreshold: 2, timeoutSeconds: 10}
  - name: liveness-http
    image: IMAGE
    command: [/bin/web]
    livenessProbe: {httpGet: {path: /healthz, port: 3000}, periodSeconds: 2, timeoutSeconds: 10}
    readinessProbe: {httpGet: {path: /healthz, port: 3000}, periodSeconds: 1, timeoutSeconds: 10}
  - name: liveness-tcp
    image: IMAGE
    command: [/bin/web, tcp-echo, "4000"]
    livenessProbe: {tcpSocket: {port: 4000}, periodSeconds: 2, timeoutSeconds: 10}
  - name: startup
    image: IMAGE
    # Alive only after 6 s: without the startup probe liveness ends it before.
    command: [sh, -c, "sleep 6; touch /tmp/alive; exec sleep infinity"]
    startupProbe: {exec: {command: [cat, /tmp/alive]}, periodSeconds: 1, failureThreshold: 60, timeoutSeconds: 10}
    livenessProbe: {exec: {command: [cat, /tmp/alive]}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 10}
`)
	n.waitFor("condition=Ready", "pod/probed")
	restarts := `{range .status.containerStatuses[*]}{.name}={.restartCount} {end}`
	n.want("restarts", n.get("pod/probed", restarts), "liveness-http=0 liveness-tcp=0 readiness-exec=0 startup=0")

	ready := `{.status.conditions[?(@.type=="Ready")].status}`
	n.run("exec", "probed", "-c", "readiness-exec", "--", "rm", "/tmp/ready")
	n.becomes(2*time.Minute, "pod/probed", ready, "False")
	n.run("exec", "probed", "-c", "readiness-exec", "--", "touch", "/tmp/ready")
	n.becomes(2*time.Minute, "pod/probed", ready, "True")

	// A kubelet that collects garbage, once a minute, takes a container that is created
	// and not yet started for a dead one, and removes the one that died before it:
	// then there is no last state, and it takes another restart.
	code := ""
	for restart := 1; code == "" && restart <= 3; restart++ {
		n.run("exec", "probed", "-c", "startup", "--", "rm", "/tmp/alive")
		n.becomes(2*time.Minute, "pod/probed", restarts, fmt.Sprintf("liveness-http=0 liveness-tcp=0 readiness-exec=0 startup=%d", restart))
		code = n.get("pod/probed", `{.status.containerStatuses[?(@.name=="startup")].lastState.terminated.exitCode}`)
		n.waitFor("condition=Ready", "pod/probed")
	}
	n.want("reason of the restart", code, "137")
}

// A server whose port is closed is restarted by its liveness probes.
func TestDeafServersRestart(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: deaf}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: http
    image: IMAGE
    livenessProbe: {httpGet: {path: /healthz, port: 3000}, periodSeconds: 1, failureThreshold: 2}
  - name: tcp
    image: IMAGE
    livenessProbe: {tcpSocket: {port: 4000}, periodSeconds: 1, failureThreshold: 2}
`)
	n.eventually(2*time.Minute, "a restart of each", func() error {
		// One may be in its second life while the other is in its first.
		counts := strings.Fields(n.get("pod/deaf", "{.status.containerStatuses[*].restartCount}"))
		if len(counts) != 2 || slices.Contains(counts, "0") {
			return fmt.Errorf("restarts: %v", counts)
		}
		return nil
	})
}
