//go:build linux

package node_test

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// A container's limits change while it runs.
func TestResize(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.ready("sized", `
apiVersion: v1
kind: Pod
metadata: {name: sized}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    resources: {limits: {cpu: 200m, memory: 64Mi}}
`)
	id := n.get("pod/sized", "{.status.containerStatuses[0].containerID}")
	n.want("limits before", n.limits("sized"), "67108864 20000")
	n.run("patch", "pod", "sized", "--subresource=resize", "-p",
		`{"spec":{"containers":[{"name":"main","resources":{"requests":{"cpu":"300m","memory":"96Mi"},"limits":{"cpu":"300m","memory":"96Mi"}}}]}}`)
	n.becomes(2*time.Minute, "pod/sized", "{.status.containerStatuses[0].resources.limits}", `{"cpu":"300m","memory":"96Mi"}`)
	n.want("limits after", n.limits("sized"), "100663296 30000")
	n.want("container", n.get("pod/sized", "{.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}"), id+" 0")
}

// limits are a container's memory limit in bytes and its CPU quota in µs, as its
// cgroup has them: v2 in a VM, whatever the node has elsewhere.
func (n *namespace) limits(pod string) string {
	n.Helper()
	return strings.Join(strings.Fields(n.exec(pod, "sh", "-c", `cd /sys/fs/cgroup
if [ -e memory.max ]; then cat memory.max; cut -d' ' -f1 cpu.max
else cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us; fi`)), " ")
}

// A RuntimeClass chooses the class of the VM, and its overhead reaches the pod.
func TestRuntimeClass(t *testing.T) {
	onlyCRIVZ(t, "its handlers are its own")
	t.Parallel()
	n := newNamespace(t)
	n.ready("large", `
apiVersion: v1
kind: Pod
metadata: {name: large}
spec:
  runtimeClassName: `+n.runtimeClass()+`
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    resources: {limits: {cpu: 200m, memory: 64Mi}}
`)
	n.want("CPUs", n.exec("large", "nproc"), "2")
	n.want("overhead", n.get("pod/large", "{.spec.overhead.memory}"), "320Mi")
	n.apply(`
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: unknown}
handler: unknown
---
apiVersion: v1
kind: Pod
metadata: {name: unknown}
spec:
  runtimeClassName: unknown
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: IMAGE}]
`)
	t.Cleanup(func() { _, _ = kubectl("delete", "runtimeclass", "unknown") })
	n.warned("unknown", `runtime_handler "unknown" is not configured`)
}

// runtimeClass makes a RuntimeClass of cri-vz's handler, with overhead, for the
// time of the test.
func (n *namespace) runtimeClass() string {
	n.Helper()
	n.apply(fmt.Sprintf(`
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: %s}
handler: %s
overhead: {podFixed: {memory: 320Mi, cpu: 100m}}
`, n.name, handler))
	n.Cleanup(func() { _, _ = kubectl("delete", "runtimeclass", n.name) })
	return n.name
}

// What a VM can't give is refused, and the event says why (T4, T39, T40).
func TestRefused(t *testing.T) {
	onlyCRIVZ(t, "it may grant all that")
	t.Parallel()
	n := newNamespace(t)
	for name, c := range map[string]struct{ spec, container, event string }{
		"host-network": {"hostNetwork: true", "", "namespace_options.network: NODE can't be had"},
		"host-ipc":     {"hostIPC: true", "", "namespace_options.ipc: NODE can't be had"},
		"propagation": {
			"volumes: [{name: v, hostPath: {path: " + suite.base + "}}]",
			"securityContext: {privileged: true}, volumeMounts: [{name: v, mountPath: /v, mountPropagation: Bidirectional}]",
			"BIDIRECTIONAL can't be had",
		},
		"selinux": {"securityContext: {seLinuxOptions: {level: s0}}", "", "selinux_options"},
		// Only requests are the scheduler's business.
		"memory": {"", "resources: {requests: {memory: 16Mi}, limits: {memory: 1Ti}}", "the VM needs"},
	} {
		n.apply(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: IMAGE, %s}]
  %s
`, name, c.container, c.spec))
		n.warned(name, c.event)
	}
}

// warned waits for a warning about a pod that has text.
func (n *namespace) warned(pod, text string) {
	n.Helper()
	n.eventually(2*time.Minute, "a warning about pod "+pod, func() error {
		events := n.run("get", "events", "--field-selector=type=Warning,involvedObject.name="+pod, "-o", "jsonpath={.items[*].message}")
		if !strings.Contains(events, text) {
			return fmt.Errorf("none has %q: %s", text, events)
		}
		return nil
	})
}
