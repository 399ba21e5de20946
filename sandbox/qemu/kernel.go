package qemu

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// bootProtocol is how a kernel file wants to be started.
type bootProtocol int

const (
	// bootBzImage is Linux' own x86 boot protocol, which SeaBIOS starts.
	bootBzImage bootProtocol = iota + 1
	// bootPVH is an ELF vmlinux with a PVH entry point, which qboot starts 0.3 s
	// sooner.
	bootPVH
	// bootImage is an uncompressed arm64 Image.
	bootImage
)

// kernelProtocol tells from the file at path how a kernel for arch is started.
// Errors wrap vmm.ErrConfig.
func kernelProtocol(path, arch string) (bootProtocol, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("kernel: %w: %w", err, vmm.ErrConfig)
	}
	defer f.Close()
	p, err := detectKernel(f, arch)
	if err != nil {
		return 0, fmt.Errorf("kernel %s: %w: %w", path, err, vmm.ErrConfig)
	}
	return p, nil
}

// Offsets in Documentation/arch/x86/boot.rst and Documentation/arch/arm64/booting.rst.
const (
	x86BootFlag   = 0x1fe
	x86Header     = 0x202
	arm64Magic    = 0x38
	kernelHeader  = 0x300
	noteSizeLimit = 64 << 10
	maxSegments   = 64 // a vmlinux has five
)

func detectKernel(r io.ReaderAt, arch string) (bootProtocol, error) {
	b := make([]byte, kernelHeader)
	n, err := r.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	b = b[:n]
	if len(b) < kernelHeader {
		return 0, fmt.Errorf("%d bytes are too short for a kernel", n)
	}
	isX86 := bytes.HasPrefix(b[x86Header:], []byte("HdrS")) && binary.LittleEndian.Uint16(b[x86BootFlag:]) == 0xaa55
	isArm64 := bytes.HasPrefix(b[arm64Magic:], []byte("ARM\x64"))
	isELF := bytes.HasPrefix(b, []byte(elf.ELFMAG))
	switch arch {
	case "amd64":
		switch {
		case isX86:
			return bootBzImage, nil
		case isELF:
			return bootPVH, checkPVH(r)
		case isArm64:
			return 0, errors.New("it is for arm64, the guest is amd64")
		}
		return 0, errors.New("it is neither a bzImage nor an ELF vmlinux, install the guest's kernel anew")
	case "arm64":
		switch {
		case isArm64:
			return bootImage, nil
		case isX86:
			return 0, errors.New("it is for amd64, the guest is arm64")
		case bytes.HasPrefix(b, []byte{0x1f, 0x8b}) || bytes.HasPrefix(b[4:], []byte("zimg")):
			return 0, errors.New("it is compressed, an arm64 guest needs the uncompressed Image")
		}
		return 0, errors.New("it is not an arm64 Image, install the guest's kernel anew")
	}
	return 0, fmt.Errorf("no kernel is known for architecture %q", arch)
}

// checkPVH wants the note in which a vmlinux gives its PVH entry point
// (XEN_ELFNOTE_PHYS32_ENTRY).
func checkPVH(r io.ReaderAt) error {
	f, err := elf.NewFile(r)
	if err != nil {
		return err
	}
	if f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("it is for %s, the guest is amd64", f.Machine)
	}
	for _, p := range f.Progs[:min(len(f.Progs), maxSegments)] {
		if p.Type != elf.PT_NOTE || p.Filesz > noteSizeLimit {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return err
		}
		if hasNote(b, f.ByteOrder, "Xen\x00", 18) {
			return nil
		}
	}
	return errors.New("this vmlinux has no PVH entry point (CONFIG_PVH), use its bzImage")
}

func hasNote(b []byte, order binary.ByteOrder, name string, kind uint32) bool {
	align := func(n uint64) uint64 { return (n + 3) &^ 3 }
	for len(b) >= 12 {
		nameSize, descSize := uint64(order.Uint32(b)), uint64(order.Uint32(b[4:]))
		k := order.Uint32(b[8:])
		size := 12 + align(nameSize) + align(descSize)
		if size > uint64(len(b)) {
			return false
		}
		if k == kind && string(b[12:12+nameSize]) == name {
			return true
		}
		b = b[size:]
	}
	return false
}
