package vmm

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const (
	// serialLimit is VIRTIO_BLK_ID_BYTES (virtio 1.2 §5.2.6).
	serialLimit = 20
	// tagLimit is the size of the tag in virtio_fs_config (virtio 1.2 §5.11.4).
	tagLimit = 36
	// socketPathLimit is sun_path of the narrowest system that cri-vz knows, with
	// the zero at its end. // T14
	socketPathLimit = 104
	// longestSocket is the longest name that a driver gives a socket in RunDir.
	longestSocket = "share-00.sock"
)

// Check refuses what no driver can carry out, without looking into any file; its
// errors wrap [ErrConfig]. A driver's Validate adds what is particular to it:
// architectures, kernel formats, how much of each device there can be.
func (c Config) Check() error {
	if err := c.check(); err != nil {
		return fmt.Errorf("%w: %w", err, ErrConfig)
	}
	return nil
}

func (c Config) check() error {
	if c.Initrd != "" {
		if err := isFile(c.Initrd); err != nil {
			return fmt.Errorf("initrd: %w", err)
		}
	}
	if strings.ContainsAny(c.Cmdline, "\x00\n") {
		return fmt.Errorf("kernel command line %q: a newline or zero can't be in it", c.Cmdline)
	}
	if c.CPUs < 1 {
		return fmt.Errorf("%d CPUs: choose at least 1", c.CPUs)
	}
	if c.MemoryBytes <= 0 || c.MemoryBytes%(1<<20) != 0 {
		return fmt.Errorf("memory of %d bytes: choose a positive multiple of 1 MiB", c.MemoryBytes)
	}
	if c.Console == nil {
		return fmt.Errorf("no console file")
	}
	if err := isDir(c.RunDir); err != nil {
		return fmt.Errorf("run directory: %w", err)
	}
	if p := filepath.Join(c.RunDir, longestSocket); len(p) >= socketPathLimit {
		return fmt.Errorf("run directory %s: the socket path %s has %d bytes, at most %d fit: choose a shorter one",
			c.RunDir, p, len(p), socketPathLimit-1)
	}
	serials := map[string]bool{}
	for _, disk := range c.Disks {
		switch {
		case disk.Serial == "" || len(disk.Serial) > serialLimit || !printable(disk.Serial):
			return fmt.Errorf("disk serial %q: choose 1 to %d bytes of printable ASCII", disk.Serial, serialLimit)
		case serials[disk.Serial]:
			return fmt.Errorf("two disks have the serial %q", disk.Serial)
		}
		serials[disk.Serial] = true
		if err := isFile(disk.Path); err != nil {
			return fmt.Errorf("disk %s: %w", disk.Serial, err)
		}
	}
	tags := map[string]bool{}
	for _, s := range c.Shares {
		switch {
		case s.Tag == "" || len(s.Tag) > tagLimit || !printable(s.Tag):
			return fmt.Errorf("share tag %q: choose 1 to %d bytes of printable ASCII", s.Tag, tagLimit)
		case tags[s.Tag]:
			return fmt.Errorf("two shares have the tag %q", s.Tag)
		case s.Dirs != nil && (s.Dir != "" || s.ReadOnly):
			return fmt.Errorf("share %s has one directory and several", s.Tag)
		}
		tags[s.Tag] = true
		if s.Dirs == nil {
			if err := isDir(s.Dir); err != nil {
				return fmt.Errorf("share %s: %w", s.Tag, err)
			}
		}
		if err := CheckDirs(s.Dirs); err != nil {
			return fmt.Errorf("share %s: %w", s.Tag, err)
		}
	}
	macs := map[string]bool{}
	for i, n := range c.NICs {
		mac := n.MAC.String()
		switch {
		case len(n.MAC) != 6 || n.MAC[0]&1 != 0:
			return fmt.Errorf("NIC %d: MAC %q: choose a unicast address of 6 bytes", i, mac)
		case macs[mac]:
			return fmt.Errorf("two NICs have the MAC %s", mac)
		case n.MTU != 0 && n.MTU < 68 || n.MTU > 65535:
			return fmt.Errorf("NIC %s: MTU %d: choose 68 to 65535, or 0", mac, n.MTU)
		}
		macs[mac] = true
	}
	return nil
}

// CheckDirs refuses names that can't be those of directories, and directories that
// are none.
func CheckDirs(dirs map[string]SharedDir) error {
	for name, d := range dirs {
		if name == "" || name == "." || name == ".." || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
			return fmt.Errorf("%q can't be the name of a directory: %w", name, ErrConfig)
		}
		if err := isDir(d.Dir); err != nil {
			return fmt.Errorf("%s: %w: %w", name, err, ErrConfig)
		}
	}
	return nil
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}

func isDir(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q is not an absolute path", path)
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return fmt.Errorf("%s is not a directory", path)
	}
	return nil
}

func isFile(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q is not an absolute path", path)
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if m := st.Mode(); !m.IsRegular() && (m&fs.ModeDevice == 0 || m&fs.ModeCharDevice != 0) {
		return fmt.Errorf("%s is neither a file nor a block device", path)
	}
	return nil
}
