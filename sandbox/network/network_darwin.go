package network

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// macOS has neither network namespaces nor CNI: pods are behind the Virtualization
// framework's NAT, from where they reach the world and the host reaches them. Among
// themselves they don't: the framework keeps machines apart.

func newNetwork(cfg Config) (*Network, error) {
	if !filepath.IsAbs(cfg.StateDir) {
		return nil, fmt.Errorf("network: path %q is not absolute: %w", cfg.StateDir, errdefs.ErrInvalidArgument)
	}
	if cfg.NodeNetns != "" {
		return nil, fmt.Errorf("network: macOS has no network namespaces, leave network.node_netns empty: %w", errdefs.ErrInvalidArgument)
	}
	subnet, gateway, err := sharedNetwork()
	if err != nil {
		return nil, err
	}
	behind, err := NewNAT(cfg.StateDir, subnet, gateway)
	if err != nil {
		return nil, err
	}
	return &Network{cfg: cfg, platform: platform{behind}}, nil
}

// What the framework uses unless it was told otherwise.
const (
	defaultGateway = "192.168.64.1"
	defaultMask    = "255.255.255.0"
)

// sharedNetwork is the subnet of the framework's NAT and the host's address in it.
func sharedNetwork() (netip.Prefix, netip.Addr, error) {
	gateway, err := netip.ParseAddr(setting("Shared_Net_Address", defaultGateway))
	if err != nil {
		return netip.Prefix{}, netip.Addr{}, fmt.Errorf("network: the NAT's address: %w", err)
	}
	mask, err := netip.ParseAddr(setting("Shared_Net_Mask", defaultMask))
	if err != nil || !mask.Is4() {
		return netip.Prefix{}, netip.Addr{}, fmt.Errorf("network: the NAT's mask %s: %w", mask, err)
	}
	bits := 0
	for _, b := range mask.As4() {
		for ; b&0x80 != 0; b <<= 1 {
			bits++
		}
	}
	return netip.PrefixFrom(gateway, bits).Masked(), gateway, nil
}

// setting is a value of vmnet's, which the framework's NAT is made of.
func setting(key, otherwise string) string {
	const file = "/Library/Preferences/SystemConfiguration/com.apple.vmnet.plist"
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "/usr/bin/plutil", "-extract", key, "raw", "-o", "-", file).Output()
	if err != nil || strings.TrimSpace(string(out)) == "" {
		return otherwise // the file is not there before the first machine
	}
	return strings.TrimSpace(string(out))
}

// platform is what a Network is made of here.
type platform struct{ nat *NAT }

func (n *Network) status(context.Context) error { return nil }
func (n *Network) setUp(ctx context.Context, pod Pod) (*Result, error) {
	return n.nat.SetUp(ctx, pod)
}
func (n *Network) openTap(id string) (*os.File, error) { return n.nat.OpenTap(id) }
func (n *Network) tearDown(ctx context.Context, podID string) error {
	return n.nat.TearDown(ctx, podID)
}
func (n *Network) pods() ([]string, error) { return n.nat.Pods() }

// errNoNetns answers for namespaces.
var errNoNetns = fmt.Errorf("macOS has no network namespaces: %w", errdefs.ErrNotImplemented)

func createNodeNetns(string) error { return errNoNetns }
func removeNetns(string) error     { return errNoNetns }
