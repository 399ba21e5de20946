package command

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/cmd/cri-vz/config"
	"github.com/cri-vz/cri-vz/sandbox/vz"
)

var platformChecks = []check{
	{"macOS", checkMacOS},
	{"processor", checkProcessor},
	{"driver", checkDriver},
	{"entitlement", checkEntitlement},
	{"file system", checkFileSystem},
	{"Rosetta", checkRosetta},
}

func checkMacOS(context.Context, *config.Config) finding {
	version, err := unix.Sysctl("kern.osproductversion")
	if err != nil {
		return failed(err.Error(), "")
	}
	var major int
	if _, err := fmt.Sscanf(version, "%d", &major); err != nil || major < 13 {
		return failed("macOS "+version, "virtual machines take macOS 13 or later: update it")
	}
	return ok("macOS " + version)
}

func checkProcessor(context.Context, *config.Config) finding {
	name, _ := unix.Sysctl("machdep.cpu.brand_string")
	detail := fmt.Sprintf("%s, %s", name, runtime.GOARCH)
	if v, err := unix.SysctlUint32("sysctl.proc_translated"); err == nil && v == 1 {
		return failed(detail+", translated by Rosetta", "use the cri-vz for arm64")
	}
	if v, err := unix.SysctlUint32("kern.hv_support"); err != nil || v != 1 {
		return failed(detail+" without virtualization", "in a virtual machine turn on nested virtualization, where there is any")
	}
	return ok(detail)
}

func checkDriver(context.Context, *config.Config) finding {
	if _, err := vz.New(); err != nil {
		return failed(err.Error(), "")
	}
	features, err := vz.Features()
	if err != nil {
		return failed(err.Error(), "")
	}
	for _, f := range features {
		if f.Name == "live shares" && !f.Available {
			return warning("host paths can't be volumes: "+f.Reason, "")
		}
	}
	return ok("Virtualization framework")
}

// checkEntitlement asks how this program is signed.
func checkEntitlement(ctx context.Context, _ *config.Config) finding {
	const mend = "sign it: codesign --force --sign - --entitlements hack/vz.entitlements PATH, as `make build` does"
	path, err := os.Executable()
	if err != nil {
		return failed(err.Error(), "")
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "codesign", "--display", "--entitlements", "-", "--xml", path).CombinedOutput()
	if err != nil {
		return failed(fmt.Sprintf("%s: %v: %s", path, err, bytes.TrimSpace(out)), mend)
	}
	if !bytes.Contains(out, []byte("com.apple.security.virtualization")) {
		return failed(path+" lacks com.apple.security.virtualization", mend)
	}
	return ok(path)
}

// checkFileSystem: layers are hard links and clones, and images have names that
// differ by case (T47).
func checkFileSystem(_ context.Context, c *config.Config) finding {
	dir, st, err := statfs(c.Root)
	if err != nil {
		return failed(err.Error(), "choose another `root`")
	}
	kind := unix.ByteSliceToString(st.Fstypename[:])
	if kind != "apfs" {
		return failed(dir+" is on "+kind, "choose a `root` on an APFS volume")
	}
	const ignoreOwnership = 0x00200000 // MNT_IGNORE_OWNERSHIP of sys/mount.h
	if st.Flags&ignoreOwnership != 0 {
		return warning(dir+" is on a volume that ignores ownership", "choose a `root` on an internal disk")
	}
	if insensitive(dir) {
		return warning(dir+" is on a volume on which case makes no difference: host paths that differ by case alone are one in volumes", "images are not concerned; for volumes use a case-sensitive APFS volume")
	}
	return ok("APFS at " + dir)
}

// insensitive tells whether dir is also found by a name in the other case.
func insensitive(dir string) bool {
	other := strings.ToUpper(filepath.Base(dir))
	if other == filepath.Base(dir) {
		other = strings.ToLower(other)
	}
	a, err1 := os.Stat(dir)
	b, err2 := os.Stat(filepath.Join(filepath.Dir(dir), other))
	return other != filepath.Base(dir) && err1 == nil && err2 == nil && os.SameFile(a, b)
}

func checkRosetta(context.Context, *config.Config) finding {
	features, err := vz.Features()
	if err != nil {
		return failed(err.Error(), "")
	}
	for _, f := range features {
		if f.Name == "Rosetta" && f.Available {
			return ok("there is Rosetta for Linux")
		} else if f.Name == "Rosetta" {
			return ok("not used: " + f.Reason)
		}
	}
	return ok("not used")
}
