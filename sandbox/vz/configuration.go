//go:build (darwin && cgo) || fakevz

package vz

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"unicode/utf8"

	"github.com/Code-Hex/vz/v3"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// configure describes the machine to the framework, which has a look at it.
//
// An object that is handed over is kept alive until the framework has a reference of
// its own: vz reads the pointer, and its finalizer could run before the call has.
func (m *machine) configure() error {
	c := m.config
	options := []vz.LinuxBootLoaderOption{vz.WithCommandLine(strings.TrimSpace("console=hvc0 " + c.Cmdline))}
	if c.Initrd != "" {
		options = append(options, vz.WithInitrd(c.Initrd))
	}
	boot, err := vz.NewLinuxBootLoader(c.Kernel, options...)
	if err != nil {
		return fmt.Errorf("boot loader: %w", classify(err))
	}
	cfg, err := vz.NewVirtualMachineConfiguration(boot, uint(c.CPUs), uint64(c.MemoryBytes))
	runtime.KeepAlive(boot)
	if err != nil {
		return classify(err)
	}
	for _, step := range []struct {
		what string
		add  func(*vz.VirtualMachineConfiguration) error
	}{
		{"console", m.addConsole},
		{"entropy device", addEntropy},
		{"memory balloon", addBalloon},
		{"vsock device", addSocket},
		{"disk", m.addDisks},
		{"share", m.addShares},
		{"NIC", m.addNICs},
	} {
		if err := step.add(cfg); err != nil {
			return fmt.Errorf("%s: %w", step.what, classify(err))
		}
	}
	if ok, err := cfg.Validate(); err != nil {
		return fmt.Errorf("the framework refuses the configuration: %w", classify(err))
	} else if !ok {
		return fmt.Errorf("the framework refuses the configuration and doesn't say why: %w", vmm.ErrConfig)
	}
	m.vzConfig = cfg
	return nil
}

func (m *machine) addConsole(cfg *vz.VirtualMachineConfiguration) error {
	out, err := duplicate(m.config.Console)
	if err != nil {
		return err
	}
	m.files = append(m.files, out)
	// An input that never has anything to read and never ends: the framework might
	// read a file at its end for ever.
	in, quiet, err := os.Pipe()
	if err != nil {
		return err
	}
	m.files = append(m.files, in, quiet)
	att, err := vz.NewFileHandleSerialPortAttachment(in, out)
	if err != nil {
		return err
	}
	port, err := vz.NewVirtioConsoleDeviceSerialPortConfiguration(att)
	runtime.KeepAlive(att)
	if err != nil {
		return err
	}
	cfg.SetSerialPortsVirtualMachineConfiguration([]*vz.VirtioConsoleDeviceSerialPortConfiguration{port})
	runtime.KeepAlive(port)
	return nil
}

func addEntropy(cfg *vz.VirtualMachineConfiguration) error {
	d, err := vz.NewVirtioEntropyDeviceConfiguration()
	if err != nil {
		return err
	}
	cfg.SetEntropyDevicesVirtualMachineConfiguration([]*vz.VirtioEntropyDeviceConfiguration{d})
	runtime.KeepAlive(d)
	return nil
}

// The framework's balloon has no free page reporting: macOS gets back what it is told
// to take (SetMemory), and no page that a guest has merely freed.
func addBalloon(cfg *vz.VirtualMachineConfiguration) error {
	d, err := vz.NewVirtioTraditionalMemoryBalloonDeviceConfiguration()
	if err != nil {
		return err
	}
	cfg.SetMemoryBalloonDevicesVirtualMachineConfiguration([]vz.MemoryBalloonDeviceConfiguration{d})
	runtime.KeepAlive(d)
	return nil
}

func addSocket(cfg *vz.VirtualMachineConfiguration) error {
	d, err := vz.NewVirtioSocketDeviceConfiguration()
	if err != nil {
		return err
	}
	cfg.SetSocketDevicesVirtualMachineConfiguration([]vz.SocketDeviceConfiguration{d})
	runtime.KeepAlive(d)
	return nil
}

func (m *machine) addDisks(cfg *vz.VirtualMachineConfiguration) error {
	var disks []vz.StorageDeviceConfiguration
	for _, d := range m.config.Disks {
		// Cached: the automatic mode has corrupted disks on Apple silicon. Fsync: a
		// guest's flush reaches the file, as it would under QEMU; Full would also wait
		// for the drive's own cache.
		att, err := vz.NewDiskImageStorageDeviceAttachmentWithCacheAndSync(d.Path, d.ReadOnly,
			vz.DiskImageCachingModeCached, vz.DiskImageSynchronizationModeFsync)
		if err != nil {
			return fmt.Errorf("%s: %w", d.Serial, err)
		}
		disk, err := vz.NewVirtioBlockDeviceConfiguration(att)
		runtime.KeepAlive(att)
		if err != nil {
			return fmt.Errorf("%s: %w", d.Serial, err)
		}
		if err := disk.SetBlockDeviceIdentifier(d.Serial); err != nil {
			return fmt.Errorf("%s: serial: %w", d.Serial, err)
		}
		disks = append(disks, disk)
	}
	cfg.SetStorageDevicesVirtualMachineConfiguration(disks)
	runtime.KeepAlive(disks)
	return nil
}

