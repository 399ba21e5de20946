//go:build linux

// Command critest runs the critest that is found on PATH against a daemon of its
// own, in a network namespace that plays the node, or against a runtime that
// runs already, and prints what passed, what failed, and what was left out and
// why. Its exit status is 0 only if nothing failed and nothing was skipped but
// what is left out by name.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/cri-vz/cri-vz/test/testnode"
)

// ginkgo is what critest runs to use several processes; the version is the one
// that critest v1.36.0 is built with.
const ginkgo = "github.com/onsi/ginkgo/v2/ginkgo@v2.28.1"

// relayEnv tells the process in the namespace where the registry's relay
// listens: the registry itself is in the caller's network.
const relayEnv = "CRI_VZ_CRITEST_RELAY"

// registries are the names that critest pulls from.
var registries = []string{"registry.k8s.io", "k8s.gcr.io", "gcr.io", "public.ecr.aws"}

type options struct {
	parallel int
	registry string
	endpoint string
	focus    string
	out      string
	// websocket: the streaming specs use it instead of SPDY.
	websocket bool
}

func main() {
	var o options
	flag.IntVar(&o.parallel, "parallel", 1, "number of specs at a time")
	flag.StringVar(&o.registry, "registry", os.Getenv("CRITEST_REGISTRY"), "HOST:PORT of a plain HTTP registry that has critest's images")
	flag.StringVar(&o.endpoint, "endpoint", os.Getenv("CRI_SOCKET"), "unix://PATH of a runtime that runs already, in this network namespace")
	flag.StringVar(&o.focus, "focus", "", "regular expression: run these specs only, and want no number of passes")
	flag.BoolVar(&o.websocket, "websocket", false, "exec, attach and port-forward over WebSocket instead of SPDY")
	flag.StringVar(&o.out, "out", "bin", "directory for critest.log and critest.json")
	flag.Parse()
	code, err := run(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "critest:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func run(o options) (int, error) {
	var err error
	if o.out, err = filepath.Abs(o.out); err != nil {
		return 1, err
	}
	if os.Getenv(relayEnv) == "" { // once, not in the namespace again
		clean, err := prepare(o)
		if err != nil {
			return 1, err
		}
		defer clean()
	}
	if o.endpoint != "" {
		return critest(o)
	}
	return testnode.Run("cvt", func(base string) (int, error) { return inside(base, o) })
}

// prepare makes what needs the caller's network.
func prepare(o options) (clean func(), err error) {
	if _, err := exec.LookPath("critest"); err != nil {
		return nil, fmt.Errorf("%w; it comes with github.com/kubernetes-sigs/cri-tools", err)
	}
	if o.endpoint == "" && o.registry == "" {
		return nil, errors.New("name a registry that has critest's images, as HOST:PORT (make critest CRITEST_REGISTRY=...), or a runtime that runs already and has one (CRI_SOCKET=unix://...)")
	}
	dir, err := os.MkdirTemp("", "critest-")
	if err != nil {
		return nil, err
	}
	remove := func() { os.RemoveAll(dir) }
	defer func() {
		if err != nil {
			remove()
		}
	}()
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return nil, err
	}
	if _, err := exec.LookPath("ginkgo"); err != nil && o.parallel > 1 {
		fmt.Printf("no ginkgo on PATH: building %s\n", ginkgo)
		cmd := exec.Command("go", "install", ginkgo)
		cmd.Env = append(cmd.Environ(), "GOBIN="+dir)
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("critest -parallel runs ginkgo, which is not on PATH and can't be built: %w: %s", err, out)
		}
		if err := os.Setenv("PATH", dir+":"+os.Getenv("PATH")); err != nil {
			return nil, err
		}
	}
	if o.endpoint != "" {
		return remove, nil
	}
	relay := filepath.Join(dir, "registry")
	l, err := net.Listen("unix", relay)
	if err != nil {
		return nil, err
	}
	go forward(l, "tcp", strings.TrimSuffix(strings.TrimPrefix(o.registry, "http://"), "/"))
	return remove, os.Setenv(relayEnv, relay)
}

// forward connects who connects to l with an address, until the process ends.
func forward(l net.Listener, network, address string) {
	for {
		from, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer from.Close()
			to, err := net.DialTimeout(network, address, 10*time.Second)
			if err != nil {
				fmt.Fprintln(os.Stderr, "critest: the registry:", err)
				return
			}
			defer to.Close()
			go func() {
				_, _ = io.Copy(to, from) // ends with either connection
				to.Close()
			}()
			_, _ = io.Copy(from, to)
		}()
	}
}

