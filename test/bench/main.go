//go:build linux

// Command bench measures cri-vz in real VMs and prints the figures that the
// project promises, as ratios of what was measured in the same run: machines are
// noisy, ratios less so. Run it by hack/bench, which gives it a node to be on.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/cri-vz/cri-vz/guest/image"
	"github.com/cri-vz/cri-vz/sandbox/qemu"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
	"github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest"
	"github.com/cri-vz/cri-vz/test/images"
)

func main() {
	testing.Init() // testing.Benchmark reads its flags
	var o options
	flag.StringVar(&o.program, "cri-vz", "bin/cri-vz", "the program to measure")
	flag.StringVar(&o.dir, "dir", "", "an empty directory with a short path")
	flag.IntVar(&o.rounds, "rounds", 7, "pods per figure")
	flag.BoolVar(&o.streams, "streams", false, "measure traffic only: the vsock device, a forwarded port, the pod's address")
	flag.StringVar(&o.yardstick, "yardstick", "", "CRI socket of another runtime to print beside")
	flag.StringVar(&o.yardstickImage, "yardstick-image", "registry.k8s.io/e2e-test-images/busybox:1.29-2", "an image with sleep and true that the other runtime can pull")
	flag.Parse()
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	program, dir              string
	rounds                    int
	streams                   bool
	yardstick, yardstickImage string
}

func run(o options) error {
	guests, err := image.DefaultDir()
	if err != nil {
		return err
	}
	var yard latency
	if o.yardstick != "" {
		node, err := dial(o.yardstick)
		if err != nil {
			return err
		}
		if err := node.pull(o.yardstickImage); err != nil {
			return err
		}
		if yard, err = node.rounds(o.rounds, o.yardstickImage); err != nil {
			return fmt.Errorf("yardstick: %w", err)
		}
	}
	table("", "p50 of "+fmt.Sprint(o.rounds), "ratio", "to")
	var last *image.Guest
	for _, kind := range []image.Kind{image.KindStock, image.KindFast} {
		g, err := image.LocateKind(guests, runtime.GOARCH, kind)
		if err != nil {
			table("RunPodSandbox, "+string(kind)+" kernel", "not built", "", "")
			continue
		}
		last = &g
		if err := measureKind(o, guests, g, yard); err != nil {
			return fmt.Errorf("%s kernel: %w", kind, err)
		}
	}
	if last == nil {
		return errors.New("there is no guest: run `make guest` first")
	}
	if o.streams {
		return nil
	}
	if err := weighDaemon(o, guests, *last); err != nil {
		return fmt.Errorf("the daemon with many pods: %w", err)
	}
	return sizes(guests)
}

// measureKind measures pods on one kernel, beside bare boots of the same kernel
// that are taken in turn with them.
func measureKind(o options, guests string, g image.Guest, yard latency) (err error) {
	driver, err := qemu.New(qemu.Options{Accel: qemu.AccelAuto, CacheDir: filepath.Join(o.dir, "driver")})
	if err != nil {
		return err
	}
	guest := vmmtest.Guest{Arch: g.Arch, Kernel: g.KernelPath, Initrd: g.InitrdPath, Cmdline: g.Cmdline}
	d, err := startDaemon(o, string(g.KernelKind), guests, g)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	node, err := dial(d.socket)
	if err != nil {
		return err
	}
	archive := filepath.Join(o.dir, "bench.tar")
	img, err := images.WebServer(o.dir, runtime.GOARCH)
	if err == nil {
		err = images.SaveDockerArchive(archive, benchImage, img)
	}
	if err == nil {
		err = node.load(archive)
	}
	if err != nil {
		return err
	}
	kind := string(g.KernelKind)
	if o.streams {
		return node.streams(driver, guest, kind)
	}
	var bare []time.Duration
	var pods latency
	for range o.rounds {
		b, err := bareBoot(driver, guest)
		if err != nil {
			return err
		}
		bare = append(bare, b)
		l, err := node.rounds(1, benchImage)
		if err != nil {
			return err
		}
		pods.add(l)
	}
	boot := p50(bare)
	table("bare boot to a ready agent, "+kind+" kernel", ms(boot), "", "")
	table("RunPodSandbox, "+kind+" kernel", ms(p50(pods.run)), ratio(p50(pods.run), boot), "bare boot (goal: at most 1.25)")
	for _, name := range pods.order {
		table("  "+name, ms(p50(pods.steps[name])), "", "")
	}
	for _, c := range []struct {
		name        string
		mine, other []time.Duration
	}{
		{"CreateContainer", pods.create, yard.create}, {"StartContainer", pods.start, yard.start},
		{"ExecSync echo", pods.exec, yard.exec}, {"StopPodSandbox", pods.stop, yard.stop},
	} {
		if len(c.other) == 0 {
			table(c.name+", "+kind, ms(p50(c.mine)), "", "")
			continue
		}
		table(c.name+", "+kind, ms(p50(c.mine)), ratio(p50(c.mine), p50(c.other)), "yardstick: "+ms(p50(c.other)))
	}
	return node.streams(driver, guest, kind)
}