func (m *machine) addShares(cfg *vz.VirtualMachineConfiguration) error {
	var devices []vz.DirectorySharingDeviceConfiguration
	add := func(tag string, share vz.DirectoryShare) error {
		d, err := vz.NewVirtioFileSystemDeviceConfiguration(tag)
		if err != nil {
			return fmt.Errorf("%s: %w", tag, err)
		}
		d.SetDirectoryShare(share)
		runtime.KeepAlive(share)
		devices = append(devices, d)
		return nil
	}
	for _, s := range m.config.Shares {
		share, err := directoryShare(s)
		if err != nil {
			return fmt.Errorf("%s: %w", s.Tag, err)
		}
		if err := add(s.Tag, share); err != nil {
			return err
		}
	}
	if available(FeatureRosetta) {
		share, err := rosettaShare()
		if err != nil {
			return fmt.Errorf("%s: %w", guestapi.ShareRosetta, err)
		}
		if err := add(guestapi.ShareRosetta, share); err != nil {
			return err
		}
	}
	cfg.SetDirectorySharingDevicesVirtualMachineConfiguration(devices)
	runtime.KeepAlive(devices)
	return nil
}

// directoryShare is one directory where it can be: under load, shares of several have
// lost names that were there.
func directoryShare(s vmm.Share) (vz.DirectoryShare, error) {
	if s.Dirs != nil {
		return multipleShare(s.Dirs)
	}
	dir, err := sharedDirectory(s.Dir, s.ReadOnly)
	if err != nil {
		return nil, err
	}
	share, err := vz.NewSingleDirectoryShare(dir)
	runtime.KeepAlive(dir)
	if err != nil {
		return nil, err // and not share: a nil of its type is not nil
	}
	return share, nil
}

func multipleShare(dirs map[string]vmm.SharedDir) (vz.DirectoryShare, error) {
	shared := make(map[string]*vz.SharedDirectory, len(dirs))
	for name, d := range dirs {
		dir, err := sharedDirectory(d.Dir, d.ReadOnly)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		shared[name] = dir
	}
	share, err := vz.NewMultipleDirectoryShare(shared)
	runtime.KeepAlive(shared)
	if err != nil {
		return nil, err
	}
	return share, nil
}

// sharedDirectory refuses what would be nil as an NSString: the exception that comes
// of it ends the process.
func sharedDirectory(path string, readOnly bool) (*vz.SharedDirectory, error) {
	if !utf8.ValidString(path) {
		return nil, fmt.Errorf("%q is not UTF-8, which macOS wants of names: %w", path, vmm.ErrConfig)
	}
	return vz.NewSharedDirectory(path, readOnly)
}

func (m *machine) addNICs(cfg *vz.VirtualMachineConfiguration) error {
	var nics []*vz.VirtioNetworkDeviceConfiguration
	for _, n := range m.config.NICs {
		att, err := attachment(n)
		if err != nil {
			return fmt.Errorf("%s: %w", n.MAC, err)
		}
		nic, err := vz.NewVirtioNetworkDeviceConfiguration(att)
		runtime.KeepAlive(att)
		if err != nil {
			return fmt.Errorf("%s: %w", n.MAC, err)
		}
		mac, err := vz.NewMACAddress(n.MAC)
		if err != nil {
			return fmt.Errorf("%s: %w", n.MAC, err)
		}
		nic.SetMACAddress(mac)
		runtime.KeepAlive(mac)
		nics = append(nics, nic)
	}
	cfg.SetNetworkDevicesVirtualMachineConfiguration(nics)
	runtime.KeepAlive(nics)
	return nil
}

func attachment(n vmm.NIC) (vz.NetworkDeviceAttachment, error) {
	if n.Frames == nil {
		nat, err := vz.NewNATNetworkDeviceAttachment()
		if err != nil {
			return nil, err
		}
		return nat, nil
	}
	frames, err := vz.NewFileHandleNetworkDeviceAttachment(n.Frames)
	if err != nil {
		return nil, err
	}
	if err := frames.SetMaximumTransmissionUnit(n.MTU); err != nil {
		return nil, fmt.Errorf("MTU %d: %w", n.MTU, err)
	}
	return frames, nil
}
