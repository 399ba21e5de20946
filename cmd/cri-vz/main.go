// Command cri-vz is a Kubernetes container runtime whose pods are virtual
// machines: the daemon, a pod's shim, and the command line that talks to them.
package main

import (
	"os"

	"github.com/cri-vz/cri-vz/cmd/cri-vz/command"
)

func main() { os.Exit(command.Main(os.Args[1:])) }
