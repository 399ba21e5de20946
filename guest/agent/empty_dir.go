//go:build linux && (amd64 || arm64)

package agent

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountEmptyDir mounts at target what is described at [api.EmptyDirMount], and takes
// the options that are its own out of m.
func (a *Agent) mountEmptyDir(m *specs.Mount, target string) error {
	parts := strings.Split(m.Source, "/")
	var made []string
	var rest []string
	for _, o := range m.Options {
		if v, ok := strings.CutPrefix(o, api.EmptyDirMake); ok {
			made = append(made, v)
		} else {
			rest = append(rest, o)
		}
	}
	if len(made) != len(parts) {
		return invalidf("%d parts of a path, and %d of them are described", len(parts), len(made))
	}
	for _, p := range parts {
		if p == "" || p == "." || p == ".." {
			return invalidf("path %q", m.Source)
		}
	}
	m.Options = rest
	// One after the other: nobody finds a directory that is not his to use yet.
	a.emptyDirTurn <- struct{}{}
	defer func() { <-a.emptyDirTurn }()
	base := filepath.Join(a.scratch.dir, "emptydirs")
	if err := os.Mkdir(base, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := makeDirBelow(base, ".", parts[0], made[0]); err != nil {
		return err
	}
	// Only this directory is the containers' to change, and no link in it leads out.
	sub := path.Join(parts[1:]...)
	if sub == "" {
		_, err := pinBelow(base, parts[0], target)
		return err
	}
	base = filepath.Join(base, parts[0])
	for i := 1; i < len(parts); i++ {
		if err := makeDirBelow(base, path.Join(append([]string{"."}, parts[1:i]...)...), parts[i], made[i]); err != nil {
			return err
		}
	}
	_, err := pinBelow(base, sub, target)
	return err
}

// makeDirBelow makes a directory in parent, which is below base; whatever has the
// name already is left as it is. As is MODE:GID.
func makeDirBelow(base, parent, name, as string) error {
	m, g, _ := strings.Cut(as, ":")
	mode, merr := strconv.ParseUint(m, 8, 12)
	gid, gerr := strconv.ParseUint(g, 10, 32)
	if err := errors.Join(merr, gerr); err != nil {
		return invalidf("mode and group %q: %w", as, err)
	}
	root, err := unix.Open(base, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: base, Err: err}
	}
	defer unix.Close(root)
	in, err := openIn(root, parent)
	if err != nil {
		return fmt.Errorf("open %q in the emptyDir: %w", parent, err)
	}
	defer unix.Close(in)
	err = unix.Mkdirat(in, name, 0o700)
	if err == unix.EEXIST {
		return nil
	}
	if err != nil {
		return fmt.Errorf("make %q in the emptyDir: %w", name, err)
	}
	dir, err := unix.Openat(in, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the new %q in the emptyDir: %w", name, err)
	}
	defer unix.Close(dir)
	// In this order: a change of the group takes the setgid bit away.
	if err := unix.Fchown(dir, 0, int(gid)); err != nil {
		return fmt.Errorf("group of %q in the emptyDir: %w", name, err)
	}
	if err := unix.Fchmod(dir, uint32(mode)); err != nil {
		return fmt.Errorf("mode of %q in the emptyDir: %w", name, err)
	}
	return nil
}
