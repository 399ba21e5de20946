package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

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
	if err := v.prepare(); err != nil {
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
