package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

const (
	// maxShares, maxDisks and maxNICs fit on the root bus of q35 and virt.
	maxShares, maxDisks, maxNICs = 8, 12, 4
	// cmdlineLimit is COMMAND_LINE_SIZE of x86 and arm64, less what is added here.
	cmdlineLimit = 2048 - 64
)

// platform is what differs between the architectures of guests.
type platform struct {
	binary  string // its name in PATH
	pkg     string // Debian's package
	machine string
	cpuTCG  string
	console string
}

var platforms = map[string]platform{
	// -erms,-fsrm: TCG carries out "rep movsb" byte by byte. Without these flags
	// Linux copies by plain loads and stores: 2.3 times the bytes through a socket.
	"amd64": {"qemu-system-x86_64", "qemu-system-x86", "q35", "max,-erms,-fsrm", "ttyS0"},
	// pauth-impdef: pointer authentication by a cheap function instead of QARMA,
	// which costs an emulated guest half of its time.
	"arm64": {"qemu-system-aarch64", "qemu-system-arm", "virt,gic-version=3", "max,pauth-impdef=on", "ttyAMA0"},
}

type driver struct {
	opts Options

	virtiofsd    func() (virtiofsd, error) // found once
	probeTimeout time.Duration
	kvm          string // the device

	mu     sync.Mutex
	probes map[string]*probe // by arch
}

// New returns the driver. It starts nothing; programs are looked for when a machine
// needs them, as errdefs.ErrNotFound if they are missing.
func New(o Options) (vmm.Driver, error) {
	switch o.Accel {
	case "":
		o.Accel = AccelAuto
	case AccelAuto, AccelKVM, AccelTCG:
	default:
		return nil, fmt.Errorf("qemu: accelerator %q: choose auto, kvm or tcg: %w", o.Accel, errdefs.ErrInvalidArgument)
	}
	for arch := range o.QEMUPath {
		if _, ok := platforms[arch]; !ok {
			return nil, fmt.Errorf("qemu: path for architecture %q: choose amd64 or arm64: %w", arch, errdefs.ErrInvalidArgument)
		}
	}
	if o.UID == 0 {
		o.UID = nobody
	}
	if o.GID == 0 {
		o.GID = nobody
	}
	return newDriver(o), nil
}

func newDriver(o Options) *driver {
	return &driver{
		opts:         o,
		virtiofsd:    sync.OnceValues(func() (virtiofsd, error) { return findVirtiofsd(o.VirtiofsdPath) }),
		probeTimeout: probeTimeout,
		kvm:          kvmDevice,
		probes:       map[string]*probe{},
	}
}

// Name implements vmm.Driver.
func (d *driver) Name() string { return "qemu" }

// binary is the path of QEMU for guests of arch.
func (d *driver) binary(arch string) (string, error) {
	p, ok := platforms[arch]
	if !ok {
		return "", fmt.Errorf("qemu: guests of architecture %q: choose amd64 or arm64: %w", arch, errdefs.ErrInvalidArgument)
	}
	name := d.opts.QEMUPath[arch]
	if name == "" {
		name = p.binary
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("qemu for %s guests: %w: install it (Debian: apt install %s): %w", arch, err, p.pkg, errdefs.ErrNotFound)
	}
	return path, nil
}

// Capabilities implements vmm.Driver.
func (d *driver) Capabilities(ctx context.Context, arch string) (vmm.Capabilities, error) {
	a, err := d.accelerator(ctx, arch, d.opts.ProbeKernel, d.opts.ProbeInitrd)
	if err != nil {
		return vmm.Capabilities{}, err
	}
	return vmm.Capabilities{Accelerator: string(a), SharePropagation: os.Geteuid() == 0, DiskErrors: true}, nil
}

// Validate implements vmm.Driver. It reads the start of the kernel and looks at the
// other paths.
func (d *driver) Validate(c vmm.Config) error {
	if err := validate(c); err != nil {
		return fmt.Errorf("machine %s: %w", c.ID, err)
	}
	return nil
}

