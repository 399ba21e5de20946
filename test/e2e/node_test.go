//go:build linux

package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
	"github.com/cri-vz/cri-vz/sandbox/network"
)

// node is a daemon and the clients of its socket.
type node struct {
	runtimeapi.RuntimeServiceClient
	images runtimeapi.ImageServiceClient
	api    nodeapi.NodeClient

	dir, root, run, socket, config, log string

	cmd  *exec.Cmd
	done chan struct{} // closed when cmd has ended
	conn *grpc.ClientConn
}

// callTimeout bounds every call of a test that has no shorter bound of its own.
const callTimeout = 90 * time.Second

// newNode writes the configuration of a daemon of that name; lines are added to
// it, the first ones in its top-level table.
func newNode(name string, lines ...string) *node {
	n := &node{dir: filepath.Join(suite.base, name)}
	n.root, n.run = filepath.Join(n.dir, "root"), filepath.Join(n.dir, "run")
	n.socket = filepath.Join(n.run, "cri-vz.sock")
	n.config, n.log = filepath.Join(n.dir, "config.toml"), filepath.Join(n.dir, "log")
	settings := map[string]string{
		"guest":   fmt.Sprintf("dir = %q", suite.guests),
		"images":  fmt.Sprintf("registry_config_dir = %q", filepath.Join(n.dir, "certs.d")),
		"network": fmt.Sprintf("conf_dir = %q\nbuiltin_subnet = \"10.99.0.0/16\"", filepath.Join(n.dir, "cni")),
	}
	top := []string{fmt.Sprintf("root = %q\nrun = %q\nlog_level = \"debug\"", n.root, n.run)}
	for _, l := range lines {
		if table, setting, ok := strings.Cut(l, ": "); ok {
			settings[table] = setting
			continue
		}
		top = append(top, l)
	}
	var b bytes.Buffer
	fmt.Fprintln(&b, strings.Join(top, "\n"))
	for _, table := range []string{"guest", "images", "network", "vm"} {
		if s, ok := settings[table]; ok {
			fmt.Fprintf(&b, "[%s]\n%s\n", table, s)
		}
	}
	if err := errors.Join(os.MkdirAll(n.dir, 0o755), os.WriteFile(n.config, b.Bytes(), 0o644)); err != nil {
		panic(err) // a private directory of our own
	}
	return n
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

// command is the daemon's command line; env is added to its environment.
func (n *node) command(env ...string) *exec.Cmd {
	cmd := exec.Command(suite.bin, "serve", "--config", n.config)
	cmd.Env = append(os.Environ(), env...)
	// Ctrl-C on the terminal is the test's business.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// start runs the daemon until it says that it is ready.
func (n *node) start() error { return n.startCommand(n.command()) }

func (n *node) startCommand(cmd *exec.Cmd) error {
	out, err := os.OpenFile(n.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	began, err := out.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	n.cmd = cmd
	n.cmd.Stdout, n.cmd.Stderr = out, out
	if err := n.cmd.Start(); err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	n.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { _ = cmd.Wait(); close(done) }(n.cmd, n.done)
	const bound = 30 * time.Second
	for deadline := time.Now().Add(bound); ; time.Sleep(10 * time.Millisecond) {
		said, err := n.logSince(began)
		switch {
		case err != nil:
			return err
		case strings.Contains(said, "cri-vz is ready"):
			return n.connect()
		case n.ended():
			return fmt.Errorf("the daemon ended: %s", said)
		case time.Now().After(deadline):
			n.kill()
			return fmt.Errorf("the daemon was not ready within %v: %s", bound, said)
		}
	}
}

func (n *node) connect() error {
	if n.conn != nil {
		n.conn.Close()
	}
	var err error
	n.conn, err = grpc.NewClient("unix://"+n.socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return err
	}
	n.RuntimeServiceClient = runtimeapi.NewRuntimeServiceClient(n.conn)
	n.images = runtimeapi.NewImageServiceClient(n.conn)
	n.api = nodeapi.NewNodeClient(n.conn)
	return nil
}

func (n *node) ended() bool {
	select {
	case <-n.done:
		return true
	default:
		return false
	}
}

// kill ends the daemon as a crash does.
func (n *node) kill() {
	_ = n.cmd.Process.Kill()
	<-n.done
}

// stop ends the daemon as a service manager does.
func (n *node) stop() error {
	if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop the daemon: %w", err)
	}
	const bound = 10 * time.Second
	select {
	case <-n.done:
	case <-time.After(bound):
		n.kill()
		return fmt.Errorf("the daemon did not stop within %v", bound)
	}
	if code := n.cmd.ProcessState.ExitCode(); code != 0 {
		return fmt.Errorf("the stopped daemon's exit status is %d", code)
	}
	return nil
}

func (n *node) logSince(offset int64) (string, error) {
	b, err := os.ReadFile(n.log)
	if err != nil || int64(len(b)) < offset {
		return "", err
	}
	return string(b[offset:]), nil
}

// printLog shows the daemon's last lines of log.
func (n *node) printLog(w io.Writer, lines int) {
	b, _ := os.ReadFile(n.log)
	all := strings.SplitAfter(string(b), "\n")
	fmt.Fprintf(w, "--- the daemon's last lines (%s)\n%s---\n", n.log, strings.Join(all[max(0, len(all)-lines):], ""))
}

// finish removes all pods, stops the daemon, and says what it left.
func (n *node) finish() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var errs []error
	pods, err := n.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	errs = append(errs, err)
	var ids []string
	for _, p := range pods.GetItems() {
		_, serr := n.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.GetId()})
		_, rerr := n.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.GetId()})
		errs, ids = append(errs, serr, rerr), append(ids, p.GetId())
	}
	errs = append(errs, n.leftovers(ids...), n.stop())
	n.conn.Close()
	for _, p := range descendants(os.Getpid()) {
		if strings.HasPrefix(p.command, suite.bin) || strings.HasPrefix(p.name, "qemu") || strings.HasPrefix(p.name, "virtiofsd") {
			errs = append(errs, fmt.Errorf("process %d is left: %.200s", p.pid, p.command))
		}
	}
	return errors.Join(errs...)
}

