package image

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/cri-vz/cri-vz/sandbox/scratch"
	"github.com/ulikunitz/xz"
)

// buildInit builds testdata/init, the stand-in for the agent.
func buildInit(t *testing.T, arch string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "init")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "./testdata/init")
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build testdata/init: %v\n%s", err, text)
	}
	return out
}

// bzImage makes the header of a bzImage that says it is of version.
func bzImage(version string) []byte {
	b := make([]byte, 4096)
	binary.LittleEndian.PutUint16(b[0x1fe:], 0xaa55)
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x20f)
	binary.LittleEndian.PutUint16(b[0x20e:], 0x300)
	copy(b[0x500:], version+" (someone@host) #1")
	return b
}

func arm64Image(version string) []byte {
	b := make([]byte, 4096)
	copy(b[0x38:], "ARM\x64")
	copy(b[0x400:], "Linux version %s\x00Linux version "+version+" (someone@host)")
	return b
}

// elfFile makes an ELF64 with one program header that covers note, and sections
// for what a module has.
func elfFile(machine elf.Machine, note []byte, modinfo string) []byte {
	var b bytes.Buffer
	w := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) }
	const names = "\x00.modinfo\x00.shstrtab\x00"
	headers, progs := 64, 56
	noteAt := headers + progs
	infoAt := noteAt + len(note)
	namesAt := infoAt + len(modinfo)
	sectionsAt := namesAt + len(names)
	w(elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: 1,
		Phoff: uint64(headers), Shoff: uint64(sectionsAt), Ehsize: 64, Phentsize: 56, Phnum: 1, Shentsize: 64, Shnum: 3, Shstrndx: 2,
	})
	w(elf.Prog64{Type: uint32(elf.PT_NOTE), Off: uint64(noteAt), Filesz: uint64(len(note)), Memsz: uint64(len(note)), Align: 4})
	b.Write(note)
	b.WriteString(modinfo)
	b.WriteString(names)
	w(elf.Section64{})
	w(elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: uint64(infoAt), Size: uint64(len(modinfo))})
	w(elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(namesAt), Size: uint64(len(names))})
	b.WriteString(strings.Repeat("\x00", 1024))
	return b.Bytes()
}

func vmlinux(machine elf.Machine, pvh bool, version string) []byte {
	kind := byte(1)
	if pvh {
		kind = 18
	}
	note := append([]byte{4, 0, 0, 0, 4, 0, 0, 0, kind, 0, 0, 0}, "Xen\x00\x00\x00\x00\x01"...)
	return append(elfFile(machine, note, ""), "Linux version "+version+" (x)"...)
}

func ko(modinfo string) []byte { return elfFile(elf.EM_X86_64, nil, modinfo) }

