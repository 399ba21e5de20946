package image

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
)

// The kernel formats that a guest boots from.
const (
	// FormatBzImage is x86's compressed image, which every VMM loads.
	FormatBzImage = "bzImage"
	// FormatVmlinux is an x86-64 ELF with a PVH entry, which QEMU loads
	// without decompressing anything in the guest.
	FormatVmlinux = "vmlinux (PVH)"
	// FormatImage is arm64's uncompressed Image.
	FormatImage = "Image"
)

// maxKernel caps what is read of a kernel; Debian's unpacked one has 58 MB.
const maxKernel = 256 << 20

// maxNotes caps one segment of notes; vmlinux has some hundred bytes of them.
const maxNotes = 1 << 20

// KernelInfo is what a kernel file says about itself.
type KernelInfo struct {
	// Arch is the kernel's architecture as GOARCH spells it.
	Arch string
	// Format is one of the Format constants.
	Format string
	// Version is the release as `uname -r` prints it.
	Version string
}

// CheckKernel reads the kernel at path and says what it is. A file that a
// guest of arch can't boot from is refused with an error that names what it is
// and what to do, wrapping [errdefs.ErrInvalidArgument].
func CheckKernel(path, arch string) (KernelInfo, error) {
	if err := checkArch(arch); err != nil {
		return KernelInfo{}, err
	}
	f, err := os.Open(path)
	if err != nil {
		return KernelInfo{}, fmt.Errorf("kernel: %w", err)
	}
	defer f.Close()
	info, err := parseKernel(f, arch)
	if err != nil {
		return KernelInfo{}, fmt.Errorf("kernel %s: %w", path, err)
	}
	return info, nil
}

func readCapped(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	// Room for all of it at once: growing step by step copies a kernel many times.
	var data bytes.Buffer
	data.Grow(int(min(st.Size(), limit)) + bytes.MinRead)
	if _, err := data.ReadFrom(io.LimitReader(f, limit+1)); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(data.Len()) > limit {
		return nil, fmt.Errorf("%s has more than %d MiB: %w", path, limit>>20, errdefs.ErrInvalidArgument)
	}
	return data.Bytes(), nil
}

// refused makes the error for a kernel of the wrong format.
func refused(what, todo string) error {
	return fmt.Errorf("%s: %s: %w", what, todo, errdefs.ErrInvalidArgument)
}

// kernelHead is how much of a kernel's beginning its headers can take: a
// bzImage points to its version with 16 bits, counted from 0x200.
const kernelHead = 1<<16 + 0x200 + maxRelease

// parseKernel tells the formats apart by their magic numbers. It holds little
// of the kernel in memory at once: each start of a VM asks for it.
func parseKernel(r io.ReaderAt, arch string) (KernelInfo, error) {
	b, err := io.ReadAll(io.NewSectionReader(r, 0, kernelHead))
	if err != nil {
		return KernelInfo{}, err
	}
	wanted := map[string]string{
		"amd64": "a guest for amd64 boots from a bzImage or from a vmlinux with CONFIG_PVH; run `cri-vz guest build --arch amd64` to get one",
		"arm64": "a guest for arm64 boots from an uncompressed Image; run `cri-vz guest build --arch arm64` to get one, or build `make Image` with CONFIG_EFI_ZBOOT=n",
	}[arch]

	var info KernelInfo
	switch {
	case len(b) < 0x250:
		return KernelInfo{}, refused(fmt.Sprintf("has %d bytes, which is no kernel", len(b)), wanted)
	case bytes.HasPrefix(b, []byte{0x1f, 0x8b}):
		return KernelInfo{}, refused("is compressed with gzip (Image.gz or vmlinuz)", "decompress it with `gunzip < FILE > Image`; "+wanted)
	case bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return KernelInfo{}, refused("is compressed with zstd", "decompress it with `zstd -d`; "+wanted)
	case bytes.HasPrefix(b, []byte("MZ")) && string(b[4:8]) == "zimg":
		return KernelInfo{}, refused("is an EFI zboot image, which unpacks itself only under EFI firmware", wanted)
	case string(b[0x38:0x3c]) == "ARM\x64":
		// Documentation/arch/arm64/booting.rst
		info = KernelInfo{Arch: "arm64", Format: FormatImage, Version: bannerVersion(r)}
	case string(b[0x202:0x206]) == "HdrS" && binary.LittleEndian.Uint16(b[0x1fe:]) == 0xaa55:
		// Documentation/arch/x86/boot.rst
		info = KernelInfo{Arch: "amd64", Format: FormatBzImage, Version: bzImageVersion(b)}
	case bytes.HasPrefix(b, []byte(elf.ELFMAG)):
		machine, pvh, err := elfKernel(r)
		switch {
		case err != nil:
			return KernelInfo{}, refused("is a damaged ELF file ("+err.Error()+")", wanted)
		case machine == elf.EM_AARCH64:
			return KernelInfo{}, refused("is an arm64 vmlinux (ELF)", "use arch/arm64/boot/Image of the same build; "+wanted)
		case machine != elf.EM_X86_64:
			return KernelInfo{}, refused("is an ELF file for "+machine.String(), wanted)
		case !pvh:
			return KernelInfo{}, refused("is a vmlinux without a PVH entry, which QEMU can't load", "build it with CONFIG_PVH=y or use the bzImage of the same build; "+wanted)
		}
		info = KernelInfo{Arch: "amd64", Format: FormatVmlinux, Version: bannerVersion(r)}
	default:
		return KernelInfo{}, refused("is no Linux kernel", wanted)
	}
	if info.Arch != arch {
		return KernelInfo{}, refused("is a "+info.Format+" for "+info.Arch, wanted)
	}
	if info.Version == "" {
		return KernelInfo{}, refused("has a "+info.Format+" header but no version", wanted)
	}
	return info, nil
}

