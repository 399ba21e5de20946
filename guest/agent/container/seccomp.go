//go:build linux && (amd64 || arm64)

package container

import (
	"cmp"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

//go:generate go run mksyscalls.go

// syscallNumber is one line of the native system call table. The table is our
// own because that of go-seccomp-bpf makes maps for five architectures each time
// the agent starts, and on arm64 has a name for newfstatat that no profile uses:
// an allow list would deny every stat(2).
type syscallNumber struct {
	name   string
	number uint32
}

// nativeSyscall returns the number of a system call on this architecture.
func nativeSyscall(name string) (uint32, bool) {
	i, ok := slices.BinarySearchFunc(nativeSyscalls[:], name, func(s syscallNumber, name string) int {
		return cmp.Compare(s.name, name)
	})
	if !ok {
		return 0, false
	}
	return nativeSyscalls[i].number, true
}

const (
	// Offsets in struct seccomp_data. Both architectures are little endian, so
	// the low word of an argument comes first.
	offsetNumber = 0
	offsetArch   = 4
	offsetArgs   = 16

	// x32SyscallBit marks the x32 ABI, which shares AUDIT_ARCH_X86_64.
	x32SyscallBit = 0x40000000

	// maxFilter is BPF_MAXINSNS.
	maxFilter = 4096
	// maxErrno is MAX_ERRNO: the kernel would silently lower more.
	maxErrno = 4095
)

// nativeAuditArch is what seccomp_data.arch holds for this binary's own ABI.
func nativeAuditArch() uint32 {
	if runtime.GOARCH == "arm64" {
		return unix.AUDIT_ARCH_AARCH64
	}
	return unix.AUDIT_ARCH_X86_64
}

// seccompCondition is one comparison of a system call argument.
type seccompCondition struct {
	index uint
	op    specs.LinuxSeccompOperator
	a, b  uint64
}

// seccompRule applies action when all conditions hold.
type seccompRule struct {
	action     uint32
	conditions []seccompCondition
}

// seccompFilter is a profile translated to classic BPF.
type seccompFilter struct {
	program []unix.SockFilter
	flags   uintptr
}

// compileSeccomp translates an OCI seccomp profile (OCI runtime-spec
// config-linux.md#seccomp) for the native architecture (T23).
//
// It follows runc where the specification is silent: unknown system call names
// are skipped, a rule whose action is the default action is dropped, two
// conditions on one argument of a rule mean "either", and a system call newer
// than the newest one the profile names answers ENOSYS instead of a denying
// default, so that a libc can fall back. Where several rules match, the most
// restrictive action wins, which is the kernel's own order.
//
// System calls of a foreign ABI (i386, x32, 32-bit ARM) get the default action
// if that denies, else ENOSYS, whatever architectures the profile lists: a
// number means something else there, so a deny list would not hold.
func compileSeccomp(profile *specs.LinuxSeccomp) (*seccompFilter, error) {
	defaultAction, err := seccompAction(profile.DefaultAction, profile.DefaultErrnoRet)
	if err != nil {
		return nil, fmt.Errorf("default action: %w", err)
	}
	if profile.ListenerPath != "" {
		return nil, errors.New("listenerPath can't be honoured: there is no seccomp agent in the guest")
	}
	filter := &seccompFilter{}
	for _, flag := range profile.Flags {
		switch flag {
		case specs.LinuxSeccompFlagLog:
			filter.flags |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			filter.flags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		case "SECCOMP_FILTER_FLAG_TSYNC":
			// One thread is left after execve: there is nothing to synchronise.
		default:
			return nil, fmt.Errorf("flag %q can't be honoured", flag)
		}
	}

	rules := make(map[uint32][]seccompRule)
	newest, named := uint32(0), false
	for i, call := range profile.Syscalls {
		action, err := seccompAction(call.Action, call.ErrnoRet)
		if err != nil {
			return nil, fmt.Errorf("rule %d: %w", i, err)
		}
		if len(call.Names) == 0 {
			return nil, fmt.Errorf("rule %d names no system call", i)
		}
		added, err := seccompRules(action, call.Args)
		if err != nil {
			return nil, fmt.Errorf("rule %d (%s): %w", i, call.Names[0], err)
		}
		for _, name := range call.Names {
			number, ok := nativeSyscall(name)
			if !ok {
				continue
			}
			newest, named = max(newest, number), true
			if action == defaultAction {
				continue
			}
			rules[number] = append(rules[number], added...)
			if len(rules[number]) > maxFilter {
				return nil, fmt.Errorf("more than %d rules for %s", maxFilter, name)
			}
		}
	}

	const enosys = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	foreign, unknown := enosys, defaultAction
	if denies(defaultAction) {
		foreign = defaultAction
		if profile.DefaultErrnoRet == nil && named {
			unknown = enosys
		}
	}
	program := []unix.SockFilter{
		loadWord(offsetArch),
		jump(unix.BPF_JEQ, nativeAuditArch(), 1, 0),
		ret(foreign),
		loadWord(offsetNumber),
	}
	if runtime.GOARCH == "amd64" {
		program = append(program, jump(unix.BPF_JGE, x32SyscallBit, 0, 1), ret(foreign))
	}
	program = append(program, searchTree(segments(rules, newest, defaultAction, unknown))...)
	if len(program) > maxFilter {
		return nil, fmt.Errorf("profile needs %d instructions, the kernel takes %d", len(program), maxFilter)
	}
	filter.program = program
	return filter, nil
}

// seccompAction encodes an action as a filter's return value.
func seccompAction(action specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	if errno != nil && action != specs.ActErrno {
		// Only a tracer would see it, and TRACE is refused below.
		if action != specs.ActTrace {
			return 0, fmt.Errorf("errnoRet does not go with %s", action)
		}
	}
	switch action {
	case specs.ActKill, specs.ActKillThread:
		return unix.SECCOMP_RET_KILL_THREAD, nil
	case specs.ActKillProcess:
		return unix.SECCOMP_RET_KILL_PROCESS, nil
	case specs.ActTrap:
		return unix.SECCOMP_RET_TRAP, nil
	case specs.ActErrno:
		if errno == nil {
			return unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM), nil
		}
		if *errno > maxErrno {
			return 0, fmt.Errorf("errnoRet %d is above %d", *errno, maxErrno)
		}
		return unix.SECCOMP_RET_ERRNO | uint32(*errno), nil
	case specs.ActAllow:
		return unix.SECCOMP_RET_ALLOW, nil
	case specs.ActLog:
		return unix.SECCOMP_RET_LOG, nil
	case specs.ActTrace, specs.ActNotify:
		return 0, fmt.Errorf("action %s can't be honoured: there is no tracer or seccomp agent in the guest", action)
	}
	return 0, fmt.Errorf("unknown action %q", action)
}

