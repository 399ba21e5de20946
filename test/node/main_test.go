//go:build linux

package node_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/crane"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/cri-vz/cri-vz/test/images"
	"github.com/cri-vz/cri-vz/test/testnode"
)

// As in test/e2e, an outer process makes the place (a directory and a network
// namespace), starts itself in it, and judges what was left, however the inner
// one ended. baseEnv tells the inner one where it is.
const baseEnv = "CRI_VZ_NODE_BASE"

// binEnv names the folder that kubernetes/build printed.
const binEnv = "KUBERNETES_BIN"

// address is the node's, on a bridge without ports (RFC 5737, TEST-NET-1).
const (
	address = "192.0.2.1"
	link    = "cri-vz-node"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if l := flag.Lookup("test.list"); l != nil && l.Value.String() != "" {
		os.Exit(m.Run())
	}
	run := outer
	if base := os.Getenv(baseEnv); base != "" {
		run = func() (int, error) { return inner(m, base) }
	}
	code, err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "node:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func outer() (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("a kubelet needs root: `make test-node` sees to it")
	}
	if os.Getenv(binEnv) == "" {
		return 1, fmt.Errorf("%s is not set: these tests need the programs that test/node/kubernetes/build makes; `make test-node` calls it", binEnv)
	}
	if left := podCgroups(); len(left) > 0 {
		return 1, fmt.Errorf("a kubelet runs here, or left %s: its pods and this test's could not be told apart; if no kubelet runs: find %s -depth -type d -exec rmdir {} +", strings.Join(left, ", "), strings.Join(left, " "))
	}
	runtime.LockOSThread() // the inner process dies with this thread
	// Short, because of the sockets below it (T14).
	base, err := os.MkdirTemp("/tmp", "cvn")
	if err != nil {
		return 1, err
	}
	// QEMU runs as nobody.
	if err := os.Chmod(base, 0o755); err != nil {
		return 1, err
	}
	restore, err := saveMachine()
	if err != nil {
		return 1, errors.Join(err, os.RemoveAll(base))
	}
	// What the inner process leaves becomes ours, and is found.
	if err := becomeSubreaper(); err != nil {
		return 1, err
	}
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM) // the inner process ends, then this one cleans up
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), baseEnv+"="+base)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Getenv(socketEnv) == "" {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNET
	}
	if err := cmd.Start(); err != nil {
		return 1, errors.Join(err, os.RemoveAll(base))
	}
	werr := testnode.WaitAndReap(cmd)
	left := sweep(base)
	if err := restore(); err != nil {
		left = append(left, err.Error())
	}
	if len(left) > 0 {
		err = fmt.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
	}
	var exit *exec.ExitError
	if errors.As(werr, &exit) {
		return max(1, exit.ExitCode()), err
	}
	return 0, errors.Join(err, werr)
}

// suite is what all tests share.
var suite struct {
	base    string // private directory
	bin     string // programs of Kubernetes
	image   string // reference of the image that most pods run
	cluster *cluster
	kubelet *kubelet
	runtime *criRuntime
}

func inner(m *testing.M, base string) (code int, err error) {
	suite.base, suite.bin = base, os.Getenv(binEnv)
	if err := errors.Join(os.RemoveAll(logs), os.MkdirAll(logs, 0o755)); err != nil {
		return 1, err
	}
	began := time.Now()
	// In reverse: the kubelet ends before what it talks to.
	var undo []func() error
	defer func() {
		for i := len(undo) - 1; i >= 0; i-- {
			if uerr := undo[i](); uerr != nil {
				err = errors.Join(err, uerr)
			}
		}
		if code != 0 || err != nil {
			printLogs()
		}
	}()
	for _, step := range []struct {
		name string
		do   func() (func() error, error)
	}{
		{"network", setUpNetwork},
		{"registry and images", serveImages},
		{"runtime", startRuntime},
		{"control plane", startCluster},
		{"kubelet", startKubelet},
	} {
		stepBegan := time.Now()
		inverse, err := step.do()
		if inverse != nil {
			undo = append(undo, inverse)
		}
		if err != nil {
			return 1, fmt.Errorf("%s: %w", step.name, err)
		}
		fmt.Printf("node: %s: %.1f s\n", step.name, time.Since(stepBegan).Seconds())
	}
	code = m.Run()
	if err := suite.cluster.drain(); err != nil {
		return 1, err
	}
	if err := suite.runtime.checkEmpty(); err != nil {
		return 1, err
	}
	fmt.Printf("node: %.0f s\n", time.Since(began).Seconds())
	return code, nil
}

// setUpNetwork gives the node an address that is not loopback, which both the
// kubelet and the API server insist on.
func setUpNetwork() (func() error, error) {
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"link", "add", link, "type", "bridge"},
		{"address", "add", address + "/24", "dev", link},
		{"link", "set", link, "up"},
	} {
		if err := run("ip", args...); err != nil {
			return nil, err
		}
	}
	return func() error { return run("ip", "link", "del", link) }, nil
}

// serveImages makes the pods' image and serves it on loopback: a static busybox
// with its applets, and the test program of package images as /bin/web.
func serveImages() (func() error, error) {
	dir := filepath.Join(suite.base, "images")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	img, err := busyboxImage(dir)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	quiet := log.New(io.Discard, "", 0)
	srv := &http.Server{Handler: registry.New(registry.Logger(quiet)), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = srv.Serve(l) }() // until Close
	suite.image = l.Addr().String() + "/busybox:1"
	return srv.Close, crane.Push(img, suite.image, crane.Insecure)
}

func busyboxImage(dir string) (v1.Image, error) {
	const path = "/bin/busybox"
	busybox, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: install busybox-static (make setup does)", err)
	}
	out, err := exec.Command(path, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list: %w", path, err)
	}
	web, err := images.Build(dir, runtime.GOARCH)
	if err != nil {
		return nil, err
	}
	program, err := os.ReadFile(web)
	if err != nil {
		return nil, err
	}
	entries := []images.Entry{
		images.Dir("bin/", 0o755), images.Dir("etc/", 0o755), images.Dir("tmp/", 0o1777), images.Dir("root/", 0o700), images.Dir("data/", 0o755),
		images.File("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/tmp:/bin/sh\n"),
		images.File("etc/group", 0o644, "root:x:0:\napp:x:1000:\n"),
		images.File("data/from-image", 0o644, "of the image\n"),
		images.File("bin/busybox", 0o755, string(busybox)),
		images.File("bin/web", 0o755, string(program)),
	}
	for _, applet := range strings.Fields(string(out)) {
		if applet != "busybox" {
			entries = append(entries, images.Symlink("bin/"+applet, "busybox"))
		}
	}
	layer, err := images.Layer(entries...)
	if err != nil {
		return nil, err
	}
	return images.Image(runtime.GOARCH, v1.Config{
		Cmd: []string{"/bin/sleep", "infinity"},
		Env: []string{"PATH=/bin"},
	}, layer)
}

// run runs a program that should say nothing.
func run(name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
