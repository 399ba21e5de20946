// Package node tests cri-vz as a node's runtime: a control plane and a kubelet
// of the release in folder kubernetes run in a network namespace, and the tests
// do through kubectl what users do (T45). `make test-node` runs it; it is no part
// of `make test`.
//
// CRI_SOCKET=unix:///PATH runs the same against another runtime. The command
// must then run in the network namespace in which that runtime's pods have their
// addresses, and the runtime must be free of pods.
package node