// denies tells whether an action keeps the system call from running.
func denies(action uint32) bool {
	return action != unix.SECCOMP_RET_ALLOW && action != unix.SECCOMP_RET_LOG
}

// seccompRules validates the conditions of one rule of the profile.
func seccompRules(action uint32, args []specs.LinuxSeccompArg) ([]seccompRule, error) {
	var conditions []seccompCondition
	var seen [6]bool
	twice := false
	for _, arg := range args {
		if arg.Index >= uint(len(seen)) {
			return nil, fmt.Errorf("argument index %d: a system call has 6 arguments", arg.Index)
		}
		twice = twice || seen[arg.Index]
		seen[arg.Index] = true
		switch arg.Op {
		case specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo,
			specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual:
		default:
			return nil, fmt.Errorf("unknown operator %q", arg.Op)
		}
		conditions = append(conditions, seccompCondition{arg.Index, arg.Op, arg.Value, arg.ValueTwo})
	}
	if !twice {
		return []seccompRule{{action, conditions}}, nil
	}
	rules := make([]seccompRule, len(conditions))
	for i := range conditions {
		rules[i] = seccompRule{action, conditions[i : i+1]}
	}
	return rules, nil
}

// seccompSegment is the code for the system call numbers from first up to the
// next segment's first.
type seccompSegment struct {
	first uint32
	code  []unix.SockFilter
}

// segments lays the whole number range out in ascending order and joins
// neighbours that are answered alike.
func segments(rules map[uint32][]seccompRule, newest, defaultAction, unknown uint32) []seccompSegment {
	numbers := make([]uint32, 0, len(rules))
	for n := range rules {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	var out []seccompSegment
	next := uint32(0)
	add := func(first uint32, code []unix.SockFilter) {
		if len(out) > 0 && slices.Equal(out[len(out)-1].code, code) {
			return
		}
		out = append(out, seccompSegment{first, code})
	}
	for _, n := range numbers {
		if n > next {
			add(next, []unix.SockFilter{ret(defaultAction)})
		}
		add(n, rulesCode(rules[n], defaultAction))
		next = n + 1
	}
	if next <= newest {
		add(next, []unix.SockFilter{ret(defaultAction)})
		next = newest + 1
	}
	add(next, []unix.SockFilter{ret(unknown)})
	return out
}

// searchTree is a binary search over segments with the system call number in
// the accumulator. Every path ends in a return, so jumps only go forward.
func searchTree(s []seccompSegment) []unix.SockFilter {
	if len(s) == 1 {
		return s[0].code
	}
	mid := len(s) / 2
	below, above := searchTree(s[:mid]), searchTree(s[mid:])
	var code []unix.SockFilter
	if len(below) <= 255 {
		code = append(code, jump(unix.BPF_JGE, s[mid].first, uint8(len(below)), 0))
	} else {
		// A conditional jump reaches 255 instructions only.
		code = append(code, jump(unix.BPF_JGE, s[mid].first, 0, 1),
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(len(below))})
	}
	return append(append(code, below...), above...)
}

