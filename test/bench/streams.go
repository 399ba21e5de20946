//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
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

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
	"github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest"
)

const (
	echoBytes = 48 << 20 // per figure, over all streams
	echoPings = 200
	podPort   = 7000
)

// figures of a path to an echo server in a VM.
type figures struct {
	rtt       time.Duration
	one, many float64 // MB/s there and back, over 1 and over 32 streams
}

// streams compares a forwarded port with the bare vsock device, both to an echo
// server in a VM of the same kernel, and prints what the idle pod weighs.
func (n *node) streams(driver vmm.Driver, guest vmmtest.Guest, kind string) (err error) {
	var device figures
	var derr error
	r := testing.Benchmark(func(b *testing.B) {
		m := vmmtest.Boot(b, driver, guest)
		device, derr = echo(func(ctx context.Context) (io.ReadWriteCloser, error) { return m.Dial(ctx, vmmtest.EchoPort) })
	})
	if derr != nil || r.N == 0 {
		return fmt.Errorf("echo over the device: %w", errors.Join(derr, errors.New("no result")))
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
	c, err := n.create(ctx, pod, cfg, benchImage, "tcp-echo", strconv.Itoa(podPort))
	if err != nil {
		return err
	}
	if _, err := n.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c}); err != nil {
		return err
	}
	forward := func(ctx context.Context) (io.ReadWriteCloser, error) { return n.forward(ctx, pod) }
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
	forwarded, err := echo(forward)
	if err != nil {
		return fmt.Errorf("echo over a forwarded port: %w", err)
	}
	st, err := n.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil {
		return err
	}
	tap, err := echo(func(ctx context.Context) (io.ReadWriteCloser, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(st.GetStatus().GetNetwork().GetIp(), strconv.Itoa(podPort)))
	})
	if err != nil {
		return fmt.Errorf("echo over the pod's address: %w", err)
	}
	mb := func(f float64) string { return fmt.Sprintf("%.0f MB/s", f) }
	quot := func(a, b float64) string { return fmt.Sprintf("%.2f", a/b) }
	table("vsock device round trip, "+kind, ms(device.rtt), "", "")
	table("vsock device echo, 1 stream, "+kind, mb(device.one), "", "")
	table("vsock device echo, 32 streams, "+kind, mb(device.many), "", "")
	table("port forward round trip, "+kind, ms(forwarded.rtt), ratio(forwarded.rtt, device.rtt), "device")
	table("port forward echo, 1 stream, "+kind, mb(forwarded.one), quot(forwarded.one, device.one), "device (goal: at least 0.8)")
	table("port forward echo, 32 streams, "+kind, mb(forwarded.many), quot(forwarded.many, device.many), "device (goal: at least 0.8)")
	table("pod address (tap) echo, 1 stream, "+kind, mb(tap.one), quot(tap.one, device.one), "device")
	return nil
}

// echo measures a path to an echo server.
func echo(dial func(context.Context) (io.ReadWriteCloser, error)) (f figures, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	c, err := dial(ctx)
	if err != nil {
		return f, err
	}
	var rtt []time.Duration
	for b := []byte{0}; len(rtt) < echoPings && err == nil; {
		err = timed(&rtt, func(context.Context) error {
			if _, err := c.Write(b); err != nil {
				return err
			}
			_, err := io.ReadFull(c, b)
			return err
		})
	}
	c.Close()
	if err != nil {
		return f, err
	}
	f.rtt = p50(rtt)
	if f.one, err = throughput(ctx, dial, 1); err == nil {
		f.many, err = throughput(ctx, dial, 32)
	}
	return f, err
}

func throughput(ctx context.Context, dial func(context.Context) (io.ReadWriteCloser, error), streams int) (float64, error) {
	each := echoBytes / streams
	g, ctx := errgroup.WithContext(ctx)
	began := time.Now()
	for range streams {
		g.Go(func() error {
			c, err := dial(ctx)
			if err != nil {
				return err
			}
			defer c.Close()
			sent := make(chan error, 1)
			go func() {
				buf := make([]byte, 64<<10)
				for left := each; left > 0; {
					n, err := c.Write(buf[:min(left, len(buf))])
					if err != nil {
						sent <- err
						return
					}
					left -= n
				}
				sent <- nil
			}()
			_, err = io.CopyN(io.Discard, c, int64(each))
			return errors.Join(err, <-sent)
		})
	}
	err := g.Wait()
	return float64(streams*each) / time.Since(began).Seconds() / 1e6, err
}

// forward is one connection to the pod's port, as `cri-vz run -p` makes it.
func (n *node) forward(ctx context.Context, pod string) (io.ReadWriteCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	s, err := n.own.Forward(ctx)
	if err == nil {
		err = s.Send(&nodeapi.ForwardRequest{PodSandboxId: pod, Port: podPort})
	}
	if err == nil {
		_, err = s.Recv()
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return &forwardConn{s: s, cancel: cancel}, nil
}

type forwardConn struct {
	s      nodeapi.Node_ForwardClient
	cancel context.CancelFunc
	rest   []byte
}

func (c *forwardConn) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		m, err := c.s.Recv()
		if err != nil {
			return 0, err
		}
		if m.GetEof() {
			return 0, io.EOF
		}
		c.rest = m.GetData()
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *forwardConn) Write(p []byte) (int, error) {
	if err := c.s.Send(&nodeapi.ForwardRequest{Data: p}); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *forwardConn) Close() error { c.cancel(); return nil }

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
