package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Options say what [Build] builds.
type Options struct {
	// Dir is the guest directory; it is made if need be.
	Dir string
	// Arch is the guest's architecture as GOARCH spells it.
	Arch string
	// Agent is the path of the agent's binary: a static Linux executable for
	// Arch. It becomes /init.
	Agent string
	// Kernel is a linux-image package (.deb) or a kernel file. Empty means the
	// one that an earlier build of the same kind used and, for [KindStock],
	// the distribution's current one.
	Kernel string
	// Kind is which guest to build. Empty means [KindCustom] if Kernel is set,
	// else [KindStock].
	Kind Kind
	// Refresh fetches the distribution's current kernel also if there is one
	// already. Only for [KindStock] without a Kernel.
	Refresh bool
}

// BuildAll builds the stock guest and rebuilds the others that dir has a
// kernel for, so that all of them carry the same agent. If o names a kernel or
// a kind, it builds that one alone.
func BuildAll(ctx context.Context, o Options) ([]Guest, error) {
	if o.Kind != "" || o.Kernel != "" {
		g, err := Build(ctx, o)
		if err != nil {
			return nil, err
		}
		return []Guest{g}, nil
	}
	var all []Guest
	for _, kind := range kinds {
		o.Kind = kind
		if _, err := os.Stat(filepath.Join(kindDir(o.Dir, o.Arch, kind), sourceName)); err != nil && kind != KindStock {
			continue
		}
		g, err := Build(ctx, o)
		if err != nil {
			return nil, err
		}
		all = append(all, g)
	}
	return all, nil
}

// Build makes one guest: kernel, initramfs and manifest in o.Dir. Equal agent
// and kernel make equal bytes on any host. It uses the network only if it has
// to fetch a kernel. Builds may run at the same time; the last one to finish
// wins, and what an older manifest names stays for an hour.
func Build(ctx context.Context, o Options) (Guest, error) {
	if err := checkArch(o.Arch); err != nil {
		return Guest{}, fmt.Errorf("build guest: %w", err)
	}
	if o.Kind == "" {
		o.Kind = KindStock
		if o.Kernel != "" {
			o.Kind = KindCustom
		}
	}
	g, err := build(ctx, o)
	if err != nil {
		return Guest{}, fmt.Errorf("build %s guest for %s: %w", o.Kind, o.Arch, err)
	}
	return g, nil
}

func build(ctx context.Context, o Options) (Guest, error) {
	agent, agentVersion, err := readAgent(o.Agent, o.Arch)
	if err != nil {
		return Guest{}, err
	}
	dir := kindDir(o.Dir, o.Arch, o.Kind)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Guest{}, err
	}
	src, err := findKernel(ctx, o, dir)
	if err != nil {
		return Guest{}, err
	}
	k, err := unpackKernel(filepath.Join(dir, src.File), src.Name, o.Arch, dir, src.SHA256)
	if err != nil {
		return Guest{}, fmt.Errorf("kernel %s: %w", src.Name, err)
	}
	initrd, err := makeInitramfs(agent, k.boot, k.demand)
	if err != nil {
		return Guest{}, err
	}
	g := Guest{
		Arch: o.Arch, KernelKind: o.Kind, KernelVersion: k.info.Version, KernelFormat: k.info.Format,
		KernelSource: src.Name, Cmdline: cmdline(o.Arch, o.Kind), AgentVersion: agentVersion,
		Kernel:  fileOf("kernel", k.kernel),
		Initrd:  fileOf("initrd", initrd),
		Agent:   File{Name: "init", Size: int64(len(agent)), SHA256: hashBytes(agent)},
		Modules: names(k.boot), OnDemand: names(k.demand),
	}
	g.KernelPath, g.InitrdPath = filepath.Join(dir, g.Kernel.Name), filepath.Join(dir, g.Initrd.Name)
	if err := writeFile(g.KernelPath, k.kernel); err != nil {
		return Guest{}, err
	}
	if err := writeFile(g.InitrdPath, initrd); err != nil {
		return Guest{}, err
	}
	if err := writeJSON(filepath.Join(dir, manifestName), g.manifest()); err != nil {
		return Guest{}, err
	}
	prune(dir, manifestName, sourceName, g.Kernel.Name, g.Initrd.Name, src.File, unpackedName(src.SHA256))
	return g, nil
}

func fileOf(prefix string, data []byte) File {
	sum := hashBytes(data)
	return File{Name: prefix + "-" + sum[:16], Size: int64(len(data)), SHA256: sum}
}

