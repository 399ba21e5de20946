package main

import (
	"bytes"
	"go/types"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	driver = "github.com/cri-vz/cri-vz/sandbox/vz"
	vz     = "github.com/Code-Hex/vz/v3"
)

// checked is the driver as a Mac of arch compiles it.
func checked(t *testing.T, arch string) *program {
	t.Helper()
	p := &program{goos: "darwin", goarch: arch}
	problems, err := p.check([]string{driver})
	if err != nil {
		t.Fatal(err)
	}
	if len(problems) != 0 {
		t.Fatalf("the driver as it is: %q", problems)
	}
	return p
}

// changed is a file of the repository with one text in the place of another.
func changed(t *testing.T, file, old, new string) map[string][]byte {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("../..", file))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Count(b, []byte(old)) != 1 {
		t.Fatalf("%s has %q %d times, the test wants it once", file, old, bytes.Count(b, []byte(old)))
	}
	return map[string][]byte{path: bytes.Replace(b, []byte(old), []byte(new), 1)}
}

func expect(t *testing.T, problems []string, want string) {
	t.Helper()
	if all := strings.Join(problems, "\n"); !strings.Contains(all, want) {
		t.Errorf("problems %q, want one with %q", all, want)
	}
}

// What `make check` is to find: an error in the driver that no build on Linux sees.
func TestPlantedErrors(t *testing.T) {
	p := checked(t, "arm64")
	for _, test := range []struct{ name, file, old, new, want string }{
		{"wrong argument", "sandbox/vz/configuration.go", "uint(c.CPUs), uint64(c.MemoryBytes)", "uint(c.CPUs), c.MemoryBytes", "cannot use c.MemoryBytes"},
		{"unknown function", "sandbox/vz/configuration.go", "vz.NewNATNetworkDeviceAttachment()", "vz.NewNetworkAddressTranslation()", "undefined: vz.NewNetworkAddressTranslation"},
		{"wrong result", "sandbox/vz/machine.go", "err := vm.Stop()", "_, err := vm.Stop()", "assignment mismatch"},
		{"in a file for macOS alone", "sandbox/vz/setshare_darwin.go", "device.Send(s.setShare, objcObject(share))", "device.Send(objcObject(share))", "cannot use objcObject(share)"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p.overlay = changed(t, test.file, test.old, test.new)
			for _, l := range p.named {
				if l.ImportPath == driver { // and not with its tests
					expect(t, p.checkPackage(l), test.want)
				}
			}
		})
	}
}

// A stand-in whose signatures drift from vz's proves nothing.
func TestPlantedDrift(t *testing.T) {
	const dir = "../../test/fakevz"
	p := checked(t, "arm64")
	same := func() []string {
		problems, err := p.compare(dir, vz)
		if err != nil {
			t.Fatal(err)
		}
		return problems
	}
	// Paths as compare has them.
	plant := func(file, old, new string) {
		for _, b := range changed(t, "test/fakevz/"+file, old, new) {
			p.overlay = map[string][]byte{filepath.Join(dir, file): b}
		}
	}
	if problems := same(); len(problems) != 0 {
		t.Fatalf("the stand-in as it is: %q", problems)
	}
	plant("vz.go", "func WithInitrd(initrdPath string)", "func WithInitrd(initrdPath []byte)")
	expect(t, same(), "WithInitrd is func(initrdPath []byte)")
	plant("machine.go", "func (v *VirtualMachine) Stop() error", "func (v *VirtualMachine) Halt() error")
	expect(t, same(), "VirtualMachine.Halt is not in")
	plant("vz.go", "DiskImageCachingModeAutomatic DiskImageCachingMode = iota", "DiskImageCachingModeAutomatic DiskImageCachingMode = 1 + iota")
	expect(t, same(), "DiskImageCachingModeCached is 3, the real one 2")
}

// setShare reads two fields that vz doesn't export: here is where they are.
func TestLayoutThatSetShareReads(t *testing.T) {
	for _, arch := range []string{"arm64", "amd64"} {
		p := checked(t, arch)
		for _, want := range []struct{ typ, path, is string }{
			{"VirtualMachine", "dispatchQueue", "unsafe.Pointer"},
			{"VirtualMachine", "pointer._ptr", "unsafe.Pointer"},
			{"MultipleDirectoryShare", "pointer._ptr", "unsafe.Pointer"},
		} {
			at := p.packages[vz].Scope().Lookup(want.typ).Type()
			for name := range strings.SplitSeq(want.path, ".") {
				at = field(at, name)
				if at == nil {
					t.Fatalf("%s: vz.%s has no field %s", arch, want.typ, want.path)
				}
			}
			if at.String() != want.is {
				t.Errorf("%s: vz.%s.%s is %s, want %s", arch, want.typ, want.path, at, want.is)
			}
		}
	}
}

// field is the type of a struct's own field, or of what it points to.
func field(t types.Type, name string) types.Type {
	if p, ok := types.Unalias(t).Underlying().(*types.Pointer); ok {
		t = p.Elem()
	}
	s, ok := types.Unalias(t).Underlying().(*types.Struct)
	if !ok {
		return nil
	}
	for f := range s.Fields() {
		if f.Name() == name {
			return f.Type()
		}
	}
	return nil
}
