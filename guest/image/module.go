package image

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/ulikunitz/xz"
)

// bootModules is what every guest loads at boot, as far as its kernel has them
// as modules: the drivers of the virtual machine's devices, the file systems
// of containers, and project quotas (T15).
var bootModules = []string{
	"virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_balloon",
	"vsock", "vmw_vsock_virtio_transport",
	"ext4", "quota_v2", "fuse", "virtiofs", "overlay", "loop",
	"af_packet",
}

// demandModules are what containers may ask for; they stay compressed in the
// initramfs until the agent loads one.
var demandModules = []string{
	"veth", "bridge", "br_netfilter", "tun", "macvlan", "dummy",
	"nf_tables", "nft_chain_nat", "nft_compat", "nft_ct", "nft_nat", "nft_masq", "nft_redir",
	"nft_reject_inet", "nft_limit", "nft_log", "nft_fib_inet", "nf_conntrack_netlink",
	"ip_tables", "iptable_filter", "iptable_nat", "iptable_mangle", "iptable_raw",
	"ip6_tables", "ip6table_filter", "ip6table_nat", "ip6table_mangle", "ip6table_raw",
	"ipt_REJECT", "ip6t_REJECT",
	"xt_addrtype", "xt_comment", "xt_connmark", "xt_conntrack", "xt_CT", "xt_limit", "xt_LOG", "xt_mark",
	"xt_MASQUERADE", "xt_multiport", "xt_nat", "xt_owner", "xt_recent", "xt_REDIRECT", "xt_state",
	"xt_statistic", "xt_tcpudp", "xt_TCPMSS", "xt_TPROXY",
	"binfmt_misc", // and the agent, for Rosetta
}

const (
	// maxModule caps a decompressed module; the largest in use has 0.9 MB.
	maxModule = 16 << 20
	// maxModinfo caps the text that a module says about itself.
	maxModinfo = 1 << 20
)

// module is a kernel module as it goes into an initramfs.
type module struct {
	name string
	// depends are the names of the modules that have to be loaded before, soft
	// dependencies last.
	depends []string
	// aliases are what the kernel asks modprobe for, patterns left out.
	aliases []string
	// data is the file as the kernel loads it, signature included.
	data []byte
	// packed is the file as it came in the package; packedExt its extension.
	packed    []byte
	packedExt string
}

// moduleName is a module's name for a file name: the kernel takes "-" and "_"
// for the same.
func moduleName(file string) (name, ext string, ok bool) {
	name, ext, ok = strings.Cut(file, ".")
	if !ok || name == "" || ext != "ko" && ext != "ko.xz" {
		return "", "", false
	}
	return strings.ReplaceAll(name, "-", "_"), ext, true
}

// newModule decompresses a module file and reads what it depends on.
func newModule(file string, data []byte) (module, error) {
	name, ext, ok := moduleName(file)
	if !ok {
		return module{}, fmt.Errorf("module file %q: want NAME.ko or NAME.ko.xz: %w", file, errdefs.ErrInvalidArgument)
	}
	m := module{name: name, data: data, packed: data, packedExt: ext}
	if ext == "ko.xz" {
		r, err := xz.NewReader(bytes.NewReader(data))
		if err != nil {
			return module{}, fmt.Errorf("module %s: %w", name, err)
		}
		m.data, err = io.ReadAll(io.LimitReader(r, maxModule+1))
		if err != nil {
			return module{}, fmt.Errorf("module %s: decompress: %w", name, err)
		}
	}
	if len(m.data) > maxModule {
		return module{}, fmt.Errorf("module %s: more than %d MiB: %w", name, maxModule>>20, errdefs.ErrInvalidArgument)
	}
	var err error
	m.depends, m.aliases, err = modinfo(m.data)
	if err != nil {
		return module{}, fmt.Errorf("module %s: %w", name, err)
	}
	return m, nil
}

// modinfo reads the .modinfo section of a module. Debian's packages carry no
// modules.dep (depmod makes it at installation), and this is where depmod
// itself has the dependencies from.
func modinfo(data []byte) (depends, aliases []string, err error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, nil, fmt.Errorf("not a kernel module: %w", err)
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil || section.Size > maxModinfo {
		return nil, nil, fmt.Errorf("no usable .modinfo section: %w", errdefs.ErrInvalidArgument)
	}
	text, err := section.Data()
	if err != nil {
		return nil, nil, fmt.Errorf("read .modinfo: %w", err)
	}
	depends, aliases = parseModinfo(text)
	return depends, aliases, nil
}

// parseModinfo reads NUL-terminated key=value strings.
func parseModinfo(text []byte) (depends, aliases []string) {
	var soft []string
	for _, field := range bytes.Split(text, []byte{0}) {
		key, value, ok := strings.Cut(string(field), "=")
		if !ok {
			continue
		}
		switch key {
		case "depends":
			for name := range strings.SplitSeq(value, ",") {
				if name != "" {
					depends = append(depends, strings.ReplaceAll(name, "-", "_"))
				}
			}
		case "softdep":
			// "pre: a b post: c"; post dependencies are not needed to load.
			pre := false
			for word := range strings.FieldsSeq(value) {
				switch {
				case strings.HasSuffix(word, ":"):
					pre = word == "pre:"
				case pre:
					soft = append(soft, strings.ReplaceAll(word, "-", "_"))
				}
			}
		case "alias":
			if value != "" && !strings.ContainsAny(value, "*?[ \t\n") {
				aliases = append(aliases, value)
			}
		}
	}
	return append(depends, soft...), aliases
}

// moduleSource finds modules by name.
type moduleSource interface {
	// module returns false if the kernel has no module of that name (because
	// it is built in, or not there at all).
	module(name string) (module, bool, error)
}

// resolve returns the modules of wanted and what they depend on, each once and
// after everything it depends on. Names that src doesn't have are left out:
// they are built in, and a guest whose kernel really lacks one says so when it
// is used. A dependency cycle is an error.
func resolve(src moduleSource, wanted []string) ([]module, error) {
	var order []module
	const (
		visiting = 1
		done     = 2
	)
	state := map[string]int{}
	var visit func(name string, chain []string) error
	visit = func(name string, chain []string) error {
		switch state[name] {
		case done:
			return nil
		case visiting:
			return fmt.Errorf("modules depend on each other: %s: %w", strings.Join(append(chain, name), " -> "), errdefs.ErrInvalidArgument)
		}
		state[name] = visiting
		m, ok, err := src.module(name)
		if err != nil {
			return err
		}
		if ok {
			chain = append(slices.Clip(chain), name)
			for _, dep := range m.depends {
				if err := visit(dep, chain); err != nil {
					return err
				}
			}
			order = append(order, m)
		}
		state[name] = done
		return nil
	}
	for _, name := range wanted {
		if err := visit(name, nil); err != nil {
			return nil, err
		}
	}
	return order, nil
}