func TestKernelFormat(t *testing.T) {
	zboot := make([]byte, 4096)
	copy(zboot, "MZ\x00\x00zimg")
	gz := append([]byte{0x1f, 0x8b, 8}, make([]byte, 4096)...)
	for _, tt := range []struct {
		name, arch string
		data       []byte
		want       KernelInfo
		errs       []string
	}{
		{name: "bzImage", arch: "amd64", data: bzImage("6.12.1-x"), want: KernelInfo{"amd64", FormatBzImage, "6.12.1-x"}},
		{name: "vmlinux with PVH", arch: "amd64", data: vmlinux(elf.EM_X86_64, true, "6.12.2"), want: KernelInfo{"amd64", FormatVmlinux, "6.12.2"}},
		{name: "Image", arch: "arm64", data: arm64Image("6.12.3-y"), want: KernelInfo{"arm64", FormatImage, "6.12.3-y"}},
		{name: "vmlinux without PVH", arch: "amd64", data: vmlinux(elf.EM_X86_64, false, "6.12.2"), errs: []string{"without a PVH entry", "CONFIG_PVH"}},
		{name: "gzip", arch: "arm64", data: gz, errs: []string{"gzip", "gunzip"}},
		{name: "EFI zboot", arch: "arm64", data: zboot, errs: []string{"EFI zboot", "CONFIG_EFI_ZBOOT=n"}},
		{name: "arm64 vmlinux", arch: "arm64", data: vmlinux(elf.EM_AARCH64, false, "6"), errs: []string{"arm64 vmlinux", "boot/Image"}},
		{name: "ELF for riscv", arch: "amd64", data: vmlinux(elf.EM_RISCV, false, "6"), errs: []string{"EM_RISCV"}},
		{name: "arm64 Image for amd64", arch: "amd64", data: arm64Image("6.12"), errs: []string{"Image for arm64", "--arch amd64"}},
		{name: "bzImage for arm64", arch: "arm64", data: bzImage("6.12"), errs: []string{"bzImage for amd64", "--arch arm64"}},
		{name: "text", arch: "amd64", data: bytes.Repeat([]byte("kernel\n"), 200), errs: []string{"is no Linux kernel"}},
		{name: "empty", arch: "amd64", errs: []string{"0 bytes"}},
		{name: "no version", arch: "arm64", data: arm64Image(""), errs: []string{"no version"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "kernel")
			if err := os.WriteFile(path, tt.data, 0o644); err != nil {
				t.Fatal(err)
			}
			got, err := CheckKernel(path, tt.arch)
			if tt.errs == nil {
				if err != nil || got != tt.want {
					t.Fatalf("got %+v, %v; want %+v", got, err, tt.want)
				}
				return
			}
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("error %v, want one that is ErrInvalidArgument", err)
			}
			for _, want := range append(tt.errs, path) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q doesn't say %q", err, want)
				}
			}
		})
	}
}

func FuzzKernelHeader(f *testing.F) {
	for _, seed := range [][]byte{bzImage("6.12"), arm64Image("6.12"), vmlinux(elf.EM_X86_64, true, "6.12"), vmlinux(elf.EM_AARCH64, false, "6")} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, arch := range []string{"amd64", "arm64"} {
			info, err := parseKernel(bytes.NewReader(data), arch)
			if err == nil && (info.Arch != arch || info.Version == "") {
				t.Errorf("accepted %+v for %s", info, arch)
			}
		}
		_, _ = unpackBzImage(data)
	})
}

func TestModinfo(t *testing.T) {
	depends, aliases := parseModinfo([]byte("license=GPL\x00depends=nf_nat,x-tables\x00softdep=pre: crc32c post: late\x00alias=nft-chain-2-nat\x00alias=pci:v*d*\x00junk\x00"))
	if want := []string{"nf_nat", "x_tables", "crc32c"}; !slices.Equal(depends, want) {
		t.Errorf("depends %q, want %q", depends, want)
	}
	if want := []string{"nft-chain-2-nat"}; !slices.Equal(aliases, want) {
		t.Errorf("aliases %q, want %q", aliases, want)
	}
	if _, _, err := modinfo([]byte("no ELF")); err == nil {
		t.Error("accepted what is no module")
	}
}

func FuzzModinfo(f *testing.F) {
	f.Add(ko("depends=a,b\x00alias=x\x00"))
	f.Add(ko(""))
	f.Fuzz(func(_ *testing.T, data []byte) { _, _, _ = modinfo(data) })
}

func source4(deps map[string]string) moduleSource {
	var s subset
	for name, d := range deps {
		m := module{name: name, packedExt: "ko"}
		if d != "" {
			m.depends = strings.Split(d, ",")
		}
		s = append(s, m)
	}
	return s
}

func TestModuleOrder(t *testing.T) {
	src := source4(map[string]string{
		"net": "failover,builtin", "failover": "", "transport": "common,vsock", "common": "vsock", "vsock": "", "unused": "vsock",
	})
	got, err := resolve(src, []string{"net", "transport", "absent", "vsock"})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"failover", "net", "vsock", "common", "transport"}; !slices.Equal(names(got), want) {
		t.Errorf("order %q, want %q", names(got), want)
	}
	_, err = resolve(source4(map[string]string{"a": "b", "b": "c", "c": "a"}), []string{"a"})
	if err == nil || !strings.Contains(err.Error(), "a -> b -> c -> a") {
		t.Errorf("cycle: %v", err)
	}
}

