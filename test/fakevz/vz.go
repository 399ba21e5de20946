// Package vz is a stand-in for the part of github.com/Code-Hex/vz/v3 v3.7.1 that
// sandbox/vz uses, for machines that are no Macs: Start launches QEMU with the devices
// of the configuration that it was given, so that the driver's own source boots real
// guests. hack/with-fakevz swaps it in; hack/typecheck keeps its signatures equal to
// the real package's.
//
// It is hostile where vz is (T50): it uses the descriptors that it was handed and
// provokes their finalizers, a failed call may come with a typed nil, Connect fails
// before the guest listens, connections have no CloseWrite, on shares there is one
// owner of files and no chown, machines leave goroutines behind, and one whose
// disconnections were asked for is never released. What a test can set begins with Test.
//
// The process needs a mount namespace of its own: shares are bind mounts in it.
package vz

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"syscall"
)

var (
	ErrUnsupportedOSVersion = errors.New("unsupported macOS version")
	ErrBuildTargetOSVersion = errors.New("unsupported build target macOS version")
)

// NSError is what the framework reports.
type NSError struct {
	Domain               string
	Code                 int
	LocalizedDescription string
	UserInfo             string
}

func (n *NSError) Error() string {
	if n == nil {
		return "<nil>"
	}
	return fmt.Sprintf("Error Domain=%s Code=%d Description=%q UserInfo=%s", n.Domain, n.Code, n.LocalizedDescription, n.UserInfo)
}

type ErrorCode int

const (
	ErrorInternal ErrorCode = 1 + iota
	ErrorInvalidVirtualMachineConfiguration
	ErrorInvalidVirtualMachineState
	ErrorInvalidVirtualMachineStateTransition
	ErrorInvalidDiskImage
	ErrorVirtualMachineLimitExceeded
	ErrorNetworkError
	ErrorOutOfDiskSpace
	ErrorOperationCancelled
	ErrorNotSupported
)

func vzError(code ErrorCode, format string, args ...any) *NSError {
	return &NSError{Domain: "VZErrorDomain", Code: int(code), LocalizedDescription: fmt.Sprintf(format, args...)}
}

type (
	BootLoader                          interface{ bootLoader() }
	SerialPortAttachment                interface{ serialPortAttachment() }
	MemoryBalloonDeviceConfiguration    interface{ memoryBalloonDeviceConfiguration() }
	SocketDeviceConfiguration           interface{ socketDeviceConfiguration() }
	StorageDeviceAttachment             interface{ storageDeviceAttachment() }
	StorageDeviceConfiguration          interface{ storageDeviceConfiguration() }
	DirectorySharingDeviceConfiguration interface{ directorySharingDeviceConfiguration() }
	DirectoryShare                      interface{ directoryShare() }
	NetworkDeviceAttachment             interface {
		fmt.Stringer
		networkDeviceAttachment()
	}
)

// VirtualMachineConfiguration is what Start makes QEMU's command line of.
type VirtualMachineConfiguration struct {
	boot     *LinuxBootLoader
	cpus     uint
	memory   uint64
	consoles []*VirtioConsoleDeviceSerialPortConfiguration
	entropy  []*VirtioEntropyDeviceConfiguration
	balloons []MemoryBalloonDeviceConfiguration
	sockets  []SocketDeviceConfiguration
	disks    []StorageDeviceConfiguration
	shares   []DirectorySharingDeviceConfiguration
	nics     []*VirtioNetworkDeviceConfiguration
}

func NewVirtualMachineConfiguration(bootLoader BootLoader, cpu uint, memorySize uint64) (*VirtualMachineConfiguration, error) {
	if err := called("NewVirtualMachineConfiguration", 11); err != nil {
		return nil, err
	}
	return &VirtualMachineConfiguration{boot: bootLoader.(*LinuxBootLoader), cpus: cpu, memory: memorySize}, nil
}

func VirtualMachineConfigurationMinimumAllowedCPUCount() uint { return 1 }
func VirtualMachineConfigurationMaximumAllowedCPUCount() uint { return 8 }

func VirtualMachineConfigurationMinimumAllowedMemorySize() uint64 { return 4 << 20 }
func VirtualMachineConfigurationMaximumAllowedMemorySize() uint64 { return 16 << 30 }

