//go:build linux && (amd64 || arm64)

package container

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// seccompCall is struct seccomp_data without the instruction pointer.
type seccompCall struct {
	arch, number uint32
	args         [6]uint64
}

// interpret runs a filter as the kernel would, and fails where the kernel's
// checker would refuse it.
func interpret(program []unix.SockFilter, call seccompCall) (uint32, error) {
	var a uint32
	for pc := 0; pc < len(program); pc++ {
		i := program[pc]
		switch i.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			switch {
			case i.K == 0:
				a = call.number
			case i.K == 4:
				a = call.arch
			case i.K >= 16 && i.K < 64 && i.K%8 == 0:
				a = uint32(call.args[(i.K-16)/8])
			case i.K >= 16 && i.K < 64 && i.K%8 == 4:
				a = uint32(call.args[(i.K-16)/8] >> 32)
			default:
				return 0, fmt.Errorf("load at %d", i.K)
			}
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			a &= i.K
		case unix.BPF_JMP | unix.BPF_JA:
			pc += int(i.K)
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K, unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			var is bool
			switch i.Code & 0xf0 {
			case unix.BPF_JEQ:
				is = a == i.K
			case unix.BPF_JGT:
				is = a > i.K
			case unix.BPF_JGE:
				is = a >= i.K
			}
			if is {
				pc += int(i.Jt)
			} else {
				pc += int(i.Jf)
			}
		case unix.BPF_RET | unix.BPF_K:
			return i.K, nil
		default:
			return 0, fmt.Errorf("instruction %#x", i.Code)
		}
	}
	return 0, fmt.Errorf("ran off the end")
}

// evaluate is the meaning of a profile, straight from the specification and the
// comment of compileSeccomp, for system calls of the native ABI.
func evaluate(profile *specs.LinuxSeccomp, call seccompCall) uint32 {
	byDefault, _ := seccompAction(profile.DefaultAction, profile.DefaultErrnoRet)
	result, matched := byDefault, false
	named, newest := false, uint32(0)
	for _, s := range profile.Syscalls {
		action, _ := seccompAction(s.Action, s.ErrnoRet)
		for _, name := range s.Names {
			n, ok := nativeSyscall(name)
			if !ok {
				continue
			}
			named, newest = true, max(newest, n)
			if n != call.number || action == byDefault {
				continue
			}
			all, some, count := true, false, map[uint]int{}
			twice := false
			for _, arg := range s.Args {
				v, is := call.args[arg.Index], false
				switch arg.Op {
				case specs.OpEqualTo:
					is = v == arg.Value
				case specs.OpNotEqual:
					is = v != arg.Value
				case specs.OpLessThan:
					is = v < arg.Value
				case specs.OpLessEqual:
					is = v <= arg.Value
				case specs.OpGreaterThan:
					is = v > arg.Value
				case specs.OpGreaterEqual:
					is = v >= arg.Value
				case specs.OpMaskedEqual:
					is = v&arg.Value == arg.ValueTwo&arg.Value
				}
				all, some = all && is, some || is
				count[arg.Index]++
				twice = twice || count[arg.Index] > 1
			}
			if all || twice && some {
				if !matched || int32(action&unix.SECCOMP_RET_ACTION_FULL) < int32(result&unix.SECCOMP_RET_ACTION_FULL) {
					result = action
				}
				matched = true
			}
		}
	}
	if !matched && named && call.number > newest && denies(byDefault) && profile.DefaultErrnoRet == nil {
		return unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	}
	return result
}

func errno(n uint) *uint { return &n }

// allowList is shaped like containerd's default profile.
func allowList() *specs.LinuxSeccomp {
	p := &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno,
		Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32, specs.ArchAARCH64, specs.ArchARM},
	}
	all := specs.LinuxSyscall{Action: specs.ActAllow, Names: []string{"no_such_call"}}
	for _, s := range nativeSyscalls {
		switch s.name {
		case "chmod", "fchmod", "fchmodat", "fchmodat2", "clone3", "personality", "socket", "clone":
		default:
			all.Names = append(all.Names, s.name)
		}
	}
	p.Syscalls = []specs.LinuxSyscall{
		all,
		{Names: []string{"clone3"}, Action: specs.ActErrno, ErrnoRet: errno(uint(unix.ENOSYS))},
		{Names: []string{"personality"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 0, Op: specs.OpEqualTo}}},
		{Names: []string{"personality"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 8, Op: specs.OpEqualTo}}},
		{Names: []string{"socket"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 40, Op: specs.OpNotEqual}}},
		{Names: []string{"clone"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 0x7e020000, ValueTwo: 0, Op: specs.OpMaskedEqual}}},
	}
	return p
}

