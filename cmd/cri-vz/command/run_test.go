package command

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
)

// daemon is one that answers RunPodSandbox as run says.
type daemon struct {
	runtimeapi.RuntimeServiceClient
	nodeapi.NodeClient

	logs  string
	run   func(ctx context.Context, d *daemon) error
	began chan struct{} // closed by run
	done  chan struct{} // closed when the pod is ready or has failed

	containers []*runtimeapi.Container

	mu   sync.Mutex
	pods []*runtimeapi.PodSandbox
}

func (d *daemon) RunPodSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest, _ ...grpc.CallOption) (*runtimeapi.RunPodSandboxResponse, error) {
	if err := os.MkdirAll(r.GetConfig().GetLogDirectory(), 0o755); err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.pods = append(d.pods, &runtimeapi.PodSandbox{Id: "0123456789abcdef", Metadata: r.GetConfig().GetMetadata()})
	d.mu.Unlock()
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: "0123456789abcdef"}, d.run(ctx, d)
}

func (d *daemon) undo() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pods = nil
}

func (d *daemon) ListPodSandbox(context.Context, *runtimeapi.ListPodSandboxRequest, ...grpc.CallOption) (*runtimeapi.ListPodSandboxResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &runtimeapi.ListPodSandboxResponse{Items: d.pods}, nil
}

func (d *daemon) ListContainers(context.Context, *runtimeapi.ListContainersRequest, ...grpc.CallOption) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: d.containers}, nil
}

