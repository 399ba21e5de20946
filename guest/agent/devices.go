//go:build linux && (amd64 || arm64)

package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// deviceRule is one line of a device policy.
type deviceRule struct {
	allow  bool
	typ    uint32 // devBlock, devChar or devAny
	access uint32 // devMknod, devRead, devWrite
	major  int64  // -1: any
	minor  int64
}

// Fields of struct bpf_cgroup_dev_ctx (linux/bpf.h).
const (
	devAny   = 0
	devBlock = 1
	devChar  = 2

	devMknod = 1
	devRead  = 2
	devWrite = 4
	devAll   = devMknod | devRead | devWrite
)

// defaultDevices are what every container may use, as under runc: making nodes
// is harmless where they can't be opened.
var defaultDevices = []deviceRule{
	{true, devAny, devMknod, -1, -1},
	{true, devChar, devAll, 1, 3},    // null
	{true, devChar, devAll, 1, 5},    // zero
	{true, devChar, devAll, 1, 7},    // full
	{true, devChar, devAll, 1, 8},    // random
	{true, devChar, devAll, 1, 9},    // urandom
	{true, devChar, devAll, 5, 0},    // tty
	{true, devChar, devAll, 5, 2},    // ptmx
	{true, devChar, devAll, 136, -1}, // terminals
}

// loopMajor is the kernel's number of loop devices: the layers (T37).
const loopMajor = 7

// deviceRules translates a spec's rules; later ones win. What the agent itself
// lives on is refused whatever the spec says: disk are the numbers of the
// scratch disk.
func deviceRules(r *specs.LinuxResources, devices []specs.LinuxDevice, disk uint64) ([]deviceRule, error) {
	rules := append([]deviceRule(nil), defaultDevices...)
	if r != nil {
		for _, d := range r.Devices {
			rule := deviceRule{allow: d.Allow, major: -1, minor: -1}
			switch d.Type {
			case "", "a":
				rule.typ = devAny
			case "b":
				rule.typ = devBlock
			case "c", "u":
				rule.typ = devChar
			default:
				return nil, invalidf("device rule of type %q", d.Type)
			}
			for _, a := range d.Access {
				switch a {
				case 'r':
					rule.access |= devRead
				case 'w':
					rule.access |= devWrite
				case 'm':
					rule.access |= devMknod
				default:
					return nil, invalidf("device rule with access %q", d.Access)
				}
			}
			if rule.access == 0 {
				rule.access = devAll
			}
			if d.Major != nil && *d.Major >= 0 {
				rule.major = *d.Major
			}
			if d.Minor != nil && *d.Minor >= 0 {
				rule.minor = *d.Minor
			}
			if !rule.allow && rule.typ == devAny && rule.major < 0 && rule.minor < 0 {
				// The deny-all that every spec begins with; it does not take the
				// default devices away, there as here.
				continue
			}
			rules = append(rules, rule)
		}
	}
	for _, d := range devices {
		if r != nil && slices.ContainsFunc(r.Devices, func(rule specs.LinuxDeviceCgroup) bool {
			return rule.Type == d.Type && rule.Major != nil && *rule.Major == d.Major && rule.Minor != nil && *rule.Minor == d.Minor
		}) {
			continue // the spec says what may be done with it
		}
		rule := deviceRule{allow: true, typ: devChar, access: devAll, major: d.Major, minor: d.Minor}
		switch d.Type {
		case "b":
			rule.typ = devBlock
		case "c", "u":
		default:
			continue // a fifo
		}
		rules = append(rules, rule)
	}
	const open = devRead | devWrite
	rules = append(rules, deviceRule{false, devBlock, open, loopMajor, -1})
	if disk != 0 {
		rules = append(rules, deviceRule{false, devBlock, open, int64(unix.Major(disk)), int64(unix.Minor(disk))})
	}
	return rules, nil
}

