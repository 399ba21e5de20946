//go:build linux

package vhostvsock

import (
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// T16: a region is exactly the bytes of its file that it claims, also where they don't
// start on a page.
func TestMemory(t *testing.T) {
	const page = 4096
	fd := must(unix.MemfdCreate("memory", unix.MFD_CLOEXEC))(t)
	defer unix.Close(fd)
	check(t, unix.Ftruncate(fd, 4*page))
	content := random(4 * page)
	must(unix.Pwrite(fd, content, 0))(t)

	var m memory
	check(t, m.add(regionSpec{guest: 0x1000, size: page, user: 0xa000, offset: 100}, fd))
	check(t, m.add(regionSpec{guest: 0x2000, size: 10, user: 0xf000, offset: 4*page - 10}, fd))
	if err := m.add(regionSpec{guest: 0x3000, size: 11, user: 0x1_0000, offset: 4*page - 10}, fd); err == nil {
		t.Error("a byte beyond the file was mapped")
	}
	// From the first region into the second.
	segs, err := m.guest(nil, 0x2000-5, 15)
	if err != nil || len(segs) != 2 || string(segs[0]) != string(content[100+page-5:100+page]) || string(segs[1]) != string(content[4*page-10:]) {
		t.Errorf("%d pieces, %v", len(segs), err)
	}
	for _, tt := range []struct{ addr, n uint64 }{{0x2000 - 5, 16}, {0xfff, 2}, {0x200a, 1}, {0, 1}, {1<<64 - 1, 1}} {
		if _, err := m.guest(nil, tt.addr, tt.n); err == nil {
			t.Errorf("%#x+%d is no memory, and was found", tt.addr, tt.n)
		}
	}
	if b, err := m.user(0xa000+page-1, 1); err != nil || b[0] != content[100+page-1] {
		t.Errorf("last byte: %v", err)
	}
	for _, tt := range []struct{ addr, n uint64 }{{0xa000 + page - 1, 2}, {0x9fff, 1}, {0xa000, 1<<64 - 1}} {
		if _, err := m.user(tt.addr, tt.n); err == nil {
			t.Errorf("%#x+%d is no memory, and was found", tt.addr, tt.n)
		}
	}
	// A ring's indices are accessed atomically, wherever the file's offset puts them.
	check(t, m.add(regionSpec{guest: 0x8000, size: page, user: 0x2_0000, offset: 102}, fd))
	q := must(newRing("odd", &m))(t)
	defer q.close()
	q.size, q.descAddr, q.availAddr, q.usedAddr = 2, 0x2_0000, 0x2_0100, 0x2_0200
	if err := q.resolve(); err == nil || !strings.Contains(err.Error(), "odd offset") {
		t.Errorf("resolve: %v", err)
	}
	check(t, m.remove(regionSpec{guest: 0x1000, size: page, user: 0xa000}))
	if _, err := m.guest(nil, 0x1000, 1); err == nil {
		t.Error("memory that was removed was found")
	}
	check(t, m.clear())
}

// The available ring is aligned to 2 bytes only; its index is read right all the same.
func TestAvailIndex(t *testing.T) {
	backing := make([]uint64, 8)
	for _, lead := range []int{0, 2, 4, 6} {
		q := &ring{avail: unsafe.Slice((*byte)(unsafe.Pointer(&backing[0])), 64)[lead : lead+16]}
		copy(q.avail, []byte{0xff, 0xff, 0x34, 0x12, 0xee, 0xee, 0xdd, 0xdd})
		if got := q.availIndex(); got != 0x1234 {
			t.Errorf("at %d: %#x", lead, got)
		}
	}
}