func nr(t testing.TB, name string) uint32 {
	t.Helper()
	n, ok := nativeSyscall(name)
	if !ok {
		t.Fatalf("no system call %s", name)
	}
	return n
}

func TestCompileSeccomp(t *testing.T) { // T23
	const allow, eperm, enosys = uint32(unix.SECCOMP_RET_ALLOW), uint32(unix.SECCOMP_RET_ERRNO | 1), uint32(unix.SECCOMP_RET_ERRNO | 38)
	filter, err := compileSeccomp(allowList())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d instructions", len(filter.program))
	native := nativeAuditArch()
	for _, test := range []struct {
		name string
		call seccompCall
		want uint32
	}{
		{"allowed", seccompCall{native, nr(t, "read"), [6]uint64{}}, allow},
		{"default", seccompCall{native, nr(t, "fchmod"), [6]uint64{}}, eperm},
		{"errnoRet", seccompCall{native, nr(t, "clone3"), [6]uint64{}}, enosys},
		{"equal, first", seccompCall{native, nr(t, "personality"), [6]uint64{0}}, allow},
		{"equal, second", seccompCall{native, nr(t, "personality"), [6]uint64{8}}, allow},
		{"equal, neither", seccompCall{native, nr(t, "personality"), [6]uint64{9}}, eperm},
		{"equal, high word", seccompCall{native, nr(t, "personality"), [6]uint64{1<<32 | 8}}, eperm},
		{"not equal", seccompCall{native, nr(t, "socket"), [6]uint64{2}}, allow},
		{"not equal, high word", seccompCall{native, nr(t, "socket"), [6]uint64{1<<32 | 40}}, allow},
		{"not equal, equal", seccompCall{native, nr(t, "socket"), [6]uint64{40}}, eperm},
		{"masked", seccompCall{native, nr(t, "clone"), [6]uint64{0x1200011}}, allow},
		{"masked, CLONE_NEWUSER", seccompCall{native, nr(t, "clone"), [6]uint64{0x10000011}}, eperm},
		{"newer than the profile", seccompCall{native, 9999, [6]uint64{}}, enosys},
		{"i386", seccompCall{unix.AUDIT_ARCH_I386, 3, [6]uint64{}}, eperm},
		{"32-bit ARM", seccompCall{unix.AUDIT_ARCH_ARM, 3, [6]uint64{}}, eperm},
	} {
		if got, err := interpret(filter.program, test.call); err != nil || got != test.want {
			t.Errorf("%s: %#x, %v; want %#x", test.name, got, err, test.want)
		}
	}
	if runtime.GOARCH == "amd64" {
		if got, _ := interpret(filter.program, seccompCall{native, x32SyscallBit | nr(t, "read"), [6]uint64{}}); got != eperm {
			t.Errorf("x32: %#x", got)
		}
	}
	// A deny list must not be passed by with another ABI's numbers.
	filter, err = compileSeccomp(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"fchmod"}, Action: specs.ActKillProcess}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, call := range []seccompCall{{unix.AUDIT_ARCH_I386, 3, [6]uint64{}}, {unix.AUDIT_ARCH_ARM, 3, [6]uint64{}}} {
		if got, _ := interpret(filter.program, call); got != enosys {
			t.Errorf("deny list, arch %#x: %#x", call.arch, got)
		}
	}
	if got, _ := interpret(filter.program, seccompCall{native, nr(t, "fchmod"), [6]uint64{}}); got != unix.SECCOMP_RET_KILL_PROCESS {
		t.Errorf("deny list: %#x", got)
	}
}