func (v *VirtualMachineConfiguration) Validate() (bool, error) {
	if err := called("Validate", 11); err != nil {
		return false, err
	}
	tags := map[string]bool{}
	for _, s := range v.shares {
		d := s.(*VirtioFileSystemDeviceConfiguration)
		if d.share == nil || tags[d.tag] {
			return false, vzError(ErrorInvalidVirtualMachineConfiguration, "share %q has no directory or is there twice", d.tag)
		}
		tags[d.tag] = true
	}
	for _, n := range v.nics {
		if f, ok := n.attachment.(*FileHandleNetworkDeviceAttachment); ok && (f.mtu < 1500 || f.mtu > 65535) {
			return false, vzError(ErrorInvalidVirtualMachineConfiguration, "MTU %d", f.mtu)
		}
	}
	if v.memory%(1<<20) != 0 || v.cpus == 0 {
		return false, vzError(ErrorInvalidVirtualMachineConfiguration, "memory %d, CPUs %d", v.memory, v.cpus)
	}
	return !TestInvalid, nil
}

func (v *VirtualMachineConfiguration) SetSerialPortsVirtualMachineConfiguration(cs []*VirtioConsoleDeviceSerialPortConfiguration) {
	v.consoles = cs
}
func (v *VirtualMachineConfiguration) SetEntropyDevicesVirtualMachineConfiguration(cs []*VirtioEntropyDeviceConfiguration) {
	v.entropy = cs
}
func (v *VirtualMachineConfiguration) SetMemoryBalloonDevicesVirtualMachineConfiguration(cs []MemoryBalloonDeviceConfiguration) {
	v.balloons = cs
}
func (v *VirtualMachineConfiguration) SetSocketDevicesVirtualMachineConfiguration(cs []SocketDeviceConfiguration) {
	v.sockets = cs
}
func (v *VirtualMachineConfiguration) SetStorageDevicesVirtualMachineConfiguration(cs []StorageDeviceConfiguration) {
	v.disks = cs
}
func (v *VirtualMachineConfiguration) SetDirectorySharingDevicesVirtualMachineConfiguration(cs []DirectorySharingDeviceConfiguration) {
	v.shares = cs
}
func (v *VirtualMachineConfiguration) SetNetworkDevicesVirtualMachineConfiguration(cs []*VirtioNetworkDeviceConfiguration) {
	v.nics = cs
}

type LinuxBootLoader struct{ kernel, cmdline, initrd string }

func (*LinuxBootLoader) bootLoader() {}

type LinuxBootLoaderOption func(*LinuxBootLoader) error

func WithCommandLine(cmdLine string) LinuxBootLoaderOption {
	return func(b *LinuxBootLoader) error { b.cmdline = cmdLine; return nil }
}

func WithInitrd(initrdPath string) LinuxBootLoaderOption {
	return func(b *LinuxBootLoader) error {
		b.initrd = initrdPath
		_, err := os.Stat(initrdPath)
		return err
	}
}

