package qemu

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
)

// sparse makes a file of size bytes with parts at offsets.
func sparse(size int, parts map[int]string) []byte {
	b := make([]byte, size)
	for at, s := range parts {
		copy(b[at:], s)
	}
	return b
}

// vmlinux makes an ELF file with one note.
func vmlinux(machine uint16, noteName string, noteType uint32) []byte {
	b := sparse(0x400, map[int]string{0: "\x7fELF\x02\x01\x01", 0x204: noteName})
	le := binary.LittleEndian
	le.PutUint16(b[16:], 2) // ET_EXEC
	le.PutUint16(b[18:], machine)
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[32:], 64) // program headers
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	le.PutUint16(b[58:], 64) // no sections
	le.PutUint32(b[64:], 4)  // PT_NOTE
	le.PutUint64(b[72:], 0x1f8)
	le.PutUint64(b[96:], 20)
	le.PutUint32(b[0x1f8:], uint32(len(noteName)))
	le.PutUint32(b[0x1fc:], 4)
	le.PutUint32(b[0x200:], noteType)
	return b
}

func TestDetectKernel(t *testing.T) {
	bzImage := sparse(0x400, map[int]string{0x1fe: "\x55\xaa", 0x202: "HdrS"})
	arm64 := sparse(0x400, map[int]string{0x38: "ARM\x64"})
	pvh := vmlinux(62, "Xen\x00", 18)
	for _, test := range []struct {
		name, arch string
		file       []byte
		want       bootProtocol
		err        string
	}{
		{"bzImage", "amd64", bzImage, bootBzImage, ""},
		{"vmlinux", "amd64", pvh, bootPVH, ""},
		{"Image", "arm64", arm64, bootImage, ""},
		{"vmlinux without PVH", "amd64", vmlinux(62, "GNU\x00", 18), 0, "no PVH entry point"},
		{"vmlinux with another Xen note", "amd64", vmlinux(62, "Xen\x00", 3), 0, "no PVH entry point"},
		{"vmlinux for arm64", "amd64", vmlinux(183, "Xen\x00", 18), 0, "it is for EM_AARCH64"},
		{"Image for amd64", "amd64", arm64, 0, "it is for arm64"},
		{"bzImage for arm64", "arm64", bzImage, 0, "it is for amd64"},
		{"gzip for arm64", "arm64", sparse(0x400, map[int]string{0: "\x1f\x8b"}), 0, "uncompressed"},
		{"EFI zboot for arm64", "arm64", sparse(0x400, map[int]string{0: "MZ\x00\x00zimg"}), 0, "uncompressed"},
		{"empty", "amd64", nil, 0, "too short"},
		{"truncated", "amd64", bzImage[:0x210], 0, "too short"},
		{"garbage", "amd64", bytes.Repeat([]byte("x"), 0x400), 0, "neither a bzImage"},
		{"unknown architecture", "vax", bzImage, 0, "vax"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := detectKernel(bytes.NewReader(test.file), test.arch)
			switch {
			case test.err == "" && (err != nil || got != test.want):
				t.Errorf("got %v, %v, want %v", got, err, test.want)
			case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)):
				t.Errorf("got %v, %v, want an error with %q", got, err, test.err)
			}
		})
	}
}

func FuzzDetectKernel(f *testing.F) {
	f.Add(vmlinux(62, "Xen\x00", 18)[:0x220])
	f.Add(sparse(0x400, map[int]string{0x1fe: "\x55\xaa", 0x202: "HdrS"}))
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, arch := range []string{"amd64", "arm64"} {
			if p, err := detectKernel(bytes.NewReader(b), arch); err == nil && p == 0 {
				t.Error("neither a protocol nor an error")
			}
		}
	})
}
