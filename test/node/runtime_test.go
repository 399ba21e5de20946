//go:build linux

package node_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// socketEnv names the CRI socket of a runtime that runs already.
const socketEnv = "CRI_SOCKET"

// handler is a runtime handler that the configuration below has.
const handler = "large"

// criRuntime is the node's container runtime.
type criRuntime struct {
	runtimeapi.RuntimeServiceClient
	socket string // path
	bin    string // of cri-vz; empty: another runtime
	config string
	daemon *program
	conn   *grpc.ClientConn
}

func startRuntime() (func() error, error) {
	r := &criRuntime{socket: strings.TrimPrefix(os.Getenv(socketEnv), "unix://")}
	if r.socket == "" {
		if err := r.prepare(); err != nil {
			return nil, err
		}
		if err := r.start(); err != nil {
			return nil, err
		}
	}
	var err error
	r.conn, err = grpc.NewClient("unix://"+r.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	r.RuntimeServiceClient = runtimeapi.NewRuntimeServiceClient(r.conn)
	suite.runtime = r
	undo := func() error {
		err := r.conn.Close()
		if r.daemon != nil {
			err = errors.Join(err, r.daemon.stop())
		}
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	v, err := r.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return undo, fmt.Errorf("ask %s for its version: %w", r.socket, err)
	}
	fmt.Printf("node: runtime %s %s\n", v.GetRuntimeName(), v.GetRuntimeVersion())
	return undo, r.checkEmpty()
}

// prepare builds cri-vz and writes its configuration.
func (r *criRuntime) prepare() error {
	dir := filepath.Join(suite.base, "v")
	r.socket, r.config = filepath.Join(dir, "run", "cri-vz.sock"), filepath.Join(dir, "config.toml")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if r.bin = os.Getenv("CRI_VZ_BIN"); r.bin == "" {
		r.bin = filepath.Join(dir, "cri-vz")
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if out, err := exec.CommandContext(ctx, "go", "build", "-o", r.bin, "github.com/cri-vz/cri-vz/cmd/cri-vz").CombinedOutput(); err != nil {
			return fmt.Errorf("build cri-vz: %w: %s", err, out)
		}
	}
	return os.WriteFile(r.config, fmt.Appendf(nil, `root = %q
run = %q
log_level = "debug"
[images]
registry_config_dir = %q
[network]
conf_dir = %q
builtin_subnet = "10.98.0.0/16"
[vm.class.%s]
cpus = 2
memory_mib = 768
`, filepath.Join(dir, "root"), filepath.Join(dir, "run"), filepath.Join(dir, "certs.d"), filepath.Join(dir, "cni"), handler), 0o644)
}

func (r *criRuntime) start() (err error) {
	r.daemon, err = startProgram("cri-vz", r.bin, []string{"serve", "--config", r.config}, time.Minute, func() error {
		c, err := net.DialTimeout("unix", r.socket, time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	})
	return err
}

// checkEmpty waits for the last pods to go, and fails if one stays.
func (r *criRuntime) checkEmpty() error {
	// The kubelet removes the sandboxes of pods that are gone once a minute.
	const bound = 3 * time.Minute
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	defer cancel()
	for {
		pods, err := r.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		if err != nil {
			return fmt.Errorf("list pods of %s: %w", r.socket, err)
		}
		containers, err := r.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
		if err != nil {
			return fmt.Errorf("list containers of %s: %w", r.socket, err)
		}
		if len(pods.GetItems())+len(containers.GetContainers()) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the runtime has pods %v and containers %v after %v", pods.GetItems(), containers.GetContainers(), bound)
		case <-time.After(time.Second):
		}
	}
}

// onlyCRIVZ ends a test of something that other runtimes don't have.
func onlyCRIVZ(t *testing.T, why string) {
	t.Helper()
	if suite.runtime.bin == "" {
		t.Skipf("%s is not cri-vz: %s", suite.runtime.socket, why)
	}
}
