package command

import (
	"context"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/sandbox/vz"
)

var platformChecks = mac{
	arch:     runtime.GOARCH,
	text:     unix.Sysctl,
	number:   unix.SysctlUint32,
	driver:   func() error { _, err := vz.New(); return err },
	features: vz.Features,
	signature: func(ctx context.Context, program string) ([]byte, error) {
		return exec.CommandContext(ctx, "/usr/bin/codesign", "--display", "--entitlements", "-", "--xml", program).CombinedOutput()
	},
	volume: func(path string) (volume, error) {
		const ignoreOwnership = 0x00200000 // MNT_IGNORE_OWNERSHIP of sys/mount.h
		dir, st, err := statfs(path)
		return volume{dir, unix.ByteSliceToString(st.Fstypename[:]), st.Flags&ignoreOwnership != 0}, err
	},
}.checks()

const mendGuest = "run `cri-vz guest build --agent FILE --kernel FILE`; a kernel is a Debian linux-image package or, for arm64, an uncompressed Image"
