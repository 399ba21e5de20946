//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/sandbox"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
	"github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest"
	"github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest/traffic"
)

const (
	streamBytes = 48 << 20 // per figure, over all streams
	manyStreams = 32
	pings       = 200
	connects    = 50
	podPort     = 7000
)

// path is a way to a server of traffic in a VM.
type path func(context.Context) (io.ReadWriteCloser, error)

// figures of a path.
type figures struct {
	connect, rtt time.Duration
	mb           [len(loads)]float64 // MB/s
}

// loads are what throughput is measured of; the test guest knows each by its way.
var loads = [...]struct {
	name    string
	streams int
	move    func(io.ReadWriter, int64) error
	way     string
}{
	{"to the guest, 1 stream", 1, traffic.Send, "send"},
	{"to the guest, 32 streams", manyStreams, traffic.Send, "send"},
	{"from the guest, 1 stream", 1, traffic.Receive, "receive"},
	{"from the guest, 32 streams", manyStreams, traffic.Receive, "receive"},
}

// streams compares forwarded ports with the bare vsock device, in VMs of the same
// kernel, and prints what the idle pod weighs.
//
// A forwarded port ends at a TCP server, in a process of its own. The device ends
// at whoever listens on vsock, which is less work for the guest's CPU: in a guest
// that is emulated, far less. Three ratios are therefore printed of each figure: to
// the device with a TCP server behind it, joined by the shortest of relays; to the
// device alone, which is what the goal is about; and to what one CPU can carry at
// best that has to take each byte from the device and to pass it on by TCP, which
// follows from what the device and TCP inside the guest carry alone.
func (n *node) streams(driver vmm.Driver, guest vmmtest.Guest, kind string) (err error) {
	var device, relayed, loopback, best figures
	var derr error
	r := testing.Benchmark(func(b *testing.B) {
		m := vmmtest.Boot(b, driver, guest)
		dial := func(port uint32) path {
			return func(ctx context.Context) (io.ReadWriteCloser, error) { return m.Dial(ctx, port) }
		}
		if device, derr = measure(dial(vmmtest.TrafficPort)); derr == nil {
			relayed, derr = measure(dial(vmmtest.RelayPort))
		}
		inside := vmmtest.Await(b, m)
		for i, l := range loads {
			for range 3 {
				ns, err := strconv.ParseInt(inside.Do(b, "loopback %s %d %d", l.way, l.streams, streamBytes), 10, 64)
				if err != nil {
					b.Fatal(err)
				}
				loopback.mb[i] = max(loopback.mb[i], perSecond(time.Duration(ns)))
			}
			best.mb[i] = 1 / (1/device.mb[i] + 1/loopback.mb[i])
		}
	})
	if derr != nil || r.N == 0 {
		return fmt.Errorf("traffic over the device: %w", errors.Join(derr, errors.New("no result")))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cfg := n.podConfig()
	p, err := n.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		return err
	}
	pod := p.GetPodSandboxId()
	defer func() {
		_, rerr := n.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
		err = errors.Join(err, rerr)
	}()
	if err := weigh(pod, kind); err != nil {
		return err
	}
	c, err := n.create(ctx, pod, cfg, benchImage, "tcp-traffic", strconv.Itoa(podPort))
	if err != nil {
		return err
	}
	if _, err := n.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c}); err != nil {
		return err
	}
	f, err := n.newForwarder(ctx, pod)
	if err != nil {
		return err
	}
	defer f.l.Close()
	forward := f.dial
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := forward(ctx)
		if err == nil {
			conn.Close()
			break
		}
		if time.Now().After(end) {
			return err
		}
	}
	forwarded, err := measure(forward)
	if err != nil {
		return fmt.Errorf("traffic over a forwarded port: %w", err)
	}
	st, err := n.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil {
		return err
	}
	tap, err := measure(func(ctx context.Context) (io.ReadWriteCloser, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(st.GetStatus().GetNetwork().GetIp(), strconv.Itoa(podPort)))
	})
	if err != nil {
		return fmt.Errorf("traffic over the pod's address: %w", err)
	}
	throughput := func(name, goal string, f figures) {
		for i, l := range loads {
			table(name+" "+l.name+", "+kind, fmt.Sprintf("%.0f MB/s", f.mb[i]), quotient(f.mb[i], relayed.mb[i]),
				fmt.Sprintf("device + TCP server; device alone: %s%s; one CPU's best: %s", quotient(f.mb[i], device.mb[i]), goal, quotient(f.mb[i], best.mb[i])))
		}
	}
	print := func(name, goal string, f figures) {
		table(name+" connect, "+kind, ms(f.connect), ratio(f.connect, relayed.connect), "device + TCP server")
		table(name+" round trip, "+kind, ms(f.rtt), ratio(f.rtt, relayed.rtt), "device + TCP server")
		throughput(name, goal, f)
	}
	print("vsock device", "", device)
	throughput("TCP inside the guest", "", loopback)
	throughput("device and TCP, one CPU's best", "", best)
	print("device + TCP server", "", relayed)
	print("port forward", " (goal: at least 0.8)", forwarded)
	print("pod address (tap)", "", tap)
	return nil
}

