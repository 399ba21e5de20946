package shim

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/cri-vz/cri-vz/sandbox/qemu"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
	"github.com/cri-vz/cri-vz/sandbox/vz"
)

// Main is the hidden command "shim POD_DIR": it runs in a session of its own, on
// Linux also in a mount namespace of its own, which package sandbox gave it, until
// the pod is stopped. It returns the exit code.
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
	switch c.Driver.Name {
	case DriverQEMU:
		return qemu.New(qemu.Options{
			Accel: qemu.Accel(c.Driver.Accel), CacheDir: c.Driver.CacheDir,
			UID: c.Driver.UID, GID: c.Driver.GID,
		})
	case DriverVZ:
		return vz.New()
	}
	return nil, fmt.Errorf("there is no VM driver %q: use %q on Linux and %q on macOS: %w", c.Driver.Name, DriverQEMU, DriverVZ, errdefs.ErrInvalidArgument)
}
