//go:build linux && (amd64 || arm64)

package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/cri-vz/cri-vz/guest/api"
	"golang.org/x/sys/unix"
)

// rosettaDir is where amd64Programs looks for the translator.
const rosettaDir = "/run/rosetta"

// amd64Programs tells the kernel (binfmt-misc.rst) to run 64-bit ELF programs for
// x86-64, position-independent or not, by the translator. O: it gets the program as a
// descriptor. C: a setuid program has its owner's rights. F: the kernel opens the
// translator now, once and for all, because in a container's root it is not found.
const amd64Programs = `:rosetta:M::` +
	`\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x3e\x00:` +
	`\xff\xff\xff\xff\xff\xfe\xfe\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:` +
	rosettaDir + `/rosetta:OCF`

// useRosetta makes amd64 programs run in an arm64 guest, where the host has a share
// for it.
func useRosetta(b *bootState) error {
	if runtime.GOARCH != "arm64" {
		return nil
	}
	err := mountShare(api.ShareRosetta, rosettaDir, unix.MS_RDONLY)
	if errors.Is(err, unix.EINVAL) { // the kernel's word for a tag that no device has
		return os.Remove(rosettaDir)
	}
	if err != nil {
		return err
	}
	// The kernel has its module loaded by RunModprobe.
	dir := filepath.Join(b.paths.run, "binfmt_misc")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("binfmt_misc", dir, "binfmt_misc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount binfmt_misc: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "register"), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(amd64Programs)
	return err
}