func validate(c vmm.Config) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %w", fmt.Errorf(format, args...), vmm.ErrConfig)
	}
	if _, ok := platforms[c.Arch]; !ok {
		return bad("architecture %q: choose amd64 or arm64", c.Arch)
	}
	if _, err := kernelProtocol(c.Kernel, c.Arch); err != nil {
		return err
	}
	if len(c.Cmdline) > cmdlineLimit {
		return bad("kernel command line has %d bytes, at most %d fit", len(c.Cmdline), cmdlineLimit)
	}
	if c.CPUs > 255 {
		return bad("%d CPUs: choose 1 to 255", c.CPUs)
	}
	if len(c.Disks) > maxDisks || len(c.Shares) > maxShares || len(c.NICs) > maxNICs {
		return bad("%d disks, %d shares and %d NICs: at most %d, %d and %d fit",
			len(c.Disks), len(c.Shares), len(c.NICs), maxDisks, maxShares, maxNICs)
	}
	for _, s := range c.Shares {
		if s.Dirs != nil {
			return bad("share %s: directories that change can't be shared: share one, and mount others below it", s.Tag)
		}
	}
	for _, n := range c.NICs {
		if n.Tap == nil || n.Frames != nil {
			return bad("NIC %s: it takes a tap and nothing else", n.MAC)
		}
	}
	return c.Check()
}

// New implements vmm.Driver.
func (d *driver) New(ctx context.Context, c vmm.Config) (vmm.Machine, error) {
	m, err := d.newMachine(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("machine %s: %w", c.ID, err)
	}
	return m, nil
}

func (d *driver) newMachine(ctx context.Context, c vmm.Config) (_ *machine, err error) {
	m := &machine{config: c, driver: d, done: make(chan struct{})}
	for _, n := range c.NICs {
		for _, f := range []*os.File{n.Tap, n.Frames} {
			if f != nil {
				m.files = append(m.files, f)
			}
		}
	}
	defer func() {
		if err != nil {
			_ = m.release()
		}
	}()
	if err := validate(c); err != nil {
		return nil, err
	}
	if m.binary, err = d.binary(c.Arch); err != nil {
		return nil, err
	}
	if len(c.Shares) > 0 {
		if m.virtiofsd, err = d.virtiofsd(); err != nil {
			return nil, err
		}
	}
	if m.accel, err = d.accelerator(ctx, c.Arch, c.Kernel, c.Initrd); err != nil {
		return nil, err
	}
	return m, m.prepare()
}

// accelerator decides what runs guests of arch, and proves KVM with the given
// files if that was not done yet.
func (d *driver) accelerator(ctx context.Context, arch, kernel, initrd string) (Accel, error) {
	if _, ok := platforms[arch]; !ok {
		return "", fmt.Errorf("qemu: guests of architecture %q: choose amd64 or arm64: %w", arch, errdefs.ErrInvalidArgument)
	}
	if d.opts.Accel == AccelTCG {
		return AccelTCG, nil
	}
	err := d.kvmUsable(arch)
	if d.opts.Accel == AccelKVM {
		if err != nil {
			return "", fmt.Errorf("qemu: accelerator kvm: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
		return AccelKVM, nil
	}
	if err == nil {
		err = d.proveKVM(ctx, arch, kernel, initrd)
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return "", fmt.Errorf("qemu: prove KVM: %w", err)
	}
	if err != nil {
		d.noteFallback(arch, err)
		return AccelTCG, nil
	}
	return AccelKVM, nil
}

// kvmUsable tells why KVM can't be used for guests of arch, as far as that shows
// without a boot.
func (d *driver) kvmUsable(arch string) error {
	if arch != runtime.GOARCH {
		return fmt.Errorf("the host is %s, the guest %s", runtime.GOARCH, arch)
	}
	f, err := os.OpenFile(d.kvm, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	// QEMU opens it again, as a user who gets the device's group for that.
	if m := st.Mode().Perm(); os.Geteuid() == 0 && m&0o060 != 0o060 && m&0o006 != 0o006 {
		return fmt.Errorf("%s has mode %s and can't be opened by uid %d, which QEMU runs as: chgrp kvm and chmod 660 it", d.kvm, m, d.opts.UID)
	}
	return nil
}
