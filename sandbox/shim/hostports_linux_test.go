package shim

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/shim/shimtest"
)

// freePort is one that nothing listens on.
func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func TestHostPorts(t *testing.T) {
	good, dead := freePort(t), freePort(t)
	r := newRig(t, &shimtest.Driver{}, Timeouts{}, func(c *Config) {
		c.HostPorts = []HostPort{{Address: "127.0.0.1", Port: good, PodPort: 7}, {Address: "127.0.0.1", Port: dead, PodPort: 8}}
	})
	r.boot()
	dial := func(port uint16) *net.TCPConn {
		t.Helper()
		c, err := net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(port)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		return c
	}
	t.Run("bytes and both ends", func(t *testing.T) {
		c, sent := dial(good), bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
		go func() { _, _ = c.Write(sent); _ = c.CloseWrite() }()
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%d bytes of %d, %v", len(got), len(sent), err)
		}
	})
	t.Run("nothing listens in the pod", func(t *testing.T) {
		// The reset may come before the connecting side has seen its connection.
		c, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(dead))), 10*time.Second)
		if err == nil {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			_, err = c.Read(make([]byte, 1))
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Error(err)
		}
	})
	t.Run("a pod's end", func(t *testing.T) {
		open := dial(good)
		if _, err := open.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(open, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Stop(r.ctx(), &shimapi.StopRequest{}); err != nil {
			t.Fatal(err)
		}
		if n, err := open.Read(make([]byte, 1)); err == nil || errors.Is(err, syscall.ETIMEDOUT) {
			t.Errorf("%d bytes, %v", n, err)
		}
		if c, err := net.Dial("tcp", open.RemoteAddr().String()); err == nil {
			c.Close()
			t.Error("the port is still open")
		}
	})
}

func TestHostPortTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	free := freePort(t)
	d := &shimtest.Driver{}
	r := newRig(t, d, Timeouts{}, func(c *Config) {
		c.HostPorts = []HostPort{{Port: free, PodPort: 7}, {Address: "127.0.0.1", Port: uint16(l.Addr().(*net.TCPAddr).Port), PodPort: 7}}
	})
	_, err = r.StartMachine(r.ctx(), &shimapi.StartMachineRequest{})
	if err = errgrpc.ToNative(err); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "host port") || !strings.Contains(err.Error(), "choose another port") {
		t.Errorf("%v", err)
	}
	if n := len(d.Machines()); n != 0 {
		t.Errorf("%d machines were made", n)
	}
	if again, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(int(free)))); err != nil {
		t.Errorf("the port before it is still taken: %v", err)
	} else {
		again.Close()
	}
}
