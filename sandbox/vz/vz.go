// Package vz is the macOS driver of [vmm.Driver]: one virtual machine of Apple's
// Virtualization framework per guest, by way of github.com/Code-Hex/vz/v3. The
// framework runs the guest in a process of its own that ends with ours.
//
// # What the framework does not say
//
// It has no figure for the processor time of a guest, so Progress is the time that
// the machine has run, and only its hard limit ends a boot that hangs. It does not
// tell why a machine stopped by itself, nor that a disk failed: the guest sees an
// I/O error and nobody else does. A guest that resets itself boots again; its agent's
// connections end, which is how the owner notices.
//
// # Shares
//
// A share is read-only on the host's side where it says so. A share with several
// directories can change while the guest runs, which vz does not offer: see
// setShare. The owners of files are the framework's own idea, and chown does not
// work (T47), so what pods write for themselves alone is better on a disk. File locks
// stay in the guest, sockets can't be shared. For each file and directory that a guest's
// kernel remembers the framework is said to keep a descriptor, and a Mac can run out of
// them: an agent forgets the volumes of a removed container.
//
// # vz v3.7.1
//
// The version is pinned, and what is known to be wrong in it is dealt with where it
// matters: descriptors are used and not duplicated, so machine keeps every *os.File
// it has handed over until the machine is gone; a connection has no CloseWrite; an
// error comes with a typed nil (Dial); Connect has no context and may never return
// (Dial); Accept never returns after Close, so nothing listens on the host; asking
// for the balloon devices releases them once too often, so setMemory asks by itself; disks need
// caching mode Cached, the automatic one has corrupted disks on Apple silicon; asking
// for the disconnections of NICs keeps a machine for ever, so only one whose guest
// answered is asked (adopt); an MTU below 1500 is refused without a reason (Validate);
// text that is not UTF-8 becomes a nil that ends the process (sharedDirectory); so does
// a change of state that comes when the machine has been released (stop).
//
// One fault can't be dealt with from outside: Connect closes the descriptor of the
// framework's connection, which closes it once more some microseconds later. What got
// the same number in between is closed with it.
//
// # What it does not promise
//
// That it has run on a Mac: it is tested against a stand-in for vz (test/fakevz),
// type-checked against vz itself, and hack/mac-first-run is there for whoever has one.
package vz