func TestSeccompRefusals(t *testing.T) { // T23
	rule := func(s specs.LinuxSyscall) *specs.LinuxSeccomp {
		if s.Names == nil {
			s.Names = []string{"read"}
		}
		return &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{s}}
	}
	for want, profile := range map[string]*specs.LinuxSeccomp{
		"SCMP_ACT_NOTIFY":   rule(specs.LinuxSyscall{Action: specs.ActNotify}),
		"SCMP_ACT_TRACE":    rule(specs.LinuxSyscall{Action: specs.ActTrace}),
		"SCMP_ACT_PARTY":    rule(specs.LinuxSyscall{Action: "SCMP_ACT_PARTY"}),
		`unknown action ""`: {},
		"listenerPath":      {DefaultAction: specs.ActAllow, ListenerPath: "/x"},
		"WAIT_KILLABLE":     {DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}},
		"4096 is above":     rule(specs.LinuxSyscall{Action: specs.ActErrno, ErrnoRet: errno(4096)}),
		"errnoRet":          rule(specs.LinuxSyscall{Action: specs.ActKill, ErrnoRet: errno(1)}),
		"index 6":           rule(specs.LinuxSyscall{Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 6, Op: specs.OpEqualTo}}}),
		"SCMP_CMP_X":        rule(specs.LinuxSyscall{Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Op: "SCMP_CMP_X"}}}),
		"names no system":   rule(specs.LinuxSyscall{Names: []string{}, Action: specs.ActErrno}),
	} {
		if _, err := compileSeccomp(profile); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want %q", err, want)
		}
	}
	huge := rule(specs.LinuxSyscall{Action: specs.ActErrno})
	for i := range 3000 {
		huge.Syscalls = append(huge.Syscalls, specs.LinuxSyscall{Names: []string{"write"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Value: uint64(i), Op: specs.OpEqualTo}}})
	}
	if _, err := compileSeccomp(huge); err == nil || !strings.Contains(err.Error(), "instructions") {
		t.Errorf("error is %v", err)
	}
}

// TestSyscallTable compares with the table of an independent source.
func TestSyscallTable(t *testing.T) {
	info, err := arch.GetInfo(runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	// On arm64 that source is wrong: it has newfstatat under a name that the
	// kernel and seccomp profiles don't use, and the time64 calls of 32-bit
	// architectures (403 to 423).
	wrong := func(number int) bool {
		return runtime.GOARCH == "arm64" && (number == 79 || number == 244 || number >= 403 && number <= 423)
	}
	for i, s := range nativeSyscalls {
		if i > 0 && nativeSyscalls[i-1].name >= s.name {
			t.Errorf("%s is out of order", s.name)
		}
		if name, ok := info.SyscallNumbers[int(s.number)]; ok && name != s.name && !wrong(int(s.number)) {
			t.Errorf("%d is %s here and %s there", s.number, s.name, name)
		}
	}
	for name, number := range info.SyscallNames {
		if _, ok := nativeSyscall(name); !ok && !wrong(number) {
			t.Errorf("%s is missing", name)
		}
	}
	if want := map[string]uint32{"amd64": 262, "arm64": 79}[runtime.GOARCH]; nr(t, "newfstatat") != want {
		t.Errorf("newfstatat is %d, want %d", nr(t, "newfstatat"), want)
	}
}

func TestSeccompInContainer(t *testing.T) { // T23
	root := newRoot(t)
	denyChmod := func() *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"chmod", "fchmod", "fchmodat", "fchmodat2", "unheard_of"}, Action: specs.ActErrno},
		}}
	}
	for _, nnp := range []bool{false, true} {
		for name, profile := range map[string]*specs.LinuxSeccomp{"deny list": denyChmod(), "allow list": allowList()} {
			t.Run(fmt.Sprintf("%s, no_new_privs %v", name, nnp), func(t *testing.T) {
				config := newConfig(root)
				config.Spec.Linux.Seccomp = profile
				config.Spec.Process.NoNewPrivileges = nnp
				config.User = &User{Name: "alice"}
				out := sh(t, config, "grep Seccomp: /proc/self/status; touch /tmp/$$ 2>/dev/null; chmod 600 /proc/self/fd/0 2>&1; ls -d /bin")
				if !strings.HasPrefix(out, "Seccomp:\t2\n") || !strings.Contains(out, "Operation not permitted") || !strings.HasSuffix(out, "/bin\n") {
					t.Errorf("output %q", out)
				}
			})
		}
	}
	t.Run("kill", func(t *testing.T) {
		config := newConfig(root, "chmod", "600", "/tmp")
		config.Spec.Linux.Seccomp = denyChmod()
		config.Spec.Linux.Seccomp.Syscalls[0].Action = specs.ActKillProcess
		c := start(t, "container-init", config, nil)
		c.wait()
		if c.report != nil || c.cmd.ProcessState.String() != "signal: bad system call" && c.cmd.ProcessState.String() != "signal: bad system call (core dumped)" {
			t.Errorf("report %v, state %s", c.report, c.cmd.ProcessState)
		}
	})
	t.Run("unconfined", func(t *testing.T) {
		if out := sh(t, newConfig(root), "grep Seccomp: /proc/self/status"); out != "Seccomp:\t0\n" {
			t.Errorf("output %q", out)
		}
	})
	if runtime.GOARCH != "amd64" {
		return
	}
	t.Run("x32", func(t *testing.T) {
		writeProgram(t, filepath.Join(root, "bin/x32"), elfProgram(unix.EM_X86_64, []byte{
			0xb8, 0x27, 0, 0, 0x40, // mov $(x32SyscallBit + getpid), %eax
			0x0f, 0x05, // syscall
			0x89, 0xc7, // mov %eax, %edi
			0xf7, 0xdf, // neg %edi
			0xb8, 60, 0, 0, 0, // mov $exit, %eax
			0x0f, 0x05, // syscall
		}), 0o755)
		for want, profile := range map[int]*specs.LinuxSeccomp{int(unix.EPERM): allowList(), int(unix.ENOSYS): denyChmod()} {
			config := newConfig(root, "x32")
			config.Spec.Linux.Seccomp = profile
			if _, code := runToEnd(t, config); code != want {
				t.Errorf("errno %d, want %d", code, want)
			}
		}
	})
	t.Run("i386", func(t *testing.T) {
		writeProgram(t, filepath.Join(root, "bin/i386"), elfProgram(unix.EM_386, []byte{
			0xb8, 1, 0, 0, 0, // mov $exit, %eax
			0xbb, 42, 0, 0, 0, // mov $42, %ebx
			0xcd, 0x80, // int $0x80
			0x0f, 0x0b, // ud2, for when that was denied
		}), 0o755)
		state := func(profile *specs.LinuxSeccomp) string {
			config := newConfig(root, "i386")
			config.Spec.Linux.Seccomp = profile
			c := start(t, "container-init", config, nil)
			c.wait()
			if c.report != nil {
				return c.report.Error()
			}
			return c.cmd.ProcessState.String()
		}
		// A kernel without 32-bit programs, as of a paravirtual guest, has none to
		// deny; TestCompileSeccomp asks the filter itself.
		const none = "exec: exec /bin/i386: exec format error"
		unfiltered := state(nil)
		if unfiltered != "exit status 42" && unfiltered != none {
			t.Fatalf("without a filter: %s", unfiltered)
		}
		for _, profile := range []*specs.LinuxSeccomp{allowList(), denyChmod()} {
			if s := state(profile); !strings.HasPrefix(s, "signal: illegal instruction") && (s != none || unfiltered != none) {
				t.Errorf("a 32-bit exit was let through: %s", s)
			}
		}
	})
}

