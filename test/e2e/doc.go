// Package e2e tests cri-vz from outside: a real daemon with real virtual
// machines, driven through its CRI socket, its command line and, where it is on
// PATH, crictl. There is nothing in it but tests; they need Linux, root, QEMU,
// virtiofsd and a built guest (`make guest`).
package e2e
