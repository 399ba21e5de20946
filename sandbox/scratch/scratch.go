// Package scratch makes the disk that a pod's containers write to: a sparse
// ext4 file system with project quotas, from a template in the binary, so that
// a host needs no mkfs and no time for one.
//
// The template was made by `go run ./hack/scratch`. Its inode tables are
// declared zeroed, so the guest's kernel doesn't write a gigabyte of zeros in
// the background, and it has no journal and no backups of the superblock: a
// scratch disk doesn't outlive its machine, so nothing ever repairs it.
//
// All scratch disks have the same UUID. A machine has one, and nothing finds it
// by that.
package scratch

import (
	"bufio"
	"bytes"
	"compress/gzip"
	_ "embed" // the template
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
)

// Size is the size in bytes of every scratch disk: 64 GiB, of which a new one
// occupies some 200 KiB on the host.
const Size int64 = 64 << 30

// BlockSize is the unit of the template's extents, and of the file system.
const BlockSize = 4096

//go:generate go run ../../hack/scratch template.gz

//go:embed template.gz
var template []byte

// CreateScratch writes a new scratch disk to path, which must not exist: the
// error wraps [errdefs.ErrAlreadyExists] if it does. The file is not synced
// to disk; a host that crashes takes the machine along. After an error no file is
// left.
func CreateScratch(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("scratch disk: %w: %w", err, errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return fmt.Errorf("scratch disk: %w", err)
	}
	err = Expand(f, template)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		_ = os.Remove(path)
		return fmt.Errorf("scratch disk %s: %w", path, err)
	}
	return nil
}

// extentHeader precedes the blocks of an extent in a template: gzip of any
// number of headers and their data, all in little-endian.
type extentHeader struct {
	// Block is the number of the first block, Count how many follow.
	Block, Count uint32
}

// maxExtent caps an extent at 4 MiB, far above what the template has.
const maxExtent = 1024

// Expand writes the extents of packed to f and sets its size.
func Expand(f *os.File, packed []byte) error {
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return fmt.Errorf("template: %w", err)
	}
	r := bufio.NewReader(z)
	for {
		var h extentHeader
		if err := binary.Read(r, binary.LittleEndian, &h); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("template: %w", err)
		}
		if h.Count > maxExtent || int64(h.Block)+int64(h.Count) > Size/BlockSize {
			return fmt.Errorf("template: extent of %d blocks at %d is outside the disk", h.Count, h.Block)
		}
		data := make([]byte, int(h.Count)*BlockSize)
		if _, err := io.ReadFull(r, data); err != nil {
			return fmt.Errorf("template: extent at block %d: %w", h.Block, err)
		}
		if _, err := f.WriteAt(data, int64(h.Block)*BlockSize); err != nil {
			return err
		}
	}
	return f.Truncate(Size)
}

// Pack writes the blocks of disk that aren't zero, in the form that [Expand]
// reads. next returns the first offset at or after its argument that may hold
// data, and where that data ends; ok is false past the last.
func Pack(w io.Writer, disk io.ReaderAt, next func(offset int64) (start, end int64, ok bool)) error {
	z, err := gzip.NewWriterLevel(w, gzip.BestCompression)
	if err != nil {
		return err
	}
	var run []byte
	var first int64
	flush := func() error {
		if len(run) == 0 {
			return nil
		}
		h := extentHeader{Block: uint32(first), Count: uint32(len(run) / BlockSize)}
		if err := binary.Write(z, binary.LittleEndian, h); err != nil {
			return err
		}
		_, err := z.Write(run)
		run = run[:0]
		return err
	}
	block := make([]byte, BlockSize)
	zero := make([]byte, BlockSize)
	for start, end, ok := next(0); ok; start, end, ok = next(end) {
		for n := start / BlockSize; n*BlockSize < end; n++ {
			if _, err := disk.ReadAt(block, n*BlockSize); err != nil {
				return err
			}
			contiguous := first+int64(len(run)/BlockSize) == n
			if len(run) > 0 && (!contiguous || len(run) >= maxExtent*BlockSize || bytes.Equal(block, zero)) {
				if err := flush(); err != nil {
					return err
				}
			}
			if bytes.Equal(block, zero) {
				continue
			}
			if len(run) == 0 {
				first = n
			}
			run = append(run, block...)
		}
	}
	if err := flush(); err != nil {
		return err
	}
	return z.Close()
}
