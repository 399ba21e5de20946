//go:build linux

package e2e_test

import (
	"fmt"
	"strings"

	"github.com/cri-vz/cri-vz/test/testnode"
)

type process = testnode.Process

var (
	processes   = testnode.Processes
	descendants = testnode.Descendants
	cgroupsOf   = testnode.CgroupsOf
	filesBelow  = testnode.FilesBelow
)

// shimOf finds the process that owns a pod.
func shimOf(pod string) (process, error) {
	for _, p := range processes() {
		if args := strings.Fields(p.Command); len(args) > 2 && args[1] == "shim" && strings.Contains(p.Command, pod) && p.State != 'Z' {
			return p, nil
		}
	}
	return process{}, fmt.Errorf("pod %.12s has no shim", pod)
}

// helperOf finds a process of a pod's machine by the beginning of its name.
func helperOf(pod, name string) (process, error) {
	shim, err := shimOf(pod)
	if err != nil {
		return process{}, err
	}
	for _, p := range descendants(shim.PID) {
		if strings.HasPrefix(p.Name, name) && p.State != 'Z' {
			return p, nil
		}
	}
	return process{}, fmt.Errorf("pod %.12s has no %s", pod, name)
}
