//go:build linux && (amd64 || arm64)

// Command cri-vz-agent is PID 1 of every pod's VM, and by re-executing itself
// every process between PID 1 and a container's command.
package main

import (
	"fmt"
	"os"

	"github.com/cri-vz/cri-vz/guest/agent"
	"github.com/cri-vz/cri-vz/guest/agent/container"
)

func main() {
	role := "init"
	if len(os.Args) > 1 {
		role = os.Args[1]
	}
	switch {
	case role == agent.RoleContainerInit:
		os.Exit(container.ExitCode(container.Init()))
	case role == agent.RoleExecInit:
		os.Exit(container.ExitCode(container.ExecInit()))
	case role == agent.RolePodInit:
		os.Exit(agent.RunPodInit())
	case role == agent.RoleModprobe:
		os.Exit(agent.RunModprobe(os.Args[1:]))
	case os.Getpid() == 1:
		agent.RunInit()
	}
	fmt.Fprintln(os.Stderr, "cri-vz-agent", agent.Version, "is the init process of a cri-vz guest: it has no other use")
	os.Exit(2)
}
