package command

import (
	"context"
	"net/netip"
	"path/filepath"

	"github.com/cri-vz/cri-vz/cmd/cri-vz/config"
	"github.com/cri-vz/cri-vz/sandbox"
	"github.com/cri-vz/cri-vz/sandbox/network"
)

// podNetwork is what the daemon asks of a network.
type podNetwork interface {
	sandbox.Network
	Status(ctx context.Context) error
}

// openNetwork opens this system's; tests on Linux have a Mac's (network_fakevz.go).
var openNetwork = func(c *config.Config, subnet netip.Prefix) (podNetwork, error) {
	return network.New(network.Config{
		ConfDir:   c.Network.ConfDir,
		BinDirs:   c.Network.BinDirs,
		StateDir:  filepath.Join(c.Root, "network"),
		RunDir:    filepath.Join(c.Run, "network"),
		Subnets:   []netip.Prefix{subnet},
		NodeNetns: c.Network.NodeNetns,
	})
}