func names(modules []module) []string {
	var all []string
	for _, m := range modules {
		all = append(all, m.name)
	}
	return all
}

// cmdline is what makes a guest start fast and end when its kernel panics.
func cmdline(arch string, kind Kind) string {
	// The machine reboots at once on a panic, which every driver turns into
	// "gone". Expedited grace periods shorten boot, when nothing else runs.
	options := []string{"quiet", "panic=-1", "rcupdate.rcu_expedited=1"}
	if arch == "amd64" {
		// Both skip calibration loops that a hypervisor's clocks don't need.
		options = append(options, "tsc=reliable", "no_timer_check")
	}
	if kind != KindFast {
		// The host's mitigations keep machines apart; a pod's containers are
		// one trust domain. The fast kernel is built without.
		options = append(options, "mitigations=off")
	}
	return strings.Join(options, " ")
}

// maxAgent caps the agent that is read; the goal is 6 MiB.
const maxAgent = 64 << 20

// readAgent checks that the kernel of a guest can run the agent as its first
// process, which would otherwise show as a panic without a word.
func readAgent(path, arch string) (data []byte, version string, err error) {
	if path == "" {
		return nil, "", fmt.Errorf("no agent given: %w", errdefs.ErrInvalidArgument)
	}
	data, err = readCapped(path, maxAgent)
	if err != nil {
		return nil, "", fmt.Errorf("agent: %w", err)
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, "", fmt.Errorf("agent %s: not a Linux executable (build it with GOOS=linux GOARCH=%s CGO_ENABLED=0): %w: %w", path, arch, err, errdefs.ErrInvalidArgument)
	}
	defer f.Close()
	if want := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[arch]; f.Machine != want {
		return nil, "", fmt.Errorf("agent %s: is for %s, the guest is %s (build it with GOARCH=%s): %w", path, f.Machine, arch, arch, errdefs.ErrInvalidArgument)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, "", fmt.Errorf("agent %s: is linked dynamically, and a guest has no libraries (build it with CGO_ENABLED=0): %w", path, errdefs.ErrInvalidArgument)
		}
	}
	version = "unknown"
	if info, err := buildinfo.Read(bytes.NewReader(data)); err == nil {
		version = versionOf(info)
	}
	return data, version, nil
}

func versionOf(info *debug.BuildInfo) string {
	version := info.Main.Version
	if version != "" && version != "(devel)" {
		return version
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return "devel-" + s.Value[:min(12, len(s.Value))]
		}
	}
	return "devel"
}

