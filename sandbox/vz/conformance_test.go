//go:build (darwin && cgo) || fakevz

package vz

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/guest/image"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
	"github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest"
)

// guest is the image that a Mac boots; it is built, which takes apt and the network, if
// the machine has none.
func guest(t testing.TB) vmmtest.Guest {
	t.Helper()
	dir, err := image.DefaultDir()
	if err != nil {
		t.Fatal(err)
	}
	return guestIn(t, dir)
}

// guestIn prefers the kernel that CI runs with. A Mac has one of its user's choice,
// because it has no apt to fetch that with.
func guestIn(t testing.TB, dir string) vmmtest.Guest {
	t.Helper()
	g, err := image.LocateKind(dir, hostArch(), image.KindStock)
	if errdefs.IsNotFound(err) {
		g, err = image.Locate(dir, hostArch())
	}
	if errdefs.IsNotFound(err) {
		g, err = image.Build(t.Context(), image.Options{
			Dir: filepath.Join(dir, "conformance"), Arch: hostArch(), Agent: vmmtest.Init(t, hostArch()), Kind: image.KindStock,
		})
	}
	if err != nil {
		t.Fatalf("no guest to boot; make one with `cri-vz guest build`, on a Mac as the README says: %v", err)
	}
	return vmmtest.Guest{Arch: g.Arch, Kernel: g.KernelPath, Initrd: g.InitrdPath, Cmdline: g.Cmdline}
}

// What a Mac user has built with --kernel is found: there is nothing to fetch another
// with.
func TestGuestOfAMac(t *testing.T) {
	stock, dir := guest(t), t.TempDir()
	built, err := image.Build(t.Context(), image.Options{
		Dir: dir, Arch: stock.Arch, Agent: vmmtest.Init(t, stock.Arch), Kernel: stock.Kernel,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", t.TempDir()) // no apt
	if g := guestIn(t, dir); built.KernelKind == image.KindStock || g.Kernel != built.KernelPath {
		t.Errorf("%s (%s) was built, %s found", built.KernelPath, built.KernelKind, g.Kernel)
	}
}

func newDriver(t *testing.T) vmm.Driver {
	t.Helper()
	d, err := New()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// frames is one end of a cable whose other end the test keeps.
func frames(t *testing.T) (ours, guests *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, guests = os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "guest's")
	t.Cleanup(func() { ours.Close() })
	return ours, guests
}

// The suite that every driver passes, on the image that a Mac boots, under the devices
// that the framework offers. // T50
func TestConformance(t *testing.T) {
	g := guest(t)
	g.NIC = func(t *testing.T) vmm.NIC {
		_, f := frames(t)
		return vmm.NIC{MAC: []byte{2, 0, 0, 0, 0, 1}, MTU: framesMTU, Frames: f}
	}
	g.LeaksOf = []string{
		// vz closes the channels of a machine never, or when it is released.
		"github.com/Code-Hex/go-infinity-channel.(*Channel[...]).infiniteBuffer",
		"github.com/Code-Hex/vz/v3.(*VirtualMachine).watchDisconnected",
	}
	vmmtest.Run(t, newDriver, g)
}
