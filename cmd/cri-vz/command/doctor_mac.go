package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cri-vz/cri-vz/cmd/cri-vz/config"
	"github.com/cri-vz/cri-vz/sandbox/vz"
)

// mac answers what the checks ask on macOS, so that they can be tested elsewhere.
type mac struct {
	// arch is the architecture that this program was built for.
	arch     string
	text     func(sysctl string) (string, error)
	number   func(sysctl string) (uint32, error)
	driver   func() error
	features func() ([]vz.Feature, error)
	// signature is what codesign shows of a program's entitlements.
	signature func(ctx context.Context, program string) ([]byte, error)
	// volume is about the file system that path is on, or will be.
	volume func(path string) (volume, error)
}

type volume struct {
	dir, kind        string
	ignoresOwnership bool
}

func (m mac) checks() []check {
	return []check{
		{"macOS", m.checkMacOS},
		{"processor", m.checkProcessor},
		{"driver", m.checkDriver},
		{"entitlement", m.checkEntitlement},
		{"file system", m.checkFileSystem},
		{"Rosetta", m.checkRosetta},
	}
}

const mendMacOS = "virtual machines take macOS 13 or later: update it"

// noDriver is what a driver that can't be had means.
func noDriver(err error) finding {
	if errors.Is(err, errdefs.ErrFailedPrecondition) {
		return failed(err.Error(), mendMacOS)
	}
	return failed(err.Error(), "build it on this Mac with `make build`")
}

func (m mac) checkMacOS(context.Context, *config.Config) finding {
	version, err := m.text("kern.osproductversion")
	if err != nil {
		return failed(err.Error(), "see whether `sw_vers` answers, and restart the Mac if it doesn't")
	}
	var major int
	if _, err := fmt.Sscanf(version, "%d", &major); err != nil || major < 13 {
		return failed("macOS "+version, mendMacOS)
	}
	return ok("macOS " + version)
}

func (m mac) checkProcessor(context.Context, *config.Config) finding {
	name, _ := m.text("machdep.cpu.brand_string")
	kind := map[string]string{"arm64": "Apple silicon", "amd64": "Intel"}[m.arch]
	detail := strings.TrimSpace(fmt.Sprintf("%s (%s, %s guests)", name, kind, m.arch))
	if v, err := m.number("sysctl.proc_translated"); err == nil && v == 1 {
		return failed(detail+", translated by Rosetta", "use the cri-vz for arm64")
	}
	if v, err := m.number("kern.hv_support"); err != nil || v != 1 {
		return failed(detail+" without virtualization", "in a virtual machine turn on nested virtualization, where there is any")
	}
	return ok(detail)
}

func (m mac) checkDriver(context.Context, *config.Config) finding {
	if err := m.driver(); err != nil {
		return noDriver(err)
	}
	features, err := m.features()
	if err != nil {
		return noDriver(err)
	}
	for _, f := range features {
		if f.Name == vz.FeatureLiveShares && !f.Available {
			return warning("host paths can't be volumes: "+f.Reason, "images and emptyDir volumes work; please report this with the version of macOS")
		}
	}
	return ok("Virtualization framework")
}

var entitled = regexp.MustCompile(`<key>com\.apple\.security\.virtualization</key>\s*<true/>`)

// checkEntitlement asks how this program is signed.
func (m mac) checkEntitlement(ctx context.Context, _ *config.Config) finding {
	path, err := os.Executable()
	if err != nil {
		return failed(err.Error(), "start cri-vz by its path")
	}
	mend := fmt.Sprintf("sign it, as `make build` does: codesign --force --sign - --entitlements hack/vz.entitlements '%s'", path)
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := m.signature(ctx, path)
	if err != nil {
		return failed(fmt.Sprintf("%s: %v: %s", path, err, bytes.TrimSpace(out)), mend)
	}
	if !entitled.Match(out) {
		return failed(path+" lacks com.apple.security.virtualization", mend)
	}
	return ok(path)
}

// checkFileSystem: layers are hard links and clones, and images have names that
// differ by case (T47).
func (m mac) checkFileSystem(_ context.Context, c *config.Config) finding {
	v, err := m.volume(c.Root)
	switch {
	case err != nil:
		return failed(err.Error(), "choose another `root`")
	case v.kind != "apfs":
		return failed(v.dir+" is on "+v.kind, "choose a `root` on an APFS volume")
	case v.ignoresOwnership:
		return warning(v.dir+" is on a volume that ignores ownership", "choose a `root` on an internal disk")
	case insensitive(v.dir):
		return warning(v.dir+" is on a volume on which case makes no difference: host paths that differ by case alone are one in volumes", "images are not concerned; for volumes use a case-sensitive APFS volume")
	}
	return ok("APFS at " + v.dir)
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

func (m mac) checkRosetta(context.Context, *config.Config) finding {
	features, err := m.features()
	if err != nil {
		return noDriver(err)
	}
	for _, f := range features {
		switch {
		case f.Name != vz.FeatureRosetta:
		case f.Available:
			return ok("there is Rosetta for Linux")
		case m.arch == "arm64":
			return warning("there is no Rosetta for Linux: programs for amd64 don't run", f.Reason)
		default:
			return ok("not used: " + f.Reason)
		}
	}
	return ok("not used")
}