// bareBoot is the time from a machine's New to an agent that can be dialled.
func bareBoot(driver vmm.Driver, guest vmmtest.Guest) (time.Duration, error) {
	if err := flag.Set("test.benchtime", "1x"); err != nil {
		return 0, err
	}
	r := testing.Benchmark(func(b *testing.B) { vmmtest.BareBoot(b, driver, guest) })
	if r.N == 0 {
		return 0, errors.New("the bare boot failed")
	}
	return r.T / time.Duration(r.N), nil
}

type daemon struct {
	cmd    *exec.Cmd
	socket string
}

// startDaemon runs a daemon whose only guest is g, in directory name.
func startDaemon(o options, name, guests string, g image.Guest, args ...string) (*daemon, error) {
	base := filepath.Join(o.dir, name)
	only := filepath.Join(base, "guest", g.Arch)
	if err := os.MkdirAll(only, 0o700); err != nil {
		return nil, err
	}
	if err := os.Symlink(filepath.Join(guests, g.Arch, string(g.KernelKind)), filepath.Join(only, string(g.KernelKind))); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(base, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	d := &daemon{socket: filepath.Join(base, "run", "cri-vz.sock")}
	d.cmd = exec.Command(o.program, append([]string{"serve", "--root", filepath.Join(base, "root"), "--run", filepath.Join(base, "run")}, args...)...)
	d.cmd.Env = append(os.Environ(), "CRI_VZ_CACHE="+filepath.Join(base, "guest"))
	d.cmd.Stderr = log
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(d.socket); err == nil {
			return d, nil
		}
		if time.Now().After(end) {
			b, _ := os.ReadFile(log.Name())
			return nil, errors.Join(fmt.Errorf("the daemon is not ready after 30 s: %s", b), d.stop())
		}
	}
}

func (d *daemon) stop() error {
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(10*time.Second, func() { _ = d.cmd.Process.Kill() })
	defer kill.Stop()
	return d.cmd.Wait()
}

// sizes prints what the guest weighs.
func sizes(guests string) error {
	all, err := image.List(guests)
	if err != nil {
		return err
	}
	for _, g := range all {
		name := g.Arch + " " + string(g.KernelKind)
		table("initramfs, "+name, fmt.Sprintf("%.1f MB", float64(g.Initrd.Size)/1e6), "", "goal: at most 10 MB")
		table("agent, "+name, fmt.Sprintf("%.2f MiB", float64(g.Agent.Size)/(1<<20)), "", "goal: at most 6 MiB")
	}
	return nil
}

func table(name, value, ratio, to string) {
	fmt.Printf("%-56s %12s %6s  %s\n", name, value, ratio, to)
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

func ratio(a, b time.Duration) string { return fmt.Sprintf("%.2f", float64(a)/float64(b)) }

func p50(d []time.Duration) time.Duration {
	d = slices.Clone(d)
	slices.Sort(d)
	return d[len(d)/2]
}

// timed runs f and appends how long it took.
func timed(to *[]time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	began := time.Now()
	err := f(ctx)
	*to = append(*to, time.Since(began))
	return err
}
