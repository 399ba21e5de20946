// Package frameswitch joins virtual machines by Ethernet frames on a host that
// has no bridge for them: macOS keeps the machines behind its NAT apart, so each
// pod gets a second NIC whose other end is a port here.
//
// A NIC is a pair of SOCK_DGRAM sockets that carries one frame per datagram. The
// process that owns the machine makes the pair and lends the switch one end
// ([Join]); the switch runs in a process of its own ([Switch.Serve]). Either may
// be restarted: a port joins again by itself, and the machine notices nothing
// but the frames that were lost meanwhile.
//
// The switch trusts whoever can reach its socket, which is its user alone, and
// no machine: a frame enters only under the MAC address that its port was
// joined with, so that a guest can neither take over another's traffic nor fill
// a table. A frame that its receiver has no room for is dropped and counted.
// Nobody waits for a slow machine.
package frameswitch

import "time"

const (
	headerSize = 14
	// maxFrame is the most a virtio NIC can send: header, VLAN tag, largest MTU.
	maxFrame = headerSize + 4 + 65535
	// The framework's documentation wants the receiving buffer to be at least
	// twice the sending one, and recommends four times.
	sendBuffer    = 1 << 20
	receiveBuffer = 4 << 20
	// maxPorts bounds descriptors and goroutines. No host runs as many VMs.
	maxPorts = 1024

	// helloTimeout bounds the exchange of hello and welcome.
	helloTimeout = 2 * time.Second
	maxHello     = 256
	maxWelcome   = 1024
	// rejoinEvery is how long a port waits before it asks a switch again that
	// was not there.
	rejoinEvery = 200 * time.Millisecond
)

// hello is what a port says first; its socket comes attached to it (SCM_RIGHTS).
type hello struct {
	MAC string `json:"mac"`
}

// welcome is the switch's answer. Error is empty when the port was joined.
type welcome struct {
	Error string `json:"error,omitempty"`
}
