package scratch

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// TestCreateScratch checks what T15 asks of the template: ext4, clean, with
// project quotas, sparse, made at once.
func TestCreateScratch(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	start := time.Now()
	if err := CreateScratch(path); err != nil {
		t.Fatal(err)
	}
	// The goal is 30 ms; a machine that runs other tests gets ten times that.
	if took := time.Since(start); took > 300*time.Millisecond {
		t.Errorf("took %v", took)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != Size {
		t.Errorf("size %d, want %d", st.Size, Size)
	}
	if used := st.Blocks * 512; used > 1<<20 {
		t.Errorf("occupies %d bytes, want at most 1 MiB", used)
	}
	if len(template) > 100<<10 {
		t.Errorf("template has %d bytes in the binary, want at most 100 KiB", len(template))
	}
	if runtime.GOOS != "linux" {
		return // e2fsck isn't there
	}
	if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck (package e2fsprogs): %v\n%s", err, out)
	}
	out, err := exec.Command("dumpe2fs", path).Output()
	if err != nil {
		t.Fatalf("dumpe2fs (package e2fsprogs): %v", err)
	}
	text := string(out)
	for _, want := range []string{" project", " quota", "Project quota inode:"} {
		if !strings.Contains(text, want) {
			t.Errorf("dumpe2fs doesn't say %q", want)
		}
	}
	if strings.Contains(text, "has_journal") {
		t.Error("has a journal")
	}
	if groups, zeroed := strings.Count(text, ": (Blocks "), strings.Count(text, "ITABLE_ZEROED"); groups == 0 || zeroed != groups {
		t.Errorf("%d of %d inode tables are declared zeroed; the guest would write the rest", zeroed, groups)
	}
}

func TestCreateScratchRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := CreateScratch(path); err != nil {
		t.Fatal(err)
	}
	if err := CreateScratch(path); !errdefs.IsAlreadyExists(err) {
		t.Errorf("over an existing file: %v", err)
	}
}

// TestPackExpand packs the disk that the template makes and expands it again.
func TestPackExpand(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := CreateScratch(path); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var packed bytes.Buffer
	// The extents that the template itself names stand for the disk's data.
	extents := headers(t, template)
	next := func(offset int64) (int64, int64, bool) {
		for _, h := range extents {
			if start := int64(h.Block) * BlockSize; start >= offset {
				return start, start + int64(h.Count)*BlockSize, true
			}
		}
		return 0, 0, false
	}
	if err := Pack(&packed, f, next); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(unpack(t, packed.Bytes()), unpack(t, template)) {
		t.Error("packing a fresh disk doesn't give the template")
	}
}

func unpack(t *testing.T, packed []byte) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := b.ReadFrom(z); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func headers(t *testing.T, packed []byte) []extentHeader {
	t.Helper()
	var all []extentHeader
	for b := unpack(t, packed); len(b) >= 8; {
		h := extentHeader{Block: binary.LittleEndian.Uint32(b), Count: binary.LittleEndian.Uint32(b[4:])}
		all = append(all, h)
		b = b[8+int(h.Count)*BlockSize:]
	}
	return all
}

func TestExpandDamaged(t *testing.T) {
	pack := func(h extentHeader, data int) []byte {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		_ = binary.Write(z, binary.LittleEndian, h)
		_, _ = z.Write(make([]byte, data))
		_ = z.Close()
		return b.Bytes()
	}
	for name, packed := range map[string][]byte{
		"no gzip":          []byte("x"),
		"past the end":     pack(extentHeader{Block: uint32(Size / BlockSize), Count: 1}, BlockSize),
		"too long":         pack(extentHeader{Count: maxExtent + 1}, 0),
		"truncated extent": pack(extentHeader{Count: 2}, BlockSize),
	} {
		t.Run(name, func(t *testing.T) {
			f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := Expand(f, packed); err == nil {
				t.Error("no error")
			}
		})
	}
}

func BenchmarkCreateScratch(b *testing.B) {
	dir := b.TempDir()
	for b.Loop() {
		path := filepath.Join(dir, "disk")
		if err := CreateScratch(path); err != nil {
			b.Fatal(err)
		}
		_ = os.Remove(path)
	}
}
