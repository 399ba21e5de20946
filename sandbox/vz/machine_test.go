//go:build fakevz

package vz

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/Code-Hex/vz/v3"
	"github.com/containerd/errdefs"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
	"github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest"
)

// config is the least that the driver takes; it needs the suite's init to answer.
func config(t *testing.T) vmm.Config {
	t.Helper()
	g := guest(t)
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	console, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = console.Close() })
	return vmm.Config{
		ID: "test", Arch: g.Arch, Kernel: g.Kernel, Initrd: g.Initrd, Cmdline: g.Cmdline + " testinit=hang",
		CPUs: 1, MemoryBytes: 256 << 20, Console: console, RunDir: dir,
	}
}

func newMachine(t *testing.T, c vmm.Config) *machine {
	t.Helper()
	m, err := newDriver(t).New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m.(*machine)
}

func fail(t *testing.T, name string, err error) {
	t.Helper()
	vz.TestFail(name, err)
	t.Cleanup(func() { vz.TestFail(name, nil) })
}

// set changes one of the stand-in's variables for a test.
func set[T any](t *testing.T, v *T, to T) {
	old := *v
	*v = to
	t.Cleanup(func() { *v = old })
}

// Every call to the framework can fail; the error says which, and New has let go of
// the NIC's file.
func TestEachCallCanFail(t *testing.T) {
	set(t, &vz.TestRosetta, vz.LinuxRosettaAvailabilityInstalled)
	for _, name := range []string{
		"NewLinuxBootLoader", "NewVirtualMachineConfiguration", "Validate",
		"NewFileHandleSerialPortAttachment", "NewVirtioConsoleDeviceSerialPortConfiguration",
		"NewVirtioEntropyDeviceConfiguration", "NewVirtioTraditionalMemoryBalloonDeviceConfiguration",
		"NewVirtioSocketDeviceConfiguration", "NewDiskImageStorageDeviceAttachmentWithCacheAndSync",
		"NewVirtioBlockDeviceConfiguration", "SetBlockDeviceIdentifier",
		"NewSharedDirectory", "NewSingleDirectoryShare", "NewMultipleDirectoryShare",
		"NewVirtioFileSystemDeviceConfiguration", "NewLinuxRosettaDirectoryShare",
		"NewNATNetworkDeviceAttachment", "NewFileHandleNetworkDeviceAttachment", "SetMaximumTransmissionUnit",
		"NewVirtioNetworkDeviceConfiguration", "NewMACAddress",
	} {
		t.Run(name, func(t *testing.T) {
			c := config(t)
			disk := filepath.Join(c.RunDir, "disk")
			if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			_, cable := frames(t)
			c.Disks = []vmm.Disk{{Serial: "scratch", Path: disk}}
			c.Shares = []vmm.Share{
				{Tag: "several", Dirs: map[string]vmm.SharedDir{"one": {Dir: c.RunDir}}}, {Tag: "single", Dir: c.RunDir},
			}
			c.NICs = []vmm.NIC{{MAC: []byte{2, 0, 0, 0, 0, 2}, MTU: 9000, Frames: cable}, {MAC: []byte{2, 0, 0, 0, 0, 1}, MTU: 1500}}
			fail(t, name, errors.New("as planned"))
			m, err := newDriver(t).New(t.Context(), c)
			if m != nil || err == nil || !strings.Contains(err.Error(), "as planned") {
				t.Fatalf("New: %v, %v", m, err)
			}
			if err := cable.Close(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("the NIC's file after New failed: %v", err)
			}
		})
	}
}

