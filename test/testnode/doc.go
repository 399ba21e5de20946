// Package testnode makes a node for tests that boot VMs: a directory and a
// network namespace of their own, daemons in it, and a judgement of what they
// left behind. It needs Linux and root.
package testnode
