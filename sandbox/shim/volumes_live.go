package shim

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

const (
	// FilesDir, in the pod's directory, has a directory for each volume that is a
	// single file, and in it a link to that file, LinkedFile.
	FilesDir   = "files"
	LinkedFile = "file"
	// placeholder is what the share has when no volume is there: nobody says what
	// an empty one is.
	placeholder = ".none"
	// setShareTimeout bounds a call that takes milliseconds.
	setShareTimeout = 10 * time.Second
)

// liveVolumes are directories of a share that changes while the machine runs, where
// the host has no bind mounts (macOS).
//
// A single file is a hard link in a directory of its own: like a bind mount it pins
// the file and shows what is written to it in place, and nothing of its neighbours
// (T30). Its source in the guest is volume://NAME/file.
type liveVolumes struct {
	podDir, arch string
	turn         chan struct{} // one change at a time

	mu      sync.Mutex
	fixed   bool // this host can't change the share of a machine that runs: it has nothing
	dirs    map[string]vmm.SharedDir
	machine vmm.Machine
}

func newLiveVolumes(c Config) *liveVolumes {
	return &liveVolumes{podDir: c.PodDir, arch: c.Arch, turn: make(chan struct{}, 1), dirs: make(map[string]vmm.SharedDir)}
}

func (v *liveVolumes) prepare() error {
	return errors.Join(os.MkdirAll(filepath.Join(v.podDir, VolumesDir), 0o700), os.MkdirAll(filepath.Join(v.podDir, FilesDir), 0o700))
}

func (v *liveVolumes) share(ctx context.Context, d vmm.Driver) (vmm.Share, error) {
	caps, err := d.Capabilities(ctx, v.arch)
	if err != nil {
		return vmm.Share{}, err
	}
	v.mu.Lock()
	v.fixed = !caps.LiveShares
	v.mu.Unlock()
	if !caps.LiveShares {
		return vmm.Share{Tag: guestapi.ShareVolumes, Dir: filepath.Join(v.podDir, VolumesDir), ReadOnly: true}, nil
	}
	return vmm.Share{Tag: guestapi.ShareVolumes, Dirs: v.current()}, nil
}

func (v *liveVolumes) current() map[string]vmm.SharedDir {
	v.mu.Lock()
	defer v.mu.Unlock()
	dirs := maps.Clone(v.dirs)
	dirs[placeholder] = vmm.SharedDir{Dir: filepath.Join(v.podDir, VolumesDir), ReadOnly: true}
	return dirs
}

func (v *liveVolumes) attach(m vmm.Machine) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.machine = m
}

// add shares a host path as vol.Name.
func (v *liveVolumes) add(vol *shimapi.Volume) (err error) {
	if err := checkVolume(vol); err != nil {
		return err
	}
	name, path := vol.GetName(), vol.GetHostPath()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		err = &os.PathError{Op: "stat", Path: path, Err: err}
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("host path doesn't exist: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
		return err
	}
	if err := shareable(path, uint32(st.Mode)); err != nil {
		return err
	}
	v.turn <- struct{}{} // bounded, as each change is
	defer func() { <-v.turn }()
	v.mu.Lock()
	_, taken := v.dirs[name]
	fixed := v.fixed
	v.mu.Unlock()
	if fixed {
		return fmt.Errorf("host path %s can't be a volume: this host can't share a directory with a machine that runs already (`cri-vz doctor` says why); emptyDir and image volumes need none: %w", path, errdefs.ErrFailedPrecondition)
	}
	if taken {
		return fmt.Errorf("volume %s: %w", name, errdefs.ErrAlreadyExists)
	}
	dir := vmm.SharedDir{Dir: path, ReadOnly: vol.GetReadOnly()}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		if dir.Dir, err = v.link(name, path); err != nil {
			return err
		}
	}
	v.mu.Lock()
	v.dirs[name] = dir
	v.mu.Unlock()
	if err := v.set(); err != nil {
		v.forget(name)
		return err
	}
	return nil
}

// link makes the directory that shows a single file.
func (v *liveVolumes) link(name, path string) (string, error) {
	dir := filepath.Join(v.podDir, FilesDir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	err := os.Link(path, filepath.Join(dir, LinkedFile))
	if err == nil {
		return dir, nil
	}
	_ = os.Remove(dir)
	if errors.Is(err, unix.EXDEV) {
		return "", fmt.Errorf("single file %s lies on another disk than %s, and can't be shared by itself: mount its directory, or move one of the two: %w", path, v.podDir, errdefs.ErrFailedPrecondition)
	}
	return "", err
}

// forget removes a volume that is shared no more. The directory is never descended
// into unless it is ours.
func (v *liveVolumes) forget(name string) {
	v.mu.Lock()
	delete(v.dirs, name)
	v.mu.Unlock()
	dir := filepath.Join(v.podDir, FilesDir, name)
	_ = os.Remove(filepath.Join(dir, LinkedFile))
	_ = os.Remove(dir)
}

// set tells the machine; one that is gone shares nothing.
func (v *liveVolumes) set() error {
	v.mu.Lock()
	m := v.machine
	v.mu.Unlock()
	if m == nil {
		return nil
	}
	setter := m.(vmm.ShareSetter) // which goes with LiveShares
	ctx, cancel := context.WithTimeout(context.Background(), setShareTimeout)
	defer cancel()
	err := setter.SetShare(ctx, guestapi.ShareVolumes, v.current())
	select {
	case <-m.Done():
		return nil
	default:
		return err
	}
}

func (v *liveVolumes) release(names []string) error {
	v.turn <- struct{}{}
	defer func() { <-v.turn }()
	v.mu.Lock()
	before := maps.Clone(v.dirs)
	for _, name := range names {
		delete(v.dirs, name)
	}
	changed := len(v.dirs) != len(before)
	v.mu.Unlock()
	if !changed {
		return nil
	}
	if err := v.set(); err != nil {
		v.mu.Lock()
		v.dirs = before
		v.mu.Unlock()
		return err
	}
	for _, name := range names {
		v.forget(name)
	}
	return nil
}

func (v *liveVolumes) close() error {
	v.mu.Lock()
	var names []string
	for name := range v.dirs {
		names = append(names, name)
	}
	v.mu.Unlock()
	return v.release(names)
}
