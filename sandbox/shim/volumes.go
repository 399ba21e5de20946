package shim

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// volumes are the host paths in the share "volumes", each under its name.
type volumes interface {
	// prepare is called once, before the first machine.
	prepare() error
	// share is what a machine of that driver is to have.
	share(context.Context, vmm.Driver) (vmm.Share, error)
	// attach tells which machine has it.
	attach(vmm.Machine)
	add(*shimapi.Volume) error
	// release takes volumes away; names that are not there are no error.
	release(names []string) error
	// close releases all.
	close() error
}

func checkVolume(v *shimapi.Volume) error {
	if !isName(v.GetName(), 201) {
		return fmt.Errorf("volume name %q: %w", v.GetName(), errdefs.ErrInvalidArgument)
	}
	if !filepath.IsAbs(v.GetHostPath()) {
		return fmt.Errorf("host path %q is not absolute: %w", v.GetHostPath(), errdefs.ErrInvalidArgument)
	}
	return nil
}

// shareable refuses by name what is neither a directory nor a regular file (T29).
func shareable(path string, mode uint32) error {
	var what string
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR, unix.S_IFREG:
		return nil
	case unix.S_IFSOCK:
		what = "socket"
	case unix.S_IFIFO:
		what = "fifo"
	case unix.S_IFCHR, unix.S_IFBLK:
		what = "device"
	default:
		what = "file of mode " + strconv.FormatUint(uint64(mode), 8)
	}
	return fmt.Errorf("host path %s is a %s, which can't be shared with a virtual machine; mount its directory or use a directory or regular file (T29): %w", path, what, errdefs.ErrInvalidArgument)
}