// allDevices tells whether a spec allows every device: a privileged container's.
func allDevices(r *specs.LinuxResources) bool {
	return r != nil && slices.ContainsFunc(r.Devices, func(d specs.LinuxDeviceCgroup) bool {
		return d.Allow && (d.Type == "" || d.Type == "a") && d.Major == nil && d.Minor == nil
	})
}

// onDemand are devices whose modules the kernel loads when they are opened.
var onDemand = []specs.LinuxDevice{
	{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229},
	{Path: "/dev/net/tun", Type: "c", Major: 10, Minor: 200},
}

// guestDevices are the nodes in dir, the guest's /dev, for a privileged container:
// less the loop devices and the disk, on which the pod stands (T37), and less
// terminals, of which each container has its own.
func guestDevices(dir string, disk uint64) ([]specs.LinuxDevice, error) {
	var found []specs.LinuxDevice
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		name := strings.TrimPrefix(path, dir+"/")
		switch {
		case errors.Is(err, fs.ErrNotExist): // meanwhile
			return nil
		case err != nil:
			return err
		case e.IsDir() && slices.Contains([]string{"pts", "shm", "mqueue"}, name):
			return fs.SkipDir
		case e.Type()&fs.ModeDevice == 0, name == "console", name == "ptmx",
			strings.HasPrefix(name, "tty"), strings.HasPrefix(name, "vcs"), strings.HasPrefix(name, "hvc"):
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		d := specs.LinuxDevice{Path: "/dev/" + name, Type: "c", Major: int64(unix.Major(uint64(st.Rdev))), Minor: int64(unix.Minor(uint64(st.Rdev)))}
		if e.Type()&fs.ModeCharDevice == 0 {
			if d.Type = "b"; d.Major == loopMajor || uint64(st.Rdev) == disk {
				return nil
			}
		}
		mode := os.FileMode(st.Mode & 0o777)
		d.FileMode = &mode
		found = append(found, d)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("the guest's devices: %w", err)
	}
	return found, nil
}

// addDevices adds those that the spec has nothing for at their paths.
func addDevices(spec *specs.Spec, devices []specs.LinuxDevice) {
	for _, d := range devices {
		if !slices.ContainsFunc(spec.Linux.Devices, func(o specs.LinuxDevice) bool { return path.Clean(o.Path) == d.Path }) &&
			!slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool { return path.Clean(m.Destination) == d.Path }) {
			spec.Linux.Devices = append(spec.Linux.Devices, d)
		}
	}
}

// assembler collects eBPF instructions.
type assembler struct{ code []byte }

// Operations of eBPF (linux/bpf.h): load word, 32-bit arithmetic and jumps.
const (
	bpfLoad   = 0x61
	bpfAnd    = 0x54
	bpfShift  = 0x74
	bpfCopy   = 0xbc
	bpfSet    = 0xb7
	bpfJumpEq = 0x16 // to an immediate
	bpfJumpNe = 0x56
	bpfJumpNX = 0x5e // not equal to a register
	bpfExit   = 0x95
)

func (a *assembler) emit(op, dst, src byte, off int16, imm int32) {
	a.code = append(a.code, op, dst|src<<4)
	a.code = binary.NativeEndian.AppendUint16(a.code, uint16(off))
	a.code = binary.NativeEndian.AppendUint32(a.code, uint32(imm))
}

func (a *assembler) len() int { return len(a.code) / 8 }