// StopContainer is of a container that takes its whole grace period.
func (d *daemon) StopContainer(ctx context.Context, r *runtimeapi.StopContainerRequest, _ ...grpc.CallOption) (*runtimeapi.StopContainerResponse, error) {
	select {
	case <-time.After(time.Duration(r.GetTimeout()) * time.Second):
		return &runtimeapi.StopContainerResponse{}, nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

func (d *daemon) StopPodSandbox(context.Context, *runtimeapi.StopPodSandboxRequest, ...grpc.CallOption) (*runtimeapi.StopPodSandboxResponse, error) {
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

func (d *daemon) RemovePodSandbox(context.Context, *runtimeapi.RemovePodSandboxRequest, ...grpc.CallOption) (*runtimeapi.RemovePodSandboxResponse, error) {
	d.undo()
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

func (d *daemon) Status(context.Context, *runtimeapi.StatusRequest, ...grpc.CallOption) (*runtimeapi.StatusResponse, error) {
	info, err := json.Marshal(map[string]string{"logRoot": d.logs})
	return &runtimeapi.StatusResponse{Info: map[string]string{"config": string(info)}}, err
}

func (d *daemon) WatchSteps(ctx context.Context, _ *nodeapi.WatchStepsRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[nodeapi.Step], error) {
	return &stepStream{ctx: ctx, done: d.done}, nil
}

type stepStream struct {
	grpc.ServerStreamingClient[nodeapi.Step]
	ctx  context.Context
	done chan struct{}
}

func (s *stepStream) Recv() (*nodeapi.Step, error) {
	select {
	case <-s.done:
		return nil, io.EOF
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}

// A run that ends before it knows its pod leaves neither pod nor log folder.
func TestStartThatFailsLeavesNothing(t *testing.T) {
	cancelled := status.Error(codes.Canceled, "context canceled")
	for name, run := range map[string]func(context.Context, *daemon) error{
		"the start fails": func(_ context.Context, d *daemon) error {
			d.undo()
			return status.Error(codes.ResourceExhausted, "no memory")
		},
		"Ctrl-C, undone by the daemon after the call's end": func(ctx context.Context, d *daemon) error {
			close(d.began)
			<-ctx.Done()
			go func() { d.undo(); close(d.done) }()
			return cancelled
		},
		"Ctrl-C just when the pod became ready": func(ctx context.Context, d *daemon) error {
			close(d.began)
			<-ctx.Done()
			close(d.done)
			return cancelled
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := &daemon{logs: t.TempDir(), run: run, began: make(chan struct{}), done: make(chan struct{})}
			c := &client{RuntimeServiceClient: d, node: d}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			pod, err := c.podConfig(ctx, "web", "web:1")
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				select {
				case <-d.began:
					cancel()
				case <-ctx.Done():
				}
			}()
			if _, err := c.startPod(ctx, io.Discard, pod); err == nil {
				t.Error("no error")
			}
			d.mu.Lock()
			defer d.mu.Unlock()
			if len(d.pods) != 0 {
				t.Error("the pod is still there")
			}
			if left, _ := filepath.Glob(filepath.Join(d.logs, "*")); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// The second Ctrl-C ends the grace period and not the removal; a period that no
// duration can hold is no reason to leave the pod.
func TestRemovePodGrace(t *testing.T) {
	hurried, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tc := range []struct {
		name  string
		hurry context.Context
		grace int64
	}{
		{"hurried", hurried, 3600},
		{"hurried, more than a duration holds", hurried, 1 << 60},
		{"negative", t.Context(), -3600},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := &runtimeapi.PodSandbox{Id: "0123456789abcdef", Metadata: &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "other"}}
			d := &daemon{pods: []*runtimeapi.PodSandbox{pod}, containers: []*runtimeapi.Container{{Id: "c"}}}
			c := &client{RuntimeServiceClient: d}
			began := time.Now()
			if err := c.removePod(t.Context(), tc.hurry, pod, tc.grace); err != nil {
				t.Error(err)
			}
			if took := time.Since(began); took > 5*time.Second || len(d.pods) != 0 {
				t.Errorf("took %v, left %v", took, d.pods)
			}
		})
	}
}

// `cri-vz stop "$POD"` with an unset variable must not remove the only pod.
func TestAnEmptyNameIsNobodys(t *testing.T) {
	d := &daemon{
		pods:       []*runtimeapi.PodSandbox{{Id: "0123", Metadata: &runtimeapi.PodSandboxMetadata{Name: "p"}}},
		containers: []*runtimeapi.Container{{Id: "4567"}},
	}
	c := &client{RuntimeServiceClient: d}
	if p, err := c.findPod(t.Context(), ""); err == nil {
		t.Errorf("pod %s", p.GetId())
	}
	if ct, err := c.findContainer(t.Context(), ""); err == nil {
		t.Errorf("container %s", ct.GetId())
	}
}

func (d *daemon) LoadImage(ctx context.Context, _ ...grpc.CallOption) (grpc.BidiStreamingClient[nodeapi.LoadImageRequest, nodeapi.LoadImageResponse], error) {
	return &loadStream{ctx: ctx}, nil
}

type loadStream struct {
	grpc.BidiStreamingClient[nodeapi.LoadImageRequest, nodeapi.LoadImageResponse]
	ctx context.Context
}

func (s *loadStream) Recv() (*nodeapi.LoadImageResponse, error) {
	<-s.ctx.Done()
	return nil, status.FromContextError(s.ctx.Err()).Err()
}

// An archive that can't be read says so, and not that the call was cancelled.
func TestLoadNamesTheReadError(t *testing.T) {
	d := &daemon{}
	cmd := &cobra.Command{}
	cmd.SetIn(iotest.ErrReader(os.ErrPermission))
	if _, err := (&client{node: d}).load(t.Context(), cmd, "-"); !errors.Is(err, os.ErrPermission) {
		t.Error(err)
	}
}

// statuses is a daemon that answers ContainerStatus in turn.
type statuses struct {
	runtimeapi.RuntimeServiceClient
	answers []error
	state   runtimeapi.ContainerState
}

func (s *statuses) ContainerStatus(context.Context, *runtimeapi.ContainerStatusRequest, ...grpc.CallOption) (*runtimeapi.ContainerStatusResponse, error) {
	if len(s.answers) > 0 {
		err := s.answers[0]
		s.answers = s.answers[1:]
		return nil, err
	}
	return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{State: s.state}}, nil
}

// A container outlives its daemon, and so does who follows it, for a while.
func TestFollowingOutlivesTheDaemon(t *testing.T) {
	gone := status.Error(codes.Unavailable, "connection refused")
	s := &statuses{answers: []error{gone, gone}, state: runtimeapi.ContainerState_CONTAINER_RUNNING}
	synctest.Test(t, func(t *testing.T) {
		ended := (&client{RuntimeServiceClient: s}).ended("x")
		for range 3 { // away twice, and back
			if ended(t.Context()) {
				t.Fatal("a container that runs has ended, because its daemon was away")
			}
			time.Sleep(daemonPatience / 2)
		}
		s.answers = []error{gone, gone, gone}
		if ended(t.Context()) {
			t.Error("the daemon's next absence was cut short")
		}
		time.Sleep(daemonPatience)
		if !ended(t.Context()) {
			t.Error("a daemon that doesn't come back is waited for without a bound")
		}
		s.answers = []error{status.Error(codes.NotFound, "no such container")}
		if !ended(t.Context()) {
			t.Error("a container that is not there runs")
		}
		s.answers, s.state = nil, runtimeapi.ContainerState_CONTAINER_EXITED
		if !ended(t.Context()) {
			t.Error("a container that has ended runs")
		}
	})
}
