package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

const (
	// serialLimit is VIRTIO_BLK_ID_BYTES (virtio 1.2 §5.2.6).
	serialLimit = 20
	// tagLimit is the size of the tag in virtio_fs_config (virtio 1.2 §5.11.4).
	tagLimit = 36
	// socketPathLimit is sun_path of the narrowest system that cri-vz knows, with
	// the zero at its end. // T14
	socketPathLimit = 104
	// longestSocket is the longest name that a machine gives a socket in RunDir.
	longestSocket = "share-00.sock"
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
	return vmm.Capabilities{Accelerator: string(a), SharePropagation: os.Geteuid() == 0}, nil
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
	if c.Initrd != "" {
		if err := isFile(c.Initrd); err != nil {
			return bad("initrd: %w", err)
		}
	}
	if len(c.Cmdline) > cmdlineLimit {
		return bad("kernel command line has %d bytes, at most %d fit", len(c.Cmdline), cmdlineLimit)
	}
	if strings.ContainsAny(c.Cmdline, "\x00\n") {
		return bad("kernel command line %q: a newline or zero can't be in it", c.Cmdline)
	}
	if c.CPUs < 1 || c.CPUs > 255 {
		return bad("%d CPUs: choose 1 to 255", c.CPUs)
	}
	if c.MemoryBytes <= 0 || c.MemoryBytes%(1<<20) != 0 {
		return bad("memory of %d bytes: choose a positive multiple of 1 MiB", c.MemoryBytes)
	}
	if c.Console == nil {
		return bad("no console file")
	}
	if st, err := os.Stat(c.RunDir); err != nil {
		return bad("run directory: %w", err)
	} else if !st.IsDir() || !filepath.IsAbs(c.RunDir) {
		return bad("run directory %s: it has to be an absolute path of a directory", c.RunDir)
	}
	if p := filepath.Join(c.RunDir, longestSocket); len(p) >= socketPathLimit {
		return bad("run directory %s: the socket path %s has %d bytes, at most %d fit: choose a shorter one",
			c.RunDir, p, len(p), socketPathLimit-1)
	}
	if len(c.Disks) > maxDisks || len(c.Shares) > maxShares || len(c.NICs) > maxNICs {
		return bad("%d disks, %d shares and %d NICs: at most %d, %d and %d fit",
			len(c.Disks), len(c.Shares), len(c.NICs), maxDisks, maxShares, maxNICs)
	}
	serials := map[string]bool{}
	for _, disk := range c.Disks {
		switch {
		case disk.Serial == "" || len(disk.Serial) > serialLimit || !printable(disk.Serial):
			return bad("disk serial %q: choose 1 to %d bytes of printable ASCII", disk.Serial, serialLimit)
		case serials[disk.Serial]:
			return bad("two disks have the serial %q", disk.Serial)
		}
		serials[disk.Serial] = true
		if err := isFile(disk.Path); err != nil {
			return bad("disk %s: %w", disk.Serial, err)
		}
	}
	tags := map[string]bool{}
	for _, s := range c.Shares {
		switch {
		case s.Tag == "" || len(s.Tag) > tagLimit || !printable(s.Tag):
			return bad("share tag %q: choose 1 to %d bytes of printable ASCII", s.Tag, tagLimit)
		case tags[s.Tag]:
			return bad("two shares have the tag %q", s.Tag)
		}
		tags[s.Tag] = true
		st, err := os.Stat(s.Dir)
		if err == nil && (!st.IsDir() || !filepath.IsAbs(s.Dir)) {
			err = fmt.Errorf("%s: it has to be an absolute path of a directory", s.Dir)
		}
		if err != nil {
			return bad("share %s: %w", s.Tag, err)
		}
	}
	macs := map[string]bool{}
	for i, n := range c.NICs {
		mac := n.MAC.String()
		switch {
		case len(n.MAC) != 6 || n.MAC[0]&1 != 0:
			return bad("NIC %d: MAC %q: choose a unicast address of 6 bytes", i, mac)
		case macs[mac]:
			return bad("two NICs have the MAC %s", mac)
		case n.MTU < 68 || n.MTU > 65535:
			return bad("NIC %s: MTU %d: choose 68 to 65535", mac, n.MTU)
		case n.Tap == nil:
			return bad("NIC %s: no tap", mac)
		}
		macs[mac] = true
	}
	return nil
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}

func isFile(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q is not an absolute path", path)
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if m := st.Mode(); !m.IsRegular() && (m&fs.ModeDevice == 0 || m&fs.ModeCharDevice != 0) {
		return fmt.Errorf("%s is neither a file nor a block device", path)
	}
	return nil
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
		if n.Tap != nil {
			m.files = append(m.files, n.Tap)
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
