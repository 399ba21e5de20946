// Package config reads the daemon's configuration: TOML, strict, with every
// default in one documented file.
package config

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Default is the documented file that `cri-vz config default` prints; it sets
// every key to its default.
//
//go:embed default.toml
var Default []byte

// maxFile bounds the configuration file, in bytes.
const maxFile = 1 << 20

// Config is the daemon's configuration; default.toml says what the keys mean.
type Config struct {
	Root      string `toml:"root"`
	Run       string `toml:"run"`
	Listen    string `toml:"listen"`
	LogLevel  string `toml:"log_level"`
	Streaming struct {
		Address string `toml:"address"`
	} `toml:"streaming"`
	Images struct {
		RegistryConfigDir string `toml:"registry_config_dir"`
	} `toml:"images"`
	Network struct {
		ConfDir       string   `toml:"conf_dir"`
		BinDirs       []string `toml:"bin_dirs"`
		BuiltinSubnet string   `toml:"builtin_subnet"`
		NodeNetns     string   `toml:"node_netns"`
	} `toml:"network"`
	Guest struct {
		Dir string `toml:"dir"`
	} `toml:"guest"`
	VM struct {
		Driver  string           `toml:"driver"`
		Accel   string           `toml:"accel"`
		Boots   int              `toml:"boots"`
		UID     uint32           `toml:"uid"`
		GID     uint32           `toml:"gid"`
		Default Class            `toml:"default"`
		Class   map[string]Class `toml:"class"`
	} `toml:"vm"`
	Kubelet struct {
		CgroupDriver  string `toml:"cgroup_driver"`
		SandboxCgroup string `toml:"sandbox_cgroup"`
	} `toml:"kubelet"`
}

// Class is what virtual machines of one runtime handler are like.
type Class struct {
	CPUs         int    `toml:"cpus"`
	MemoryMiB    int64  `toml:"memory_mib"`
	Kernel       string `toml:"kernel"`
	PidsMax      int64  `toml:"pids_max"`
	HugepagesMiB int64  `toml:"hugepages_mib"`
}

func (c Class) validate() error {
	switch {
	case c.CPUs < 1 || c.CPUs > 255:
		return fmt.Errorf("cpus: %d is not in 1 to 255", c.CPUs)
	case c.MemoryMiB < 64 || c.MemoryMiB > 1<<20:
		return fmt.Errorf("memory_mib: %d is not in 64 to %d", c.MemoryMiB, 1<<20)
	case !map[string]bool{"": true, "stock": true, "fast": true, "custom": true}[c.Kernel]:
		return fmt.Errorf("kernel: %q is none of stock, fast and custom", c.Kernel)
	case c.PidsMax < 0 || c.PidsMax > 0 && c.PidsMax < 16 || c.PidsMax > 1<<22:
		return fmt.Errorf("pids_max: %d is neither 0 nor in 16 to %d", c.PidsMax, 1<<22)
	case c.HugepagesMiB < 0 || c.HugepagesMiB > 1<<20 || c.HugepagesMiB%2 != 0:
		return fmt.Errorf("hugepages_mib: %d is not an even number in 0 to %d", c.HugepagesMiB, 1<<20)
	}
	return nil
}

// Flags are the keys that the command line can set too.
type Flags struct{ Root, Run, Listen, LogLevel string }

// Load reads the file at path over the defaults; with an empty path it returns
// the defaults. Flags that are not empty override the file.
func Load(path string, flags Flags) (*Config, error) {
	c, err := decode(Default, &Config{})
	if err != nil {
		return nil, fmt.Errorf("built-in configuration: %w", err)
	}
	platformDefaults(c, runtime.GOOS)
	if path != "" {
		b, err := readCapped(path)
		if err != nil {
			return nil, err
		}
		if c, err = decode(b, c); err != nil {
			return nil, fmt.Errorf("configuration %s: %w", path, err)
		}
	}
	for _, f := range []struct {
		flag string
		key  *string
	}{{flags.Root, &c.Root}, {flags.Run, &c.Run}, {flags.Listen, &c.Listen}, {flags.LogLevel, &c.LogLevel}} {
		if f.flag != "" {
			*f.key = f.flag
		}
	}
	if c.Listen == "" {
		c.Listen = "unix://" + filepath.Join(c.Run, "cri-vz.sock")
	}
	if err := c.validate(); err != nil {
		if path != "" {
			return nil, fmt.Errorf("configuration %s: %w", path, err)
		}
		return nil, err
	}
	return c, nil
}

// PlatformDefault is Default with what is different on this system.
func PlatformDefault() []byte {
	var before, after Config
	if _, err := decode(Default, &before); err != nil { // a test says that it can't
		return Default
	}
	after = before
	platformDefaults(&after, runtime.GOOS)
	b := Default
	for _, v := range [][3]string{
		{"root", before.Root, after.Root}, {"run", before.Run, after.Run}, {"driver", before.VM.Driver, after.VM.Driver},
	} {
		b = bytes.Replace(b, fmt.Appendf(nil, "\n%s = %q\n", v[0], v[1]), fmt.Appendf(nil, "\n%s = %q\n", v[0], v[2]), 1)
	}
	return b
}