// readCPIO is the reader that the round trip needs.
func readCPIO(b []byte) ([]entry, error) {
	var all []entry
	at := 0
	take := func(n int) ([]byte, error) {
		if n < 0 || at+n > len(b) {
			return nil, io.ErrUnexpectedEOF
		}
		at += n
		return b[at-n : at], nil
	}
	for {
		header, err := take(110)
		if err != nil {
			return nil, err
		}
		if string(header[:6]) != "070701" {
			return nil, fmt.Errorf("magic %q at %d", header[:6], at)
		}
		var f [13]uint32
		for i := range f {
			n, err := strconv.ParseUint(string(header[6+8*i:14+8*i]), 16, 32)
			if err != nil {
				return nil, err
			}
			f[i] = uint32(n)
		}
		name, err := take(int(f[11]))
		if err != nil {
			return nil, err
		}
		at = (at + 3) &^ 3
		data, err := take(int(f[6]))
		if err != nil {
			return nil, err
		}
		at = (at + 3) &^ 3
		if string(name) == "TRAILER!!!\x00" {
			return all, nil
		}
		if f[2] != 0 || f[3] != 0 || f[5] != 0 {
			return nil, fmt.Errorf("%q has owner %d:%d and date %d", name, f[2], f[3], f[5])
		}
		all = append(all, entry{name: string(name[:len(name)-1]), mode: f[1], data: data, major: f[9], minor: f[10]})
	}
}

