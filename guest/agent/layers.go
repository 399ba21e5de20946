//go:build linux && (amd64 || arm64)

package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// layerStore mounts layer images, each once however many containers use it, at
// the short paths that an overlay of 127 layers needs (T24).
type layerStore struct {
	images string // directory of the share
	mounts string // directory of the mount points, on a tmpfs

	userns *os.File // nil: files keep their ids; set before the first mount

	mu     sync.Mutex // guards what follows, never held while mounting
	next   int
	layers map[string]*layer
}

type layer struct {
	name string
	path string // mount point
	refs int
	// ready is closed when the mount has been made or has failed with err.
	ready chan struct{}
	err   error
	// bare says that the image has no lost+found, or one of its own making.
	bare bool
}

func newLayerStore(images, mounts string) *layerStore {
	return &layerStore{images: images, mounts: mounts, layers: map[string]*layer{}}
}

// whiteouts is the directory that hides, as the topmost lower layer, the
// lost+found that every ext4 image has in its root.
func (s *layerStore) whiteouts() string { return filepath.Join(s.mounts, "w") }

// init makes the whiteout directory.
func (s *layerStore) init() error {
	if err := os.MkdirAll(s.whiteouts(), 0o755); err != nil {
		return err
	}
	err := unix.Mknod(filepath.Join(s.whiteouts(), "lost+found"), unix.S_IFCHR, 0)
	if err != nil && err != unix.EEXIST {
		return os.NewSyscallError("mknod", err)
	}
	return os.MkdirAll(filepath.Join(s.mounts, "e"), 0o755)
}

// empty is a directory without entries, which stands for "no layer".
func (s *layerStore) empty() string { return filepath.Join(s.mounts, "e") }

// acquire mounts the named layers or takes another reference to them. It is all
// or nothing; release gives them back.
func (s *layerStore) acquire(names []string) ([]*layer, error) {
	var got []*layer
	for _, name := range names {
		l, err := s.acquireOne(name)
		if err != nil {
			_ = s.release(got) // what went wrong first is what matters
			return nil, fmt.Errorf("layer %q: %w", name, err)
		}
		got = append(got, l)
	}
	return got, nil
}

func (s *layerStore) acquireOne(name string) (*layer, error) {
	// A file in the share.
	if !isName(name, 255) || name[0] == '.' || name[0] == '-' {
		return nil, invalidf("not a name of a layer image")
	}
	for {
		s.mu.Lock()
		l := s.layers[name]
		if l == nil {
			s.next++
			l = &layer{name: name, refs: 1, ready: make(chan struct{}), path: filepath.Join(s.mounts, strconv.Itoa(s.next))}
			s.layers[name] = l
			s.mu.Unlock()
			if l.err = s.mount(l); l.err != nil {
				s.mu.Lock()
				delete(s.layers, name)
				s.mu.Unlock()
			}
			close(l.ready)
			return l, l.err
		}
		if l.refs > 0 {
			l.refs++
			s.mu.Unlock()
			<-l.ready // mount is bounded by the kernel
			return l, l.err
		}
		// Its last user is unmounting it: wait and mount it afresh.
		s.mu.Unlock()
		<-l.ready
	}
}

// release drops one reference of each; a layer without any is unmounted, which
// also frees its loop device.
func (s *layerStore) release(layers []*layer) error {
	var errs []error
	for _, l := range layers {
		s.mu.Lock()
		l.refs--
		last := l.refs == 0
		if last {
			l.ready = make(chan struct{})
		}
		s.mu.Unlock()
		if !last {
			continue
		}
		if err := unmount(l.path); err != nil {
			errs = append(errs, fmt.Errorf("layer %q: %w", l.name, err))
		}
		os.Remove(l.path)
		s.mu.Lock()
		delete(s.layers, l.name)
		close(l.ready)
		s.mu.Unlock()
	}
	return errors.Join(errs...)
}

