// Package api is what the host and the guest agent agree on: a ttrpc service
// for everything with an answer, and a framed byte stream for everything that
// flows (stdio, forwarded ports). It is the only package that both sides import.
//
// The host dials and the guest listens, always; each side treats the other's
// bytes as hostile and caps them.
package api

//go:generate protoc -I../.. --go_out=../.. --go_opt=paths=source_relative --go-ttrpc_out=../.. --go-ttrpc_opt=paths=source_relative guest/api/agent.proto

// Version is this API's version. A host drives agents of the same version; the
// initramfs that carries the agent is chosen by the host, so the two only
// differ when someone mixed files of two builds.
const Version = 2

// vsock ports of the agent.
const (
	// PortControl serves the Agent service over ttrpc.
	PortControl = 1024
	// PortData serves streams: see [Header] and [Stream].
	PortData = 1025
)

// Tags of the virtiofs shares and serials of the disks that pod VMs have.
const (
	// ShareLayers holds the pod's layer images (*.ext4), read-only on the host.
	ShareLayers = "layers"
	// ShareVolumes holds one entry per mounted host path.
	ShareVolumes = "volumes"
	// ShareRosetta is there where the host can have amd64 programs run in arm64 guests:
	// it holds the translator, "rosetta".
	ShareRosetta = "rosetta"
	// DiskScratch is the writable disk for overlays.
	DiskScratch = "scratch"
)

// AgentScheme begins the Source of an OCI mount that is one of the pod's own
// files, which the agent makes in SetUpSandbox: agent://resolv.conf,
// agent://hosts, agent://hostname and agent://shm (64 MiB, shared by the pod).
const AgentScheme = "agent://"

// ImageMount is the Type of an OCI mount that is an image, and ImageLayer and
// ImageSubpath begin its options: ImageLayer before the name of each
// layer in [ShareLayers], the lowest first, and at most one ImageSubpath before a
// path in the image. The mount is read-only; its Source is not looked at.
const (
	ImageMount   = "image"
	ImageLayer   = "layer="
	ImageSubpath = "subpath="
)

// EmptyDirMount is the Type of an OCI mount that is a directory of the scratch disk:
// the same for all containers of the pod, for as long as the VM lives. Its Source is
// the directory's name, or a path NAME/DIR/... of one below it. For each part of
// Source, in their order, an option that begins with EmptyDirMake says as MODE:GID,
// octal and decimal, how a directory is made that is not there yet.
const (
	EmptyDirMount = "emptydir"
	EmptyDirMake  = "make="
)

// VolumeScheme begins the Source of an OCI mount that lies in [ShareVolumes].
const VolumeScheme = "volume://"