func TestErrorsOfTheFramework(t *testing.T) {
	nserr := func(domain string, code int) error {
		return &vz.NSError{Domain: domain, Code: code, LocalizedDescription: "as the framework says it"}
	}
	var none *vz.NSError
	for _, test := range []struct {
		name string
		err  error
		is   error
		text string
	}{
		{"limit", nserr("VZErrorDomain", 6), errdefs.ErrResourceExhausted, "stop others"},
		{"disk space", nserr("VZErrorDomain", 8), syscall.ENOSPC, "free some space"},
		{"configuration", nserr("VZErrorDomain", 2), vmm.ErrConfig, "entitlement"},
		{"disk image", nserr("VZErrorDomain", 5), vmm.ErrConfig, "raw image"},
		{"state", nserr("VZErrorDomain", 3), errdefs.ErrFailedPrecondition, ""},
		{"transition", nserr("VZErrorDomain", 4), errdefs.ErrFailedPrecondition, ""},
		{"network", nserr("VZErrorDomain", 7), errdefs.ErrUnavailable, ""},
		{"not supported", nserr("VZErrorDomain", 10), errdefs.ErrNotImplemented, ""},
		{"internal", nserr("VZErrorDomain", 1), nil, "Code=1"},
		{"reset", nserr("NSPOSIXErrorDomain", 54), syscall.ECONNRESET, ""},
		{"refused", nserr("NSPOSIXErrorDomain", 61), syscall.ECONNREFUSED, ""},
		{"a number that nobody knows", nserr("NSPOSIXErrorDomain", 9999), nil, "Code=9999"},
		{"another domain", nserr("NSCocoaErrorDomain", 6), nil, "NSCocoaErrorDomain"},
		{"old macOS", fmt.Errorf("x: %w", vz.ErrUnsupportedOSVersion), errdefs.ErrFailedPrecondition, "macOS 13"},
		{"old SDK", fmt.Errorf("x: %w", vz.ErrBuildTargetOSVersion), errdefs.ErrFailedPrecondition, "SDK"},
		{"typed nil", none, nil, "<nil>"}, // T50
	} {
		t.Run(test.name, func(t *testing.T) {
			got := classify(test.err)
			if test.is != nil && !errors.Is(got, test.is) {
				t.Errorf("%v is not %v", got, test.is)
			}
			if !errors.Is(got, test.err) || !strings.Contains(got.Error(), test.text) {
				t.Errorf("%v, want %q and what the framework said", got, test.text)
			}
		})
	}
	if classify(nil) != nil {
		t.Error("no error is one")
	}
	if err := refused(errors.New("whatever")); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("refused: %v", err)
	}
}

func TestVersionsOfMacOS(t *testing.T) {
	for _, test := range []struct {
		version string
		want    float64
		ok      bool
	}{{"13.0", 13, true}, {"12.3.1", 12.3, true}, {"15", 15, true}, {"26.1", 26.1, true}, {"", 0, false}, {"Tahoe", 0, false}} {
		set(t, &vz.TestMacOS, test.version)
		got, err := macOSVersion()
		if got != test.want || (err == nil) != test.ok {
			t.Errorf("%q: %g, %v", test.version, got, err)
		}
	}
	set(t, &vz.TestMacOS, "12.6")
	if _, err := New(); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "13 or later") {
		t.Errorf("New on macOS 12: %v", err)
	}
	set(t, &vz.TestMacOS, "?")
	if _, err := New(); err == nil {
		t.Error("New on an unknown macOS")
	}
	if _, err := Features(); err == nil {
		t.Error("features of an unknown macOS")
	}
	if available(FeatureRosetta) {
		t.Error("Rosetta on an unknown macOS")
	}
}

