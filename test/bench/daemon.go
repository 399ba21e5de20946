//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/guest/image"
)

// weighDaemon prints what the daemon holds with 0, 10 and 30 pods, each with a
// running container. The pods are started one after the other, in the smallest
// VMs that run them, so that a small machine has room for all.
func weighDaemon(o options, guests string, g image.Guest) (err error) {
	config := filepath.Join(o.dir, "small.toml")
	if err := os.WriteFile(config, []byte("[vm.default]\ncpus = 1\nmemory_mib = 128\n"), 0o600); err != nil {
		return err
	}
	d, err := startDaemon(o, "many", guests, g, "--config", config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	node, err := dial(d.socket)
	if err != nil {
		return err
	}
	// An image's import leaves garbage that the figure is not about.
	time.Sleep(time.Second)
	if err := d.weigh(0); err != nil {
		return err
	}
	if err := node.load(filepath.Join(o.dir, "bench.tar")); err != nil {
		return err
	}
	var pods []string
	defer func() {
		for _, pod := range pods {
			err = errors.Join(err, node.remove(pod))
		}
	}()
	for _, count := range []int{10, 30} {
		for len(pods) < count {
			pod, serr := node.startPod()
			if pod != "" {
				pods = append(pods, pod)
			}
			if serr != nil {
				return fmt.Errorf("pod %d of %d: %w", len(pods), count, serr)
			}
		}
		time.Sleep(2 * time.Second) // the calls' own memory and connections go
		if err := d.weigh(len(pods)); err != nil {
			return err
		}
	}
	return nil
}

// startPod runs a pod with a container that sleeps. The pod's id comes also with
// an error, when there is a pod to remove.
func (n *node) startPod() (pod string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cfg := n.podConfig()
	r, err := n.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		return "", err
	}
	container, err := n.create(ctx, r.GetPodSandboxId(), cfg, benchImage, "sleep", "3600")
	if err != nil {
		return r.GetPodSandboxId(), err
	}
	_, err = n.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: container})
	return r.GetPodSandboxId(), err
}

func (n *node) remove(pod string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := n.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		return err
	}
	_, err := n.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
	return err
}

// weigh prints the daemon's proportional set size, and what of it is the daemon's
// alone: pages of the program are shared with the pods' shims.
func (d *daemon) weigh(pods int) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", d.cmd.Process.Pid))
	if err != nil {
		return err
	}
	kib := map[string]float64{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[2] == "kB" {
			if kib[f[0]], err = strconv.ParseFloat(f[1], 64); err != nil {
				return err
			}
		}
	}
	private := kib["Private_Clean:"] + kib["Private_Dirty:"]
	table(fmt.Sprintf("PSS of the daemon, %d pods", pods), fmt.Sprintf("%.1f MiB", kib["Pss:"]/1024), "", fmt.Sprintf("private: %.1f MiB", private/1024))
	return nil
}