// leftovers says what is there of a node without pods: records, sockets, mounts,
// interfaces, and cgroups of the pods with these ids.
func (n *node) leftovers(ids ...string) error {
	var left []string
	for _, f := range append(filesBelow(filepath.Join(n.root, "pods")), filesBelow(n.run)...) {
		if f != n.socket {
			left = append(left, "file "+f)
		}
	}
	for _, m := range mountsBelow(n.dir) {
		left = append(left, "mount "+m)
	}
	names, err := links()
	if err != nil {
		return err
	}
	for _, l := range names {
		if l != "lo" && !n.isBridge(l) {
			left = append(left, "network interface "+l)
		}
	}
	for _, id := range ids {
		if len(id) >= 12 {
			for _, c := range cgroupsOf(id[:12]) {
				left = append(left, "cgroup "+c)
			}
		}
	}
	if len(left) > 0 {
		slices.Sort(left)
		return fmt.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
	}
	return nil
}

// isBridge: the built-in network's bridge stays for the next pod.
func (n *node) isBridge(name string) bool {
	_, err := os.Stat("/sys/class/net/" + name + "/bridge")
	if err == nil {
		return true
	}
	// /sys may show another namespace's interfaces; the bridge has the gateway's
	// address.
	addrs, err := addressesOf(name)
	return err == nil && slices.ContainsFunc(addrs, func(a netip.Prefix) bool { return a.Addr() == netip.MustParseAddr("10.99.0.1") })
}

// cli runs the command line against this daemon.
func (n *node) cli(args ...string) *exec.Cmd {
	cmd := exec.Command(suite.bin, args...)
	cmd.Env = append(os.Environ(), "CRI_VZ_SOCKET=unix://"+n.socket)
	return cmd
}
