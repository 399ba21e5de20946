// Package conformance is what this runtime promises of the CRI, as tests against
// a socket: what cri-tools' critest asserts, and what it has no spec for. It
// knows nothing of the daemon but the CRI.
//
// Without CRI_SOCKET it starts a daemon of its own in a network namespace, and
// also kills and restarts it. With CRI_SOCKET=unix://PATH it runs against any
// runtime; then it runs as root in the network namespace that plays that
// runtime's node, because it speaks to pods and serves the images, over plain
// HTTP on loopback.
//
// containerd 2.4.2 with runc, run on one machine with this suite, differs in
// these points:
//
//   - Status codes: a name that is taken is FailedPrecondition (here
//     AlreadyExists), a call in the wrong state is Unknown (FailedPrecondition),
//     a missing program is Unknown (NotFound).
//   - RemoveContainer that is called several times at once succeeds for one
//     caller and fails for the others.
//   - CreateContainer that the client gave up may keep the container's name, and
//     StartContainer that it gave up may leave a container that can't be removed
//     until it has started.
//   - A missing host_path is made, not refused.
//   - ExecSync with more than 16 MiB of output fails with ResourceExhausted; here
//     the rest is dropped (T19).
//   - ListImages ignores its filter.
//   - A privileged container needs a sandbox that says that it is privileged.
//   - After a client of PortForward vanished in the middle of its connections,
//     the next one was not served within 30 s.
//   - Exec, attach and port-forward over WebSocket fail in the handshake.
package conformance
