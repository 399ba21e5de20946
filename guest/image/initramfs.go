package image

import (
	"bytes"
	"fmt"
	"io"
	"path"
	"sort"
	"strings"
)

// Modes of entries (inode(7)).
const (
	modeDir  = 0o040000
	modeReg  = 0o100000
	modeChar = 0o020000
)

// entry is a file, directory or device of an initramfs.
type entry struct {
	// name has no leading slash.
	name string
	mode uint32
	data []byte
	// major and minor are a device's numbers.
	major, minor uint32
}

// writeCPIO writes entries as a "newc" archive, the format of
// Documentation/driver-api/early-userspace/buffer-format.rst. Equal entries in
// any order make equal bytes: they are sorted, parents are added, numbered from
// 1, owned by root and dated 1970.
func writeCPIO(w io.Writer, entries []entry) error {
	byName := map[string]entry{}
	for _, e := range entries {
		if e.name == "" || path.Clean("/" + e.name)[1:] != e.name || strings.ContainsRune(e.name, 0) {
			return fmt.Errorf("initramfs entry %q: not a clean relative path", e.name)
		}
		if _, twice := byName[e.name]; twice {
			return fmt.Errorf("initramfs entry %q: twice", e.name)
		}
		byName[e.name] = e
	}
	for _, e := range entries {
		for dir := path.Dir(e.name); dir != "."; dir = path.Dir(dir) {
			parent, ok := byName[dir]
			if ok && parent.mode&modeDir == 0 {
				return fmt.Errorf("initramfs entry %q: its parent %q is no directory", e.name, dir)
			}
			if !ok {
				byName[dir] = entry{name: dir, mode: modeDir | 0o755}
			}
		}
	}
	names := make([]string, 0, len(byName))
	for name := range byName {
		names = append(names, name)
	}
	// Parents sort before their children: a prefix is less than what it
	// begins.
	sort.Strings(names)
	var buf bytes.Buffer
	for i, name := range names {
		writeEntry(&buf, uint32(i+1), byName[name])
	}
	writeEntry(&buf, 0, entry{name: "TRAILER!!!"})
	_, err := w.Write(buf.Bytes())
	return err
}

func writeEntry(buf *bytes.Buffer, ino uint32, e entry) {
	links := uint32(1)
	if e.mode&modeDir != 0 {
		links = 2
	}
	buf.WriteString("070701")
	for _, field := range []uint32{
		ino, e.mode, 0, 0, links, 0, uint32(len(e.data)),
		0, 0, e.major, e.minor, uint32(len(e.name) + 1), 0,
	} {
		fmt.Fprintf(buf, "%08x", field)
	}
	buf.WriteString(e.name)
	buf.WriteByte(0)
	pad(buf)
	buf.Write(e.data)
	pad(buf)
}

func pad(buf *bytes.Buffer) {
	for buf.Len()%4 != 0 {
		buf.WriteByte(0)
	}
}
