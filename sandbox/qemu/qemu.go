// Package qemu is the Linux driver of [vmm.Driver]: one QEMU process per guest,
// with a vsock device served by the caller's process (see vhostvsock) and one
// virtiofsd process per share.
//
// # Processes
//
// All children start from one thread that lives as long as the process, and get
// SIGKILL when it dies, so a machine never outlives its owner. When the owner is
// root, QEMU runs as an unprivileged user that needs no access to any path: boot
// files, disks, taps, sockets and the console reach it as descriptors. virtiofsd
// stays root, as it has to act for every user of the guest; it is confined by
// chroot into the share, namespaces of its own for network, IPC and processes, a
// bounded set of capabilities and its seccomp filter. A chroot and not a mount
// namespace, because mounts made below the share later must reach it whatever
// the propagation of / is.
//
// # Shares
//
// A read-only share is a clone of the directory's mounts, all made read-only, in
// the machine's run directory: virtiofsd as Debian 12 has it can't refuse writes
// itself. The mount must be seen by nobody else, so a process that starts a
// machine with read-only shares needs a mount namespace of its own in which the
// run directory's mount is not shared. Mounts made later below a read-only share
// are not seen by the guest; below a writable one they are, if they are made in
// the mount namespace of the process.
//
// A file that the host changes shows its new content when it is opened next. Names
// and attributes in a writable share are never old with Debian 12's virtiofsd, and
// at most a second with Debian 13's, which has no such option (cache=auto). File
// locks, extended attributes and ACLs
// stay inside the guest or are not supported.
//
// # What it does not promise
//
// Hot-plug, snapshots, migration; a guest that resets itself is dead.
package qemu

import "time"

// Accel says what runs the guest's code.
type Accel string

const (
	// AccelAuto uses KVM if a guest was seen to boot with it, else TCG.
	AccelAuto Accel = "auto"
	// AccelKVM uses KVM and nothing else.
	AccelKVM Accel = "kvm"
	// AccelTCG is emulation in software.
	AccelTCG Accel = "tcg"
)

// Options configures a driver. The zero value looks for programs where Debian
// has them and proves KVM with the files of the first machine.
type Options struct {
	// Accel is AccelAuto if empty.
	Accel Accel
	// QEMUPath overrides where the QEMU for an architecture (GOARCH) is.
	QEMUPath map[string]string
	// VirtiofsdPath overrides where virtiofsd is.
	VirtiofsdPath string
	// CacheDir is where the verdict on KVM is remembered; a directory that only
	// the caller can write to, made if missing. Empty: not remembered beyond the
	// driver.
	CacheDir string
	// ProbeKernel and ProbeInitrd are what proves KVM by booting. Without them
	// Capabilities can't prove it and New uses the files of its Config.
	ProbeKernel, ProbeInitrd string
	// UID and GID are who QEMU runs as if the caller is root; 0 is nobody and its
	// group. They have no effect for a caller that is not root.
	UID, GID uint32
}

const (
	// nobody is Debian's nobody and nogroup.
	nobody = 65534

	// probeTimeout bounds the boot that proves KVM, which takes well under a second
	// where KVM works.
	probeTimeout = 5 * time.Second
)
