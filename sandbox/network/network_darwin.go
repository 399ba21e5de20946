package network

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// macOS has neither network namespaces nor CNI: pods are behind the Virtualization
// framework's NAT, from where they reach the world and the host reaches them, and on a
// frame switch among themselves: the framework keeps machines apart.

func newNetwork(cfg Config) (*Network, error) {
	if !filepath.IsAbs(cfg.StateDir) {
		return nil, fmt.Errorf("network: path %q is not absolute: %w", cfg.StateDir, errdefs.ErrInvalidArgument)
	}
	if cfg.NodeNetns != "" {
		return nil, fmt.Errorf("network: macOS has no network namespaces, leave network.node_netns empty: %w", errdefs.ErrInvalidArgument)
	}
	behind, err := NewNAT(cfg.StateDir, filepath.Dir(cfg.RunDir))
	if err != nil {
		return nil, err
	}
	return &Network{cfg: cfg, platform: platform{behind}}, nil
}

// platform is what a Network is made of here.
type platform struct{ nat *NAT }

func (n *Network) status(context.Context) error { return nil }
func (n *Network) prepare(ctx context.Context, pod Pod) (*NIC, error) {
	return n.nat.Prepare(ctx, pod)
}
func (n *Network) setUp(ctx context.Context, podID string) (*Result, error) {
	return n.nat.SetUp(ctx, podID)
}
func (n *Network) openTap(id string) (*os.File, error) { return n.nat.OpenTap(id) }
func (n *Network) tearDown(ctx context.Context, podID string) error {
	return n.nat.TearDown(ctx, podID)
}
func (n *Network) pods() ([]string, error) { return n.nat.Pods() }

// Leased, Released and Keep are [NAT]'s.
func (n *Network) Leased(id string, a netip.Addr, seconds uint32) error {
	return n.nat.Leased(id, a, seconds)
}
func (n *Network) Released(id string) error { return n.nat.Released(id) }
func (n *Network) Keep(ctx context.Context) { n.nat.Keep(ctx) }

// errNoNetns answers for namespaces.
var errNoNetns = fmt.Errorf("macOS has no network namespaces: %w", errdefs.ErrNotImplemented)

func createNodeNetns(string) error { return errNoNetns }
func removeNetns(string) error     { return errNoNetns }
