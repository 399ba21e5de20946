package imageservice

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"
)

// Limits bound what a foreigner's image may cost. A zero field means its
// default.
type Limits struct {
	// ManifestBytes caps a manifest or an index; default 4 MiB, which is what
	// the OCI distribution-spec asks registries to accept at least.
	ManifestBytes int64
	// ConfigBytes caps an image config; default 8 MiB.
	ConfigBytes int64
	// Layers caps the layers of one image; default 127, docker's own limit.
	Layers int
	// LayerBytes caps one layer, compressed and uncompressed alike; default
	// 32 GiB. The ext4 writer is wrong for single files above 42 GiB.
	LayerBytes int64
	// LayerRatio caps uncompressed to compressed bytes past the first 256 MiB, the
	// holes of sparse files included; default 250. Real layers stay below 20.
	LayerRatio int64
	// LayerEntries caps the tar entries of one layer, together with the directories
	// that their paths imply; default 1,048,576.
	LayerEntries int
	// ArchiveEntries caps the entries of an archive that is loaded; default
	// 65,536: 500 images of 127 layers.
	ArchiveEntries int
	// ArchiveMetadataBytes caps all JSON documents of an archive together;
	// default 64 MiB. They are kept in memory during a load.
	ArchiveMetadataBytes int64

	// ratioGrace is what a layer may expand to whatever its compressed size:
	// 256 MiB. Only tests change it.
	ratioGrace int64
}

const (
	// maxLayerBytes keeps a file below 340 extents of 128 MiB, the number up to
	// which hcsshim's extent tree is right, and the image below maxDiskBytes.
	maxLayerBytes = 40 << 30
	// maxDiskBytes is the size that the ext4 metadata is laid out for: 16 KiB
	// of group descriptors.
	maxDiskBytes = 64 << 30
	maxPathBytes = 4096
	maxNameBytes = 255
	// maxLinkBytes is what a symbolic link can hold in one ext4 block.
	maxLinkBytes = 4095
	// maxXattrBytes caps one entry's extended attributes; ext4 has room for
	// about 4 KiB of them.
	maxXattrBytes = 4096
)

func (l *Limits) setDefaults() error {
	for _, f := range []struct {
		name string
		v    *int64
		def  int64
	}{
		{"ManifestBytes", &l.ManifestBytes, 4 << 20},
		{"ConfigBytes", &l.ConfigBytes, 8 << 20},
		{"LayerBytes", &l.LayerBytes, 32 << 30},
		{"LayerRatio", &l.LayerRatio, 250},
		{"ratioGrace", &l.ratioGrace, 256 << 20},
		{"ArchiveMetadataBytes", &l.ArchiveMetadataBytes, 64 << 20},
	} {
		if *f.v == 0 {
			*f.v = f.def
		}
		if *f.v < 0 {
			return fmt.Errorf("limit %s is negative: %w", f.name, errdefs.ErrInvalidArgument)
		}
	}
	for _, f := range []struct {
		name string
		v    *int
		def  int
	}{
		{"Layers", &l.Layers, 127},
		{"LayerEntries", &l.LayerEntries, 1 << 20},
		{"ArchiveEntries", &l.ArchiveEntries, 1 << 16},
	} {
		if *f.v == 0 {
			*f.v = f.def
		}
		if *f.v < 0 {
			return fmt.Errorf("limit %s is negative: %w", f.name, errdefs.ErrInvalidArgument)
		}
	}
	if l.LayerBytes > maxLayerBytes {
		return fmt.Errorf("limit LayerBytes is %d, more than the %d that the ext4 writer can do: %w", l.LayerBytes, int64(maxLayerBytes), errdefs.ErrInvalidArgument)
	}
	return nil
}

// invalidf makes an error about input that can never work.
func invalidf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// diskError names the path and gives a full disk its class and its remedy.
func diskError(path string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%s: the image store's file system is full; free space there, or remove images that are not needed (crictl rmi, cri-vz image remove), and try again: %w: %w",
			path, errdefs.ErrResourceExhausted, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}
