//go:build fakevz

package vz

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/Code-Hex/vz/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/guest/image"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
	"github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest"
)

// inside marks the process in which the tests run.
const inside = "CRI_VZ_VZ_TEST"

// TestMain runs the tests in a mount namespace of its own, which the stand-in needs.
// The Mac that it stands in for has Apple silicon.
func TestMain(m *testing.M) {
	if os.Getenv(inside) == "" {
		os.Exit(reexec())
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		fmt.Fprintln(os.Stderr, "make / a slave mount:", err)
		os.Exit(1)
	}
	vz.TestArch = "arm64"
	os.Exit(m.Run())
}

func reexec() int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests make mounts in a namespace of their own: run them as root")
		return 1
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inside+"=tests")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// guest is the image that a Mac boots; it is built, which takes the network, if the
// machine has none.
func guest(t testing.TB) vmmtest.Guest {
	t.Helper()
	dir, err := image.DefaultDir()
	if err != nil {
		t.Fatal(err)
	}
	g, err := image.LocateKind(dir, "arm64", image.KindStock)
	if errdefs.IsNotFound(err) {
		g, err = image.Build(t.Context(), image.Options{
			Dir: filepath.Join(dir, "conformance"), Arch: "arm64", Agent: vmmtest.Init(t, "arm64"), Kind: image.KindStock,
		})
	}
	if err != nil {
		t.Fatalf("no guest to boot: %v", err)
	}
	return vmmtest.Guest{Arch: g.Arch, Kernel: g.KernelPath, Initrd: g.InitrdPath, Cmdline: g.Cmdline}
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
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
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
		return vmm.NIC{MAC: []byte{2, 0, 0, 0, 0, 1}, MTU: 1400, Frames: f}
	}
	vmmtest.Run(t, newDriver, g)
}
