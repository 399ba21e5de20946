package vz

import (
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// What a test can set, while no machine is being made. TestArch and TestRosetta can
// also come from the environment, for processes that a test starts.
var (
	// TestMacOS is the version of macOS that this seems to be.
	TestMacOS = "15.1"
	// TestArch is the architecture of this Mac, and of its guests; FAKEVZ_ARCH, or
	// the machine's own.
	TestArch = fromEnvironment("FAKEVZ_ARCH", runtime.GOARCH)
	// TestRosetta is whether there is Rosetta; FAKEVZ_ROSETTA is a program that stands in
	// for the translator.
	TestRosetta = rosettaFromEnvironment()
	// TestCanSetShare is why the share of a running machine can't be replaced.
	TestCanSetShare error
	// TestInvalid makes Validate answer false without an error.
	TestInvalid bool
	// TestNoSockets makes machines without vsock devices.
	TestNoSockets bool
)

var (
	testMu   sync.Mutex
	testFail = map[string]error{}
)

// TestFail makes the function or method of that name fail, until it is called with
// nil.
func TestFail(name string, err error) {
	testMu.Lock()
	defer testMu.Unlock()
	if err == nil {
		delete(testFail, name)
		return
	}
	testFail[name] = err
}

// called fails as a test wants, or because this macOS is too old.
func called(name string, since float64) error {
	testMu.Lock()
	err := testFail[name]
	testMu.Unlock()
	if err != nil {
		return err
	}
	major, rest, _ := strings.Cut(TestMacOS, ".")
	minor, _, _ := strings.Cut(rest, ".")
	if v, err := strconv.ParseFloat(major+"."+minor+"0", 64); err != nil || v < since {
		return ErrUnsupportedOSVersion
	}
	return nil
}

func rosettaFromEnvironment() LinuxRosettaAvailability {
	if os.Getenv("FAKEVZ_ROSETTA") != "" {
		return LinuxRosettaAvailabilityInstalled
	}
	return LinuxRosettaAvailabilityNotSupported
}

func fromEnvironment(key, otherwise string) string {
	if v := os.Getenv(key); v != "" {
		return v
	}
	return otherwise
}

// TestSetShare is what Objective-C does on a Mac: it replaces the share of a running
// machine's device.
func TestSetShare(vm *VirtualMachine, tag string, share DirectoryShare) error {
	if err := called("SetShare", 12); err != nil {
		return err
	}
	return vm.setShare(tag, share)
}

// TestSetMemory is what Objective-C does on a Mac: it sets the target of a running
// machine's balloon.
func TestSetMemory(vm *VirtualMachine, bytes int64) error {
	if err := called("SetMemory", 11); err != nil {
		return err
	}
	vm.mu.Lock()
	g := vm.guest
	vm.mu.Unlock()
	return g.setMemory(bytes)
}

// TestDisconnect cuts off a NIC of a running machine.
func TestDisconnect(vm *VirtualMachine, err error) {
	vm.lost.In() <- &DisconnectedError{Err: err}
}

// TestSleep is what becomes of a running machine when its Mac sleeps for d: nothing of
// it runs, and its clock stands still.
func TestSleep(vm *VirtualMachine, d time.Duration) error {
	vm.mu.Lock()
	g := vm.guest
	vm.mu.Unlock()
	if _, err := io.WriteString(g.qmp, `{"execute":"stop"}`); err != nil {
		return err
	}
	time.Sleep(d)
	_, err := io.WriteString(g.qmp, `{"execute":"cont"}`)
	return err
}

var released atomic.Int64

// TestReleased counts the machines that nothing refers to any more.
func TestReleased() int64 { return released.Load() }

// TestCrash ends a running machine as an error of the framework's does.
func TestCrash(vm *VirtualMachine) {
	vm.mu.Lock()
	g := vm.guest
	vm.mu.Unlock()
	g.kill()
}