// Nothing is claimed that the running macOS can't do.
func TestFeatures(t *testing.T) {
	states := func() map[string]Feature {
		t.Helper()
		features, err := Features()
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]Feature{}
		for _, f := range features {
			m[f.Name] = f
			if f.Available != (f.Reason == "") {
				t.Errorf("%+v: either it is there or there is a reason", f)
			}
		}
		return m
	}
	set(t, &vz.TestRosetta, vz.LinuxRosettaAvailabilityInstalled)
	if s := states(); !s["Rosetta"].Available || !s["live shares"].Available {
		t.Errorf("on macOS %s: %+v", vz.TestMacOS, s)
	}
	set(t, &vz.TestRosetta, vz.LinuxRosettaAvailabilityNotInstalled)
	if s := states(); !strings.Contains(s["Rosetta"].Reason, "softwareupdate") {
		t.Errorf("not installed: %+v", s)
	}
	set(t, &vz.TestRosetta, vz.LinuxRosettaAvailabilityNotSupported)
	if s := states(); !strings.Contains(s["Rosetta"].Reason, "has none") {
		t.Errorf("not supported: %+v", s)
	}
	d := newDriver(t)
	if c, err := d.Capabilities(t.Context(), "arm64"); err != nil || !c.LiveShares || c.SharePropagation || c.DiskErrors {
		t.Errorf("capabilities %+v, %v", c, err)
	}
	if _, err := d.Capabilities(t.Context(), "amd64"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("amd64 guests on Apple silicon: %v", err)
	}
	set(t, &vz.TestCanSetShare, errors.New("no such symbol"))
	if s := states(); s["live shares"].Available || s["live shares"].Reason != "no such symbol" {
		t.Errorf("without the symbol: %+v", s)
	}
	c := config(t)
	c.Shares = []vmm.Share{{Tag: "several", Dirs: map[string]vmm.SharedDir{}}}
	if err := d.Validate(c); !errors.Is(err, vmm.ErrConfig) {
		t.Errorf("a share of several directories where they can't change: %v", err)
	}
	set(t, &vz.TestMacOS, "11.5")
	if s := states(); !strings.Contains(s["live shares"].Reason, "this is macOS 11.5, it takes 12") {
		t.Errorf("on macOS 11.5: %+v", s)
	}
}

