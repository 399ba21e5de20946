//go:build linux && (amd64 || arm64)

package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestPacketConn(t *testing.T) {
	a, f, err := packetPair()
	if err != nil {
		t.Fatal(err)
	}
	b, err := newPacketConn(f)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fds := []int{int(w.Fd()), int(w.Fd()), int(w.Fd()), int(w.Fd()), int(w.Fd())}
	if err := a.send(&message{Seq: 7, Op: opStart, Start: &podStart{Role: RoleExecInit}}, fds...); err != nil {
		t.Fatal(err)
	}
	w.Close()
	m, got, err := b.receive()
	if err != nil || m.Seq != 7 || m.Start.Role != RoleExecInit || len(got) != 5 {
		t.Fatalf("got %+v, %v, %v", m, got, err)
	}
	if _, err := unix.Write(got[4], []byte("x")); err != nil {
		t.Error(err)
	}
	closeAll(got)
	if b, err := io.ReadAll(r); string(b) != "x" || err != nil {
		t.Errorf("got %q, %v: a descriptor is left open", b, err)
	}
	// Too few descriptors: refused, and none is kept.
	if err := a.send(&message{Op: opStart, Start: &podStart{Role: RoleExecInit, JoinPID: true}}, 0, 1, 2); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.receive(); err == nil {
		t.Error("a start with 3 descriptors was accepted")
	}
	if err := a.send(&message{Op: opReply, Error: strings.Repeat("x", maxMessage)}); err == nil {
		t.Error("a message that is too long was sent")
	}
	a.close()
	if _, _, err := b.receive(); !isClosed(err) {
		t.Errorf("after close: %v", err)
	}
}

func FuzzDecodeMessage(f *testing.F) {
	for _, m := range []message{
		{Op: opStart, Start: &podStart{Role: RoleContainerInit, NewPID: true}},
		{Op: opSetup, Setup: &podSetup{Hostname: "x", Sysctls: map[string]string{"a": "b"}}},
		{Op: opExit, Status: 256, At: 1},
	} {
		b, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, 5)
	}
	f.Add([]byte(`{"op":"start"}{"op":"start"}`), 0)
	f.Add([]byte(`{"op":"setup","setup":{"routes":[{"destination":"x"}]}}`), 0)
	f.Fuzz(func(t *testing.T, b []byte, fds int) {
		m, err := decodeMessage(b, fds)
		if err != nil {
			return
		}
		switch {
		case m.Op == opStart && (m.Start == nil || fds < m.Start.fds()):
			t.Errorf("accepted %q with %d descriptors", b, fds)
		case m.Op == opSetup && m.Setup == nil:
			t.Errorf("accepted %q", b)
		}
	})
}

func TestStatusOf(t *testing.T) {
	for _, c := range []struct {
		err  error
		code codes.Code
	}{
		{nil, codes.OK},
		{errors.New("x"), codes.Unknown},
		{fmt.Errorf("create: %w", notFoundf("x")), codes.NotFound},
		{errorOf(classOf(preconditionf("x")), "x"), codes.FailedPrecondition},
		{errorOf("", "x"), codes.Unknown},
	} {
		if got := status.Code(statusOf(c.err)); got != c.code {
			t.Errorf("%v: %v, want %v", c.err, got, c.code)
		}
	}
	if err := notFoundf("no %s", "such"); err.Error() != "no such" || !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("got %v", err)
	}
}
