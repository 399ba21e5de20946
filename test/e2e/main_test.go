//go:build linux

package e2e_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/guest/image"
	"github.com/cri-vz/cri-vz/sandbox/network"
	"github.com/cri-vz/cri-vz/test/images"
)

// The suite runs twice nested: the outer process makes the place (a directory
// and a network namespace that plays the node), starts itself in it, and cleans
// up and judges what was left, however the inner one ended. baseEnv tells the
// inner one where it is.
const baseEnv = "CRI_VZ_E2E_BASE"

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
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func outer() (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("these tests make network namespaces and VMs: run them as root (make test does)")
	}
	runtime.LockOSThread() // the inner process dies with this thread, and starts in its namespace
	before, err := links()
	if err != nil {
		return 1, err
	}
	// Short, because of the sockets below it (T14).
	base, err := os.MkdirTemp("/tmp", "cve")
	if err != nil {
		return 1, err
	}
	// QEMU runs as nobody.
	if err := os.Chmod(base, 0o755); err != nil {
		return 1, err
	}
	// What the inner process leaves becomes ours, and is found.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return 1, fmt.Errorf("become a subreaper: %w", err)
	}
	node := filepath.Join(base, "node")
	if err := network.CreateNetns(node); err != nil {
		return 1, errors.Join(err, os.RemoveAll(base))
	}
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM) // the inner process ends, then this one cleans up
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), baseEnv+"="+base)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := inNetns(node, cmd.Start); err != nil {
		return 1, err
	}
	werr := waitAndReap(cmd)
	left := sweep(base, node)
	after, lerr := links()
	for _, l := range after {
		if !slices.Contains(before, l) && strings.HasPrefix(l, "cri-vz") {
			left = append(left, "network interface "+l)
		}
	}
	if len(left) > 0 {
		err = fmt.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
	}
	var exit *exec.ExitError
	if errors.As(werr, &exit) {
		return max(1, exit.ExitCode()), err
	}
	return 0, errors.Join(err, werr, lerr)
}

// inNetns calls f on this thread in the network namespace at path.
func inNetns(path string, f func() error) error {
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer own.Close()
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	return errors.Join(f(), unix.Setns(int(own.Fd()), unix.CLONE_NEWNET))
}

// waitAndReap waits for cmd and meanwhile reaps what was orphaned to us, as a
// node's PID 1 does.
func waitAndReap(cmd *exec.Cmd) error {
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			for _, p := range processes() {
				if p.parent == os.Getpid() && p.pid != cmd.Process.Pid && p.state == 'Z' {
					_, _ = unix.Wait4(p.pid, nil, unix.WNOHANG, nil)
				}
			}
		}
	}()
	err := cmd.Wait()
	close(stop)
	<-done
	return err
}

// sweep removes all that is below base, and says what should not have been there.
func sweep(base, node string) (left []string) {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		rest := descendants(os.Getpid())
		for _, p := range rest {
			if p.state == 'Z' {
				_, _ = unix.Wait4(p.pid, nil, unix.WNOHANG, nil)
				continue
			}
			left = append(left, fmt.Sprintf("process %d: %.200s", p.pid, p.command))
			_ = unix.Kill(p.pid, unix.SIGKILL)
		}
		if len(rest) == 0 || time.Now().After(deadline) {
			break
		}
	}
	for _, m := range mountsBelow(base) {
		if m != node {
			left = append(left, "mount "+m)
			_ = unix.Unmount(m, unix.MNT_DETACH)
		}
	}
	for _, err := range []error{network.DeleteNetns(node), os.RemoveAll(base)} {
		if err != nil {
			left = append(left, err.Error())
		}
	}
	sort.Strings(left)
	return left
}

// suite is what all tests share: one daemon and what it was made of.
var suite struct {
	base     string // private directory
	bin      string // cri-vz
	guests   string // private copy of the boot files
	images   string // built images
	registry string // host:port in the node's namespace
	node     *node
	started  time.Time
}

func inner(m *testing.M, base string) (code int, err error) {
	suite.base, suite.started = base, time.Now()
	if err := prepare(); err != nil {
		return 1, err
	}
	suite.node = newNode("main")
	if err := suite.node.start(); err != nil {
		return 1, err
	}
	prepared := time.Since(suite.started)
	code = m.Run()
	err = suite.node.finish()
	if code != 0 || err != nil {
		suite.node.printLog(os.Stderr, 25)
	}
	fmt.Printf("e2e: %d boots, %.0f s (of which %.0f s to prepare)\n", boots.Load(), time.Since(suite.started).Seconds(), prepared.Seconds())
	return code, err
}

// prepare makes binaries, images and a registry, and copies the boot files so
// that tests can damage them.
func prepare() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	suite.bin = os.Getenv("CRI_VZ_BIN")
	if suite.bin == "" {
		suite.bin = filepath.Join(suite.base, "bin", "cri-vz")
		out, err := exec.CommandContext(ctx, "go", "build", "-o", suite.bin, "github.com/cri-vz/cri-vz/cmd/cri-vz").CombinedOutput()
		if err != nil {
			return fmt.Errorf("build cri-vz: %w: %s", err, out)
		}
	}
	dir, err := image.DefaultDir()
	if err != nil {
		return err
	}
	if _, err := image.Locate(dir, runtime.GOARCH); err != nil {
		return err // says how to make one
	}
	suite.guests = filepath.Join(suite.base, "guests")
	if err := copyGuest(dir, suite.guests); err != nil {
		return err
	}
	suite.images = filepath.Join(suite.base, "images")
	if err := os.Mkdir(suite.images, 0o755); err != nil {
		return err
	}
	if _, err := images.Build(suite.images, runtime.GOARCH); err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	srv := httptest.NewUnstartedServer(registry.New(registry.Logger(quiet)))
	srv.Listener.Close()
	srv.Listener = l
	srv.Config.ReadHeaderTimeout = 10 * time.Second
	srv.Start() // for the life of the process
	suite.registry = strings.TrimPrefix(srv.URL, "http://")
	http.DefaultTransport.(*http.Transport).Proxy = nil
	return nil
}

// copyGuest copies the guest that boots here, and no other.
func copyGuest(from, to string) error {
	g, err := image.Locate(from, runtime.GOARCH)
	if err != nil {
		return err
	}
	src := filepath.Dir(g.InitrdPath)
	rel, err := filepath.Rel(from, src)
	if err != nil {
		return err
	}
	if err := os.CopyFS(filepath.Join(to, rel), os.DirFS(src)); err != nil {
		return fmt.Errorf("copy the guest's boot files: %w", err)
	}
	if _, err := image.Locate(to, runtime.GOARCH); err != nil {
		return fmt.Errorf("the copied guest: %w", err)
	}
	return nil
}