func TestRefusals(t *testing.T) {
	d := newDriver(t)
	for name, change := range map[string]func(*vmm.Config){
		"more CPUs than the Mac allows":   func(c *vmm.Config) { c.CPUs = 1000 },
		"more memory than the Mac allows": func(c *vmm.Config) { c.MemoryBytes = 1 << 40 },
		"less memory than the Mac allows": func(c *vmm.Config) { c.MemoryBytes = 1 << 20 },
		"a disk that is a device":         func(c *vmm.Config) { c.Disks = []vmm.Disk{{Serial: "a", Path: blockDevice(t)}} },
		"a tag that is Rosetta's":         func(c *vmm.Config) { c.Shares = []vmm.Share{{Tag: guestapi.ShareRosetta, Dir: c.RunDir}} },
		"an MTU that NAT hasn't":          func(c *vmm.Config) { c.NICs = []vmm.NIC{{MAC: []byte{2, 0, 0, 0, 0, 1}, MTU: 9000}} },
		"a command line that is cut off":  func(c *vmm.Config) { c.Cmdline = strings.Repeat("x", cmdlineLimit+1) },
		"a tap": func(c *vmm.Config) {
			c.NICs = []vmm.NIC{{MAC: []byte{2, 0, 0, 0, 0, 1}, MTU: 1500, Tap: c.Console}}
		},
		"an MTU that frames can't have": func(c *vmm.Config) {
			_, f := frames(t)
			t.Cleanup(func() { f.Close() })
			c.NICs = []vmm.NIC{{MAC: []byte{2, 0, 0, 0, 0, 1}, MTU: 1400, Frames: f}}
		},
		"a compressed kernel": func(c *vmm.Config) {
			c.Kernel = filepath.Join(c.RunDir, "Image.gz")
			if err := os.WriteFile(c.Kernel, append([]byte{0x1f, 0x8b}, bytes.Repeat([]byte{1}, 4096)...), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		c := config(t)
		change(&c)
		err := d.Validate(c)
		if !errors.Is(err, vmm.ErrConfig) {
			t.Errorf("%s: %v, want ErrConfig", name, err)
		}
		t.Log(err)
	}
	set(t, &vz.TestInvalid, true)
	if _, err := d.New(t.Context(), config(t)); !errors.Is(err, vmm.ErrConfig) {
		t.Errorf("a configuration that the framework refuses without a word: %v", err)
	}
	c := config(t)
	_ = c.Console.Close()
	if _, err := d.New(t.Context(), c); err == nil {
		t.Error("a console that is closed")
	}
}

// Of an Intel Mac's kernels QEMU also boots the one that the framework doesn't.
func TestUncompressedKernel(t *testing.T) {
	c := config(t)
	set(t, &vz.TestArch, "amd64")
	c.Arch, c.Kernel = "amd64", filepath.Join(c.RunDir, "vmlinux")
	note := append([]byte{4, 0, 0, 0, 0, 0, 0, 0, 18, 0, 0, 0}, "Xen\x00"...) // a PVH entry
	var b bytes.Buffer
	for _, part := range []any{
		elf.Header64{
			Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
			Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
			Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
		},
		elf.Prog64{Type: uint32(elf.PT_NOTE), Off: 64 + 56, Filesz: uint64(len(note))},
		note, []byte("Linux version 6.12.0 "), make([]byte, 1024),
	} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(c.Kernel, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	err := newDriver(t).Validate(c)
	if !errors.Is(err, vmm.ErrConfig) || !strings.Contains(err.Error(), "boots a bzImage: run `cri-vz guest build`") {
		t.Error(err)
	}
}

// blockDevice is one that this machine has, if any; a directory will do as well.
func blockDevice(t *testing.T) string {
	for _, p := range []string{"/dev/vda", "/dev/sda", "/dev/loop0"} {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return t.TempDir()
}

// The Objective-C object of a path that is not UTF-8 would be none at all.
func TestPathThatIsNotUTF8(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "\xff")
	if err := os.Mkdir(bad, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]vmm.Share{
		"one":     {Tag: "x", Dir: bad},
		"several": {Tag: "x", Dirs: map[string]vmm.SharedDir{"d": {Dir: bad}}},
	} {
		c := config(t)
		c.Shares = []vmm.Share{s}
		if _, err := newDriver(t).New(t.Context(), c); !errors.Is(err, vmm.ErrConfig) || !strings.Contains(err.Error(), "UTF-8") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What a machine took is given back when it is closed, not when this process next
// happens to collect its garbage: a boot that failed has a successor. // T7
func TestClosedMachineIsReleased(t *testing.T) {
	before := vz.TestReleased()
	c := config(t)
	func() {
		m, err := newDriver(t).New(t.Context(), c)
		if err == nil {
			err = m.Start(t.Context())
		}
		if err == nil {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if conn, err := m.Dial(ctx, 1024); err == nil {
				_ = conn.Close()
				t.Error("a guest without an agent answers")
			}
			err = m.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}()
	for end := time.Now().Add(5 * time.Second); vz.TestReleased() == before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("something refers to a machine that was closed")
		}
	}
}

func TestStartFails(t *testing.T) {
	limit := &vz.NSError{Domain: "VZErrorDomain", Code: int(vz.ErrorVirtualMachineLimitExceeded)}
	for _, name := range []string{"Start", "NewVirtualMachine"} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, config(t))
			fail(t, name, limit)
			err := m.Start(t.Context())
			if !errdefs.IsResourceExhausted(err) {
				t.Errorf("Start: %v, want ErrResourceExhausted", err)
			}
			select {
			case <-m.Done():
			default:
				t.Error("Done is open after Start failed")
			}
			if !errdefs.IsResourceExhausted(m.Err()) {
				t.Errorf("Err: %v", m.Err())
			}
			if _, err := m.Progress(); err == nil {
				t.Error("progress of a machine that didn't start")
			}
		})
	}
	set(t, &vz.TestNoSockets, true)
	if err := newMachine(t, config(t)).Start(t.Context()); err == nil || !strings.Contains(err.Error(), "vsock") {
		t.Errorf("Start without a vsock device: %v", err)
	}
}