func TestCPIORoundTrip(t *testing.T) {
	in := []entry{
		{name: "modules/a.ko", mode: modeReg | 0o644, data: []byte("abc")},
		{name: "init", mode: modeReg | 0o755, data: []byte("12345")},
		{name: "dev/null", mode: modeChar | 0o666, major: 1, minor: 3},
		{name: "empty", mode: modeReg | 0o600},
	}
	var first, second bytes.Buffer
	if err := writeCPIO(&first, in); err != nil {
		t.Fatal(err)
	}
	slices.Reverse(in)
	if err := writeCPIO(&second, in); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("the order of entries shows in the archive")
	}
	out, err := readCPIO(first.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range out {
		got = append(got, fmt.Sprintf("%s %o %d,%d %q", e.name, e.mode, e.major, e.minor, e.data))
	}
	want := []string{
		`dev 40755 0,0 ""`, `dev/null 20666 1,3 ""`, `empty 100600 0,0 ""`,
		`init 100755 0,0 "12345"`, `modules 40755 0,0 ""`, `modules/a.ko 100644 0,0 "abc"`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	for _, bad := range [][]entry{
		{{name: "/abs"}}, {{name: "../up"}}, {{name: ""}}, {{name: "a"}, {name: "a"}},
		{{name: "f", mode: modeReg}, {name: "f/g", mode: modeReg}},
	} {
		if err := writeCPIO(io.Discard, bad); err == nil {
			t.Errorf("accepted %v", bad)
		}
	}
}

func FuzzCPIORoundTrip(f *testing.F) {
	f.Add("init", []byte("x"), "dev/null", []byte{})
	f.Fuzz(func(t *testing.T, name1 string, data1 []byte, name2 string, data2 []byte) {
		var b bytes.Buffer
		if writeCPIO(&b, []entry{{name: name1, mode: modeReg, data: data1}, {name: name2, mode: modeReg, data: data2}}) != nil {
			return
		}
		out, err := readCPIO(b.Bytes())
		if err != nil && name1 != "TRAILER!!!" && name2 != "TRAILER!!!" {
			t.Fatal(err)
		}
		for _, e := range out {
			if e.name == name1 && !bytes.Equal(e.data, data1) {
				t.Errorf("%q changed", name1)
			}
		}
	})
}

// deb makes a Debian package of files.
func deb(t *testing.T, files map[string][]byte) []byte {
	t.Helper()
	var data bytes.Buffer
	z, err := xz.NewWriter(&data)
	if err != nil {
		t.Fatal(err)
	}
	writeTar(t, z, files)
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	b.WriteString("!<arch>\n")
	for _, m := range []struct {
		name string
		data []byte
	}{{"debian-binary", []byte("2.0\n")}, {"control.tar.xz", []byte("odd")}, {"data.tar.xz", data.Bytes()}} {
		fmt.Fprintf(&b, "%-16s%-12d%-6d%-6d%-8s%-10d`\n", m.name, 0, 0, 0, "100644", len(m.data))
		b.Write(m.data)
		if len(m.data)%2 == 1 {
			b.WriteByte('\n')
		}
	}
	return b.Bytes()
}

func xzip(t *testing.T, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := xz.NewWriter(&b)
	if err == nil {
		_, err = z.Write(data)
	}
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func kernelDeb(t *testing.T) string {
	t.Helper()
	modules := "./usr/lib/modules/6.12.1-cloud/kernel/"
	path := filepath.Join(t.TempDir(), "linux-image.deb")
	data := deb(t, map[string][]byte{
		"./boot/vmlinuz-6.12.1-cloud":        bzImage("6.12.1-cloud"),
		modules + "virtio_net.ko.xz":         xzip(t, ko("depends=net_failover\x00")),
		modules + "net_failover.ko.xz":       xzip(t, ko("depends=\x00")),
		modules + "virtio-rng.ko":            ko("depends=\x00"),
		modules + "bridge.ko.xz":             xzip(t, ko("depends=stp\x00alias=rtnl-link-bridge\x00")),
		modules + "stp.ko.xz":                xzip(t, ko("depends=\x00")),
		modules + "unwanted.ko.xz":           xzip(t, ko("depends=\x00")),
		"./usr/share/doc/linux-image/README": []byte("x"),
	})
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestBuildReproducible builds twice, from scratch, and compares all bytes.
func TestBuildReproducible(t *testing.T) {
	agent, pkg := buildInit(t, "amd64"), kernelDeb(t)
	var guests []Guest
	for range 2 {
		g, err := Build(context.Background(), Options{Dir: t.TempDir(), Arch: "amd64", Agent: agent, Kernel: pkg})
		if err != nil {
			t.Fatal(err)
		}
		guests = append(guests, g)
	}
	for _, path := range []func(Guest) string{
		func(g Guest) string { return g.KernelPath },
		func(g Guest) string { return g.InitrdPath },
		func(g Guest) string { return filepath.Join(filepath.Dir(g.KernelPath), manifestName) },
	} {
		a, err := os.ReadFile(path(guests[0]))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path(guests[1]))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("%s differs between two builds", filepath.Base(path(guests[0])))
		}
	}
	g := guests[0]
	if want := []string{"net_failover", "virtio_net", "virtio_rng"}; !slices.Equal(g.Modules, want) {
		t.Errorf("modules %q, want %q", g.Modules, want)
	}
	initrd, err := os.ReadFile(g.InitrdPath)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := readCPIO(initrd)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]entry{}
	for _, e := range entries {
		files[e.name] = e
	}
	if got, want := string(files["modules.list"].data), "/modules/net_failover.ko\n/modules/virtio_net.ko\n/modules/virtio_rng.ko\n"; got != want {
		t.Errorf("modules.list %q, want %q", got, want)
	}
	const paths = " /modules/stp.ko.xz /modules/bridge.ko.xz\n"
	if got, want := string(files["modules.ondemand"].data), "stp /modules/stp.ko.xz\nbridge"+paths+"rtnl-link-bridge"+paths; got != want {
		t.Errorf("modules.ondemand %q, want %q", got, want)
	}
	if _, ok := files["modules/unwanted.ko"]; ok {
		t.Error("carries a module that nobody wants")
	}
	if e := files["dev/null"]; e.mode != modeChar|0o666 || e.major != 1 || e.minor != 3 {
		t.Errorf("dev/null is %+v", e)
	}
	if e := files["dev/console"]; e.mode != modeChar|0o600 || e.major != 5 || e.minor != 1 {
		t.Errorf("dev/console is %+v", e)
	}
}

