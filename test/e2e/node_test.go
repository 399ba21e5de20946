//go:build linux

package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
	"github.com/cri-vz/cri-vz/sandbox/network"
	"github.com/cri-vz/cri-vz/test/criclient"
	"github.com/cri-vz/cri-vz/test/testnode"
)

// node is a daemon and the clients of its socket.
type node struct {
	runtimeapi.RuntimeServiceClient
	images runtimeapi.ImageServiceClient
	api    nodeapi.NodeClient
	cri    *criclient.Client // the same connection

	daemon                              *testnode.Daemon
	dir, root, run, socket, config, log string // the daemon's
}

const callTimeout = criclient.CallTimeout

// newNode writes the configuration of a daemon of that name, with lines as
// [testnode.NewDaemon] takes them.
func newNode(name string, lines ...string) *node {
	d, err := testnode.NewDaemon(suite.bin, filepath.Join(suite.base, name), suite.guests, lines...)
	if err != nil {
		panic(err) // a private directory of our own
	}
	return &node{daemon: d, dir: d.Dir, root: d.Root, run: d.Run, socket: d.Socket, config: d.Config, log: d.Log}
}

// newNodeApart is a node with a network namespace of its own for the test's
// length: the bridge of this one belongs to the suite's daemon.
func newNodeApart(t *testing.T, name string, lines ...string) *node {
	t.Helper()
	netns := filepath.Join(suite.base, name+"-node")
	if err := network.CreateNetns(netns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := network.DeleteNetns(netns); err != nil {
			t.Error(err)
		}
	})
	return newNode(name, append(lines, fmt.Sprintf("network: conf_dir = %q\nnode_netns = %q", filepath.Join(suite.base, name, "cni"), netns))...)
}

func (n *node) command(env ...string) *exec.Cmd { return n.daemon.Command(env...) }

// start runs the daemon until it says that it is ready.
func (n *node) start() error { return n.startCommand(n.command()) }

func (n *node) startCommand(cmd *exec.Cmd) error {
	if err := n.daemon.StartCommand(cmd); err != nil {
		return err
	}
	var err error
	if n.cri == nil {
		n.cri, err = criclient.Dial(n.socket)
	} else {
		err = n.cri.Redial()
	}
	if err != nil {
		return err
	}
	n.RuntimeServiceClient, n.images = n.cri.RuntimeServiceClient, n.cri.Images
	n.api = nodeapi.NewNodeClient(n.cri.Conn())
	return nil
}

// kill ends the daemon as a crash does.
func (n *node) kill() { n.daemon.Kill() }

// stop ends the daemon as a service manager does.
func (n *node) stop() error { return n.daemon.Stop() }

// finish removes all pods, stops the daemon, and says what it left.
func (n *node) finish() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	ids, err := n.cri.RemoveAllPods(ctx)
	errs := []error{err, n.leftovers(ids...), n.stop(), n.cri.Close()}
	for _, p := range n.daemon.Processes() {
		errs = append(errs, fmt.Errorf("process %d is left: %.200s", p.PID, p.Command))
	}
	return errors.Join(errs...)
}

// leftovers says what is there of a node without pods.
func (n *node) leftovers(ids ...string) error { return n.daemon.Leftovers(ids...) }

// cli runs the command line against this daemon.
func (n *node) cli(args ...string) *exec.Cmd {
	cmd := exec.Command(suite.bin, args...)
	cmd.Env = append(cmd.Environ(), "CRI_VZ_SOCKET=unix://"+n.socket)
	return cmd
}
