package imageservice

import (
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Image is one image of the store. It is a copy; changing it changes nothing.
type Image struct {
	// ID is the digest of the image's config, "sha256:<hex>" (T44).
	ID string
	// RepoTags are full references, "docker.io/library/nginx:1.27", sorted.
	RepoTags []string
	// RepoDigests are "docker.io/library/nginx@sha256:<hex>", sorted; empty for
	// an image that came only from an archive, because no registry said so.
	RepoDigests []string
	// Size is what the image occupies in bytes: its blobs and layer files.
	// Files shared with other images count for each of them.
	Size uint64
	// Config is the image's config without its build history.
	Config v1.ConfigFile
	// Layers are ordered from the bottom up and may name a diff ID twice.
	Layers []Layer
	// StoredAt is when the image was first completed here.
	StoredAt time.Time
	// Pinned images are not removed by a kubelet's garbage collection. No image
	// needs that here, since a pod sandbox is a VM and has no image of its own.
	Pinned bool
}

// Layer is one layer of an image as a read-only ext4 file.
type Layer struct {
	// DiffID is the digest of the uncompressed layer tar (OCI image-spec
	// config.md#layer-diffid).
	DiffID string
	// Path is the ext4 file, mode 0444, never written again. From [Store.Use]
	// it is the link in the caller's directory, else the store's own file.
	Path string
	// Size is the length of the ext4 file in bytes.
	Size int64
}

// Stages of a [Progress].
const (
	StageResolving = "resolving"
	StageReading   = "reading"
	StageFetching  = "fetching"
	StageDone      = "done"
)

// Progress says how far a Pull or Load is. Reports come one at a time, from one
// goroutine, at most every 200 ms and once at the end of a success.
type Progress struct {
	// Ref is what was asked for; empty in a Load.
	Ref   string
	Stage string
	// Bytes of Total have been downloaded (Pull) or read (Load). Total is 0
	// while unknown.
	Bytes, Total int64
	// Layers of LayersTotal are ready as ext4 files.
	Layers, LayersTotal int
}
