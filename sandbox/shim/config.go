// Package shim is the process that owns one pod's virtual machine: the machine
// and its console, the link to the guest agent, the containers' log files, and
// the record of how each container ended. It is the pod: it lives in its own
// session, outlives the daemon, and answers a restarted daemon with the truth.
//
// It decides nothing: what runs in the pod, when it stops, and what is kept is
// the daemon's business (package sandbox), which talks to it by package
// shim/api. When the VM is gone the shim stays to say why, until Stop.
package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// ConfigFile is the configuration's name in the pod's directory.
const ConfigFile = "shim.json"

// Names in the pod's directory.
const (
	LayersDir     = "layers"     // share "layers"
	VolumesDir    = "volumes"    // share "volumes", populated in the shim's mount namespace only
	ContainersDir = "containers" // one directory per container, with its StatusFile
	ScratchFile   = "scratch.img"
	ConsoleFile   = "console.log"
	LogFile       = "shim.log"
	StatusFile    = "status.json"
)

// configSchema is the version of Config's JSON form. A shim refuses another:
// the daemon that starts a shim is of the same build.
const configSchema = 1

// maxSocketPath is what sockaddr_un holds on macOS, less its NUL (T14).
const maxSocketPath = 103

// maxConfig bounds a configuration file.
const maxConfig = 1 << 20

// Names of hypervisor drivers.
const (
	DriverQEMU = "qemu" // Linux
	DriverVZ   = "vz"   // macOS
)

// Driver names a hypervisor driver and its settings, which are QEMU's.
type Driver struct {
	// Name is DriverQEMU or DriverVZ.
	Name string `json:"name"`
	// Accel is "auto", "kvm" or "tcg"; empty is "auto".
	Accel string `json:"accel,omitempty"`
	// CacheDir keeps what the driver learned about this host (the verdict on
	// KVM); empty: it learns again in each process.
	CacheDir string `json:"cacheDir,omitempty"`
	// UID and GID run the VMM; both 0: the driver's choice.
	UID uint32 `json:"uid,omitempty"`
	GID uint32 `json:"gid,omitempty"`
}

// KeepsOwners tells whether files on shares have the owners in the guest that they
// have on the host. On macOS the framework decides who owns them, and chown fails
// (T47).
func (d Driver) KeepsOwners() bool { return d.Name != DriverVZ }

// Config is what a shim is started with: PodDir/shim.json. Paths are absolute.
type Config struct {
	Schema int    `json:"schema"`
	ID     string `json:"id"` // pod sandbox
	PodDir string `json:"podDir"`
	// RunDir holds the sockets; an existing 0700 directory.
	RunDir string `json:"runDir"`
	Driver Driver `json:"driver"`

	Arch        string `json:"arch"`
	Kernel      string `json:"kernel"`
	Initrd      string `json:"initrd"`
	Cmdline     string `json:"cmdline,omitempty"`
	CPUs        int    `json:"cpus"`
	MemoryBytes int64  `json:"memoryBytes"`

	// MAC and MTU of the guest's NIC; an empty MAC is a guest without one.
	MAC string `json:"mac,omitempty"`
	MTU int    `json:"mtu,omitempty"`
	// SwitchMAC is of the guest's second NIC, with the same MTU, on the frame switch
	// that listens at SwitchSocket; both or none.
	SwitchSocket string `json:"switchSocket,omitempty"`
	SwitchMAC    string `json:"switchMAC,omitempty"`
	// HostPorts are TCP ports of the host that lead to the pod for as long as its VM
	// lives.
	HostPorts []HostPort `json:"hostPorts,omitempty"`
	// TapFD is the inherited descriptor of the NIC's tap; 0: none.
	TapFD int `json:"tapFD,omitempty"`
	// HostMountFD is the inherited descriptor of the daemon's mount namespace,
	// in which volumes' host paths are looked up; 0: the shim's own.
	HostMountFD int `json:"hostMountFD,omitempty"`
	// HostRootFD is the inherited descriptor of the daemon's root directory in
	// that namespace.
	HostRootFD int `json:"hostRootFD,omitempty"`
	// Cgroups are directories of the pod's cgroup, one per hierarchy, that the
	// shim moves itself into before it starts anything.
	Cgroups []string `json:"cgroups,omitempty"`

	Timeouts Timeouts `json:"timeouts,omitzero"`
}

