package cri

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// slow is a client that takes its time.
type slow struct {
	pause time.Duration
	n     int
}

func (s *slow) Write(p []byte) (int, error) {
	time.Sleep(s.pause)
	s.n += len(p)
	return len(p), nil
}

// T12: the output of a process that has ended ends, whatever the guest does; a
// client that takes its time gets all of an honest guest's.
func TestOutputsOfAHostileGuest(t *testing.T) {
	for name, tc := range map[string]struct {
		guest func(*guestapi.Stream)
		pause time.Duration
		err   error
		n     int
	}{
		"honest, slow client": {func(s *guestapi.Stream) {
			for range 8 {
				_, _ = s.Write(make([]byte, 10))
			}
			_ = s.CloseWrite()
		}, 60 * time.Millisecond, nil, 80},
		"silent":     {func(*guestapi.Stream) {}, 0, errDrain, 0},
		"drips":      {func(s *guestapi.Stream) { drip(s, 5*time.Millisecond, 1) }, 0, errDrain, -1},
		"floods":     {func(s *guestapi.Stream) { drip(s, 0, guestapi.MaxFrame) }, 0, errDrain, -1},
		"breaks off": {func(s *guestapi.Stream) { s.Close() }, 0, io.ErrUnexpectedEOF, 0},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe()
			defer a.Close()
			defer b.Close()
			client := &slow{pause: tc.pause}
			o := outputs{patience: 200 * time.Millisecond}
			o.copy(client, guestapi.NewStream(a))
			go tc.guest(guestapi.NewStream(b))
			began := time.Now()
			err := o.wait()
			if !errors.Is(err, tc.err) || tc.n >= 0 && client.n != tc.n {
				t.Errorf("%d bytes, %v, want %v", client.n, err, tc.err)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

func drip(s *guestapi.Stream, pause time.Duration, n int) {
	for {
		if _, err := s.Write(make([]byte, n)); err != nil {
			return
		}
		time.Sleep(pause)
	}
}
