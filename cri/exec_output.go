package cri

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

const (
	// drainTime is how long, in sum, an output may keep the host waiting for its
	// end after its process has ended: the guest says so when the output is on its
	// way. What a slow client takes is not counted.
	drainTime = 10 * time.Second
	// drainBytes is how much may be on its way then: more than all buffers between
	// a process and the host hold.
	drainBytes = 64 << 20
	// settleTime is how long an exec that failed waits for writes to its client.
	settleTime = 5 * time.Second
)

// errDrain is how the output of a guest ends that doesn't end it.
var errDrain = errors.New("the process has ended, its output doesn't")

// outputs are the copies of a process's output to its client. A guest may be
// hostile: outputs end, whatever it does.
type outputs struct {
	patience time.Duration // drainTime
	copies   errgroup.Group

	mu      sync.Mutex
	ended   bool // the process has
	streams []*guestapi.Stream
}

// copy begins to copy a stream to its end; nil is nobody who reads it.
func (o *outputs) copy(to io.Writer, from *guestapi.Stream) {
	if to == nil {
		to = io.Discard
	}
	o.mu.Lock()
	o.streams = append(o.streams, from)
	o.mu.Unlock()
	o.copies.Go(func() error { return o.run(to, from) })
}

func (o *outputs) run(to io.Writer, from *guestapi.Stream) error {
	buf := make([]byte, guestapi.MaxFrame)
	patience, left := o.patience, drainBytes
	for {
		ended := o.arm(from, patience)
		start := time.Now()
		n, err := from.Read(buf)
		if ended {
			patience -= time.Since(start)
			left -= n
		}
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				return werr
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded), ended && (patience <= 0 || left <= 0):
			return fmt.Errorf("%w: after %v more, or %d MiB", errDrain, o.patience, drainBytes>>20)
		case err != nil:
			return err
		}
	}
}

// arm bounds the next read, if the process has ended.
func (o *outputs) arm(from *guestapi.Stream, patience time.Duration) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended {
		_ = from.Conn().SetReadDeadline(time.Now().Add(patience))
	}
	return o.ended
}

// wait is called when the process has ended, and returns when its output has.
func (o *outputs) wait() error {
	o.mu.Lock()
	o.ended = true
	for _, s := range o.streams {
		_ = s.Conn().SetReadDeadline(time.Now().Add(o.patience))
	}
	o.mu.Unlock()
	return o.copies.Wait()
}

// settle waits, bounded, for the copies to end whose streams were closed.
func (o *outputs) settle() {
	done := make(chan struct{})
	go func() { _ = o.copies.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(settleTime):
	}
}