// deviceProgram compiles rules to a program that returns 1 for allowed accesses.
// The last rule that matches decides, none is a denial.
func deviceProgram(rules []deviceRule) []byte {
	// r2: type, r3: access, r4: major, r5: minor.
	var a assembler
	a.emit(bpfLoad, 2, 1, 0, 0)
	a.emit(bpfCopy, 3, 2, 0, 0)
	a.emit(bpfAnd, 2, 0, 0, 0xffff)
	a.emit(bpfShift, 3, 0, 0, 16)
	a.emit(bpfLoad, 4, 1, 4, 0)
	a.emit(bpfLoad, 5, 1, 8, 0)
	for i := len(rules) - 1; i >= 0; i-- {
		r := rules[i]
		var jumps []int // whose target is the next rule
		skip := func(op, dst, src byte, imm int32) {
			jumps = append(jumps, a.len())
			a.emit(op, dst, src, 0, imm)
		}
		if r.typ != devAny {
			skip(bpfJumpNe, 2, 0, int32(r.typ))
		}
		if r.access != devAll {
			a.emit(bpfCopy, 6, 3, 0, 0)
			a.emit(bpfAnd, 6, 0, 0, int32(r.access))
			if r.allow {
				skip(bpfJumpNX, 6, 3, 0) // wants more than this allows
			} else {
				skip(bpfJumpEq, 6, 0, 0) // wants nothing of what this denies
			}
		}
		if r.major >= 0 {
			skip(bpfJumpNe, 4, 0, int32(r.major))
		}
		if r.minor >= 0 {
			skip(bpfJumpNe, 5, 0, int32(r.minor))
		}
		result := int32(0)
		if r.allow {
			result = 1
		}
		a.emit(bpfSet, 0, 0, 0, result)
		a.emit(bpfExit, 0, 0, 0, 0)
		for _, j := range jumps {
			binary.NativeEndian.PutUint16(a.code[j*8+2:], uint16(a.len()-j-1))
		}
		if len(jumps) == 0 {
			return a.code // matches always; the verifier refuses dead code
		}
	}
	a.emit(bpfSet, 0, 0, 0, 0)
	a.emit(bpfExit, 0, 0, 0, 0)
	return a.code
}

// maxDeviceRules keeps the program within the kernel's 4096 instructions of
// old, and its jumps within 16 bits.
const maxDeviceRules = 256

// allowDevices attaches a device policy to the cgroup; it lasts as long as that.
func (c cgroup) allowDevices(rules []deviceRule) error {
	if len(rules) > maxDeviceRules {
		return invalidf("%d device rules are more than %d", len(rules), maxDeviceRules)
	}
	const (
		progLoad, progAttach = 5, 8
		typeCgroupDevice     = 15
		attachCgroupDevice   = 6
	)
	code := deviceProgram(rules)
	license := []byte("Apache-2.0\x00")
	load := struct {
		typ, count  uint32
		insns       uint64
		license     uint64
		level, size uint32
		log         uint64
		version     uint32
		flags       uint32
	}{
		typ: typeCgroupDevice, count: uint32(len(code) / 8),
		insns:   uint64(uintptr(unsafe.Pointer(&code[0]))),
		license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	var prog uintptr
	e := unix.EAGAIN
	// A signal interrupts the verifier with EAGAIN, and Go's scheduler sends some.
	for try := 0; e == unix.EAGAIN && try < 100; try++ {
		prog, _, e = unix.Syscall(unix.SYS_BPF, progLoad, uintptr(unsafe.Pointer(&load)), unsafe.Sizeof(load))
	}
	runtime.KeepAlive(code)
	runtime.KeepAlive(license)
	if e != 0 {
		return fmt.Errorf("load the device policy (the guest's kernel needs CONFIG_CGROUP_BPF): %w", e)
	}
	defer unix.Close(int(prog))
	dir, err := unix.Open(string(c), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: string(c), Err: err}
	}
	defer unix.Close(dir)
	attach := struct{ target, prog, typ, flags uint32 }{uint32(dir), uint32(prog), attachCgroupDevice, unix.BPF_F_ALLOW_MULTI}
	if _, _, e := unix.Syscall(unix.SYS_BPF, progAttach, uintptr(unsafe.Pointer(&attach)), unsafe.Sizeof(attach)); e != 0 {
		return fmt.Errorf("attach the device policy: %w", e)
	}
	return nil
}
