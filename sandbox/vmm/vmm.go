// Package vmm is the contract between a pod's shim and a hypervisor: a [Driver]
// makes a [Machine], and a Machine is one virtual machine from Start to Done.
//
// Every driver runs the conformance suite in vmmtest. The package promises
// nothing about what runs inside the guest; the soft way to end a guest goes
// through its agent and is not part of this contract.
package vmm

import (
	"context"
	"errors"
	"net"
	"os"
)

// ErrConfig is wrapped by every error that a [Config] itself deserves, so that
// a caller can tell a request that can never work from a machine that failed.
var ErrConfig = errors.New("invalid machine configuration")

// Config describes one virtual machine. All paths are absolute. Every machine has a
// vsock device and one for entropy besides.
type Config struct {
	// ID names the machine in logs and error messages.
	ID string
	// Arch is the guest's architecture as GOARCH spells it: amd64 or arm64.
	Arch string
	// Kernel and Initrd are boot files; Cmdline is passed to the kernel as it
	// is, after what the driver itself needs (console=...).
	Kernel, Initrd, Cmdline string
	// CPUs is the number of virtual CPUs, at least 1.
	CPUs int
	// MemoryBytes is the guest's memory, a multiple of 1 MiB.
	MemoryBytes int64
	// Console receives what the guest writes to its console. The driver dups
	// or inherits it; the caller keeps ownership and may close it after Start.
	Console *os.File
	// RunDir is an existing 0700 directory for sockets and other files of the
	// machine's life; Close removes what the driver put there.
	RunDir string

	Disks  []Disk
	Shares []Share
	NICs   []NIC

	// DiskFailed, where the driver can tell (T9), is called when the host could
	// not do what the guest asked of a disk, at most once for each: with its
	// serial and the host's reason. The guest sees an I/O error and goes on. It
	// must not wait and may be nil.
	DiskFailed func(serial, reason string) `json:"-"`
}

// Disk is a raw image that the guest sees as a virtio block device.
type Disk struct {
	// Serial finds the disk in the guest (/sys/block/*/serial); at most 20
	// bytes of printable ASCII, unique in the machine.
	Serial   string
	Path     string
	ReadOnly bool
}

// Share is a host directory that the guest mounts as virtiofs by its tag.
// Mounts made below Dir after Start are visible to the guest where the driver
// says so in [Capabilities]. ReadOnly is enforced on the host.
type Share struct {
	Tag      string
	Dir      string
	ReadOnly bool
	// Dirs, if not nil, are shared instead of Dir: each is a directory of that
	// name in the guest's mount, and a [ShareSetter] can replace them all while
	// the machine runs. Only where [Capabilities] say LiveShares.
	Dirs map[string]SharedDir
}

// SharedDir is a directory of a [Share] with several.
type SharedDir struct {
	Dir      string
	ReadOnly bool
}

// NIC is a network interface of the guest.
type NIC struct {
	MAC net.HardwareAddr
	MTU int // bytes; 0: the device says nothing of it, and the guest may set any
	// Tap is an open tap device (linux, IFF_VNET_HDR); New takes ownership.
	Tap *os.File
	// Frames is a connected datagram socket that carries one Ethernet frame per
	// datagram; New takes ownership. A NIC with neither is behind the host's own
	// NAT, where the driver has one (vz), with an MTU of 1500.
	Frames *os.File
}

// Capabilities says what a driver can do on this host.
type Capabilities struct {
	// Accelerator is what runs the guest's code: "kvm", "tcg", "hvf".
	Accelerator string
	// SharePropagation: mounts made on the host below a share's directory
	// after Start appear in the guest.
	SharePropagation bool
	// LiveShares: a Share may have Dirs, and machines implement [ShareSetter].
	LiveShares bool
	// DiskErrors: Config.DiskFailed is called.
	DiskErrors bool
}

// Driver makes machines of one kind. Its methods may be called concurrently.
type Driver interface {
	// Name is the driver's name in the configuration: "qemu", "vz".
	Name() string
	// Capabilities reports what this host offers for guests of arch (GOARCH).
	// It may boot a probe once (bounded by ctx) and then remembers the verdict.
	Capabilities(ctx context.Context, arch string) (Capabilities, error)
	// Validate checks c without side effects; its errors wrap [ErrConfig].
	Validate(c Config) error
	// New prepares a machine and takes ownership of every NIC's Tap and Frames,
	// also when it fails.
	New(ctx context.Context, c Config) (Machine, error)
}

// Machine is one virtual machine. All methods may be called concurrently;
// Kill and Close may be called at any time and more than once.
type Machine interface {
	// Start boots the guest and returns when its virtual CPUs run. It does not
	// wait for the guest. After an error the machine is dead: call Close.
	Start(ctx context.Context) error
	// Dial connects to a vsock port of the guest. It fails at once with an
	// error wrapping syscall.ECONNREFUSED or ECONNRESET when nothing listens
	// (yet), and with ctx's error when the guest doesn't answer. No half-close
	// is promised on the connection.
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	// Progress is a number that grows while the guest's virtual CPUs consume
	// time (nanoseconds); a boot watchdog compares it with itself.
	Progress() (uint64, error)
	// PIDs returns the processes of the machine other than the caller (VMM and
	// helpers), for cgroups and memory accounting. Empty before Start.
	PIDs() []int
	// Kill ends the machine at once and waits, bounded by ctx, until it is
	// gone.
	Kill(ctx context.Context) error
	// Done is closed when the machine is gone, for whatever reason.
	Done() <-chan struct{}
	// Err says why, after Done: nil if it was killed by Kill or the guest
	// powered itself off, else what happened (VMM crashed, a helper died).
	Err() error
	// Close kills the machine if need be and releases every file, socket and
	// helper process.
	Close() error
}

// CPUPinner is what a [Machine] may be able to do besides.
type CPUPinner interface {
	// PinCPUs has the machine's virtual CPUs run on the host's CPUs of those
	// numbers and no others; none are all that the caller may use. After an
	// error they run where they ran before. It works from Start to Done, and may
	// be called concurrently with all other methods but itself.
	PinCPUs(ctx context.Context, cpus []int) error
}

// MemorySetter is a [Machine] with a balloon, for a driver whose host doesn't learn
// by itself what a guest has freed.
type MemorySetter interface {
	// SetMemory asks the guest to make do with so many bytes of what it has, from
	// the number of [Config] downwards, and gives what it lets go of to the host. It
	// returns before the guest has done so, which it may also not do. A guest that
	// has run out of what it was left with kills processes.
	SetMemory(ctx context.Context, bytes int64) error
}

// ShareSetter is a [Machine] whose shares with Dirs can change.
type ShareSetter interface {
	// SetShare replaces the directories of the share tag while the machine runs.
	// What stays the same stays mounted in the guest, with its open files.
	SetShare(ctx context.Context, tag string, dirs map[string]SharedDir) error
}
