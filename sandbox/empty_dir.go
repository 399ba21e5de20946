package sandbox

import (
	"fmt"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	shimapi "github.com/cri-vz/cri-vz/sandbox/shim/api"
)

// guestEmptyDir is the mount in the guest that takes the place of a volume, if its host
// path is an emptyDir that a kubelet made for the pod with that uid, or a directory
// below one; for any other volume it is nil (T47). Directories get the mode and the
// group in the guest that they have on the host, which is how a kubelet sets fsGroup.
//
// One that is a mount of its own, in memory, is not moved: its size and its pages are
// the host's (T36). Nor is a file below one, which somebody has put there on the host.
func guestEmptyDir(uid string, v *shimapi.Volume) (*specs.Mount, error) {
	path := v.GetHostPath()
	marker := "/pods/" + uid + "/volumes/kubernetes.io~empty-dir/"
	root, rest, ok := strings.Cut(path, marker)
	if uid == "" || !ok {
		return nil, nil
	}
	dir := filepath.Clean(root + marker)
	var disk unix.Stat_t
	if err := unix.Lstat(dir, &disk); err != nil {
		return nil, fmt.Errorf("emptyDir %s: %w", path, err)
	}
	m := &specs.Mount{Type: guestapi.EmptyDirMount, Source: rest}
	for name := range strings.SplitSeq(rest, "/") {
		dir = filepath.Join(dir, name)
		var st unix.Stat_t
		if err := unix.Lstat(dir, &st); err != nil {
			return nil, fmt.Errorf("emptyDir %s: %w", path, err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Dev != disk.Dev {
			return nil, nil
		}
		m.Options = append(m.Options, fmt.Sprintf("%s%o:%d", guestapi.EmptyDirMake, st.Mode&0o7777, st.Gid))
	}
	// As the share would be.
	m.Options = append(m.Options, "nodev")
	if v.GetReadOnly() {
		m.Options = append(m.Options, "ro")
	}
	return m, nil
}
