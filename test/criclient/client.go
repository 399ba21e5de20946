// Package criclient is the CRI as tests use it: pods and containers that end
// with their test, commands, logs, streams, and errors judged by their code. It
// speaks to any runtime; nothing of this project's daemon is known to it.
package criclient

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CallTimeout bounds every call that has no shorter bound of its own: a boot
// without KVM takes seconds, and several of them share the processors.
const CallTimeout = 90 * time.Second

// Client is a connection to a runtime's socket. Its methods but Redial
// may be called concurrently.
type Client struct {
	runtimeapi.RuntimeServiceClient
	Images runtimeapi.ImageServiceClient

	socket string
	boots  atomic.Int64
	conn   *grpc.ClientConn
}

// Dial connects to unix://PATH or PATH, at the first call.
func Dial(socket string) (*Client, error) {
	c := &Client{socket: strings.TrimPrefix(socket, "unix://")}
	return c, c.Redial()
}

// Redial replaces the connection, so that the first call to a runtime that was
// started anew does not wait out a back-off. No other call may be under way.
func (c *Client) Redial() error {
	conn, err := grpc.NewClient("unix://"+c.socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return fmt.Errorf("connect to %s: %w", c.socket, err)
	}
	if c.conn != nil {
		c.conn.Close()
	}
	c.conn, c.RuntimeServiceClient, c.Images = conn, runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)
	return nil
}

// Conn is the connection itself.
func (c *Client) Conn() *grpc.ClientConn { return c.conn }

// Close closes the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Boots is the number of pods that RunPod has started (T46).
func (c *Client) Boots() int64 { return c.boots.Load() }

// Pull pulls an image.
func (c *Client) Pull(ref string) error {
	ctx, cancel := context.WithTimeout(context.Background(), CallTimeout)
	defer cancel()
	if _, err := c.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}}); err != nil {
		return fmt.Errorf("pull %s: %w", ref, err)
	}
	return nil
}

// RemoveAllPods stops and removes what there is, and returns the pods' ids.
func (c *Client) RemoveAllPods(ctx context.Context) ([]string, error) {
	pods, err := c.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	errs := []error{err}
	var ids []string
	for _, p := range pods.GetItems() {
		_, serr := c.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.GetId()})
		_, rerr := c.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.GetId()})
		errs, ids = append(errs, serr, rerr), append(ids, p.GetId())
	}
	return ids, errors.Join(errs...)
}

// Sandbox is a pod sandbox's status.
func (c *Client) Sandbox(t *testing.T, id string) *runtimeapi.PodSandboxStatus {
	t.Helper()
	r, err := c.PodSandboxStatus(Timeout(t, CallTimeout), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		t.Fatalf("status of pod %.12s: %v", id, err)
	}
	return r.GetStatus()
}

// Container is a container's status.
func (c *Client) Container(t *testing.T, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	r, err := c.ContainerStatus(Timeout(t, CallTimeout), &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatalf("status of container %.12s: %v", id, err)
	}
	return r.GetStatus()
}

// StartByID starts a created container.
func (c *Client) StartByID(t *testing.T, id string) {
	t.Helper()
	if _, err := c.StartContainer(Timeout(t, CallTimeout), &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		t.Fatalf("start container %.12s: %v", id, err)
	}
}

// StopByID stops a container after seconds of grace.
func (c *Client) StopByID(t *testing.T, id string, seconds int64) {
	t.Helper()
	if _, err := c.StopContainer(Timeout(t, CallTimeout), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: seconds}); err != nil {
		t.Fatalf("stop container %.12s: %v", id, err)
	}
}

// RemoveByID removes a container in any state.
func (c *Client) RemoveByID(t *testing.T, id string) {
	t.Helper()
	if _, err := c.RemoveContainer(Timeout(t, CallTimeout), &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		t.Errorf("remove container %.12s: %v", id, err)
	}
}

// WaitExit waits until a container has ended.
func (c *Client) WaitExit(t *testing.T, id string, bound time.Duration) *runtimeapi.ContainerStatus {
	t.Helper()
	var st *runtimeapi.ContainerStatus
	Eventually(t, bound, "the end of container "+id[:12], func() error {
		if st = c.Container(t, id); st.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("it is %v", st.GetState())
		}
		return nil
	})
	return st
}

// Result is what a command did.
type Result struct {
	Stdout, Stderr string
	Code           int32
}

// Do is ExecSync.
func (c *Client) Do(t *testing.T, id string, args ...string) Result {
	t.Helper()
	r, err := c.ExecSync(Timeout(t, CallTimeout), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: args, Timeout: 60})
	if err != nil {
		t.Fatalf("exec %q: %v", args, err)
	}
	return Result{string(r.GetStdout()), string(r.GetStderr()), r.GetExitCode()}
}

// Output is the standard output of a command that must succeed.
func (c *Client) Output(t *testing.T, id string, args ...string) string {
	t.Helper()
	r := c.Do(t, id, args...)
	if r.Code != 0 || r.Stderr != "" {
		t.Fatalf("exec %q: exit code %d: %s", args, r.Code, r.Stderr)
	}
	return r.Stdout
}

// Timeout is a context that ends with the test.
func Timeout(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// Eventually polls until check succeeds.
func Eventually(t *testing.T, bound time.Duration, what string, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(bound); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("waited %v for %s: %v", bound, what, err)
}

// WantError checks an error's code and that its text has all words.
func WantError(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	switch {
	case err == nil:
		t.Errorf("no error, want %v with %q", code, words)
		return
	case errors.Is(err, context.DeadlineExceeded):
		t.Errorf("the call did not end: %v", err)
		return
	}
	s := status.Convert(err)
	if s.Code() != code {
		t.Errorf("code %v, want %v: %v", s.Code(), code, s.Message())
	}
	for _, w := range words {
		if !strings.Contains(s.Message(), w) {
			t.Errorf("the error does not say %q: %v", w, s.Message())
		}
	}
}