func (s *layerStore) mount(l *layer) error {
	image, err := os.Open(filepath.Join(s.images, l.name))
	if errors.Is(err, os.ErrNotExist) {
		return notFoundf("no such image in the share %s", s.images)
	}
	if err != nil {
		return err
	}
	defer image.Close()
	if fi, err := image.Stat(); err != nil {
		return err
	} else if !fi.Mode().IsRegular() {
		return invalidf("not a regular file")
	}
	loop, err := attachLoop(image)
	if err != nil {
		return err
	}
	// The mount keeps the device; AUTOCLEAR frees it after the last user.
	defer loop.Close()
	if err := os.Mkdir(l.path, 0o755); err != nil {
		return err
	}
	// noload: a read-only image has no journal to replay.
	if err := unix.Mount(loop.Name(), l.path, "ext4", unix.MS_RDONLY, "noload"); err != nil {
		os.Remove(l.path)
		return fmt.Errorf("mount %s as ext4: %w (not a layer image, or a damaged one)", loop.Name(), err)
	}
	if s.userns != nil {
		if err := idmapMount(l.path, s.userns); err != nil {
			_ = unmount(l.path) // what went wrong first is what matters
			os.Remove(l.path)
			return fmt.Errorf("map the ids of its files: %w", err)
		}
	}
	l.bare = ownLostFound(l.path)
	return nil
}

// idmap makes the files of all layers mounted from now on belong to the ids of a
// user namespace, which the store owns then.
func (s *layerStore) idmap(userns *os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.layers) > 0 {
		return preconditionf("layers are mounted already")
	}
	s.userns = userns
	return nil
}

// ownLostFound says that a layer's lost+found, if any, came from the image and
// not from the file system's maker.
func ownLostFound(root string) bool {
	entries, err := os.ReadDir(filepath.Join(root, "lost+found"))
	return errors.Is(err, os.ErrNotExist) || err == nil && len(entries) > 0
}

// lowerdirs is the overlay's lowerdir option, topmost first.
func (s *layerStore) lowerdirs(layers []*layer) string {
	var dirs []string
	hide := false
	for _, l := range layers {
		hide = hide || !l.bare
	}
	if hide {
		dirs = append(dirs, s.whiteouts())
	}
	for i := len(layers) - 1; i >= 0; i-- {
		dirs = append(dirs, layers[i].path)
	}
	if len(dirs) == 0 {
		dirs = append(dirs, s.empty())
	}
	return strings.Join(dirs, ":")
}

// mu serialises LOOP_CTL_GET_FREE with LOOP_CONFIGURE: the kernel gives the
// same free device to two askers.
var loopMu sync.Mutex

// attachLoop binds image to a loop device and returns the device, open. T24:
// read-only, and direct, or every byte would be cached twice.
func attachLoop(image *os.File) (*os.File, error) {
	loopMu.Lock()
	defer loopMu.Unlock()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("loop devices: %w", err)
	}
	defer ctl.Close()
	// Others (tests on a host) may take a device between the two calls.
	for try := 0; ; try++ {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		path := "/dev/loop" + strconv.Itoa(n)
		dev, err := os.OpenFile(path, os.O_RDONLY, 0)
		if err != nil {
			return nil, fmt.Errorf("loop device: %w", err)
		}
		config := unix.LoopConfig{Fd: uint32(image.Fd())}
		config.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &config)
		if err == unix.EINVAL || err == unix.EOPNOTSUPP {
			config.Info.Flags &^= unix.LO_FLAGS_DIRECT_IO
			err = unix.IoctlLoopConfigure(int(dev.Fd()), &config)
		}
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if err != unix.EBUSY || try == 16 {
			return nil, fmt.Errorf("bind %s to %s: %w", path, image.Name(), err)
		}
	}
}

// unmount detaches what can't be unmounted at once; nothing of the agent's
// keeps it busy for long then. What is no mount point is not an error.
func unmount(path string) error {
	err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
	if err == unix.EBUSY {
		err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if err == nil || err == unix.EINVAL || err == unix.ENOENT {
		return nil
	}
	return fmt.Errorf("unmount %s: %w", path, err)
}