// platformDefaults puts state where a Mac user expects it (T14).
func platformDefaults(c *Config, goos string) {
	if goos != "darwin" {
		return
	}
	c.VM.Driver = "vz"
	if home, err := os.UserHomeDir(); err == nil {
		c.Root = filepath.Join(home, "Library", "Application Support", "cri-vz")
		c.Run = filepath.Join(home, ".cri-vz")
	}
}

func readCapped(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxFile {
		return nil, fmt.Errorf("configuration %s is not a file of at most %d bytes", path, maxFile)
	}
	return os.ReadFile(path)
}

// decode reads b over c; a key that c doesn't have is an error that names it.
func decode(b []byte, c *Config) (*Config, error) {
	d := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	err := d.Decode(c)
	var unknown *toml.StrictMissingError
	var bad *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		var keys []string
		for _, e := range unknown.Errors {
			row, _ := e.Position()
			keys = append(keys, fmt.Sprintf("%s (line %d)", strings.Join(e.Key(), "."), row))
		}
		return nil, fmt.Errorf("unknown key %s; `cri-vz config default` prints all keys", strings.Join(keys, ", "))
	case errors.As(err, &bad):
		row, col := bad.Position()
		return nil, fmt.Errorf("line %d, column %d: %w", row, col, err)
	case err != nil:
		return nil, err
	}
	return c, nil
}

func (c *Config) validate() error {
	for _, p := range []struct{ key, path string }{{"root", c.Root}, {"run", c.Run}} {
		if !filepath.IsAbs(p.path) {
			return fmt.Errorf("%s: %q is not an absolute path", p.key, p.path)
		}
	}
	if s, ok := strings.CutPrefix(c.Listen, "unix://"); !ok || !filepath.IsAbs(s) {
		return fmt.Errorf("listen: %q is not unix:// and an absolute path", c.Listen)
	} else if len(s) > 103 { // sun_path of Linux and macOS, T14
		return fmt.Errorf("listen: a unix socket's path has at most 103 bytes, and %q has %d", s, len(s))
	}
	if _, err := c.Verbosity(); err != nil {
		return err
	}
	if host, _, err := net.SplitHostPort(c.Streaming.Address); err != nil || !net.ParseIP(host).IsLoopback() {
		return fmt.Errorf("streaming.address: %q is not a loopback address and a port, such as 127.0.0.1:0", c.Streaming.Address)
	}
	if _, err := netip.ParsePrefix(c.Network.BuiltinSubnet); err != nil {
		return fmt.Errorf("network.builtin_subnet: %w", err)
	}
	if c.VM.Boots < 0 {
		return fmt.Errorf("vm.boots: %d is less than 0", c.VM.Boots)
	}
	if !map[string]bool{"auto": true, "kvm": true, "tcg": true}[c.VM.Accel] {
		return fmt.Errorf("vm.accel: %q is none of auto, kvm and tcg", c.VM.Accel)
	}
	if !map[string]bool{"qemu": true, "vz": true}[c.VM.Driver] {
		return fmt.Errorf("vm.driver: %q is none of qemu (Linux) and vz (macOS)", c.VM.Driver)
	}
	if !map[string]bool{"auto": true, "systemd": true, "cgroupfs": true}[c.Kubelet.CgroupDriver] {
		return fmt.Errorf("kubelet.cgroup_driver: %q is none of auto, systemd and cgroupfs", c.Kubelet.CgroupDriver)
	}
	if !map[string]bool{"auto": true, "pod": true, "own": true}[c.Kubelet.SandboxCgroup] {
		return fmt.Errorf("kubelet.sandbox_cgroup: %q is none of auto, pod and own", c.Kubelet.SandboxCgroup)
	}
	classes := map[string]Class{"vm.default": c.VM.Default}
	for name, class := range c.VM.Class {
		if name == "" {
			return errors.New("vm.class: a class needs a name; the VM of pods without a runtime handler is vm.default")
		}
		classes["vm.class."+name] = class
	}
	for key, class := range classes {
		if err := class.validate(); err != nil {
			return fmt.Errorf("%s.%w", key, err)
		}
	}
	return nil
}

// Verbosity is log_level as klog's -v.
func (c *Config) Verbosity() (int, error) {
	v, ok := map[string]int{"error": 0, "info": 0, "debug": 2, "trace": 4}[c.LogLevel]
	if !ok {
		return 0, fmt.Errorf("log_level: %q is none of error, info, debug and trace", c.LogLevel)
	}
	return v, nil
}

// Socket is Listen as a path.
func (c *Config) Socket() string { return strings.TrimPrefix(c.Listen, "unix://") }
