//go:build linux && (amd64 || arm64)

package container

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// rootDir is an open directory that stands for "/": no path, symbolic link or
// rename by a process of another container leads out of it. The descriptors
// it returns are used instead of the paths from then on, which closes the race
// between a check and a mount (runc CVE-2019-19921, CVE-2021-30465,
// CVE-2025-31133).
type rootDir struct{ fd int }

// maxSymlinks is the kernel's MAXSYMLINKS.
const maxSymlinks = 40

// open opens what is there, with links followed inside the root.
func (r rootDir) open(path string, flags int) (int, error) {
	fd, err := openat2(r.fd, path, flags, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// openat2 repeats what RESOLVE_IN_ROOT asks to repeat: EAGAIN means that a
// rename elsewhere could have fooled the kernel's "..".
func openat2(dir int, path string, flags int, resolve uint64) (int, error) {
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: resolve}
	for tries := 0; ; tries++ {
		fd, err := unix.Openat2(dir, path, &how)
		if (err == unix.EAGAIN || err == unix.EINTR) && tries < 128 {
			continue
		}
		return fd, err
	}
}

// readFile reads a regular file of at most limit bytes.
func (r rootDir) readFile(path string, limit int64) ([]byte, error) {
	// O_PATH first: opening a FIFO or a device may block or act.
	probe, err := r.open(path, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	err = requireRegular(probe, path)
	unix.Close(probe)
	if err != nil {
		return nil, err
	}
	fd, err := r.open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err := requireRegular(fd, path); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return data, nil
}

func requireRegular(fd int, path string) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%s is not a regular file", path)
	}
	return nil
}

// make returns an O_PATH descriptor of path and creates what is missing:
// directories (0755), and for a path that is to be a file an empty one as its
// last part. Links are followed inside the root, dangling ones too: images
// have /var/run -> /run without a /run. What exists is returned as it is, file
// or directory.
//
// It walks one component at a time without ever letting the kernel follow a
// link or a "..", so nothing that happens to the tree meanwhile leads outside.
func (r rootDir) make(path string, asFile bool) (int, error) {
	fail := func(err error) (int, error) {
		return -1, &os.PathError{Op: "create", Path: path, Err: err}
	}
	top, err := unix.FcntlInt(uintptr(r.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	stack := []int{top}
	defer func() {
		for _, fd := range stack {
			unix.Close(fd)
		}
	}()
	pop := func(keep int) {
		for len(stack) > keep {
			unix.Close(stack[len(stack)-1])
			stack = stack[:len(stack)-1]
		}
	}
	rest := components(path)
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		if name == ".." {
			pop(max(1, len(stack)-1))
			continue
		}
		dir := stack[len(stack)-1]
		fd, err := openOrCreate(dir, name, asFile && len(rest) == 0)
		if err != nil {
			return fail(err)
		}
		stack = append(stack, fd)
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fail(err)
		}
		switch {
		case st.Mode&unix.S_IFMT == unix.S_IFLNK:
			if links++; links > maxSymlinks {
				return fail(unix.ELOOP)
			}
			buf := make([]byte, unix.PathMax)
			n, err := unix.Readlinkat(fd, "", buf)
			if err != nil {
				return fail(err)
			}
			target := string(buf[:n])
			pop(len(stack) - 1)
			if strings.HasPrefix(target, "/") {
				pop(1)
			}
			rest = append(components(target), rest...)
		case len(rest) > 0 && st.Mode&unix.S_IFMT != unix.S_IFDIR:
			return fail(unix.ENOTDIR)
		}
	}
	last := stack[len(stack)-1]
	stack = stack[:len(stack)-1]
	return last, nil
}

// components splits a path; "" and "." are dropped, ".." is kept.
func components(path string) []string {
	var out []string
	for _, c := range strings.Split(path, "/") {
		if c != "" && c != "." {
			out = append(out, c)
		}
	}
	return out
}

// openOrCreate opens name in dir without following it.
func openOrCreate(dir int, name string, asFile bool) (int, error) {
	const flags = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(dir, name, flags, 0)
	if err != unix.ENOENT {
		return fd, err
	}
	if asFile {
		f, err := unix.Openat(dir, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
		if err == nil {
			unix.Close(f)
		} else if err != unix.EEXIST {
			return -1, err
		}
	} else if err := unix.Mkdirat(dir, name, 0o755); err != nil && err != unix.EEXIST {
		return -1, err
	}
	return unix.Openat(dir, name, flags, 0)
}