// TestBuildAgain rebuilds without naming the kernel: from the kept package.
func TestBuildAgain(t *testing.T) {
	dir, agent := t.TempDir(), buildInit(t, "amd64")
	first, err := Build(context.Background(), Options{Dir: dir, Arch: "amd64", Agent: agent, Kernel: kernelDeb(t)})
	if err != nil {
		t.Fatal(err)
	}
	again, err := Build(context.Background(), Options{Dir: dir, Arch: "amd64", Agent: agent, Kind: KindCustom})
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(first) != fmt.Sprint(again) {
		t.Errorf("got %+v\nwant %+v", again, first)
	}
}

func TestBuildRefuses(t *testing.T) {
	agent := buildInit(t, "amd64")
	shell := filepath.Join(t.TempDir(), "agent")
	if err := os.WriteFile(shell, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	truncated := filepath.Join(t.TempDir(), "truncated.deb")
	whole, err := os.ReadFile(kernelDeb(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(truncated, whole[:len(whole)-100], 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		o    Options
		want string
	}{
		{"agent for another architecture", Options{Arch: "arm64", Agent: agent}, "GOARCH=arm64"},
		{"agent that is a script", Options{Arch: "amd64", Agent: shell}, "not a Linux executable"},
		{"no agent", Options{Arch: "amd64"}, "no agent"},
		{"unknown architecture", Options{Arch: "riscv64", Agent: agent}, "want amd64 or arm64"},
		{"kernel missing", Options{Arch: "amd64", Agent: agent, Kernel: "/nonexistent/Image"}, "/nonexistent/Image"},
		{"kernel that is a script", Options{Arch: "amd64", Agent: agent, Kernel: shell}, "no kernel"},
		{"truncated package", Options{Arch: "amd64", Agent: agent, Kernel: truncated}, "unexpected EOF"},
		{"no fast kernel", Options{Arch: "amd64", Agent: agent, Kind: KindFast}, "make kernel"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.o.Dir = t.TempDir()
			_, err := Build(context.Background(), tt.o)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
			if _, err := Locate(tt.o.Dir, "amd64"); !errdefs.IsNotFound(err) {
				t.Errorf("a guest was left: %v", err)
			}
		})
	}
}

func TestLocateAndVerify(t *testing.T) {
	dir, agent := t.TempDir(), buildInit(t, "amd64")
	if _, err := Locate(dir, "amd64"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "cri-vz guest build --arch amd64") {
		t.Fatalf("nothing there: %v", err)
	}
	fast := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(fast, vmlinux(elf.EM_X86_64, true, "6.12.9-cri-vz"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Build(context.Background(), Options{Dir: dir, Arch: "amd64", Agent: agent, Kind: KindStock, Kernel: kernelDeb(t)}); err != nil {
		t.Fatal(err)
	}
	if err := AddFastKernel(dir, "amd64", fast, "linux-source 6.12.9"); err != nil {
		t.Fatal(err)
	}
	if g, err := Locate(dir, "amd64"); err != nil || g.KernelKind != KindStock {
		t.Fatalf("before the fast guest is built: %v %v", g.KernelKind, err)
	}
	all, err := BuildAll(context.Background(), Options{Dir: dir, Arch: "amd64", Agent: agent})
	if err != nil || len(all) != 2 {
		t.Fatalf("built %d guests: %v", len(all), err)
	}
	g, err := Locate(dir, "amd64")
	if err != nil || g.KernelKind != KindFast || g.KernelVersion != "6.12.9-cri-vz" || len(g.Modules) != 0 {
		t.Fatalf("with a fast guest: %+v %v", g, err)
	}
	if fmt.Sprint(all[0]) != fmt.Sprint(g) {
		t.Errorf("Locate %+v\nBuild %+v", g, all[0])
	}
	if listed, err := List(dir); err != nil || len(listed) != 2 {
		t.Errorf("List: %d guests, %v", len(listed), err)
	}
	if err := g.Verify(); err != nil {
		t.Fatal(err)
	}

	// One byte changed: found by Verify. Truncated: found by Locate.
	b, err := os.ReadFile(g.InitrdPath)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(g.InitrdPath, b, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := g.Verify(); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), g.InitrdPath) {
		t.Errorf("a changed byte: %v", err)
	}
	if err := os.Truncate(g.InitrdPath, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := Locate(dir, "amd64"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), g.InitrdPath) {
		t.Errorf("a truncated file: %v", err)
	}
	// And a build repairs it.
	if _, err := Build(context.Background(), Options{Dir: dir, Arch: "amd64", Agent: agent, Kind: KindFast}); err != nil {
		t.Fatal(err)
	}
	if err := g.Verify(); err != nil {
		t.Errorf("after another build: %v", err)
	}
}

func TestManifestRefuses(t *testing.T) {
	good, err := json.Marshal(manifest{Schema: manifestSchema, Kernel: File{Name: "k"}, Initrd: File{Name: "i"}})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"no json":        "{",
		"unknown key":    strings.Replace(string(good), `"arch"`, `"ark"`, 1),
		"another schema": strings.Replace(string(good), `"schema":1`, `"schema":2`, 1),
		"path up":        strings.Replace(string(good), `"name":"k"`, `"name":"../k"`, 1),
		"path down":      strings.Replace(string(good), `"name":"k"`, `"name":"a/k"`, 1),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := readManifest(strings.NewReader(text), "/dir"); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("error %v", err)
			}
		})
	}
	if _, err := readManifest(bytes.NewReader(good), "/dir"); err != nil {
		t.Error(err)
	}
}

