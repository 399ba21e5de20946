package main

// exclusion is what of critest is left out by name, and why. README.md has the
// same table.
type exclusion struct {
	pattern string // regular expression over a spec's full name
	what    string
	reason  string
}

var exclusions = []exclusion{
	{`HostIpc is true`, "HostIpc is true", "a segment that was made with the node's kernel can't be seen by another kernel: the pod's. Ipc mode NODE is refused"},
	{`HostNetwork is true`, "HostNetwork is true", "the node's sockets are outside the VM. Network mode NODE is refused"},
	{`portforward in host network`, "portforward in host network", "as above"},
	{`mount with 'rshared'`, "mount propagation rshared", "a mount made in the VM can't appear on the node. Propagation BIDIRECTIONAL is refused"},
	{`public image with digest`, "public image with digest", "it needs one upstream image, byte by byte, which a mirror of stand-ins doesn't have. The project's own suite pulls by digest"},
	{`^\[k8s\.io\] AppArmor`, "AppArmor (9 specs)", "they load profiles into the node's kernel, which confines no process of a VM. Localhost profiles are refused"},
}

// benchmarks are not specs: critest runs them when asked to.
const benchmarks = ` benchmark `

// leastPassed is how many specs of critest v1.36.0 are left, on a host without
// SELinux, when the exclusions are taken out.
const leastPassed = 103
