// Package sandbox is a pod sandbox as the host sees it: its records on disk,
// its start and stop as named steps with inverses, and the client of its shim,
// the process that owns the pod's virtual machine.
//
// The package keeps what must outlive the daemon in files below Options.Root
// and takes what is true right now from the shims. It does not speak CRI: it
// stores the CRI's configuration messages and leaves their meaning, apart from
// what a VM needs, to package cri. It doesn't hold a pod's life in its own
// hands either: Close leaves pods running, and a daemon that dies takes none
// with it.
package sandbox

import (
	"context"
	"net/netip"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/network"
	"github.com/cri-vz/cri-vz/sandbox/shim"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// Options say where pods live and what they are made of. Paths are absolute.
type Options struct {
	// Root survives reboots and holds the records: Root/pods/<id>. Created 0700.
	Root string
	// Run need not survive reboots and holds the sockets: Run/<first 12
	// characters of the id>. Short, because a unix socket's path has at most
	// 104 bytes. Created 0700.
	Run string
	// Driver makes the virtual machines; see [shim.Driver].
	Driver shim.Driver
	// Guest finds the boot files for an architecture as GOARCH spells it, for
	// classes that have none of their own.
	Guest func(arch string) (Guest, error)
	// Scratch makes the sparse ext4 image at path for a pod's writable layers;
	// the path doesn't exist yet.
	Scratch func(path string) error
	// Network gives pods their addresses.
	Network Network
	// Boots is how many VMs boot at one time; 0 is the number of CPUs.
	Boots int
	// ShimCommand is the program and its first arguments; the pod's directory
	// is appended. Empty: this program with the argument "shim".
	ShimCommand []string
	// Classes are VM sizes by runtime handler. "" is the default class, and
	// every handler that is not in the map is refused.
	Classes map[string]Class
	// CgroupRoot is the cgroup, relative to each hierarchy's mount point, below
	// which pods without a cgroup_parent run. Empty: "cri-vz".
	CgroupRoot string
	// Charge says whose cgroup pays for VMs. Empty: ChargeAuto.
	Charge Charge
	// Timeouts of the shims' waits; zero fields are the defaults.
	Timeouts shim.Timeouts
}

// Charge says which cgroup the processes of a pod's VM run in (T5).
type Charge string

const (
	// ChargePod is the pod's cgroup_parent. Its limits hold for the whole VM.
	ChargePod Charge = "pod"
	// ChargeOwn is Options.CgroupRoot.
	ChargeOwn Charge = "own"
	// ChargeAuto is the pod's, unless its memory limit leaves no room for what a
	// VM needs besides its containers: a kubelet's limit for a pod is the sum of
	// its containers' and of what its RuntimeClass declares as overhead, and a VM
	// that outgrows it is killed with all that runs in it.
	ChargeAuto Charge = "auto"
)

// Class is what a runtime handler's virtual machines are like.
type Class struct {
	CPUs          int   // virtual CPUs, at least; 0: 1
	MemoryBytes   int64 // guest memory for containers, at least; 0: 512 MiB
	ReserveBytes  int64 // added for the guest's kernel and agent; 0: 64 MiB
	HugepageBytes int64 // in huge pages of 2 MiB, besides MemoryBytes
	PidsMax       int64 // processes and threads of the containers; 0: the kernel's default
	// Guest finds the boot files; nil: Options.Guest.
	Guest func(arch string) (Guest, error)
}

// Guest is what a VM boots.
type Guest struct {
	Arch           string // GOARCH
	Kernel, Initrd string
	Cmdline        string
}

// Network is what pods need of [network.Network].
type Network interface {
	// Prepare may return nil: the pod's machine gets no NIC.
	Prepare(ctx context.Context, pod network.Pod) (*network.NIC, error)
	SetUp(ctx context.Context, podID string) (*network.Result, error)
	OpenTap(podID string) (*os.File, error)
	TearDown(ctx context.Context, podID string) error
	Pods() ([]string, error)
}

var _ Network = (*network.Network)(nil)

// leases is a [Network] whose pods get their addresses by DHCP, in the guest.
type leases interface {
	// Leased says what a pod got and for how long. It refuses what can't be.
	Leased(podID string, a netip.Addr, seconds uint32) error
	// Released says that no lease of the pod's lives.
	Released(podID string) error
}

// keeper is a [Network] with something to look after while pods are there.
type keeper interface {
	// Keep returns when ctx ends.
	Keep(ctx context.Context)
}

var (
	_ leases = (*network.NAT)(nil)
	_ keeper = (*network.NAT)(nil)
)

// Step is one named part of a pod's start.
type Step struct {
	Name  string
	Nanos int64
	// Error says why this step, and so the start, failed.
	Error string
	// Last: the pod is ready or has failed; the channel is closed after it.
	Last bool
}

// PodStatus is a snapshot.
type PodStatus struct {
	Ready     bool
	CreatedAt int64        // unix nanoseconds
	IPs       []netip.Addr // the first is the pod IP; empty when not Ready
	Netns     string       // path on the host; empty where there is none
	Reason    string       // why it isn't ready
	DiskError string       // why the guest's writes fail, if they do
	Steps     []Step
}

// ContainerStatus is a snapshot. Times are unix nanoseconds of the host's
// clock, 0 while the thing has not happened.
type ContainerStatus struct {
	Phase                            shimapi.Phase
	CreatedAt, StartedAt, FinishedAt int64
	ExitCode                         int32
	Reason                           string // Completed, Error, OOMKilled, StartError, SandboxGone
	Message                          string
	User                             *guestapi.ResolvedUser // nil until created in the guest
	LogPath                          string
	LogLinesDropped                  uint64
}

// CreateContainer is what a container is made of.
type CreateContainer struct {
	// Config is kept for status answers; its metadata is the container's name.
	Config            *runtimeapi.ContainerConfig
	ImageID, ImageRef string
	// Spec is the OCI runtime spec that the guest carries out.
	Spec *specs.Spec
	User *guestapi.User
	// Layers links the image's layers into dir and returns their file names
	// there, the lowest first.
	Layers func(dir string) ([]string, error)
	// Volumes are the host paths that Spec's mounts name as volume://NAME.
	// Names are this container's own; the pod makes them unique and rewrites
	// the spec's sources.
	Volumes   []*shimapi.Volume
	PidMode   guestapi.NamespaceMode
	PidTarget string // container id
	Stdin     bool
	StdinOnce bool
	TTY       bool
	LogPath   string // absolute; empty: no log
	// StopSignal is what Stop sends first; 0: SIGTERM.
	StopSignal uint32
}
