//go:build linux

package node_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// kubectlTimeout bounds a kubectl that is given no time of its own. A pod's VM
// boots in seconds, without KVM on a loaded machine in tens of them.
const kubectlTimeout = 3 * time.Minute

// kubectlCommand is a kubectl of the administrator, which ends with ctx.
func kubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(suite.bin, "kubectl"), append([]string{"--kubeconfig=" + suite.cluster.kubeconfig("admin")}, args...)...)
	// No cache and no configuration in root's home.
	cmd.Env = append(os.Environ(), "HOME="+suite.base)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// kubectl returns what a kubectl printed; its standard error is in the error.
func kubectl(args ...string) (string, error) { return kubectlWith("", args...) }

func kubectlWith(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), kubectlTimeout)
	defer cancel()
	cmd := kubectlCommand(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s%s", strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

// drain removes the namespaces that a failed test left, and waits until the
// kubelet has no pod.
func (c *cluster) drain() error {
	out, err := kubectl("get", "namespace", "-l", "test", "-o", "name")
	if err != nil {
		return err
	}
	if names := strings.Fields(out); len(names) > 0 {
		if _, err := kubectl(append([]string{"delete", "--timeout=150s"}, names...)...); err != nil {
			return err
		}
	}
	// Pods' directories go after their objects; with them go mounts and cgroups.
	left := func() []string {
		dirs, _ := filepath.Glob(filepath.Join(suite.base, kubeletRoot, "pods", "*"))
		for _, root := range podCgroups() {
			for _, d := range directoriesBelow(root) {
				if name := filepath.Base(d); strings.Contains(name, "pod") && !strings.HasPrefix(name, "kubepods") {
					dirs = append(dirs, d)
				}
			}
		}
		return dirs
	}
	const bound = 2 * time.Minute
	for deadline := time.Now().Add(bound); len(left()) > 0; time.Sleep(500 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("the kubelet did not remove within %v: %s", bound, strings.Join(left(), " "))
		}
	}
	return nil
}

// namespace is a test's own. All its methods end the test when they fail.
type namespace struct {
	*testing.T
	name string
}

// newNamespace makes a namespace and waits until pods can be made in it. At the
// test's end its pods end, within the grace period of a second.
func newNamespace(t *testing.T) *namespace {
	t.Helper()
	n := &namespace{t, strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))}
	if _, err := kubectl("create", "namespace", n.name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			n.describe()
		}
		_, err := kubectl("delete", "namespace", n.name, "--wait=false")
		_, perr := kubectl("-n", n.name, "delete", "pod", "--all", "--grace-period=1", "--timeout=2m")
		if err := errors.Join(err, perr); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	n.run("label", "namespace", n.name, "test=")
	n.eventually(time.Minute, "the service account and the certificates of pods", func() error {
		_, err := kubectl("-n", n.name, "get", "serviceaccount/default", "configmap/kube-root-ca.crt")
		return err
	})
	return n
}

// in is the namespace for a subtest.
func (n *namespace) in(t *testing.T) *namespace { return &namespace{t, n.name} }

// describe logs all that is known about the pods of a test that failed.
func (n *namespace) describe() {
	for _, args := range [][]string{{"describe", "pods"}, {"get", "events", "--sort-by=.lastTimestamp"}} {
		out, err := kubectl(append([]string{"-n", n.name}, args...)...)
		n.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// run runs kubectl in the namespace.
func (n *namespace) run(args ...string) string {
	n.Helper()
	out, err := kubectl(append([]string{"-n", n.name}, args...)...)
	if err != nil {
		n.Fatal(err)
	}
	return out
}

// apply makes objects; IMAGE in the manifest is the suite's image.
func (n *namespace) apply(manifest string) {
	n.Helper()
	if _, err := kubectlWith(strings.ReplaceAll(manifest, "IMAGE", suite.image), "-n", n.name, "apply", "-f", "-"); err != nil {
		n.Fatal(err)
	}
}

// waitFor is `kubectl wait`.
func (n *namespace) waitFor(condition, object string) {
	n.Helper()
	n.run("wait", "--for="+condition, object, "--timeout=150s")
}

// ready applies the manifest and waits until its pod of that name is ready.
func (n *namespace) ready(pod, manifest string) {
	n.Helper()
	n.apply(manifest)
	n.waitFor("condition=Ready", "pod/"+pod)
}

// get is a field of an object, by its JSON path.
func (n *namespace) get(object, path string) string {
	n.Helper()
	return strings.TrimSpace(n.run("get", object, "-o", "jsonpath="+path))
}

// exec is what a command in a pod prints, without the last line end.
func (n *namespace) exec(pod string, command ...string) string {
	n.Helper()
	return strings.TrimSpace(n.run(append([]string{"exec", pod, "--"}, command...)...))
}

// want compares what was got, under a name.
func (n *namespace) want(what, got, want string) {
	n.Helper()
	if got != want {
		n.Errorf("%s: got %q, want %q", what, got, want)
	}
}

// eventually asks until the answer is nil.
func (n *namespace) eventually(bound time.Duration, what string, ask func() error) {
	n.Helper()
	began := time.Now()
	for {
		err := ask()
		if err == nil {
			return
		}
		if time.Since(began) > bound {
			n.Fatalf("%s: not within %v: %v", what, bound, err)
		}
		time.Sleep(300 * time.Millisecond)
	}
}

// becomes waits until a field of an object has a value.
func (n *namespace) becomes(bound time.Duration, object, path, want string) {
	n.Helper()
	n.eventually(bound, object+" "+path, func() error {
		if got := n.get(object, path); got != want {
			return fmt.Errorf("got %q, want %q", got, want)
		}
		return nil
	})
}