// inside starts a daemon in the network namespace, runs critest against it, and
// judges what is left.
func inside(base string, o options) (code int, err error) {
	for _, s := range []string{"ip_forward", "conf/all/route_localnet"} { // critest asks for a host port on loopback
		if err := os.WriteFile("/proc/sys/net/ipv4/"+s, []byte("1"), 0); err != nil {
			return 1, fmt.Errorf("set net.ipv4.%s in the test's network namespace: %w", s, err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 1, err
	}
	defer l.Close()
	go forward(l, "unix", os.Getenv(relayEnv))
	bin, err := testnode.BuildBinary(base)
	if err != nil {
		return 1, err
	}
	dir := filepath.Join(base, "daemon")
	d, err := testnode.NewDaemon(bin, dir, "")
	if err != nil {
		return 1, err
	}
	for _, r := range registries {
		hosts := fmt.Sprintf("server = %q\n", "http://"+l.Addr().String())
		path := filepath.Join(dir, "certs.d", r)
		if err := errors.Join(os.MkdirAll(path, 0o755), os.WriteFile(filepath.Join(path, "hosts.toml"), []byte(hosts), 0o644)); err != nil {
			return 1, err
		}
	}
	if err := d.Start(); err != nil {
		return 1, err
	}
	tmp := filepath.Join(base, "tmp") // critest leaves directories in its temporary one
	if err := errors.Join(os.Mkdir(tmp, 0o755), os.Setenv("TMPDIR", tmp)); err != nil {
		return 1, err
	}
	o.endpoint = "unix://" + d.Socket
	code, err = critest(o)
	if code != 0 || err != nil {
		d.PrintLog(os.Stderr, 25)
	}
	// critest removes its pods.
	err = errors.Join(err, d.Leftovers(), d.Stop())
	for _, p := range d.Processes() {
		err = errors.Join(err, fmt.Errorf("process %d is left: %.200s", p.PID, p.Command))
	}
	return code, err
}

// critest runs the suite and prints the verdict.
func critest(o options) (int, error) {
	const report = "critest.json" // relative: in parallel, Ginkgo makes one path of two
	if err := os.Remove(filepath.Join(o.out, report)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 1, err
	}
	log, err := os.Create(filepath.Join(o.out, "critest.log"))
	if err != nil {
		return 1, err
	}
	defer log.Close()
	args := []string{"-runtime-endpoint", o.endpoint, "-image-endpoint", o.endpoint, "-ginkgo.no-color", "-ginkgo.json-report", report}
	for _, x := range exclusions {
		args = append(args, "-ginkgo.skip", x.pattern)
	}
	least := leastPassed
	if o.focus != "" {
		args, least = append(args, "-ginkgo.focus", o.focus), 0
	}
	if o.websocket {
		args = append(args, "-websocket-exec", "-websocket-attach", "-websocket-portforward")
	}
	if o.parallel > 1 {
		args = append(args, "-parallel", fmt.Sprint(o.parallel))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "critest", args...)
	cmd.Dir = o.out
	var tail bytes.Buffer
	cmd.Stdout = io.MultiWriter(log, &tail)
	cmd.Stderr = cmd.Stdout
	fmt.Printf("critest %s\n", strings.Join(args, " "))
	began := time.Now()
	cerr := cmd.Run()
	took := time.Since(began)
	specs, err := readReport(filepath.Join(o.out, report))
	if err != nil {
		b := tail.Bytes()
		return 1, fmt.Errorf("%w; %w: %s", err, cerr, b[max(0, len(b)-4096):])
	}
	if o.focus != "" {
		specs = ran(specs)
	}
	v := judge(specs)
	v.print(os.Stdout, took)
	if err := errors.Join(v.err(least), cerr); err != nil {
		return 1, fmt.Errorf("%w; see %s", err, log.Name())
	}
	return 0, nil
}

// ran leaves out what a focus leaves out: specs that were skipped without a word.
func ran(specs []spec) []spec {
	var kept []spec
	for _, s := range specs {
		if s.State != "skipped" || s.Failure != nil {
			kept = append(kept, s)
		}
	}
	return kept
}
