package network

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
)

// errNotAvailable answers for everything a pod network does on macOS.
var errNotAvailable = fmt.Errorf("pod networks are not available on macOS yet; use port-forward, which needs none: %w", errdefs.ErrNotImplemented)

func newNetwork(Config) (*Network, error)                      { return nil, errNotAvailable }
func (n *Network) status(context.Context) error                { return errNotAvailable }
func (n *Network) setUp(context.Context, Pod) (*Result, error) { return nil, errNotAvailable }
func (n *Network) openTap(string) (*os.File, error)            { return nil, errNotAvailable }
func (n *Network) tearDown(context.Context, string) error      { return errNotAvailable }
func (n *Network) pods() ([]string, error)                     { return nil, errNotAvailable }
func createNodeNetns(string) error                             { return errNotAvailable }
func removeNetns(string) error                                 { return errNotAvailable }