func TestHostSources(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files fstest.MapFS
		want  []source
	}{
		{"deb822", fstest.MapFS{
			"etc/apt/sources.list.d/debian.sources": {Data: []byte("# comment\nTypes: deb deb-src\nURIs: http://m.test/debian\nSuites: bookworm\n bookworm-updates\nComponents: main\n\nTypes: deb\nURIs: http://m.test/sec\nSuites: bookworm-security\nComponents: main\n")},
		}, []source{{"http://m.test/debian", "trixie"}, {"http://m.test/sec", "trixie-security"}}},
		{"one line", fstest.MapFS{
			"etc/apt/sources.list": {Data: []byte("deb [arch=amd64 trusted=yes] http://m.test/debian bookworm main contrib # x\ndeb-src http://m.test/other bookworm main\n")},
		}, []source{{"http://m.test/debian", "trixie"}}},
		{"already 13, other vendor beside it", fstest.MapFS{
			"etc/apt/sources.list":              {Data: []byte("deb http://m.test/debian trixie main\n")},
			"etc/apt/sources.list.d/other.list": {Data: []byte("deb http://other.test/apt stable-thing main\n")},
		}, []source{{"http://m.test/debian", "trixie"}}},
		{"disabled", fstest.MapFS{
			"etc/apt/sources.list.d/debian.sources": {Data: []byte("Enabled: no\nTypes: deb\nURIs: http://m.test/debian\nSuites: bookworm\nComponents: main\n")},
		}, nil},
		{"not Debian", fstest.MapFS{
			"etc/apt/sources.list": {Data: []byte("deb http://m.test/ubuntu noble main\n")},
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := hostSources(tt.files)
			if !slices.Equal(got, tt.want) || (tt.want == nil) != errdefs.IsUnavailable(err) {
				t.Errorf("got %v, %v; want %v", got, err, tt.want)
			}
		})
	}
}

func TestRealPackage(t *testing.T) {
	const meta = "Package: linux-image-cloud-arm64\nVersion: 6.12.1-1\nDepends: linux-image-6.12.1+deb13-cloud-arm64 (= 6.12.1-1), other\n\nPackage: older\nVersion: 1\n"
	if name, version := realPackage("linux-image-cloud-arm64", []byte(meta)); name != "linux-image-6.12.1+deb13-cloud-arm64" || version != "6.12.1-1" {
		t.Errorf("meta package: %s %s", name, version)
	}
	if name, version := realPackage("linux-source-6.12", []byte("Version: 6.12.1-1\nDepends: binutils (>= 2), xz-utils\n")); name != "linux-source-6.12" || version != "6.12.1-1" {
		t.Errorf("plain package: %s %s", name, version)
	}
}

