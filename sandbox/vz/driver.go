//go:build (darwin && cgo) || fakevz

package vz

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/Code-Hex/vz/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/guest/image"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

const (
	// cmdlineLimit is COMMAND_LINE_SIZE of x86 and arm64, less what is added here.
	cmdlineLimit = 2048 - 64
	// natMTU is that of the framework's NAT; it can't be chosen.
	natMTU = 1500
	// framesMTU is the least that a NIC of frames can have; the framework refuses the
	// whole configuration otherwise.
	framesMTU = 1500
)

type driver struct{}

// New returns the driver. The error wraps errdefs.ErrFailedPrecondition if this macOS
// is too old for it.
func New() (vmm.Driver, error) {
	if err := checkMacOS(); err != nil {
		return nil, err
	}
	return driver{}, nil
}

// Name implements vmm.Driver.
func (driver) Name() string { return "vz" }

// Capabilities implements vmm.Driver.
func (driver) Capabilities(_ context.Context, arch string) (vmm.Capabilities, error) {
	if arch != hostArch() {
		return vmm.Capabilities{}, fmt.Errorf("vz: guests of architecture %q: this Mac runs %s guests only: %w", arch, hostArch(), errdefs.ErrInvalidArgument)
	}
	return vmm.Capabilities{Accelerator: "hvf", LiveShares: available(FeatureLiveShares)}, nil
}

// Validate implements vmm.Driver. It reads the kernel and looks at the other paths.
func (driver) Validate(c vmm.Config) error {
	if err := validate(c); err != nil {
		return fmt.Errorf("machine %s: %w", c.ID, err)
	}
	return nil
}

func validate(c vmm.Config) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %w", fmt.Errorf(format, args...), vmm.ErrConfig)
	}
	if c.Arch != hostArch() {
		return bad("architecture %q: this Mac runs %s guests only", c.Arch, hostArch())
	}
	// The framework only says "internal error" of a kernel that it can't start.
	kernel, err := image.CheckKernel(c.Kernel, c.Arch)
	if err != nil {
		return bad("%w", err)
	}
	if want := map[string]string{"arm64": image.FormatImage, "amd64": image.FormatBzImage}[c.Arch]; kernel.Format != want {
		return bad("kernel %s is a %s, the Virtualization framework boots a %s: run `cri-vz guest build` on this Mac", c.Kernel, kernel.Format, want)
	}
	if len(c.Cmdline) > cmdlineLimit {
		return bad("kernel command line has %d bytes, at most %d fit", len(c.Cmdline), cmdlineLimit)
	}
	if err := c.Check(); err != nil {
		return err
	}
	for _, d := range c.Disks {
		if st, err := os.Stat(d.Path); err != nil || !st.Mode().IsRegular() {
			return bad("disk %s: %s is no raw image file", d.Serial, d.Path)
		}
	}
	if lo, hi := vz.VirtualMachineConfigurationMinimumAllowedCPUCount(), vz.VirtualMachineConfigurationMaximumAllowedCPUCount(); uint(c.CPUs) < lo || uint(c.CPUs) > hi {
		return bad("%d CPUs: this Mac allows %d to %d", c.CPUs, lo, hi)
	}
	if lo, hi := vz.VirtualMachineConfigurationMinimumAllowedMemorySize(), vz.VirtualMachineConfigurationMaximumAllowedMemorySize(); uint64(c.MemoryBytes) < lo || uint64(c.MemoryBytes) > hi {
		return bad("memory of %d MiB: this Mac allows %d to %d", c.MemoryBytes>>20, lo>>20, hi>>20)
	}
	for _, s := range c.Shares {
		switch {
		case s.Tag == guestapi.ShareRosetta:
			return bad("the share tag %q is taken by Rosetta", s.Tag)
		case s.Dirs != nil && !available(FeatureLiveShares):
			return bad("share %s: directories can't be replaced on this macOS: share one", s.Tag)
		}
	}
	for _, n := range c.NICs {
		switch {
		case n.Tap != nil:
			return bad("NIC %s: macOS has no taps", n.MAC)
		case n.Frames == nil && n.MTU != natMTU:
			return bad("NIC %s: MTU %d: behind the framework's NAT it is %d", n.MAC, n.MTU, natMTU)
		case n.Frames != nil && n.MTU < framesMTU:
			return bad("NIC %s: MTU %d: the framework takes %d or more", n.MAC, n.MTU, framesMTU)
		}
	}
	return nil
}

// New implements vmm.Driver.
func (driver) New(_ context.Context, c vmm.Config) (vmm.Machine, error) {
	m := &machine{config: c, done: make(chan struct{}), killed: make(chan struct{}), changing: make(chan struct{}, 1), conns: map[*conn]bool{}}
	for _, n := range c.NICs {
		for _, f := range []*os.File{n.Tap, n.Frames} {
			if f != nil {
				m.files = append(m.files, f)
			}
		}
	}
	err := validate(c)
	if err == nil {
		err = m.configure()
	}
	if err != nil {
		err = fmt.Errorf("machine %s: %w", c.ID, err)
		return nil, errors.Join(err, m.release())
	}
	return m, nil
}

// duplicate is another descriptor of the same open file.
func duplicate(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	var derr error
	if err := raw.Control(func(old uintptr) { fd, derr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3) }); err != nil {
		return nil, err
	}
	if derr != nil {
		return nil, fmt.Errorf("duplicate the descriptor of %s: %w", f.Name(), derr)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
