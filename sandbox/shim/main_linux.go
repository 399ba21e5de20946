package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/cri-vz/cri-vz/sandbox/qemu"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// Main is the hidden command "shim POD_DIR": it runs in a session and a mount
// namespace of its own, which package sandbox gave it, until the pod is
// stopped. It returns the exit code.
func Main(args []string) int {
	if len(args) != 1 {
		fmt.Fprintln(os.Stderr, "usage: shim POD_DIR (started by the daemon, not by hand)")
		return 2
	}
	c, err := ReadConfig(args[0])
	if err == nil {
		defer openLog(filepath.Join(c.PodDir, LogFile))()
		err = run(c, newDriver)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		klog.ErrorS(err, "The shim ends", "pod", c.ID)
		return 1
	}
	return 0
}

func newDriver(c Config) (vmm.Driver, error) {
	if c.Driver.Name != "qemu" {
		return nil, fmt.Errorf("there is no VM driver %q on Linux: use \"qemu\": %w", c.Driver.Name, errdefs.ErrInvalidArgument)
	}
	return qemu.New(qemu.Options{
		Accel: qemu.Accel(c.Driver.Accel), CacheDir: c.Driver.CacheDir,
		UID: c.Driver.UID, GID: c.Driver.GID,
	})
}

// Run is Main with a driver of the caller's choice, for tests of what only a
// process of its own can show.
func Run(c Config, d vmm.Driver) error {
	return run(c, func(Config) (vmm.Driver, error) { return d, nil })
}

func run(c Config, driver func(Config) (vmm.Driver, error)) error {
	for _, dir := range c.Cgroups {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
			return fmt.Errorf("enter the pod's cgroup: %w", err)
		}
	}
	// T2: nothing that is mounted from here on is seen outside; what the host
	// mounts is still seen here.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		if errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("\"/\" is no mount point: in a chroot, start the daemon in a bind mount of it: %w", err)
		}
		return fmt.Errorf("make the shim's mounts a slave of the host's: %w", err)
	}
	v := newVolumes(c)
	if err := v.share(); err != nil {
		return fmt.Errorf("pod %s: volumes share: %w", c.ID, err)
	}
	if c.HostMountFD > 0 {
		unix.CloseOnExec(c.HostMountFD)
		unix.CloseOnExec(c.HostRootFD)
	}
	var tap *os.File
	if c.TapFD > 0 {
		if err := unix.SetNonblock(c.TapFD, true); err != nil {
			return fmt.Errorf("inherited tap: %w", err)
		}
		unix.CloseOnExec(c.TapFD)
		tap = os.NewFile(uintptr(c.TapFD), "tap")
	}
	d, err := driver(c)
	if err != nil {
		return fmt.Errorf("pod %s: %w", c.ID, err)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer cancel()
	// The terminal of whoever started the daemon is none of a pod's business.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
	return serve(ctx, c, d, tap, v)
}
