//go:build linux && (amd64 || arm64)

// Package container carries out an OCI runtime spec inside the guest. It is
// the code of two short-lived processes that the agent forks from its own
// binary and that end by becoming the container's process:
//
//   - container-init (Init) starts in new mount and cgroup namespaces, and a new
//     pid namespace when the container has its own, already in its cgroup. It
//     builds the container's view of the file system and executes its command.
//   - exec-init (ExecInit) starts in the container's pid namespace and cgroup,
//     joins the rest by descriptors, and executes a command there.
//
// The package does not create namespaces, cgroups or the root file system, does
// not fork or wait, and writes nothing to the standard streams, which are the
// container's from the start.
//
// # Protocol
//
// Descriptors 0, 1 and 2 are the container's standard streams, or all three the
// slave of its terminal. Descriptor 3 is a stream socket: the parent sends one
// Config with WriteConfig, then reads the outcome with ReadReport. Namespaces to
// join, or the container's devpts, are further inherited descriptors, which Config
// numbers. All descriptors
// from 3 up are closed by the final execve, and that is how the parent learns of
// success.
package container

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"unicode/utf8"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// ConfigFD is the descriptor of the socket to the parent.
	ConfigFD = 3

	// maxConfig caps a Config on the wire, in bytes. A spec with 1 MiB of
	// environment (ARG_MAX of old) and a large seccomp profile fits.
	maxConfig = 4 << 20
	// maxReport caps an error report on the wire, in bytes.
	maxReport = 64 << 10
)

// Config is what container-init and exec-init are told.
type Config struct {
	// Spec is the container's OCI runtime spec (v1.3.0). Root.Path and the
	// sources of bind mounts are paths in the guest, free of symbolic links.
	// Linux.Namespaces, Linux.Resources, Linux.CgroupsPath, Hostname and
	// Annotations are the agent's business and not looked at.
	//
	// For exec-init, Process is the command's own; of the rest only
	// Linux.Seccomp is used.
	Spec specs.Spec `json:"spec"`
	// User says as whom the process runs. Nil takes the numeric ids of
	// Spec.Process.User. Process.User.Umask holds in either case.
	User *User `json:"user,omitempty"`
	// Namespaces are joined by exec-init, in this order but the mount namespace
	// last. Init refuses them.
	Namespaces []Namespace `json:"namespaces,omitempty"`
	// TerminalsFD is, for container-init, an inherited descriptor of what NewTerminals
	// made, of which the terminal on descriptors 0 to 2 is one. 0: the terminal, if
	// there is one, is one of the guest's.
	TerminalsFD int `json:"terminalsFd,omitempty"`
}

// Namespace is an inherited descriptor of a namespace: an nsfs file, or a pidfd
// of a process in it, which several Namespaces may share.
type Namespace struct {
	// Type is mount, cgroup, ipc, uts or network.
	Type specs.LinuxNamespaceType `json:"type"`
	FD   int                      `json:"fd"`
}

// Classes of Error.
const (
	// ClassNotFound: the command is not there (or its interpreter isn't).
	ClassNotFound = "not-found"
	// ClassPermission: the command or the working directory may not be used.
	ClassPermission = "permission"
	// ClassInvalid: the spec asks for something wrong or unsupported.
	ClassInvalid = "invalid"
	// ClassOther is anything else.
	ClassOther = "other"
)

// Error says which step failed and why. Its text quotes names from the image
// and the spec, so it is to be escaped before it is shown.
type Error struct {
	Step    string `json:"step"`
	Message string `json:"message"`
	Class   string `json:"class"`
}

func (e *Error) Error() string { return e.Step + ": " + e.Message }

// ExitCode is the status a failed container-init or exec-init ends with, as a
// shell has it: 127 for a command that is not there, 126 for one that may not be
// executed, 1 for anything else.
func ExitCode(err error) int {
	var e *Error
	if errors.As(err, &e) {
		switch e.Class {
		case ClassNotFound:
			return 127
		case ClassPermission:
			return 126
		}
	}
	return 1
}

// classified is an error whose class is known where it happens.
type classified struct {
	class string
	err   error
}

func (c *classified) Error() string { return c.err.Error() }
func (c *classified) Unwrap() error { return c.err }

// invalid marks an error as the spec's fault.
func invalid(format string, args ...any) error {
	return &classified{ClassInvalid, fmt.Errorf(format, args...)}
}

