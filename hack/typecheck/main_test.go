package main

import (
	"bytes"
	"errors"
	"go/ast"
	"go/types"
	"os"
	"os/exec"
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
		{"too few arguments", "sandbox/vz/configuration.go", "vz.NewSharedDirectory(path, readOnly)", "vz.NewSharedDirectory(path)", "not enough arguments in call to vz.NewSharedDirectory"},
		{"constants in the wrong order", "sandbox/vz/configuration.go", "vz.DiskImageCachingModeCached, vz.DiskImageSynchronizationModeFsync", "vz.DiskImageSynchronizationModeFsync, vz.DiskImageCachingModeCached", "cannot use vz.DiskImageSynchronizationModeFsync"},
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

// The line of `make check` that looks at the driver, as it stands in the Makefile: it
// ends with an error when one is planted.
func TestMakeCheckTurnsRed(t *testing.T) {
	copied := t.TempDir()
	for _, name := range []string{"Makefile", "go.mod", "go.sum", "cmd", "cri", "guest", "hack", "imageservice", "sandbox", "test"} {
		from, to := filepath.Join("../..", name), filepath.Join(copied, name)
		if err := copyTree(from, to); err != nil {
			t.Fatal(err)
		}
	}
	plan := exec.CommandContext(t.Context(), "make", "--dry-run", "check")
	plan.Dir = copied
	out, err := plan.Output()
	if err != nil {
		t.Fatalf("make --dry-run check: %v", err)
	}
	var line string
	for l := range strings.Lines(string(out)) {
		if strings.HasPrefix(l, "go run ./hack/typecheck ") {
			line = l
		}
	}
	if line == "" {
		t.Fatalf("`make check` doesn't run hack/typecheck: %s", out)
	}
	run := func() (string, error) {
		cmd := exec.CommandContext(t.Context(), "bash", "-c", line)
		cmd.Dir = copied
		b, err := cmd.CombinedOutput()
		return string(b), err
	}
	if out, err := run(); err != nil {
		t.Fatalf("%s on what there is: %v: %s", line, err, out)
	}
	for path, b := range changed(t, "sandbox/vz/machine.go", "socket.Connect(port)", "socket.Connect(int(port))") {
		if err := os.WriteFile(filepath.Join(copied, "sandbox/vz", filepath.Base(path)), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	red, err := run()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) {
		t.Errorf("%s with a wrong argument: %v: %s", line, err, red)
	}
	for _, want := range []string{"sandbox/vz/machine.go", "cannot use int(port)", "typecheck darwin/arm64", "typecheck darwin/amd64"} {
		expect(t, []string{red}, want)
	}
}

func copyTree(from, to string) error {
	st, err := os.Stat(from)
	if err != nil {
		return err
	}
	if st.IsDir() {
		return os.CopyFS(to, os.DirFS(from))
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
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
	plant("vz.go", "type ErrorCode int", "type ErrorCode int64")
	expect(t, same(), "ErrorCode is int64, the real one int")
	plant("vz.go", "	Code                 int\n", "	Code                 ErrorCode\n")
	expect(t, same(), "NSError.Code is vz.ErrorCode, the real one int")
}

// Whatever the driver uses of vz is in the stand-in, where compare looks at it: also
// what only files for macOS use, which are not compiled against it.
func TestStandInHasWhatTheDriverUses(t *testing.T) {
	for _, arch := range []string{"arm64", "amd64"} {
		p := checked(t, arch)
		fake, err := p.standIn("../../test/fakevz", vz)
		if err != nil {
			t.Fatal(err)
		}
		p.uses = map[*ast.Ident]types.Object{}
		for _, l := range p.named {
			if l.ImportPath == driver {
				p.checkPackage(l)
			}
		}
		names := map[string]bool{}
		for _, o := range p.uses {
			if o.Pkg() == nil || o.Pkg().Path() != vz {
				continue
			}
			name, has := o.Name(), fake.Scope().Lookup(o.Name()) != nil
			if owner := owner(o); owner != nil {
				name = owner.Name() + "." + name
				if f := fake.Scope().Lookup(owner.Name()); f != nil {
					member, _, _ := types.LookupFieldOrMethod(f.Type(), true, fake, o.Name())
					has = member != nil
				}
			}
			names[name] = true
			if !has {
				t.Errorf("%s: the driver uses vz.%s, and the stand-in has none", arch, name)
			}
		}
		for _, want := range []string{"VirtualMachine.Start", "NSError.Code", "DiskImageCachingModeCached", "NewLinuxBootLoader"} {
			if !names[want] {
				t.Errorf("%s: the driver doesn't use vz.%s: %d names", arch, want, len(names))
			}
		}
		t.Logf("%s: %d names", arch, len(names))
	}
}

// owner is the type that has o as a method or a field, nil if none has.
func owner(o types.Object) *types.TypeName {
	for _, name := range o.Pkg().Scope().Names() {
		t, ok := o.Pkg().Scope().Lookup(name).(*types.TypeName)
		if !ok {
			continue
		}
		if member, index, _ := types.LookupFieldOrMethod(t.Type(), true, o.Pkg(), o.Name()); member == o && len(index) == 1 {
			return t
		}
	}
	return nil
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
