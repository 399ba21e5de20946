package command

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/cmd/cri-vz/config"
	"github.com/cri-vz/cri-vz/guest/image"
	"github.com/cri-vz/cri-vz/sandbox/network"
	"github.com/cri-vz/cri-vz/sandbox/qemu"
)

var platformChecks = []check{
	{"user", checkUser},
	{"QEMU", checkQEMU},
	{"virtiofsd", checkVirtiofsd},
	{"accelerator", checkAccelerator},
	{"tap devices", checkTun},
	{"network", checkNetwork},
	{"cgroups", checkCgroups},
}

const mendGuest = "run `make guest` in a checkout, and give the daemon's user the same guest.dir or CRI_VZ_CACHE"

func checkUser(context.Context, *config.Config) finding {
	if uid := os.Geteuid(); uid != 0 {
		return failed(fmt.Sprintf("uid %d", uid), "the daemon has to make mounts and network namespaces: run it, and this, as root")
	}
	return ok("root")
}

func checkQEMU(context.Context, *config.Config) finding {
	path, err := qemu.FindQEMU(qemu.Options{}, runtime.GOARCH)
	if err != nil {
		return failed(err.Error(), "")
	}
	return ok(path)
}

func checkVirtiofsd(context.Context, *config.Config) finding {
	path, err := qemu.FindVirtiofsd(qemu.Options{})
	if err != nil {
		return failed(err.Error(), "")
	}
	return ok(path)
}

func checkAccelerator(ctx context.Context, c *config.Config) finding {
	o := qemu.Options{Accel: qemu.Accel(c.VM.Accel), CacheDir: filepath.Join(c.Root, "driver"), UID: c.VM.UID, GID: c.VM.GID}
	if st, err := os.Stat(c.Root); err != nil || !st.IsDir() {
		o.CacheDir = "" // not ours to make
	}
	dir := c.Guest.Dir
	if dir == "" {
		dir, _ = image.DefaultDir()
	}
	g, err := image.Locate(dir, runtime.GOARCH)
	if err != nil && o.Accel != qemu.AccelTCG {
		return warning("KVM is proved by booting a guest, and there is none", "see the guest image")
	}
	o.ProbeKernel, o.ProbeInitrd = g.KernelPath, g.InitrdPath
	d, err := qemu.New(o)
	if err != nil {
		return failed(err.Error(), "")
	}
	caps, err := d.Capabilities(ctx, runtime.GOARCH)
	switch {
	case err != nil:
		return failed(err.Error(), "vm.accel = \"auto\" falls back to emulation")
	case caps.Accelerator == "kvm":
		return ok("KVM, by a guest that booted")
	case o.Accel == qemu.AccelTCG:
		return ok("software emulation, as configured")
	}
	return warning("software emulation: KVM is not there or boots no guest",
		"on a machine with virtualization load kvm_intel or kvm_amd, and give /dev/kvm to its group kvm with mode 0660")
}

func checkTun(context.Context, *config.Config) finding {
	const path = "/dev/net/tun"
	if err := unix.Access(path, unix.R_OK|unix.W_OK); err != nil {
		return failed(fmt.Sprintf("%s: %v", path, err), "load the module tun; in a container pass the device in")
	}
	return ok(path)
}

func checkNetwork(ctx context.Context, c *config.Config) finding {
	subnet, err := netip.ParsePrefix(c.Network.BuiltinSubnet)
	if err != nil {
		return failed(err.Error(), "mend network.builtin_subnet")
	}
	// It makes its directories; a doctor leaves none.
	dir, err := os.MkdirTemp("", "cri-vz-doctor-")
	if err != nil {
		return failed(err.Error(), "")
	}
	defer os.RemoveAll(dir)
	n, err := network.New(network.Config{
		ConfDir: c.Network.ConfDir, BinDirs: c.Network.BinDirs, Subnets: []netip.Prefix{subnet}, NodeNetns: c.Network.NodeNetns,
		StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"),
	})
	if err == nil {
		err = n.Status(ctx)
	}
	if err != nil {
		return failed(err.Error(), "")
	}
	if names, _ := filepath.Glob(filepath.Join(c.Network.ConfDir, "*.conf*")); len(names) > 0 {
		return ok("CNI configuration in " + c.Network.ConfDir)
	}
	return ok("the built-in bridge, " + subnet.String())
}

func checkCgroups(context.Context, *config.Config) finding {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return failed(err.Error(), "")
	}
	var writable []string
	for _, m := range mounts {
		if unix.Access(m.Mountpoint, unix.W_OK) == nil && !strings.Contains(","+m.Options+",", ",ro,") {
			writable = append(writable, m.Mountpoint)
		}
	}
	if len(writable) == 0 {
		return warning("none can be written to: a VM's memory is nobody's, and its processes are ended one by one",
			"mount the cgroup file system, in a container writable")
	}
	return ok(strings.Join(writable, ", "))
}
