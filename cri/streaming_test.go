package cri

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// stdin is a stream to a process, from both of its ends.
func stdin(t *testing.T) (host, guest *guestapi.Stream) {
	t.Helper()
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	return guestapi.NewStream(a), guestapi.NewStream(b)
}

// T17: an attach with nothing but stdin lasts until the guest has taken the
// input, and no longer than the process.
func TestFeed(t *testing.T) {
	for name, tc := range map[string]struct {
		in      func() io.Reader
		guest   func(s *guestapi.Stream, done func()) error
		anyTime bool
	}{
		"a guest that takes its time": {
			func() io.Reader { return strings.NewReader("hello") },
			func(s *guestapi.Stream, done func()) error {
				time.Sleep(50 * time.Millisecond)
				b, err := io.ReadAll(s)
				if string(b) != "hello" {
					return errors.Join(err, errors.New("got "+string(b)))
				}
				time.Sleep(50 * time.Millisecond)
				done()
				return errors.Join(err, s.CloseWrite())
			},
			false,
		},
		"a process that ends while its client is silent": {
			func() io.Reader { r, _ := io.Pipe(); return r },
			func(s *guestapi.Stream, done func()) error { done(); return s.Close() },
			false,
		},
		"a client that breaks off": {
			func() io.Reader { r, w := io.Pipe(); w.CloseWithError(io.ErrUnexpectedEOF); return r },
			func(s *guestapi.Stream, _ func()) error {
				if _, err := io.ReadAll(s); err == nil {
					return errors.New("the guest sees an end of file")
				}
				return nil
			},
			true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			host, guest := stdin(t)
			served := make(chan error, 1)
			var early atomic.Bool
			early.Store(!tc.anyTime)
			go func() { served <- tc.guest(guest, func() { early.Store(false) }) }()
			fed := make(chan struct{})
			go func() { defer close(fed); feed(host, tc.in()) }()
			select {
			case <-fed:
			case <-time.After(5 * time.Second):
				t.Fatal("feed doesn't return")
			}
			if early.Load() {
				t.Error("feed returned before the guest was done")
			}
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	}
}

// T19: output that the deadline cut off is not an answer.
func TestOutputEnd(t *testing.T) {
	expired, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	if err := outputEnd(t.Context(), "c", nil); err != nil {
		t.Error(err)
	}
	if err := outputEnd(expired, "c", nil); err != nil {
		t.Errorf("whole before the deadline: %v", err)
	}
	if err := outputEnd(expired, "c", net.ErrClosed); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if err := outputEnd(t.Context(), "c", io.ErrUnexpectedEOF); !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
}