func FuzzCompileSeccomp(f *testing.F) {
	for _, p := range []*specs.LinuxSeccomp{allowList(), {DefaultAction: specs.ActKill, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"read", "write"}, Action: specs.ActLog, Args: []specs.LinuxSeccompArg{{Index: 1, Value: 1 << 33, Op: specs.OpLessThan}, {Index: 2, Value: 7, Op: specs.OpGreaterEqual}}},
		{Names: []string{"read"}, Action: specs.ActTrap, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 3, Op: specs.OpLessEqual}, {Index: 0, Value: 9, Op: specs.OpGreaterThan}}},
	}}} {
		text, err := json.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text, uint32(0), uint64(3), uint64(1<<33-1), uint64(8))
	}
	f.Fuzz(func(t *testing.T, text []byte, number uint32, a, b, c uint64) {
		var profile specs.LinuxSeccomp
		if len(text) > 1<<16 || json.Unmarshal(text, &profile) != nil {
			return
		}
		filter, err := compileSeccomp(&profile)
		if err != nil {
			return
		}
		if len(filter.program) > maxFilter {
			t.Fatalf("%d instructions", len(filter.program))
		}
		calls := []seccompCall{{nativeAuditArch(), number % 600, [6]uint64{a, b, c, a, b, c}}}
		// Values next to the profile's own are where comparisons go wrong.
		for _, s := range profile.Syscalls {
			for _, name := range s.Names {
				n, ok := nativeSyscall(name)
				if !ok || len(calls) > 200 {
					continue
				}
				for delta := -1; delta <= 1; delta++ {
					call := seccompCall{nativeAuditArch(), uint32(int(n) + delta), [6]uint64{a, b, c}}
					for _, arg := range s.Args {
						call.args[arg.Index] = arg.Value + uint64(delta)
					}
					if call.number < x32SyscallBit {
						calls = append(calls, call)
					}
				}
			}
		}
		for _, call := range calls {
			got, err := interpret(filter.program, call)
			if err != nil {
				t.Fatal(err)
			}
			if want := evaluate(&profile, call); got != want {
				t.Errorf("%+v: %#x, want %#x", call, got, want)
			}
		}
	})
}