// HostPort is a port of the host that leads to one of the pod.
type HostPort struct {
	Address string `json:"address,omitempty"` // of the host; empty: all
	Port    uint16 `json:"port"`
	PodPort uint16 `json:"podPort"`
}

// Timeouts bound the shim's waits; zero fields take their default. They are
// configuration so that tests needn't wait for the real ones.
type Timeouts struct {
	// BootStall: no console byte and no CPU time for so long is a boot that
	// hangs (T7). Default 10 s.
	BootStall Duration `json:"bootStall,omitempty"`
	// Boot is the hard cap of one boot, progress or not. Default 120 s.
	Boot Duration `json:"boot,omitempty"`
	// Agent is how long a call to the agent may stay unanswered before the
	// agent is asked whether it lives, and how long that question may. Default
	// 10 s.
	Agent Duration `json:"agent,omitempty"`
	// Kill is how long a container may outlive SIGKILL before its VM is killed
	// (T12), and the VM the agent's Shutdown. Default 2 s.
	Kill Duration `json:"kill,omitempty"`
	// Idle is how long a pod's containers have to do nothing before the pod's spare
	// memory is given back to the host. Default 60 s.
	Idle Duration `json:"idle,omitempty"`
}

// ReadConfig reads podDir's configuration and checks it.
func ReadConfig(podDir string) (Config, error) {
	path := filepath.Join(podDir, ConfigFile)
	b, err := readCapped(path, maxConfig)
	if err != nil {
		return Config{}, fmt.Errorf("read shim configuration: %w", err)
	}
	return parseConfig(path, b)
}

func parseConfig(path string, b []byte) (Config, error) {
	var c Config
	if err := json.Unmarshal(b, &c); err != nil {
		return Config{}, fmt.Errorf("shim configuration %s: %w: %w", path, errdefs.ErrInvalidArgument, err)
	}
	if c.Schema != configSchema {
		return Config{}, fmt.Errorf("shim configuration %s has schema %d, this build knows %d: %w", path, c.Schema, configSchema, errdefs.ErrInvalidArgument)
	}
	if err := c.validate(); err != nil {
		return Config{}, fmt.Errorf("shim configuration %s: %w", path, err)
	}
	c.Timeouts = c.Timeouts.withDefaults()
	return c, nil
}

func (c Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{errdefs.ErrInvalidArgument}, args...)...))
	}
	if c.ID == "" {
		bad("no pod id")
	}
	for name, p := range map[string]string{"podDir": c.PodDir, "runDir": c.RunDir, "kernel": c.Kernel, "initrd": c.Initrd} {
		if !filepath.IsAbs(p) {
			bad("%s %q is not an absolute path", name, p)
		}
	}
	if c.CPUs < 1 {
		bad("%d virtual CPUs", c.CPUs)
	}
	if c.MemoryBytes <= 0 {
		bad("%d bytes of memory", c.MemoryBytes)
	}
	if err := CheckRunDir(c.RunDir); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// CheckRunDir reports whether the sockets of a pod whose run directory is dir
// have paths that fit a unix socket address (T14).
func CheckRunDir(dir string) error {
	if p := filepath.Join(dir, shimapi.SocketControl); len(p) > maxSocketPath {
		return fmt.Errorf("socket path %s has %d bytes, a unix socket's has at most %d: choose a shorter run directory: %w", p, len(p), maxSocketPath, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Write puts c into its pod's directory.
func (c Config) Write() error {
	c.Schema = configSchema
	b, err := json.MarshalIndent(c, "", "\t")
	if err != nil {
		return err
	}
	return WriteFile(filepath.Join(c.PodDir, ConfigFile), b)
}

// WriteFile replaces path by b so that a crash leaves the old content or the
// new: a temporary file, synced, renamed, and the directory synced.
func WriteFile(path string, b []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".tmp-"+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}