// makeInitramfs puts the agent, two devices and the modules together.
//
// /modules.list has one path per line, to be loaded at boot in that order.
// /modules.ondemand has lines of a module's name or alias and the paths to load
// for it, in order; those are compressed as the kernel decompresses them itself
// (finit_module's MODULE_INIT_COMPRESSED_FILE). Neither is there when the
// kernel has no modules.
//
// The archive as a whole isn't compressed. Under QEMU's emulation, where it
// matters most, unpacking cost more than reading: 2.00 s of CPU for a boot as it
// is, 2.04 with lz4, 2.06 with gzip, 2.13 with zstd (the least of four runs).
func makeInitramfs(agent []byte, boot, demand []module) ([]byte, error) {
	entries := []entry{
		{name: "init", mode: modeReg | 0o755, data: agent},
		// A Go program that can't open /dev/null exits before main, and without
		// /dev/console the kernel gives it no descriptors to say so.
		{name: "dev/null", mode: modeChar | 0o666, major: 1, minor: 3},
		{name: "dev/console", mode: modeChar | 0o600, major: 5, minor: 1},
	}
	var list, onDemand strings.Builder
	for _, m := range boot {
		entries = append(entries, entry{name: "modules/" + m.name + ".ko", mode: modeReg | 0o644, data: m.data})
		fmt.Fprintf(&list, "/modules/%s.ko\n", m.name)
	}
	for _, m := range demand {
		entries = append(entries, entry{name: "modules/" + m.name + "." + m.packedExt, mode: modeReg | 0o644, data: m.packed})
	}
	for _, m := range demand {
		needs, err := resolve(subset(demand), []string{m.name})
		if err != nil {
			return nil, err
		}
		var paths strings.Builder
		for _, n := range needs {
			fmt.Fprintf(&paths, " /modules/%s.%s", n.name, n.packedExt)
		}
		for _, name := range append([]string{m.name}, m.aliases...) {
			fmt.Fprintf(&onDemand, "%s%s\n", name, paths.String())
		}
	}
	if len(boot) > 0 {
		entries = append(entries, entry{name: "modules.list", mode: modeReg | 0o644, data: []byte(list.String())})
	}
	if len(demand) > 0 {
		entries = append(entries, entry{name: "modules.ondemand", mode: modeReg | 0o644, data: []byte(onDemand.String())})
	}
	var buf bytes.Buffer
	if err := writeCPIO(&buf, entries); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

type subset []module

func (s subset) module(name string) (module, bool, error) {
	for _, m := range s {
		if m.name == name {
			return m, true, nil
		}
	}
	return module{}, false, nil
}

// kernelSource is source.json: the package or kernel file that a guest's
// kernel comes from, kept so that a new agent needs no network.
type kernelSource struct {
	// Name says where it came from.
	Name string `json:"name"`
	// File is relative to the directory of source.json.
	File   string `json:"file"`
	SHA256 string `json:"sha256"`
}

const sourceName = "source.json"

// findKernel returns the source in dir, after putting it there if o says so or
// there is none.
func findKernel(ctx context.Context, o Options, dir string) (kernelSource, error) {
	if o.Kernel != "" {
		return keepSource(dir, o.Kernel, filepath.Base(o.Kernel))
	}
	var src kernelSource
	text, err := readCapped(filepath.Join(dir, sourceName), maxManifest)
	if err == nil && !(o.Refresh && o.Kind == KindStock) {
		if err := json.Unmarshal(text, &src); err != nil || !filepath.IsLocal(src.File) || len(src.SHA256) != 64 {
			return src, fmt.Errorf("%s is damaged (%v): remove it and build again: %w", filepath.Join(dir, sourceName), err, errdefs.ErrFailedPrecondition)
		}
		sum, _, err := hashFile(filepath.Join(dir, src.File))
		if err == nil && sum == src.SHA256 {
			return src, nil
		}
		// Lost or damaged: fetch it again.
	}
	switch o.Kind {
	case KindStock:
		pkg, err := FetchPackage(ctx, filepath.Join(o.Dir, "apt", o.Arch), o.Arch, "linux-image-cloud-"+o.Arch)
		if err != nil {
			return src, err
		}
		defer os.Remove(pkg.Path)
		return keepSource(dir, pkg.Path, pkg.Name+" "+pkg.Version)
	case KindFast:
		return src, fmt.Errorf("there is no fast kernel in %s yet: run `make kernel`: %w", dir, errdefs.ErrNotFound)
	default:
		return src, fmt.Errorf("there is no kernel in %s: name one with --kernel: %w", dir, errdefs.ErrNotFound)
	}
}

func keepSource(dir, path, name string) (kernelSource, error) {
	data, err := readCapped(path, maxKernel)
	if err != nil {
		return kernelSource{}, fmt.Errorf("kernel: %w", err)
	}
	f := fileOf("source", data)
	src := kernelSource{Name: name, File: f.Name, SHA256: f.SHA256}
	if err := writeFile(filepath.Join(dir, src.File), data); err != nil {
		return kernelSource{}, err
	}
	return src, writeJSON(filepath.Join(dir, sourceName), src)
}

// kernel is what a guest takes from its source.
type kernel struct {
	info         KernelInfo
	kernel       []byte
	boot, demand []module
}

// keepBzImage: the Virtualization framework boots an Intel Mac's bzImage and no
// vmlinux. Tests on Linux can be such a Mac (build_fakevz.go).
var keepBzImage = runtime.GOOS == "darwin"

// unpackedName is the cache of what was taken from the source of that digest
// by a program that wants these modules.
func unpackedName(sum string) string {
	h := sha256.New()
	fmt.Fprintln(h, "1", sum, bootModules, demandModules)
	return "unpacked-" + hex.EncodeToString(h.Sum(nil))[:16]
}

// unpackKernel takes kernel and modules from a package, or the kernel from a
// kernel file. Reading a package of 35 MB takes seconds, so the parts that are
// used stay in dir.
func unpackKernel(path, name, arch, dir, sum string) (kernel, error) {
	data, err := readCapped(path, maxKernel)
	if err != nil {
		return kernel{}, err
	}
	if !bytes.HasPrefix(data, []byte("!<arch>\n")) {
		info, err := parseKernel(bytes.NewReader(data), arch)
		return kernel{info: info, kernel: data}, err
	}
	cache := filepath.Join(dir, unpackedName(sum))
	if k, err := readUnpacked(cache, arch); err == nil {
		return k, nil
	}
	pkg, err := readKernelPackage(bytes.NewReader(data))
	if err != nil {
		return kernel{}, err
	}
	k := kernel{kernel: pkg.kernel}
	if k.info, err = parseKernel(bytes.NewReader(pkg.kernel), arch); err != nil {
		return kernel{}, err
	}
	if k.info.Format == FormatBzImage && !keepBzImage {
		vmlinux, err := unpackBzImage(pkg.kernel)
		if err != nil {
			return kernel{}, err
		}
		if vmlinux != nil {
			k.kernel, k.info.Format = vmlinux, FormatVmlinux
		}
	}
	if k.info.Version != pkg.version {
		return kernel{}, fmt.Errorf("kernel says it is %s, its package says %s: %w", k.info.Version, pkg.version, errdefs.ErrFailedPrecondition)
	}
	if k.boot, k.demand, err = chooseModules(pkg); err != nil {
		return kernel{}, err
	}
	return k, writeUnpacked(cache, k)
}

// chooseModules resolves both sets; what is loaded at boot isn't kept for
// demand.
func chooseModules(src moduleSource) (boot, demand []module, err error) {
	if boot, err = resolve(src, bootModules); err != nil {
		return nil, nil, err
	}
	loaded := map[string]bool{}
	for _, m := range boot {
		loaded[m.name] = true
	}
	more, err := resolve(src, demandModules)
	if err != nil {
		return nil, nil, err
	}
	for _, m := range more {
		if !loaded[m.name] {
			demand = append(demand, m)
		}
	}
	return boot, demand, nil
}

// The cache holds "kernel" and the module files as they were packed.
func writeUnpacked(cache string, k kernel) error {
	tmp, err := os.MkdirTemp(filepath.Dir(cache), "tmp-unpacked-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tmp, "kernel"), k.kernel, 0o644); err != nil {
		return err
	}
	for _, m := range append(append([]module{}, k.boot...), k.demand...) {
		if err := os.WriteFile(filepath.Join(tmp, m.name+"."+m.packedExt), m.packed, 0o644); err != nil {
			return err
		}
	}
	// Only a whole cache gets the name. One that a build at the same time made
	// is as good.
	if err := os.Rename(tmp, cache); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// dirSource reads module files from a directory.
type dirSource string

func (d dirSource) module(name string) (module, bool, error) {
	for _, ext := range []string{".ko", ".ko.xz"} {
		data, err := readCapped(filepath.Join(string(d), name+ext), maxModule)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return module{}, false, err
		}
		m, err := newModule(name+ext, data)
		return m, true, err
	}
	return module{}, false, nil
}

func readUnpacked(cache, arch string) (kernel, error) {
	var k kernel
	var err error
	if k.kernel, err = readCapped(filepath.Join(cache, "kernel"), maxKernel); err != nil {
		return k, err
	}
	if k.info, err = parseKernel(bytes.NewReader(k.kernel), arch); err != nil {
		return k, err
	}
	k.boot, k.demand, err = chooseModules(dirSource(cache))
	return k, err
}

// writeFile writes a file that has its name from its content, so one that is
// there with the right size is left alone, as a running machine may map it.
func writeFile(path string, data []byte) error {
	if sum, _, err := hashFile(path); err == nil && sum == hashBytes(data) {
		// prune goes by age; this one is in use again.
		now := time.Now()
		return os.Chtimes(path, now, now)
	}
	return replaceFile(path, data)
}

func writeJSON(path string, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(path, append(text, '\n'))
}

func replaceFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "tmp-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(0o644)
	}
	// Without it a crash can leave a manifest that names an empty file.
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}

// pruneAfter is how long a file of a replaced guest stays, for a machine that
// read the old manifest just before.
const pruneAfter = time.Hour

// prune removes what earlier builds left in dir. Failures don't matter: the
// next build tries again.
func prune(dir string, keep ...string) {
	kept := map[string]bool{}
	for _, name := range keep {
		kept[name] = true
	}
	found, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range found {
		info, err := e.Info()
		if err != nil || kept[e.Name()] || time.Since(info.ModTime()) < pruneAfter {
			continue
		}
		_ = os.RemoveAll(filepath.Join(dir, e.Name()))
	}
}

// AddFastKernel makes the kernel at path the one that the next [Build] of
// [KindFast] uses. Name says where it came from.
func AddFastKernel(dir, arch, path, name string) error {
	if _, err := CheckKernel(path, arch); err != nil {
		return err
	}
	dir = kindDir(dir, arch, KindFast)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	_, err := keepSource(dir, path, name)
	return err
}