func NewLinuxBootLoader(vmlinuz string, opts ...LinuxBootLoaderOption) (*LinuxBootLoader, error) {
	if err := called("NewLinuxBootLoader", 11); err != nil {
		return nil, err
	}
	if _, err := os.Stat(vmlinuz); err != nil {
		return nil, err
	}
	b := &LinuxBootLoader{kernel: vmlinuz}
	for _, o := range opts {
		if err := o(b); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// FileHandleSerialPortAttachment keeps numbers and not files, as vz does.
type FileHandleSerialPortAttachment struct{ read, write int }

func (*FileHandleSerialPortAttachment) serialPortAttachment() {}

func NewFileHandleSerialPortAttachment(read, write *os.File) (*FileHandleSerialPortAttachment, error) {
	if err := called("NewFileHandleSerialPortAttachment", 11); err != nil {
		return nil, err
	}
	return &FileHandleSerialPortAttachment{int(read.Fd()), int(write.Fd())}, nil
}

type VirtioConsoleDeviceSerialPortConfiguration struct {
	attachment *FileHandleSerialPortAttachment
}

func NewVirtioConsoleDeviceSerialPortConfiguration(attachment SerialPortAttachment) (*VirtioConsoleDeviceSerialPortConfiguration, error) {
	if err := called("NewVirtioConsoleDeviceSerialPortConfiguration", 11); err != nil {
		return nil, err
	}
	return &VirtioConsoleDeviceSerialPortConfiguration{attachment.(*FileHandleSerialPortAttachment)}, nil
}

type VirtioEntropyDeviceConfiguration struct{}

func NewVirtioEntropyDeviceConfiguration() (*VirtioEntropyDeviceConfiguration, error) {
	return &VirtioEntropyDeviceConfiguration{}, called("NewVirtioEntropyDeviceConfiguration", 11)
}

type VirtioTraditionalMemoryBalloonDeviceConfiguration struct{}

func (*VirtioTraditionalMemoryBalloonDeviceConfiguration) memoryBalloonDeviceConfiguration() {}

func NewVirtioTraditionalMemoryBalloonDeviceConfiguration() (*VirtioTraditionalMemoryBalloonDeviceConfiguration, error) {
	return &VirtioTraditionalMemoryBalloonDeviceConfiguration{}, called("NewVirtioTraditionalMemoryBalloonDeviceConfiguration", 11)
}

type VirtioSocketDeviceConfiguration struct{}

func (*VirtioSocketDeviceConfiguration) socketDeviceConfiguration() {}

func NewVirtioSocketDeviceConfiguration() (*VirtioSocketDeviceConfiguration, error) {
	return &VirtioSocketDeviceConfiguration{}, called("NewVirtioSocketDeviceConfiguration", 11)
}

type DiskImageCachingMode int

const (
	DiskImageCachingModeAutomatic DiskImageCachingMode = iota
	DiskImageCachingModeUncached
	DiskImageCachingModeCached
)

type DiskImageSynchronizationMode int

const (
	DiskImageSynchronizationModeFull DiskImageSynchronizationMode = 1 + iota
	DiskImageSynchronizationModeFsync
	DiskImageSynchronizationModeNone
)

type DiskImageStorageDeviceAttachment struct {
	path     string
	readOnly bool
}

func (*DiskImageStorageDeviceAttachment) storageDeviceAttachment() {}

func NewDiskImageStorageDeviceAttachmentWithCacheAndSync(diskPath string, readOnly bool, cachingMode DiskImageCachingMode, syncMode DiskImageSynchronizationMode) (*DiskImageStorageDeviceAttachment, error) {
	if err := called("NewDiskImageStorageDeviceAttachmentWithCacheAndSync", 12); err != nil {
		return nil, err
	}
	st, err := os.Stat(diskPath)
	if err != nil {
		return nil, err
	}
	// The framework takes the others, too: they lose data, or wait for the drive.
	if cachingMode != DiskImageCachingModeCached || syncMode != DiskImageSynchronizationModeFsync || !st.Mode().IsRegular() {
		return nil, vzError(ErrorInvalidDiskImage, "%s: caching %d, synchronization %d", diskPath, cachingMode, syncMode)
	}
	return &DiskImageStorageDeviceAttachment{diskPath, readOnly}, nil
}

type VirtioBlockDeviceConfiguration struct {
	attachment *DiskImageStorageDeviceAttachment
	id         string
}

func (*VirtioBlockDeviceConfiguration) storageDeviceConfiguration() {}

func NewVirtioBlockDeviceConfiguration(attachment StorageDeviceAttachment) (*VirtioBlockDeviceConfiguration, error) {
	if err := called("NewVirtioBlockDeviceConfiguration", 11); err != nil {
		return nil, err
	}
	return &VirtioBlockDeviceConfiguration{attachment: attachment.(*DiskImageStorageDeviceAttachment)}, nil
}

func (v *VirtioBlockDeviceConfiguration) SetBlockDeviceIdentifier(identifier string) error {
	if err := called("SetBlockDeviceIdentifier", 12.3); err != nil {
		return err
	}
	if len(identifier) > 20 {
		return vzError(ErrorInvalidVirtualMachineConfiguration, "identifier %q", identifier)
	}
	v.id = identifier
	return nil
}

type SharedDirectory struct {
	path     string
	readOnly bool
}

func NewSharedDirectory(dirPath string, readOnly bool) (*SharedDirectory, error) {
	if err := called("NewSharedDirectory", 12); err != nil {
		return nil, err
	}
	if _, err := os.Stat(dirPath); err != nil {
		return nil, err
	}
	return &SharedDirectory{dirPath, readOnly}, nil
}

type SingleDirectoryShare struct{ dir *SharedDirectory }

func (*SingleDirectoryShare) directoryShare() {}

func NewSingleDirectoryShare(share *SharedDirectory) (*SingleDirectoryShare, error) {
	return &SingleDirectoryShare{share}, called("NewSingleDirectoryShare", 12)
}

type MultipleDirectoryShare struct {
	dirs map[string]*SharedDirectory
}

func (*MultipleDirectoryShare) directoryShare() {}

func NewMultipleDirectoryShare(shares map[string]*SharedDirectory) (*MultipleDirectoryShare, error) {
	return &MultipleDirectoryShare{shares}, called("NewMultipleDirectoryShare", 12)
}

type VirtioFileSystemDeviceConfiguration struct {
	tag   string
	share DirectoryShare
}

func (*VirtioFileSystemDeviceConfiguration) directorySharingDeviceConfiguration() {}

func NewVirtioFileSystemDeviceConfiguration(tag string) (*VirtioFileSystemDeviceConfiguration, error) {
	if err := called("NewVirtioFileSystemDeviceConfiguration", 12); err != nil {
		return nil, err
	}
	return &VirtioFileSystemDeviceConfiguration{tag: tag}, nil
}

func (c *VirtioFileSystemDeviceConfiguration) SetDirectoryShare(share DirectoryShare) {
	c.share = share
}

type LinuxRosettaAvailability int

const (
	LinuxRosettaAvailabilityNotSupported LinuxRosettaAvailability = iota
	LinuxRosettaAvailabilityNotInstalled
	LinuxRosettaAvailabilityInstalled
)

func LinuxRosettaDirectoryShareAvailability() LinuxRosettaAvailability { return TestRosetta }

type LinuxRosettaDirectoryShare struct{}

func (*LinuxRosettaDirectoryShare) directoryShare() {}

func NewLinuxRosettaDirectoryShare() (*LinuxRosettaDirectoryShare, error) {
	if err := called("NewLinuxRosettaDirectoryShare", 13); err != nil {
		return nil, err
	}
	return &LinuxRosettaDirectoryShare{}, nil
}

type NATNetworkDeviceAttachment struct{}

func (*NATNetworkDeviceAttachment) networkDeviceAttachment() {}
func (*NATNetworkDeviceAttachment) String() string           { return "NATNetworkDeviceAttachment" }

func NewNATNetworkDeviceAttachment() (*NATNetworkDeviceAttachment, error) {
	return &NATNetworkDeviceAttachment{}, called("NewNATNetworkDeviceAttachment", 11)
}

// FileHandleNetworkDeviceAttachment keeps a number and not a file, as vz does.
type FileHandleNetworkDeviceAttachment struct{ fd, mtu int }

func (*FileHandleNetworkDeviceAttachment) networkDeviceAttachment() {}
func (*FileHandleNetworkDeviceAttachment) String() string {
	return "FileHandleNetworkDeviceAttachment"
}

func NewFileHandleNetworkDeviceAttachment(file *os.File) (*FileHandleNetworkDeviceAttachment, error) {
	if err := called("NewFileHandleNetworkDeviceAttachment", 11); err != nil {
		return nil, err
	}
	fd := int(file.Fd())
	if kind, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE); err != nil || kind != syscall.SOCK_DGRAM {
		return nil, fmt.Errorf("the fileHandle must be a datagram socket")
	}
	runtime.KeepAlive(file)
	return &FileHandleNetworkDeviceAttachment{fd: fd, mtu: 1500}, nil
}

func (f *FileHandleNetworkDeviceAttachment) SetMaximumTransmissionUnit(mtu int) error {
	if err := called("SetMaximumTransmissionUnit", 13); err != nil {
		return err
	}
	f.mtu = mtu
	return nil
}

type MACAddress struct{ hw net.HardwareAddr }

func NewMACAddress(macAddr net.HardwareAddr) (*MACAddress, error) {
	return &MACAddress{macAddr}, called("NewMACAddress", 11)
}

type VirtioNetworkDeviceConfiguration struct {
	attachment NetworkDeviceAttachment
	mac        *MACAddress
}

func NewVirtioNetworkDeviceConfiguration(attachment NetworkDeviceAttachment) (*VirtioNetworkDeviceConfiguration, error) {
	return &VirtioNetworkDeviceConfiguration{attachment: attachment}, called("NewVirtioNetworkDeviceConfiguration", 11)
}

func (v *VirtioNetworkDeviceConfiguration) SetMACAddress(macAddress *MACAddress) { v.mac = macAddress }
