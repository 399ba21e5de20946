// Package vhostvsock is the virtio-vsock device (virtio 1.2 §5.10) of one QEMU
// guest, served from this process over vhost-user: no /dev/vhost-vsock, no
// privilege, and no CID space shared with other guests.
//
// QEMU connects to a unix socket and hands over the guest's memory and two
// virtqueues. The host dials ports in the guest; the guest can't dial the host:
// each request of its gets a reset.
//
//	-object memory-backend-memfd,id=mem,size=512M,share=on -machine memory-backend=mem
//	-chardev socket,id=vs,path=vsock.sock -device vhost-user-vsock-pci,chardev=vs
//
// The guest is hostile, and QEMU is taken to be as hostile as its guest. Every
// address, length and index is checked against the mapped memory, memory use is
// bounded whatever arrives, and memory that is truncated while it is mapped
// fails the device, not the process.
//
// It does not promise to outlive its process (the guest's streams are lost with
// it), migration, SOCK_SEQPACKET, or a packed virtqueue. It is for linux only,
// as vhost-user in QEMU is.
package vhostvsock