// elfKernel looks for the note that tells QEMU the 32-bit PVH entry point
// (XEN_ELFNOTE_PHYS32_ENTRY).
func elfKernel(r io.ReaderAt) (machine elf.Machine, pvh bool, err error) {
	f, err := elf.NewFile(r)
	if err != nil {
		return 0, false, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE {
			continue
		}
		notes, err := io.ReadAll(io.LimitReader(p.Open(), maxNotes))
		if err != nil {
			return 0, false, err
		}
		for len(notes) >= 12 {
			nameSize := uint64(f.ByteOrder.Uint32(notes))
			descSize := uint64(f.ByteOrder.Uint32(notes[4:]))
			kind := f.ByteOrder.Uint32(notes[8:])
			end := 12 + (nameSize+3)&^3 + (descSize+3)&^3
			if end > uint64(len(notes)) {
				break
			}
			const physEntry = 18
			if kind == physEntry && bytes.HasPrefix(notes[12:], []byte("Xen\x00")) {
				pvh = true
			}
			notes = notes[end:]
		}
	}
	return f.Machine, pvh, nil
}

// bzImageVersion follows the header's pointer to the version string.
func bzImageVersion(b []byte) string {
	at := int(binary.LittleEndian.Uint16(b[0x20e:])) + 0x200
	if at == 0x200 || at >= len(b) {
		return ""
	}
	return firstWord(b[at:])
}

// bannerVersion finds "Linux version X " in an uncompressed kernel, and is
// empty when there is none or the kernel can't be read.
func bannerVersion(r io.ReaderAt) string {
	banner := []byte("Linux version ")
	window := make([]byte, 1<<20)
	// One window overlaps the next by what a banner can take.
	overlap := len(banner) + maxRelease
	for at := int64(0); at < maxKernel; at += int64(len(window) - overlap) {
		n, err := r.ReadAt(window, at)
		for b := window[:n]; ; {
			i := bytes.Index(b, banner)
			if i < 0 {
				break
			}
			b = b[i+len(banner):]
			// The format string of the banner itself may come first.
			if len(b) > 0 && b[0] >= '0' && b[0] <= '9' {
				if version := firstWord(b); version != "" {
					return version
				}
			}
		}
		if err != nil {
			return ""
		}
	}
	return ""
}

// maxRelease caps the length of a release, with the byte after it (__NEW_UTS_LEN).
const maxRelease = 65

// firstWord returns the printable text before the first space, capped at what
// a release can have.
func firstWord(b []byte) string {
	b = b[:min(len(b), maxRelease)]
	for i, c := range b {
		if c <= ' ' || c > '~' {
			return string(b[:i])
		}
	}
	return ""
}

// unpackBzImage returns the vmlinux inside a bzImage, or nil if it isn't
// compressed with zstd or has no PVH entry. Decompressing here once instead of
// in the guest at each boot saves 0.6 s of 2.7 s under QEMU's emulation.
func unpackBzImage(b []byte) ([]byte, error) {
	info, err := parseKernel(bytes.NewReader(b), "amd64")
	if err != nil {
		return nil, err
	}
	if info.Format != FormatBzImage || binary.LittleEndian.Uint16(b[0x206:]) < 0x208 {
		return nil, nil
	}
	setup := int64(b[0x1f1])
	if setup == 0 {
		setup = 4
	}
	start := (setup+1)*512 + int64(binary.LittleEndian.Uint32(b[0x248:]))
	size := int64(binary.LittleEndian.Uint32(b[0x24c:]))
	if start+size > int64(len(b)) {
		return nil, refused("its header points outside the file", "fetch it again")
	}
	payload := b[start : start+size]
	if !bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}) || len(payload) < 8 {
		return nil, nil
	}
	// The last four bytes are the size for the boot stub, not zstd's.
	z, err := zstd.NewReader(bytes.NewReader(payload[:len(payload)-4]), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxKernel))
	if err != nil {
		return nil, fmt.Errorf("unpack bzImage: %w", err)
	}
	defer z.Close()
	vmlinux, err := io.ReadAll(io.LimitReader(z, maxKernel))
	if err != nil {
		return nil, fmt.Errorf("unpack bzImage: %w", err)
	}
	inner, err := parseKernel(bytes.NewReader(vmlinux), "amd64")
	if err != nil || inner.Format != FormatVmlinux || inner.Version != info.Version {
		return nil, nil
	}
	return vmlinux, nil
}
