package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// maxUnpacked caps what is decompressed of a package; linux-image has 150 MB.
const maxUnpacked = 4 << 30

// walkDeb calls visit for each regular file of a Debian package (deb(5)), with
// its clean path and contents. It unpacks here and not by dpkg-deb, because a
// Mac has none.
func walkDeb(r io.Reader, visit func(name string, size int64, contents io.Reader) error) error {
	magic := make([]byte, 8)
	if _, err := io.ReadFull(r, magic); err != nil || string(magic) != "!<arch>\n" {
		return fmt.Errorf("not a Debian package: %w", errdefs.ErrInvalidArgument)
	}
	for {
		header := make([]byte, 60)
		if _, err := io.ReadFull(r, header); err != nil {
			return fmt.Errorf("Debian package has no data member (truncated?): %w", errdefs.ErrInvalidArgument)
		}
		size, err := strconv.ParseInt(strings.TrimSpace(string(header[48:58])), 10, 64)
		if err != nil || size < 0 || string(header[58:]) != "`\n" {
			return fmt.Errorf("Debian package has a damaged member header: %w", errdefs.ErrInvalidArgument)
		}
		name := strings.TrimRight(string(header[:16]), " /")
		member := io.LimitReader(r, size)
		if ext, ok := strings.CutPrefix(name, "data.tar"); ok {
			return walkTar(member, ext, visit)
		}
		if _, err := io.CopyN(io.Discard, r, size+size%2); err != nil {
			return fmt.Errorf("Debian package: member %q: %w", name, err)
		}
	}
}

func walkTar(r io.Reader, ext string, visit func(string, int64, io.Reader) error) error {
	var err error
	switch ext {
	case "":
	case ".xz":
		r, err = xz.NewReader(r)
	case ".gz":
		r, err = gzip.NewReader(r)
	case ".zst":
		var z *zstd.Decoder
		z, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(256<<20))
		if err == nil {
			defer z.Close()
			r = z
		}
	default:
		err = fmt.Errorf("unknown compression %q: %w", ext, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("Debian package: data.tar%s: %w", ext, err)
	}
	files := tar.NewReader(io.LimitReader(r, maxUnpacked))
	for {
		h, err := files.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("Debian package: %w", err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if err := visit(path.Clean("/" + h.Name)[1:], h.Size, files); err != nil {
			return err
		}
	}
}

// kernelPackage is a linux-image package, read into memory.
type kernelPackage struct {
	// kernel is boot/vmlinuz-*, version what follows the dash.
	kernel  []byte
	version string
	// files are the module files by module name.
	files map[string]moduleFile
}

type moduleFile struct {
	name string
	data []byte
}

// maxModuleBytes caps the module files of a package together.
const maxModuleBytes = 512 << 20

func readKernelPackage(r io.Reader) (*kernelPackage, error) {
	p := &kernelPackage{files: map[string]moduleFile{}}
	total := 0
	err := walkDeb(r, func(name string, size int64, contents io.Reader) error {
		base := path.Base(name)
		if version, ok := strings.CutPrefix(name, "boot/vmlinuz-"); ok {
			if size > maxKernel {
				return fmt.Errorf("kernel of %d bytes: %w", size, errdefs.ErrInvalidArgument)
			}
			var buf bytes.Buffer
			if _, err := io.Copy(&buf, contents); err != nil {
				return fmt.Errorf("unpack %s: %w", name, err)
			}
			p.kernel, p.version = buf.Bytes(), version
			return nil
		}
		if !strings.HasPrefix(strings.TrimPrefix(name, "usr/"), "lib/modules/") {
			return nil
		}
		mod, _, ok := moduleName(base)
		if !ok {
			return nil
		}
		if size > maxModule || total > maxModuleBytes {
			return fmt.Errorf("module %s: more than %d MiB: %w", name, maxModule>>20, errdefs.ErrInvalidArgument)
		}
		data, err := io.ReadAll(contents)
		if err != nil {
			return fmt.Errorf("unpack %s: %w", name, err)
		}
		total += len(data)
		p.files[mod] = moduleFile{name: base, data: data}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if p.kernel == nil {
		return nil, fmt.Errorf("package has no boot/vmlinuz-*; want a linux-image package: %w", errdefs.ErrInvalidArgument)
	}
	return p, nil
}

func (p *kernelPackage) module(name string) (module, bool, error) {
	f, ok := p.files[name]
	if !ok {
		return module{}, false, nil
	}
	m, err := newModule(f.name, f.data)
	return m, true, err
}

// ExtractFile writes the file name (no leading slash) of the Debian package at
// deb to dst.
func ExtractFile(deb, name, dst string) error {
	f, err := os.Open(deb)
	if err != nil {
		return err
	}
	defer f.Close()
	found := false
	err = walkDeb(f, func(entry string, _ int64, contents io.Reader) error {
		if entry != name {
			return nil
		}
		found = true
		out, err := os.Create(dst)
		if err != nil {
			return err
		}
		_, err = io.Copy(out, contents)
		return errors.Join(err, out.Close())
	})
	if err != nil {
		return fmt.Errorf("extract %s from %s: %w", name, deb, err)
	}
	if !found {
		return fmt.Errorf("extract %s from %s: no such file in the package: %w", name, deb, errdefs.ErrNotFound)
	}
	return nil
}
