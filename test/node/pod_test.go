//go:build linux

package node_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// A pod runs, its command's output is its log, and its filesystem is its image's.
func TestPod(t *testing.T) {
	n := newNamespace(t)
	n.ready("hello", `
apiVersion: v1
kind: Pod
metadata: {name: hello}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    # Two streams: what is written to them at once may come in either order.
    command: [sh, -c, "echo hello from $HOSTNAME; sleep 1; echo no >&2; exec sleep infinity"]
`)
	n.eventually(time.Minute, "the log", func() error {
		if got := n.run("logs", "hello"); got != "hello from hello\nno\n" {
			return fmt.Errorf("got %q", got)
		}
		return nil
	})
	n.want("file", n.exec("hello", "cat", "/data/from-image"), "of the image")
	n.want("service account", n.exec("hello", "cat", "/var/run/secrets/kubernetes.io/serviceaccount/namespace"), n.name)
	if hosts := n.exec("hello", "cat", "/etc/hosts"); !strings.Contains(hosts, n.get("pod/hello", "{.status.podIP}")) {
		t.Errorf("/etc/hosts does not have the pod's address:\n%s", hosts)
	}
}

// Pods of a deployment answer the node and each other at their addresses.
func TestDeployment(t *testing.T) {
	n := newNamespace(t)
	n.apply(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: IMAGE
        command: [/bin/web]
        ports: [{containerPort: 3000}]
        readinessProbe: {httpGet: {path: /healthz, port: 3000}, periodSeconds: 1}
`)
	n.run("rollout", "status", "deployment/web", "--timeout=150s")
	pods := strings.Fields(n.get("pods", "{range .items[*]}{.metadata.name} {.status.podIP} {end}"))
	if len(pods) != 4 {
		t.Fatalf("names and addresses of two pods: got %q", pods)
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for i := 0; i < len(pods); i += 2 {
		name, ip := pods[i], pods[i+1]
		resp, err := client.Get("http://" + ip + ":3000/")
		if err != nil {
			t.Fatalf("ask pod %s from the node: %v", name, err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		n.want("answer to the node", string(body), fmt.Sprintf("hello from %s\n", name))
		other := pods[(i+2)%4]
		n.want("answer to pod "+other, n.exec(other, "web", "get", "http://"+ip+":3000/"), "hello from "+name)
	}
	// A pod that goes is replaced; scaling down leaves one.
	n.run("delete", "pod", pods[0])
	n.run("rollout", "status", "deployment/web", "--timeout=150s")
	n.run("scale", "deployment/web", "--replicas=1")
	n.eventually(time.Minute, "one pod", func() error {
		if left := strings.Fields(n.get("pods", "{.items[*].metadata.name}")); len(left) != 1 {
			return fmt.Errorf("got %q", left)
		}
		return nil
	})
}