// What the framework does to a machine that runs, in one boot.
func TestRunningMachine(t *testing.T) {
	set(t, &vz.TestRosetta, vz.LinuxRosettaAvailabilityInstalled)
	c := config(t)
	c.Cmdline = strings.TrimSuffix(c.Cmdline, " testinit=hang")
	c.Initrd = vmmtest.WithInit(t, c.Initrd, vmmtest.Init(t, c.Arch))
	_, cable := frames(t)
	c.NICs = []vmm.NIC{{MAC: []byte{2, 0, 0, 0, 0, 2}, MTU: 9000, Frames: cable}, {MAC: []byte{2, 0, 0, 0, 0, 1}, MTU: 1500}}
	c.Shares = []vmm.Share{{Tag: "several", Dirs: map[string]vmm.SharedDir{}}}
	m := newMachine(t, c)
	if _, err := m.Dial(t.Context(), 1024); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Dial before Start: %v", err)
	}
	if err := m.SetShare(t.Context(), "several", nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("SetShare before Start: %v", err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	vz.TestDisconnect(m.vm, errors.New("the cable was pulled"))

	t.Run("a guest that doesn't answer yet", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		start := time.Now()
		if _, err := m.Dial(ctx, 1024); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Dial: %v", err)
		}
		if took := time.Since(start); took > 500*time.Millisecond {
			t.Errorf("Dial took %s with 20 ms to do it", took)
		}
	})
	var conn net.Conn
	for end := time.Now().Add(time.Minute); conn == nil; {
		var err error
		if conn, err = m.Dial(t.Context(), 1025); err == nil {
			break
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("Dial: %v", err)
		}
		if time.Now().After(end) {
			t.Fatal("the guest doesn't answer")
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Run("no half-close", func(t *testing.T) { // T50
		if _, ok := conn.(interface{ CloseWrite() error }); ok {
			t.Error("a connection claims CloseWrite")
		}
	})
	t.Run("shares", func(t *testing.T) {
		fail(t, "NewSharedDirectory", vz.ErrUnsupportedOSVersion)
		if err := m.SetShare(t.Context(), "several", map[string]vmm.SharedDir{"x": {Dir: t.TempDir()}}); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("SetShare: %v", err)
		}
		m.changing <- struct{}{} // somebody else's change hangs
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if err := m.SetShare(ctx, "several", nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("SetShare behind another: %v", err)
		}
		<-m.changing
		fail(t, "SetShare", errors.New("as planned"))
		if err := m.SetShare(t.Context(), "several", nil); err == nil || !strings.Contains(err.Error(), "as planned") {
			t.Errorf("SetShare: %v", err)
		}
	})
	t.Run("balloon", func(t *testing.T) {
		fail(t, "SetMemory", errors.New("as planned"))
		if err := m.SetMemory(t.Context(), 128<<20); err == nil || !strings.Contains(err.Error(), "balloon: as planned") {
			t.Errorf("SetMemory: %v", err)
		}
	})
	t.Run("a machine that won't stop", func(t *testing.T) {
		vz.TestFail("Stop", errors.New("not now"))
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if err := m.Kill(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Kill: %v", err)
		}
		select {
		case <-m.Done():
			t.Error("Done, and it runs")
		default:
		}
		vz.TestFail("Stop", nil)
		if err := m.Kill(t.Context()); err != nil || m.Err() != nil {
			t.Errorf("Kill: %v, Err: %v", err, m.Err())
		}
	})
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read from a machine that is gone: %v", err)
	}
	if err := m.SetShare(t.Context(), "several", nil); err == nil {
		t.Error("SetShare of a machine that is gone")
	}
	if _, err := m.adopt(conn); !errors.Is(err, errGone) {
		t.Errorf("a connection that comes after the end: %v", err)
	}
}

// A machine that the framework ends is not one whose guest was done.
func TestFrameworkEndsTheMachine(t *testing.T) {
	m := newMachine(t, config(t))
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	vz.TestCrash(m.vm)
	select {
	case <-m.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("not done")
	}
	if err := m.Err(); err == nil || !strings.Contains(err.Error(), "error of its own") {
		t.Errorf("Err: %v", err)
	}
	if err := m.Start(t.Context()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second Start: %v", err)
	}
}
