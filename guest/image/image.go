// Package image makes and finds what a guest boots from: a Linux kernel and an
// initramfs that holds the agent as /init.
//
// A guest directory holds, per architecture (GOARCH) and [Kind], the kernel,
// its modules, the initramfs and a manifest with the digests of both. [Build]
// writes it, [Locate] finds the guest to boot, [Guest.Verify] hashes it again.
// Files are named by their content and a manifest is replaced by rename, so a
// machine that starts during a build gets one whole guest, old or new.
//
// The package promises nothing about the agent but that it becomes /init, and
// runs nothing of the guest's.
package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containerd/errdefs"
)

// Kind says where a guest's kernel comes from.
type Kind string

const (
	// KindStock is the distribution's cloud kernel, with modules.
	KindStock Kind = "stock"
	// KindFast is the all-built-in kernel that `make kernel` builds.
	KindFast Kind = "fast"
	// KindCustom is a kernel (or kernel package) that the user named.
	KindCustom Kind = "custom"
)

// kinds is the order of preference of [Locate]: what the user named himself
// goes before what he built, and that before what everybody gets.
var kinds = []Kind{KindCustom, KindFast, KindStock}

// File is one boot file as its manifest describes it.
type File struct {
	// Name is relative to the manifest's directory.
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Guest is a bootable pair of kernel and initramfs.
type Guest struct {
	// Arch is the guest's architecture as GOARCH spells it.
	Arch string `json:"arch"`
	// KernelPath and InitrdPath are absolute if the directory given to
	// [Locate] or [Build] was.
	KernelPath string `json:"kernelPath"`
	InitrdPath string `json:"initrdPath"`
	// KernelVersion is the kernel's release as `uname -r` prints it in the
	// guest.
	KernelVersion string `json:"kernelVersion"`
	// KernelFormat is the file's format, as [CheckKernel] names it.
	KernelFormat string `json:"kernelFormat"`
	// KernelSource says what the kernel was taken from: a package with its
	// version, or a file name.
	KernelSource string `json:"kernelSource"`
	KernelKind   Kind   `json:"kernelKind"`
	// Cmdline is what the kernel needs on any hypervisor. Drivers add their
	// console to it.
	Cmdline string `json:"cmdline"`
	// AgentVersion is the version that the agent's binary carries.
	AgentVersion string `json:"agentVersion"`
	// Kernel, Initrd and Agent are sizes (bytes) and digests. Agent is the
	// uncompressed /init of the initramfs, not a file of its own.
	Kernel File `json:"kernel"`
	Initrd File `json:"initrd"`
	Agent  File `json:"agent"`
	// Modules are the kernel modules in the initramfs that the agent loads at
	// boot, in that order; OnDemand those it has at hand.
	Modules  []string `json:"modules"`
	OnDemand []string `json:"onDemand"`
}

// manifest is manifest.json: everything but paths and no time stamp, so that
// equal input makes an equal file.
type manifest struct {
	Schema        int      `json:"schema"`
	Arch          string   `json:"arch"`
	KernelKind    Kind     `json:"kernelKind"`
	KernelVersion string   `json:"kernelVersion"`
	KernelFormat  string   `json:"kernelFormat"`
	KernelSource  string   `json:"kernelSource"`
	Cmdline       string   `json:"cmdline"`
	AgentVersion  string   `json:"agentVersion"`
	Kernel        File     `json:"kernel"`
	Initrd        File     `json:"initrd"`
	Agent         File     `json:"agent"`
	Modules       []string `json:"modules,omitempty"`
	OnDemand      []string `json:"onDemand,omitempty"`
}

const (
	manifestName   = "manifest.json"
	manifestSchema = 1
	// maxManifest caps what is read of a manifest; a real one has 2 KiB.
	maxManifest = 1 << 20
)

// DefaultDir is the directory of boot files if none is configured: the
// environment's CRI_VZ_CACHE, else cri-vz/guest in the user's cache directory,
// else (for root under systemd, which has no home) /var/cache/cri-vz/guest.
func DefaultDir() (string, error) {
	if dir := os.Getenv("CRI_VZ_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil && runtime.GOOS == "linux" && os.Geteuid() == 0 {
		return "/var/cache/cri-vz/guest", nil
	}
	if err != nil {
		return "", fmt.Errorf("find the guest directory: %w; set CRI_VZ_CACHE", err)
	}
	return filepath.Join(dir, "cri-vz", "guest"), nil
}

// Locate finds the guest of dir to boot on arch (GOARCH): a custom kernel if
// one was built in, else the fast one, else the stock one. It reads the
// manifest and looks at the sizes of the files; [Guest.Verify] reads them. The
// error wraps [errdefs.ErrNotFound] if there is none and says which command
// makes it.
func Locate(dir, arch string) (Guest, error) {
	for _, kind := range kinds {
		g, err := LocateKind(dir, arch, kind)
		if errdefs.IsNotFound(err) {
			continue
		}
		return g, err
	}
	return Guest{}, fmt.Errorf("no guest image for %s in %s: run `cri-vz guest build --arch %s`: %w", arch, dir, arch, errdefs.ErrNotFound)
}

// LocateKind is [Locate] for one kind of kernel.
func LocateKind(dir, arch string, kind Kind) (Guest, error) {
	if err := checkArch(arch); err != nil {
		return Guest{}, err
	}
	path := filepath.Join(kindDir(dir, arch, kind), manifestName)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Guest{}, fmt.Errorf("no %s guest image for %s in %s: run `cri-vz guest build --arch %s`: %w", kind, arch, dir, arch, errdefs.ErrNotFound)
	}
	if err != nil {
		return Guest{}, fmt.Errorf("guest image: %w", err)
	}
	defer f.Close()
	g, err := readManifest(io.LimitReader(f, maxManifest), filepath.Dir(path))
	if err != nil {
		return Guest{}, fmt.Errorf("guest image %s: %w; run `cri-vz guest build --arch %s`", path, err, arch)
	}
	if g.Arch != arch || g.KernelKind != kind {
		return Guest{}, fmt.Errorf("guest image %s: describes %s/%s: %w", path, g.Arch, g.KernelKind, errdefs.ErrFailedPrecondition)
	}
	return g, g.checkSizes()
}

