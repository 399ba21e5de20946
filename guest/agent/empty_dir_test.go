//go:build linux && (amd64 || arm64)

package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestEmptyDir: one directory for all containers of a pod, made as asked, and no way
// out of it for who writes there. // T47
func TestEmptyDir(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test makes mounts: run it as root")
	}
	dir := t.TempDir()
	a := newAgent(paths{}, &logger{w: io.Discard})
	a.scratch = &scratch{dir: filepath.Join(dir, "scratch")}
	outside := filepath.Join(dir, "scratch", "c1")
	if err := errors.Join(os.MkdirAll(outside, 0o700), os.WriteFile(filepath.Join(outside, "secret"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	n := 0
	mount := func(source string, options ...string) (string, *specs.Mount, error) {
		n++
		target := filepath.Join(dir, fmt.Sprintf("m%d", n))
		m := &specs.Mount{Source: source, Options: options}
		if err := a.mountEmptyDir(m, target); err != nil {
			return "", m, err
		}
		t.Cleanup(func() {
			if err := unix.Unmount(target, 0); err != nil {
				t.Error(err)
			}
		})
		return target, m, nil
	}
	must := func(source string, options ...string) string {
		t.Helper()
		at, _, err := mount(source, options...)
		if err != nil {
			t.Fatalf("%s %q: %v", source, options, err)
		}
		return at
	}
	is := func(path string, mode, gid uint32) {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Mode&0o7777 != mode || st.Uid != 0 || st.Gid != gid {
			t.Errorf("%s: mode %o, %d:%d, %v; want %o, 0:%d", path, st.Mode&0o7777, st.Uid, st.Gid, err, mode, gid)
		}
	}
	at, m, err := mount("data", "rbind", "make=2777:2000", "rw")
	if err != nil || !slices.Equal(m.Options, []string{"rbind", "rw"}) {
		t.Fatalf("options %q, %v", m.Options, err)
	}
	is(at, 0o2777, 2000)
	// Who comes second finds what the first made of it.
	if err := errors.Join(os.Chmod(at, 0o700), os.WriteFile(filepath.Join(at, "file"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	again := must("data", "make=2777:2000")
	is(again, 0o700, 2000)
	if _, err := os.Stat(filepath.Join(again, "file")); err != nil {
		t.Error(err)
	}
	is(must("data/a/b", "make=777:0", "make=750:5", "make=1777:6"), 0o1777, 6)
	is(filepath.Join(at, "a"), 0o750, 5)
	if left, err := os.ReadDir(must("other", "make=777:0")); err != nil || len(left) != 0 {
		t.Errorf("another emptyDir has %v, %v", left, err)
	}
	// What a container has put where another one's part is to be.
	for name, link := range map[string]string{"up": "../../c1", "absolute": "/c1", "sideways": "../other"} {
		if err := os.Symlink(link, filepath.Join(at, name)); err != nil {
			t.Fatal(err)
		}
		for _, sub := range []string{name, name + "/new"} {
			at, _, err := mount("data/"+sub, slices.Repeat([]string{"make=777:0"}, 2+strings.Count(sub, "/"))...)
			if err == nil {
				found, _ := os.ReadDir(at)
				t.Errorf("data/%s leads to %v", sub, found)
			}
		}
	}
	if found, err := os.ReadDir(outside); err != nil || len(found) != 1 {
		t.Errorf("outside there is %v, %v", found, err)
	}
	if st, err := os.Stat(must("data/file", "make=777:0", "make=777:0")); err != nil || !st.Mode().IsRegular() {
		t.Errorf("a file for a part: %v, %v", st, err)
	}
	for source, options := range map[string][]string{
		"..": {"make=777:0"}, "a/..": {"make=777:0", "make=777:0"}, "": {"make=777:0"}, "a//b": {"make=777:0", "make=777:0", "make=777:0"}, ".": {"make=777:0"},
		"none": nil, "two": {"make=777:0", "make=777:0"}, "mode": {"make=888:0"}, "large": {"make=17777:0"}, "group": {"make=777:x"}, "half": {"make=777"},
	} {
		if _, _, err := mount(source, options...); err == nil {
			t.Errorf("%q with %q is accepted", source, options)
		}
	}
	// Nobody gets a directory whose mode is yet to come.
	var all sync.WaitGroup
	for i := range 8 {
		target := filepath.Join(dir, fmt.Sprintf("race%d", i))
		all.Go(func() {
			if err := a.mountEmptyDir(&specs.Mount{Source: "race", Options: []string{api.EmptyDirMake + "777:7"}}, target); err != nil {
				t.Error(err)
				return
			}
			is(target, 0o777, 7)
			if err := unix.Unmount(target, 0); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}
