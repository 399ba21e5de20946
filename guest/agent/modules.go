//go:build linux && (amd64 || arm64)

package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// Files of the initramfs about kernel modules; both may be absent.
const (
	moduleList     = "modules.list"     // a path a line, loaded at boot in this order
	moduleOnDemand = "modules.ondemand" // NAME PATH...: loaded when the kernel asks for NAME
)

// maxModules caps a list, which is a few dozen lines.
const maxModules = 4096

// parseModules reads lines of fields; empty lines and comments are left out.
// Every field but, with names, the first of each line is a path in the
// initramfs.
func parseModules(r io.Reader, names bool) ([][]string, error) {
	var lines [][]string
	s := bufio.NewScanner(r)
	for s.Scan() {
		text, _, _ := strings.Cut(s.Text(), "#")
		fields := strings.Fields(text)
		if len(fields) == 0 {
			continue
		}
		for i, f := range fields {
			if names && i == 0 {
				continue
			}
			if p := path.Clean("/" + f); strings.ContainsRune(f, 0) || p != f && p[1:] != f {
				return nil, fmt.Errorf("module path %q is not clean", f)
			}
		}
		if lines = append(lines, fields); len(lines) > maxModules {
			return nil, fmt.Errorf("more than %d lines", maxModules)
		}
	}
	return lines, s.Err()
}

// readModules reads a list below the directory root; none is an empty one.
func readModules(root int, name string, names bool) ([][]string, error) {
	fd, err := unix.Openat(root, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	lines, err := parseModules(f, names)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return lines, nil
}

// loadModule loads one file. A module that is loaded already, or isn't there
// because the kernel has it built in, is not an error.
func loadModule(root int, name string) error {
	fd, err := unix.Openat(root, strings.TrimPrefix(name, "/"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	flags := 0
	if !strings.HasSuffix(name, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	if err := unix.FinitModule(fd, "", flags); err != nil && err != unix.EEXIST {
		return fmt.Errorf("load module %s: %w", name, err)
	}
	return nil
}

// RunModprobe is the program that the kernel starts when it wants a module:
// args are what follows its name, "-q -- NAME". Its root is the agent's.
func RunModprobe(args []string) int {
	if len(args) == 0 {
		return 2
	}
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 1
	}
	if err := modprobe(root, args[len(args)-1]); err != nil {
		return 1
	}
	return 0
}

func modprobe(root int, name string) error {
	lines, err := readModules(root, moduleOnDemand, true)
	if err != nil {
		return err
	}
	for _, l := range lines {
		// The kernel and the files' names differ in - and _.
		ok, err := path.Match(strings.ReplaceAll(l[0], "-", "_"), strings.ReplaceAll(name, "-", "_"))
		if err != nil || !ok {
			continue
		}
		for _, p := range l[1:] {
			if err := loadModule(root, p); err != nil {
				return err
			}
		}
		return nil
	}
	return errors.New("no such module")
}
