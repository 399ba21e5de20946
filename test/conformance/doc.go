// Package conformance is what this runtime promises of the CRI, as tests against
// a socket: what cri-tools' critest asserts, and what it has no spec for. It
// knows nothing of the daemon but the CRI.
//
// Without CRI_SOCKET it starts a daemon of its own in a network namespace, and
// also kills and restarts it. With CRI_SOCKET=unix://PATH it runs against any
// runtime; then it runs as root in the network namespace that plays that
// runtime's node, because it speaks to pods and serves the images, over plain
// HTTP on loopback.
package conformance
