//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
)

const benchImage = "docker.io/library/bench:latest"

// node is a runtime under measurement.
type node struct {
	runtimeapi.RuntimeServiceClient
	images runtimeapi.ImageServiceClient
	own    nodeapi.NodeClient
	pods   int
}

func dial(socket string) (*node, error) {
	conn, err := grpc.NewClient("unix://"+strings.TrimPrefix(socket, "unix://"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		// As the CLI has it.
		grpc.WithInitialWindowSize(1<<20), grpc.WithInitialConnWindowSize(4<<20),
		grpc.WithReadBufferSize(256<<10), grpc.WithWriteBufferSize(256<<10))
	if err != nil {
		return nil, err
	}
	return &node{
		RuntimeServiceClient: runtimeapi.NewRuntimeServiceClient(conn),
		images:               runtimeapi.NewImageServiceClient(conn), own: nodeapi.NewNodeClient(conn),
	}, nil
}

func (n *node) pull(ref string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	_, err := n.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	return err
}

func (n *node) load(path string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	s, err := n.own.LoadImage(ctx)
	if err != nil {
		return err
	}
	for len(b) > 0 {
		part := b[:min(len(b), 1<<20)]
		if err := s.Send(&nodeapi.LoadImageRequest{Data: part}); err != nil {
			break // Recv says why
		}
		b = b[len(part):]
	}
	_ = s.CloseSend()
	for {
		if _, err := s.Recv(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// latency is what the calls of some rounds took, and the named steps of run.
type latency struct {
	run, create, start, exec, stop []time.Duration

	steps map[string][]time.Duration
	order []string // of steps
}

func (l *latency) addStep(name string, d time.Duration) {
	if l.steps == nil {
		l.steps = map[string][]time.Duration{}
	}
	if l.steps[name] == nil {
		l.order = append(l.order, name)
	}
	l.steps[name] = append(l.steps[name], d)
}

func (l *latency) add(o latency) {
	for _, name := range o.order {
		for _, d := range o.steps[name] {
			l.addStep(name, d)
		}
	}
	l.run, l.create, l.start = append(l.run, o.run...), append(l.create, o.create...), append(l.start, o.start...)
	l.exec, l.stop = append(l.exec, o.exec...), append(l.stop, o.stop...)
}

// rounds makes pods, one at a time, each with a container and an exec in it.
func (n *node) rounds(count int, image string) (l latency, err error) {
	for range count {
		if err := n.round(&l, image); err != nil {
			return l, err
		}
	}
	return l, nil
}

func (n *node) round(l *latency, image string) (err error) {
	var pod, container string
	cfg := n.podConfig()
	defer func() {
		if pod != "" {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			_, rerr := n.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
			err = errors.Join(err, rerr)
		}
	}()
	if err := timed(&l.run, func(ctx context.Context) error {
		r, err := n.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
		pod = r.GetPodSandboxId()
		return err
	}); err != nil {
		return err
	}
	if err := n.steps(l, pod); err != nil {
		return err
	}
	if err := timed(&l.create, func(ctx context.Context) (err error) {
		container, err = n.create(ctx, pod, cfg, image, "sleep", "3600")
		return err
	}); err != nil {
		return err
	}
	if err := timed(&l.start, func(ctx context.Context) error {
		_, err := n.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: container})
		return err
	}); err != nil {
		return err
	}
	if err := timed(&l.exec, func(ctx context.Context) error {
		r, err := n.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: []string{"echo", "hello"}, Timeout: 60})
		if err == nil && r.GetExitCode() != 0 {
			err = fmt.Errorf("exec ended with %d: %s", r.GetExitCode(), r.GetStderr())
		}
		return err
	}); err != nil {
		return err
	}
	return timed(&l.stop, func(ctx context.Context) error {
		_, err := n.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
		return err
	})
}

// steps adds what the verbose status tells of a pod's start; other runtimes' tells
// nothing.
func (n *node) steps(l *latency, pod string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	st, err := n.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil {
		return err
	}
	var info struct {
		Steps []struct {
			Name         string
			Milliseconds float64
		}
	}
	if err := json.Unmarshal([]byte(st.GetInfo()["info"]), &info); err != nil {
		return nil
	}
	for _, s := range info.Steps {
		l.addStep(s.Name, time.Duration(s.Milliseconds*float64(time.Millisecond)))
	}
	return nil
}

func (n *node) podConfig() *runtimeapi.PodSandboxConfig {
	n.pods++
	name := fmt.Sprintf("bench-%d-%d", os.Getpid(), n.pods)
	return &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: name},
		Linux:    &runtimeapi.LinuxPodSandboxConfig{},
	}
}

func (n *node) create(ctx context.Context, pod string, cfg *runtimeapi.PodSandboxConfig, image string, command ...string) (string, error) {
	r, err := n.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: cfg, Config: &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: command[0]},
		Image:    &runtimeapi.ImageSpec{Image: image},
		Command:  command,
		Linux:    &runtimeapi.LinuxContainerConfig{},
	}})
	return r.GetContainerId(), err
}