// List returns every guest of dir, in the order in which [Locate] prefers
// them within an architecture.
func List(dir string) ([]Guest, error) {
	var all []Guest
	for _, arch := range []string{"amd64", "arm64"} {
		for _, kind := range kinds {
			g, err := LocateKind(dir, arch, kind)
			if errdefs.IsNotFound(err) {
				continue
			}
			if err != nil {
				return nil, err
			}
			all = append(all, g)
		}
	}
	return all, nil
}

func readManifest(r io.Reader, dir string) (Guest, error) {
	var m manifest
	dec := json.NewDecoder(r)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&m); err != nil {
		return Guest{}, fmt.Errorf("read manifest: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if m.Schema != manifestSchema {
		return Guest{}, fmt.Errorf("manifest schema %d, this program writes %d: %w", m.Schema, manifestSchema, errdefs.ErrFailedPrecondition)
	}
	for _, f := range []File{m.Kernel, m.Initrd} {
		if !filepath.IsLocal(f.Name) || filepath.Base(f.Name) != f.Name {
			return Guest{}, fmt.Errorf("manifest names the file %q outside its directory: %w", f.Name, errdefs.ErrFailedPrecondition)
		}
	}
	return Guest{
		Arch:          m.Arch,
		KernelPath:    filepath.Join(dir, m.Kernel.Name),
		InitrdPath:    filepath.Join(dir, m.Initrd.Name),
		KernelVersion: m.KernelVersion,
		KernelFormat:  m.KernelFormat,
		KernelSource:  m.KernelSource,
		KernelKind:    m.KernelKind,
		Cmdline:       m.Cmdline,
		AgentVersion:  m.AgentVersion,
		Kernel:        m.Kernel,
		Initrd:        m.Initrd,
		Agent:         m.Agent,
		Modules:       m.Modules,
		OnDemand:      m.OnDemand,
	}, nil
}

func (g Guest) manifest() manifest {
	return manifest{
		Schema: manifestSchema, Arch: g.Arch, KernelKind: g.KernelKind,
		KernelVersion: g.KernelVersion, KernelFormat: g.KernelFormat, KernelSource: g.KernelSource,
		Cmdline: g.Cmdline, AgentVersion: g.AgentVersion,
		Kernel: g.Kernel, Initrd: g.Initrd, Agent: g.Agent,
		Modules: g.Modules, OnDemand: g.OnDemand,
	}
}

// checkSizes is the cheap half of Verify, done at every start of a daemon: it
// finds a removed or truncated file without reading 30 MB.
func (g Guest) checkSizes() error {
	for path, want := range g.files() {
		st, err := os.Stat(path)
		if err != nil {
			return fmt.Errorf("guest image: %w: run `cri-vz guest build --arch %s`: %w", err, g.Arch, errdefs.ErrFailedPrecondition)
		}
		if st.Size() != want.Size {
			return fmt.Errorf("guest image: %s has %d bytes, its manifest says %d: run `cri-vz guest build --arch %s`: %w", path, st.Size(), want.Size, g.Arch, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// Verify hashes kernel and initramfs and compares them with the manifest that
// g came from. The error names the file and wraps
// [errdefs.ErrFailedPrecondition] if one differs.
func (g Guest) Verify() error {
	if err := g.checkSizes(); err != nil {
		return err
	}
	for path, want := range g.files() {
		sum, _, err := hashFile(path)
		if err != nil {
			return fmt.Errorf("verify guest image: %w", err)
		}
		if sum != want.SHA256 {
			return fmt.Errorf("verify guest image: %s has sha256 %s, its manifest says %s: run `cri-vz guest build --arch %s`: %w", path, sum, want.SHA256, g.Arch, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

func (g Guest) files() map[string]File {
	return map[string]File{g.KernelPath: g.Kernel, g.InitrdPath: g.Initrd}
}

func kindDir(dir, arch string, kind Kind) string {
	return filepath.Join(dir, arch, string(kind))
}

func checkArch(arch string) error {
	if arch != "amd64" && arch != "arm64" {
		return fmt.Errorf("guest architecture %q: want amd64 or arm64: %w", arch, errdefs.ErrInvalidArgument)
	}
	return nil
}

func hashFile(path string) (sum string, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	size, err = io.Copy(h, f)
	if err != nil {
		return "", 0, fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), size, nil
}

func hashBytes(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