// rulesCode answers one system call: the first rule that matches, in order of
// restrictiveness, else the default action.
func rulesCode(rules []seccompRule, defaultAction uint32) []unix.SockFilter {
	rules = slices.Clone(rules)
	slices.SortStableFunc(rules, func(a, b seccompRule) int {
		// The kernel compares actions as signed numbers: KILL_PROCESS is the lowest.
		return cmp.Compare(int32(a.action&unix.SECCOMP_RET_ACTION_FULL), int32(b.action&unix.SECCOMP_RET_ACTION_FULL))
	})
	var code []unix.SockFilter
	for _, rule := range rules {
		code = append(code, ruleCode(rule)...)
		if len(rule.conditions) == 0 {
			return code
		}
		if len(code) > maxFilter {
			break // too long already: compileSeccomp refuses it
		}
	}
	return append(code, ret(defaultAction))
}

// ruleCode returns the rule's action if all its conditions hold, and else runs
// into whatever follows. At most 6 conditions of 6 instructions: short jumps do.
func ruleCode(rule seccompRule) []unix.SockFilter {
	const fail = 0xff // patched below; no real jump here is that long
	var code []unix.SockFilter
	for _, c := range rule.conditions {
		lo := loadWord(offsetArgs + 8*uint32(c.index))
		hi := loadWord(offsetArgs + 8*uint32(c.index) + 4)
		aLo, aHi := uint32(c.a), uint32(c.a>>32)
		switch c.op {
		case specs.OpEqualTo:
			code = append(code, hi, jump(unix.BPF_JEQ, aHi, 0, fail), lo, jump(unix.BPF_JEQ, aLo, 0, fail))
		case specs.OpNotEqual:
			code = append(code, hi, jump(unix.BPF_JEQ, aHi, 0, 2), lo, jump(unix.BPF_JEQ, aLo, fail, 0))
		case specs.OpGreaterThan:
			code = append(code, hi, jump(unix.BPF_JGT, aHi, 3, 0), jump(unix.BPF_JEQ, aHi, 0, fail), lo, jump(unix.BPF_JGT, aLo, 0, fail))
		case specs.OpGreaterEqual:
			code = append(code, hi, jump(unix.BPF_JGT, aHi, 3, 0), jump(unix.BPF_JEQ, aHi, 0, fail), lo, jump(unix.BPF_JGE, aLo, 0, fail))
		case specs.OpLessThan:
			code = append(code, hi, jump(unix.BPF_JGT, aHi, fail, 0), jump(unix.BPF_JEQ, aHi, 0, 2), lo, jump(unix.BPF_JGE, aLo, fail, 0))
		case specs.OpLessEqual:
			code = append(code, hi, jump(unix.BPF_JGT, aHi, fail, 0), jump(unix.BPF_JEQ, aHi, 0, 2), lo, jump(unix.BPF_JGT, aLo, fail, 0))
		case specs.OpMaskedEqual:
			// Both sides are masked, as libseccomp does.
			b := c.b & c.a
			code = append(code, hi, and(aHi), jump(unix.BPF_JEQ, uint32(b>>32), 0, fail), lo, and(aLo), jump(unix.BPF_JEQ, uint32(b), 0, fail))
		}
	}
	code = append(code, ret(rule.action))
	for i := range code {
		if code[i].Code&0x07 != unix.BPF_JMP {
			continue
		}
		if code[i].Jt == fail {
			code[i].Jt = uint8(len(code) - i - 1)
		}
		if code[i].Jf == fail {
			code[i].Jf = uint8(len(code) - i - 1)
		}
	}
	return code
}

func loadWord(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

func and(mask uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: mask}
}

func jump(test uint16, k uint32, ifTrue, ifFalse uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | test | unix.BPF_K, Jt: ifTrue, Jf: ifFalse, K: k}
}

func ret(action uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
}

// install puts the filter on the calling thread, which must be the one that
// calls execve. Without no_new_privs it needs CAP_SYS_ADMIN.
func (f *seccompFilter) install() error {
	prog := unix.SockFprog{Len: uint16(len(f.program)), Filter: &f.program[0]}
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, f.flags, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(f)
	if errno != 0 {
		return fmt.Errorf("install filter of %d instructions: %w", len(f.program), errno)
	}
	return nil
}
