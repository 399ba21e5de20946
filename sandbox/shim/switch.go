package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cri-vz/cri-vz/sandbox/network/frameswitch"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

const (
	// joinBound is how long a switch may be away when a pod starts: the daemon looks
	// after it once a second, and starts it anew.
	joinBound = 10 * time.Second
	joinEvery = 50 * time.Millisecond
)

// joinSwitch is the machine's NIC on the frame switch. The port is the shim's: a second
// machine gets the same one.
func (s *Shim) joinSwitch(ctx context.Context) (vmm.NIC, error) {
	mac, err := net.ParseMAC(s.cfg.SwitchMAC)
	if err != nil {
		return vmm.NIC{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, joinBound)
	defer cancel()
	s.mu.Lock()
	port := s.port
	s.mu.Unlock()
	for start := time.Now(); port == nil; {
		port, err = frameswitch.Join(ctx, s.cfg.SwitchSocket, mac)
		switch {
		case err == nil:
			s.mu.Lock()
			s.port = port
			s.mu.Unlock()
			continue
		case !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ECONNREFUSED):
			return vmm.NIC{}, err
		}
		select {
		case <-time.After(joinEvery):
		case <-ctx.Done():
			return vmm.NIC{}, fmt.Errorf("waited %v for the frame switch, see switch.log in the daemon's network directory: %w", time.Since(start).Round(time.Millisecond), err)
		}
	}
	// A copy: the machine owns it.
	frames, err := dupFile(port.File())
	if err != nil {
		return vmm.NIC{}, err
	}
	return vmm.NIC{MAC: mac, MTU: s.cfg.MTU, Frames: frames}, nil
}
