//go:build linux

package vhostvsock

import (
	"errors"
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// maxRegions bounds the guest's memory map. QEMU has a handful of regions, and
// one more for each memory module that is plugged.
const maxRegions = 32

// regionSpec is a memory region as QEMU describes it. All values are bytes.
type regionSpec struct {
	guest  uint64 // guest physical address: what descriptors hold
	size   uint64
	user   uint64 // QEMU's virtual address: what SET_VRING_ADDR holds
	offset uint64 // of the region's first byte in the file
}

type region struct {
	regionSpec
	bytes   []byte // the region
	mapping []byte // what munmap wants: bytes, rounded out to pages
}

// memory is the guest's memory map. It does not change while a ring runs.
type memory struct {
	regions []region
}

func overflows(a, n uint64) bool { return n > math.MaxUint64-a }

func overlap(a, an, b, bn uint64) bool { return a < b+bn && b < a+an }

// add maps a region of the file fd, which stays the caller's.
//
// Touching a page beyond the end of a file raises SIGBUS, so the file must cover
// the region now; that it can't be shortened later is sealed where the file knows
// seals, and survived by the ring workers where it does not.
func (m *memory) add(s regionSpec, fd int) error {
	if len(m.regions) >= maxRegions {
		return fmt.Errorf("memory region at %#x: the guest has %d regions already, the most there can be", s.guest, maxRegions)
	}
	if s.size == 0 || overflows(s.guest, s.size) || overflows(s.user, s.size) || overflows(s.offset, s.size) {
		return fmt.Errorf("memory region at %#x: size %#x, address %#x or offset %#x out of range", s.guest, s.size, s.user, s.offset)
	}
	for i := range m.regions {
		r := &m.regions[i]
		if overlap(s.guest, s.size, r.guest, r.size) || overlap(s.user, s.size, r.user, r.size) {
			return fmt.Errorf("memory region at %#x, %#x bytes: overlaps the region at %#x, %#x bytes", s.guest, s.size, r.guest, r.size)
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("memory region at %#x: stat its file: %w", s.guest, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("memory region at %#x: its descriptor is not a file (mode %#o)", s.guest, st.Mode)
	}
	if st.Size < 0 || s.offset+s.size > uint64(st.Size) {
		return fmt.Errorf("memory region at %#x: claims bytes %#x to %#x of a file of %#x bytes", s.guest, s.offset, s.offset+s.size, st.Size)
	}
	// Best effort: fails on files that know no seals (hugetlbfs, memory-backend-file)
	// and where QEMU has sealed the seals, by default including F_SEAL_SHRINK.
	_, _ = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK)

	// hugetlbfs wants offset and length in huge pages, which it tells as block size.
	unit := uint64(os.Getpagesize())
	if b := uint64(st.Blksize); st.Blksize > 0 && b > unit && b&(b-1) == 0 && b <= 1<<30 {
		unit = b
	}
	lead := s.offset & (unit - 1)
	length := lead + s.size
	if overflows(length, unit-1) {
		return fmt.Errorf("memory region at %#x: size %#x out of range", s.guest, s.size)
	}
	length = (length + unit - 1) &^ (unit - 1)
	if length > math.MaxInt || s.offset > math.MaxInt64 {
		return fmt.Errorf("memory region at %#x: size %#x out of range", s.guest, s.size)
	}
	b, err := unix.Mmap(fd, int64(s.offset-lead), int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("memory region at %#x: map %#x bytes at offset %#x: %w", s.guest, s.size, s.offset, err)
	}
	// The guest's secrets stay out of our core dumps.
	_ = unix.Madvise(b, unix.MADV_DONTDUMP)
	m.regions = append(m.regions, region{regionSpec: s, bytes: b[lead : lead+s.size : lead+s.size], mapping: b})
	return nil
}

// remove unmaps the region that QEMU describes by s (the offset is not compared).
func (m *memory) remove(s regionSpec) error {
	for i := range m.regions {
		r := &m.regions[i]
		if r.guest == s.guest && r.size == s.size && r.user == s.user {
			err := unix.Munmap(r.mapping)
			m.regions = append(m.regions[:i], m.regions[i+1:]...)
			return err
		}
	}
	return fmt.Errorf("memory region at %#x, %#x bytes: not mapped", s.guest, s.size)
}

// clear unmaps everything.
func (m *memory) clear() error {
	var errs []error
	for i := range m.regions {
		errs = append(errs, unix.Munmap(m.regions[i].mapping))
	}
	m.regions = nil
	return errors.Join(errs...)
}

// guest appends the n bytes at a guest physical address to segs, in more than one
// piece where they cross from one region into an adjacent one.
func (m *memory) guest(segs [][]byte, addr, n uint64) ([][]byte, error) {
	for n > 0 {
		r := m.find(addr)
		if r == nil {
			return segs, fmt.Errorf("guest address %#x (%#x bytes wanted) is not memory", addr, n)
		}
		at := addr - r.guest
		k := min(n, r.size-at)
		segs = append(segs, r.bytes[at:at+k:at+k])
		addr, n = addr+k, n-k
	}
	return segs, nil
}

func (m *memory) find(addr uint64) *region {
	for i := range m.regions {
		if r := &m.regions[i]; addr >= r.guest && addr-r.guest < r.size {
			return r
		}
	}
	return nil
}

// user returns the n bytes at an address of QEMU's, which must lie in one region.
func (m *memory) user(addr, n uint64) ([]byte, error) {
	for i := range m.regions {
		r := &m.regions[i]
		if at := addr - r.user; addr >= r.user && at < r.size && n <= r.size-at {
			return r.bytes[at : at+n : at+n], nil
		}
	}
	return nil, fmt.Errorf("address %#x (%#x bytes wanted) is not in the guest's memory", addr, n)
}
