//go:build linux

package e2e_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
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
