//go:build linux

package node_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Init containers run one after the other, a sidecar before the rest and until
// after the pod's own containers.
func TestInitAndSidecar(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: staged}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 30
  initContainers:
  - name: first
    image: IMAGE
    command: [sh, -c, "sleep 1; echo first >> /stages/list"]
    volumeMounts: [{name: stages, mountPath: /stages}]
  - name: sidecar
    image: IMAGE
    restartPolicy: Always
    command: [sh, -c, "echo sidecar >> /stages/list; trap 'echo stopped; exit 0' TERM; touch /tmp/up; while :; do sleep 0.2; done"]
    startupProbe: {exec: {command: [cat, /tmp/up]}, periodSeconds: 1, timeoutSeconds: 10}
    volumeMounts: [{name: stages, mountPath: /stages}]
  - name: second
    image: IMAGE
    command: [sh, -c, "echo second >> /stages/list"]
    volumeMounts: [{name: stages, mountPath: /stages}]
  containers:
  - name: main
    image: IMAGE
    command: [sh, -c, "echo main >> /stages/list; cat /stages/list; cat /stages/list > /dev/termination-log"]
    volumeMounts: [{name: stages, mountPath: /stages}]
  volumes: [{name: stages, emptyDir: {}}]
`)
	n.waitFor("jsonpath={.status.phase}=Succeeded", "pod/staged")
	n.want("order", n.run("logs", "staged", "-c", "main"), "first\nsidecar\nsecond\nmain\n")
	n.want("termination message", n.get("pod/staged", "{.status.containerStatuses[0].state.terminated.message}"), "first\nsidecar\nsecond\nmain")
	n.want("the sidecar's end", n.get("pod/staged", `{.status.initContainerStatuses[?(@.name=="sidecar")].state.terminated.exitCode}`), "0")
	n.want("the sidecar's log", n.run("logs", "staged", "-c", "sidecar"), "stopped\n")
}

// A container that fails is started again, after delays that double (T45).
func TestCrashLoop(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: crash}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: IMAGE, command: [sh, -c, "echo run; sleep 6; exit 3"]}
`)
	const restarts = 5
	starts := map[int]time.Time{} // by the number of restarts before
	n.eventually(5*time.Minute, fmt.Sprintf("%d restarts", restarts), func() error {
		f := strings.Fields(n.get("pod/crash", "{range .status.containerStatuses[0]}{.restartCount} {.state.*.startedAt}{end}"))
		if len(f) == 0 {
			return errors.New("it has no status")
		}
		count, err := strconv.Atoi(f[0])
		if err != nil {
			return err
		}
		if len(f) > 1 {
			if starts[count], err = time.Parse(time.RFC3339, f[1]); err != nil {
				return err
			}
		}
		if count < restarts || starts[restarts].IsZero() {
			return fmt.Errorf("it has %d, starts at %v", count, starts)
		}
		return nil
	})
	// The state CrashLoopBackOff is in the pod's status only if something else made
	// the kubelet look at the pod between a container's end and its next start.
	n.warned("crash", "Back-off restarting failed container main")
	// The first restart has no delay; times are in whole seconds.
	for i, least := 2, 10*time.Second; i <= restarts; i, least = i+1, 2*least {
		if starts[i].IsZero() || starts[i-1].IsZero() {
			t.Fatalf("the start after restart %d or %d was not seen: %v", i-1, i, starts)
		}
		delay := starts[i].Sub(starts[i-1])
		t.Logf("restart %d came %v after the one before", i, delay)
		if delay < least-time.Second {
			t.Errorf("restart %d came after %v, want at least %v", i, delay, least)
		}
	}
	// While the container runs the run before is there. When it has ended the kubelet
	// keeps that one alone, and the pod's status names the one before until the delay
	// is over: what isn't seen of this run can be seen of the next.
	n.eventually(5*time.Minute, "end and log of the run before", func() error {
		if got := n.get("pod/crash", "{.status.containerStatuses[0].lastState.terminated.exitCode}"); got != "3" {
			return fmt.Errorf("it ended with %q", got)
		}
		if got := n.run("logs", "--previous", "crash"); got != "run\n" {
			return fmt.Errorf("its log is %q", got)
		}
		return nil
	})
}

// A container beyond its memory limit ends with OOMKilled; its neighbour goes on.
func TestOOM(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: greedy}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: greedy
    image: IMAGE
    command: [/bin/web, oom]
    resources: {limits: {memory: 64Mi}}
  - name: modest
    image: IMAGE
    resources: {limits: {memory: 64Mi}}
`)
	n.becomes(2*time.Minute, "pod/greedy", `{range .status.containerStatuses[?(@.name=="greedy")]}{.state.terminated.reason} {.state.terminated.exitCode}{end}`, "OOMKilled 137")
	n.want("the neighbour", n.run("exec", "greedy", "-c", "modest", "--", "echo", "here"), "here\n")
}

// A pod that is deleted gets its hooks, the signal, and its grace period, no
// more and no less.
func TestGracefulDeletion(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	dir := filepath.Join(suite.base, "graceful")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n.ready("graceful", strings.ReplaceAll(`
apiVersion: v1
kind: Pod
metadata: {name: graceful}
spec:
  terminationGracePeriodSeconds: 60
  containers:
  - name: main
    image: IMAGE
    command: [sh, -c, "trap 'echo term >> /out/list; sleep 2; echo end >> /out/list; exit 0' TERM; while :; do sleep 0.2; done"]
    lifecycle:
      postStart: {exec: {command: [sh, -c, "echo postStart >> /out/list"]}}
      preStop: {exec: {command: [sh, -c, "sleep 1; echo preStop >> /out/list"]}}
    volumeMounts: [{name: out, mountPath: /out}]
  volumes: [{name: out, hostPath: {path: OUT}}]
---
apiVersion: v1
kind: Pod
metadata: {name: stubborn}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - {name: main, image: IMAGE, command: [/bin/web, trap-term]}
`, "OUT", dir))
	n.waitFor("condition=Ready", "pod/stubborn")
	// The upper bounds only tell a grace period from one that was overstepped.
	for pod, bounds := range map[string][2]time.Duration{"graceful": {3 * time.Second, 55 * time.Second}, "stubborn": {5 * time.Second, 55 * time.Second}} {
		began := time.Now()
		n.run("delete", "pod", pod)
		if took := time.Since(began); took < bounds[0] || took > bounds[1] {
			t.Errorf("pod %s was gone after %v, want between %v and %v", pod, took, bounds[0], bounds[1])
		}
	}
	list, err := os.ReadFile(filepath.Join(dir, "list"))
	n.want("what happened", fmt.Sprint(string(list), err), "postStart\npreStop\nterm\nend\n<nil>")
}