func FuzzHostSources(f *testing.F) {
	f.Add("Types: deb\nURIs: http://m.test/debian\nSuites: bookworm\nComponents: main\n")
	f.Add("deb [a] u s main")
	f.Fuzz(func(_ *testing.T, text string) {
		parseDeb822(text)
		parseSourcesList(text)
	})
}

func FuzzDeb(f *testing.F) {
	f.Add([]byte("!<arch>\n"))
	f.Add(fmt.Appendf(nil, "!<arch>\n%-16s%-12d%-6d%-6d%-8s%-10d`\n", "data.tar", 0, 0, 0, "100644", 0))
	f.Fuzz(func(_ *testing.T, data []byte) {
		_ = walkDeb(bytes.NewReader(data), func(string, int64, io.Reader) error { return nil })
	})
}

// TestBoot boots each guest that `cri-vz guest build` made kernels for, with a
// small init that loads the modules and mounts a scratch disk with project
// quotas (T15).
func TestBoot(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("boots with QEMU, on Linux")
	}
	base, err := DefaultDir()
	if err != nil {
		t.Fatal(err)
	}
	for arch, machine := range map[string][]string{
		"amd64": {"qemu-system-x86_64", "-M", "q35,accel=tcg", "-cpu", "max", "-bios", "qboot.rom"},
		"arm64": {"qemu-system-aarch64", "-M", "virt,accel=tcg,gic-version=3", "-cpu", "max,pauth-impdef=on"},
	} {
		found := 0
		for _, kind := range []Kind{KindFast, KindStock} {
			made, err := LocateKind(base, arch, kind)
			if errdefs.IsNotFound(err) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			found++
			t.Run(arch+"/"+string(kind), func(t *testing.T) {
				var source kernelSource
				text, err := os.ReadFile(filepath.Join(filepath.Dir(made.KernelPath), sourceName))
				if err == nil {
					err = json.Unmarshal(text, &source)
				}
				if err != nil {
					t.Fatal(err)
				}
				// From the unpacked cache beside it: reading the package again
				// takes a minute under the race detector.
				dir := filepath.Dir(made.KernelPath)
				k, err := unpackKernel(filepath.Join(dir, source.File), source.Name, arch, dir, source.SHA256)
				if err != nil {
					t.Fatal(err)
				}
				agent, err := os.ReadFile(buildInit(t, arch))
				if err != nil {
					t.Fatal(err)
				}
				initrd, err := makeInitramfs(agent, k.boot, k.demand)
				if err != nil {
					t.Fatal(err)
				}
				g := made
				g.InitrdPath = filepath.Join(t.TempDir(), "initrd")
				if err := os.WriteFile(g.InitrdPath, initrd, 0o644); err != nil {
					t.Fatal(err)
				}
				boot(t, g, machine)
			})
		}
		if found == 0 {
			t.Errorf("no guest for %s in %s: run `make guest` first", arch, base)
		}
	}
}

func boot(t *testing.T, g Guest, machine []string) {
	disk := filepath.Join(t.TempDir(), "scratch")
	if err := scratch.CreateScratch(disk); err != nil {
		t.Fatal(err)
	}
	console := map[string]string{"amd64": "ttyS0", "arm64": "ttyAMA0"}[g.Arch]
	// Emulated boots take 1 to 4 s; a busy machine gets a minute.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, machine[0], append(slices.Clone(machine[1:]),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "512", "-serial", "stdio",
		"-drive", "if=none,id=scratch,format=raw,file="+disk, "-device", "virtio-blk-pci,drive=scratch",
		"-kernel", g.KernelPath, "-initrd", g.InitrdPath, "-append", "console="+console+" "+g.Cmdline)...)
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatalf("%s (run hack/setup if it is missing): %v", machine[0], err)
	}
	for _, want := range []string{
		fmt.Sprintf("test-init: ready kernel=%s modules=%d ", g.KernelVersion, len(g.Modules)),
		"test-init: scratch GiB=",
	} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("the console doesn't say %q", want)
		}
	}
	if n := bytes.Count(out, []byte("test-init: ")); n != 2 {
		t.Errorf("%d lines of the init, want 2", n)
	}
}