// WriteConfig sends a Config to container-init or exec-init. It blocks until
// the child reads: bound it with a deadline on w.
func WriteConfig(w io.Writer, config *Config) error {
	wire := wireConfig{Config: config}
	if p := config.Spec.Process; p != nil && slices.ContainsFunc(p.Env, func(s string) bool { return !utf8.ValidString(s) }) {
		for _, s := range p.Env {
			wire.Env = append(wire.Env, []byte(s))
		}
	}
	return writeMessage(w, &wire, maxConfig)
}

// wireConfig is a Config with an environment that JSON strings can't hold.
type wireConfig struct {
	*Config
	Env [][]byte `json:"env,omitempty"`
}

// ReadReport waits for the outcome: nil once the command has been executed, an
// *Error if it was not, and another error if the answer can't be read. A child
// that is killed before it executes the command looks like success; its exit
// status tells. Bound the wait with a deadline on r. The parent must not hold
// the child's end of the socket open.
func ReadReport(r io.Reader) error {
	var report Error
	switch err := readMessage(r, &report, maxReport); {
	case err == io.EOF:
		return nil
	case err != nil:
		return fmt.Errorf("read report of container process: %w", err)
	}
	return &report
}

func writeMessage(w io.Writer, v any, limit int) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(body) > limit {
		return fmt.Errorf("message of %d bytes is larger than %d", len(body), limit)
	}
	frame := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(body)), uint32(len(body)))
	_, err = w.Write(append(frame, body...))
	return err
}

// readMessage returns io.EOF if the stream ends before the first byte.
func readMessage(r io.Reader, v any, limit uint32) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > limit {
		return fmt.Errorf("message of %d bytes is larger than %d", size, limit)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(r, body); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return json.Unmarshal(body, v)
}

// step is one line of the lists that Init and ExecInit walk through. Nothing is
// undone on failure: the process ends, and its namespaces with it.
type step struct {
	name string
	run  func(*process) error
}

// Init is container-init. It does not return if it succeeds. On failure the
// report has been sent and the caller exits with ExitCode.
func Init() error { return run(initSteps) }

// ExecInit is exec-init. It does not return if it succeeds. On failure the
// report has been sent and the caller exits with ExitCode.
func ExecInit() error { return run(execSteps) }

func run(steps []step) error {
	// Namespaces, credentials, seccomp and no_new_privs belong to a thread. The
	// one that did all this must be the one that calls execve, which ends the
	// others. The lock is never released.
	runtime.LockOSThread()
	// The process lives for milliseconds: collecting garbage only costs, and its
	// threads would still be there under the container's seccomp filter.
	debug.SetGCPercent(-1)

	err := runSteps(steps)
	var report *Error
	if !errors.As(err, &report) {
		report = &Error{Step: "start", Message: err.Error(), Class: ClassOther}
	}
	if len(report.Message) > maxReport/8 {
		report.Message = report.Message[:maxReport/8] // JSON escapes grow it sixfold at most
	}
	// A raw write: os.File would want the poller, for which it is late.
	_ = writeMessage(rawFD(ConfigFD), report, maxReport)
	return report
}

func runSteps(steps []step) error {
	// From here on a failure to execute leaks nothing, whatever the agent left open.
	if err := unix.CloseRange(ConfigFD, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return &Error{"start", fmt.Sprintf("mark descriptors close-on-exec: %v", err), ClassOther}
	}
	p := &process{}
	wire := wireConfig{Config: &p.config}
	if err := readMessage(rawFD(ConfigFD), &wire, maxConfig); err != nil {
		return &Error{"start", fmt.Sprintf("read configuration from descriptor %d: %v", ConfigFD, err), ClassOther}
	}
	if process := p.config.Spec.Process; process != nil && wire.Env != nil {
		process.Env = nil
		for _, b := range wire.Env {
			process.Env = append(process.Env, string(b))
		}
	}
	for _, s := range steps {
		if err := s.run(p); err != nil {
			class := ClassOther
			var c *classified
			if errors.As(err, &c) {
				class = c.class
			}
			return &Error{s.name, err.Error(), class}
		}
	}
	return errors.New("the last step returned without an error")
}

// rawFD reads and writes a blocking descriptor without taking it over.
type rawFD int

func (fd rawFD) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(fd), p)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0 && len(p) > 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

func (fd rawFD) Write(p []byte) (int, error) {
	for done := 0; done < len(p); {
		n, err := unix.Write(int(fd), p[done:])
		switch {
		case err == unix.EINTR:
		case err != nil:
			return done, os.NewSyscallError("write", err)
		default:
			done += n
		}
	}
	return len(p), nil
}