// measure returns the figures of a path, each the best of three where one run
// is short: what else the machine does only ever makes it worse.
func measure(dial path) (f figures, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	var took []time.Duration
	for range connects {
		if err := timed(&took, func(context.Context) error {
			c, err := dial(ctx)
			if err != nil {
				return err
			}
			defer c.Close()
			return traffic.Ping(c)
		}); err != nil {
			return f, err
		}
	}
	f.connect = p50(took)
	c, err := dial(ctx)
	if err != nil {
		return f, err
	}
	defer c.Close()
	took = nil
	for range pings {
		if err := timed(&took, func(context.Context) error { return traffic.Ping(c) }); err != nil {
			return f, err
		}
	}
	f.rtt = p50(took)
	for i, l := range loads {
		for range 3 {
			took, err := traffic.Measure(func() (io.ReadWriteCloser, error) { return dial(ctx) }, l.streams, streamBytes, l.move)
			if err != nil {
				return f, fmt.Errorf("%s: %w", l.name, err)
			}
			f.mb[i] = max(f.mb[i], perSecond(took))
		}
	}
	return f, nil
}

// perSecond is in MB/s what streamBytes in such a time are.
func perSecond(took time.Duration) float64 { return streamBytes / took.Seconds() / 1e6 }

func quotient(a, b float64) string { return fmt.Sprintf("%.2f", a/b) }

// forwarder makes connections to a port of a pod as `cri-vz run -p` does: it
// listens, and hands what it accepts over to the pod's shim.
type forwarder struct {
	socket string
	l      net.Listener
}

func (n *node) newForwarder(ctx context.Context, pod string) (*forwarder, error) {
	st, err := n.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil {
		return nil, err
	}
	var info struct {
		DataSocket string `json:"dataSocket"`
	}
	if err := json.Unmarshal([]byte(st.GetInfo()["info"]), &info); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	return &forwarder{info.DataSocket, l}, err
}

// dial is for one caller at a time.
func (f *forwarder) dial(ctx context.Context) (io.ReadWriteCloser, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", f.l.Addr().String())
	if err != nil {
		return nil, err
	}
	accepted, err := f.l.Accept()
	if err == nil {
		err = sandbox.HandOver(ctx, f.socket, podPort, accepted.(*net.TCPConn))
		accepted.Close()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// weigh prints the proportional set size of an idle pod, process by process.
func weigh(pod, kind string) error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	parts := map[string]int64{}
	for _, dir := range dirs {
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || !bytes.Contains(cmdline, []byte(pod)) && !childOf(dir, pod) {
			continue
		}
		name := filepath.Base(strings.SplitN(string(cmdline), "\x00", 2)[0])
		switch {
		case strings.HasPrefix(name, "qemu"):
			name = "VMM"
		case strings.Contains(name, "virtiofsd"):
			name = "virtiofsd"
		default:
			name = "shim"
		}
		own, guest, err := pss(dir)
		if err != nil {
			continue // it ended meanwhile
		}
		parts[name] += own
		parts["guest memory"] += guest
	}
	for _, name := range []string{"shim", "VMM", "virtiofsd", "guest memory"} {
		table("PSS of an idle pod, "+name+", "+kind, fmt.Sprintf("%.1f MiB", float64(parts[name])/1024), "", "")
	}
	return nil
}

// childOf tells whether a process is a descendant of the pod's shim.
func childOf(dir, pod string) bool {
	for range 4 {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			return false
		}
		f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(f) < 2 || f[1] == "0" || f[1] == "1" {
			return false
		}
		dir = "/proc/" + f[1]
		if b, err := os.ReadFile(dir + "/cmdline"); err != nil {
			return false
		} else if bytes.Contains(b, []byte(pod)) {
			return true
		}
	}
	return false
}

// pss is a process's proportional set size in KiB, the guest's memory apart.
func pss(dir string) (own, guest int64, err error) {
	f, err := os.Open(filepath.Join(dir, "smaps"))
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	inGuest := false
	for s := bufio.NewScanner(f); s.Scan(); {
		line := s.Text()
		if v, ok := strings.CutPrefix(line, "Pss:"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			if err != nil {
				return 0, 0, err
			}
			if inGuest {
				guest += n
			} else {
				own += n
			}
		} else if first, _, _ := strings.Cut(line, " "); strings.Contains(first, "-") {
			inGuest = strings.Contains(line, "/memfd:memory-backend-memfd")
		}
	}
	return own, guest, nil
}
