//go:build linux

package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
	"github.com/cri-vz/cri-vz/sandbox"
	"github.com/cri-vz/cri-vz/test/criclient"
)

func TestPortForward(t *testing.T) {
	p := sharedPodOf(t)
	id := p.start(t, "echo", command("/bin/tcp-echo", "7000"))
	waitForLog(t, p.container(t, id).GetLogPath(), "listening")
	request := bytes.Repeat([]byte("cri-vz! "), 8<<10) // 64 KiB

	exchange := func(f *criclient.Forwarder, request []byte) error {
		c, err := f.Dial(7000)
		if err != nil {
			return err
		}
		answer, err := c.Exchange(request)
		if err != nil {
			return err
		}
		if !bytes.Equal(answer, request) {
			return fmt.Errorf("sent %d bytes, got %d back that differ", len(request), len(answer))
		}
		return nil
	}
	t.Run("the first connection", func(t *testing.T) {
		if err := exchange(p.cri.Forward(t), request); err != nil {
			t.Error(err)
		}
	})
	t.Run("refused", func(t *testing.T) {
		f := p.cri.Forward(t)
		c, err := f.Dial(7001)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err = c.Exchange([]byte("x")); err == nil || !strings.Contains(err.Error(), "nothing listens on port 7001") {
			t.Errorf("the error does not say that nothing listens on port 7001: %v", err)
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("took %v", took)
		}
		if err := exchange(p.cri.Forward(t), request); err != nil {
			t.Errorf("the next connection: %v", err)
		}
	})
	t.Run("the command line's way", func(t *testing.T) {
		s, err := suite.node.api.Forward(timeout(t, callTimeout))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&nodeapi.ForwardRequest{PodSandboxId: p.id, Port: 7000}); err != nil {
			t.Fatal(err)
		}
		if m, err := s.Recv(); err != nil || !m.GetOpen() {
			t.Fatalf("%v, %v", m, err)
		}
		if err := s.Send(&nodeapi.ForwardRequest{Data: []byte("hello"), Eof: true}); err != nil {
			t.Fatal(err)
		}
		var got []byte
		for {
			m, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if got = append(got, m.GetData()...); m.GetEof() {
				break
			}
		}
		if string(got) != "hello" {
			t.Errorf("%q", got)
		}
		if s, err = suite.node.api.Forward(timeout(t, callTimeout)); err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&nodeapi.ForwardRequest{PodSandboxId: p.id, Port: 7001}); err != nil {
			t.Fatal(err)
		}
		_, err = s.Recv()
		wantError(t, err, codes.FailedPrecondition, "nothing listens on port 7001")
	})
	t.Run("handed over to the shim", func(t *testing.T) {
		st, err := p.cri.PodSandboxStatus(timeout(t, callTimeout), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		var info struct {
			DataSocket string `json:"dataSocket"`
		}
		if err := json.Unmarshal([]byte(st.GetInfo()["info"]), &info); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		dial := func(port uint16) (*net.TCPConn, error) {
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			_ = c.SetDeadline(time.Now().Add(callTimeout))
			accepted, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer accepted.Close()
			return c.(*net.TCPConn), sandbox.HandOver(timeout(t, callTimeout), info.DataSocket, port, accepted.(*net.TCPConn))
		}
		if _, err := dial(7001); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "nothing listens on port 7001") {
			t.Errorf("nobody listens: %v", err)
		}
		// Many at once: none starves, and each gets its own bytes back. Some break off.
		var all errgroup.Group
		for i := range 64 {
			c, err := dial(7000)
			if err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte{byte(i)}, 256<<10)
			all.Go(func() error {
				if i%8 == 7 {
					_, _ = c.Write(want)
					_ = c.SetLinger(0)
					return c.Close()
				}
				go func() {
					_, _ = c.Write(want)
					_ = c.CloseWrite()
				}()
				got, err := io.ReadAll(c)
				if err != nil || !bytes.Equal(got, want) {
					return fmt.Errorf("connection %d: %d of %d bytes came back, %v", i, len(got), len(want), err)
				}
				return nil
			})
		}
		if err := all.Wait(); err != nil {
			t.Error(err)
		}
		if err := exchange(p.cri.Forward(t), request); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	})
}

func get(url string) (string, error) {
	resp, err := (&http.Client{Timeout: 10 * time.Second}).Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}
