package imageservice

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
)

// Whiteouts of the OCI image-spec, layer.md#whiteouts.
const (
	whiteoutPrefix = ".wh."
	opaqueWhiteout = ".wh..wh..opq"
	// whiteoutMeta begins names that aufs used for itself; they are no content.
	whiteoutMeta = ".wh..wh."
)

// errRepeatedEntry makes the caller plan the layer: the ext4 writer can't take
// back a file that a later entry of the same name replaces.
var errRepeatedEntry = errors.New("the layer names a path more than once")

// errLayer is wrapped by what is wrong with a layer's content, as opposed to
// the reading of it.
var errLayer = errors.New("invalid layer")

func layerErrorf(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errLayer}, args...)...)
}

type entryKind uint8

const (
	absent entryKind = iota
	directory
	impliedDirectory
	nonDirectory // what a hard link may point to
	symlink      // also; told apart for the error text
	whiteout
)

func (k entryKind) isDir() bool { return k == directory || k == impliedDirectory }

// layerEntry is a tar entry after its names were checked.
type layerEntry struct {
	hdr *tar.Header
	// path is clean and relative, "" for the root. For a whiteout it is what is
	// hidden, for an opaque marker the directory.
	path string
	// link is a hard link's target, clean and relative.
	link     string
	whiteout bool
	opaque   bool
}

// cleanEntryName checks a path of a layer. A leading slash means the image's
// root, as it does for docker and containerd (ko writes /var/run/ko, kaniko
// writes / for the root); nothing here becomes a path of the host. A name with
// .. is refused even if it stays inside.
func cleanEntryName(what, name string) (string, error) {
	switch {
	case len(name) > maxPathBytes:
		return "", layerErrorf("%s of %d bytes is longer than %d", what, len(name), maxPathBytes)
	case strings.ContainsRune(name, 0):
		return "", layerErrorf("%s %.100q contains a NUL byte", what, name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", layerErrorf("%s %.200q contains .. and could leave the image's root", what, name)
		}
		if len(part) > maxNameBytes {
			return "", layerErrorf("%s %.100q... has a component of %d bytes, more than %d", what, name, len(part), maxNameBytes)
		}
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

// tooManyEntries is also said of directories that no entry makes, but the paths of
// others imply: 2,048 of them fit into one path, and each takes an inode.
func tooManyEntries(most int) error {
	return layerErrorf("it has more than %d entries, or directories that their paths imply", most)
}

// nextEntry reads the next entry that is content; io.EOF at the end.
func nextEntry(tr *tar.Reader, index *int, maxEntries int) (layerEntry, error) {
	for {
		hdr, err := tr.Next()
		if err != nil {
			return layerEntry{}, err
		}
		if *index++; *index > maxEntries {
			return layerEntry{}, tooManyEntries(maxEntries)
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		e := layerEntry{hdr: hdr}
		if e.path, err = cleanEntryName("entry name", hdr.Name); err != nil {
			return layerEntry{}, err
		}
		dir, file := path.Split(e.path)
		dir = strings.TrimSuffix(dir, "/")
		if strings.HasPrefix(file, whiteoutPrefix) {
			switch hidden := strings.TrimPrefix(file, whiteoutPrefix); {
			case file == opaqueWhiteout:
				e.opaque, e.path = true, dir
			case strings.HasPrefix(file, whiteoutMeta):
				continue
			case hidden == "" || hidden == "." || hidden == "..":
				return layerEntry{}, layerErrorf("whiteout %.200q hides nothing that can exist", hdr.Name)
			default:
				e.whiteout, e.path = true, path.Join(dir, hidden)
			}
			if first, _, _ := strings.Cut(dir, "/"); strings.HasPrefix(first, whiteoutPrefix) {
				continue
			}
		}
		// Content below an aufs directory (.wh..wh.plnk/...) is aufs' own.
		if strings.HasPrefix(e.path, whiteoutMeta) || strings.Contains(e.path, "/"+whiteoutMeta) {
			continue
		}
		if e.whiteout || e.opaque {
			// Every ext4 has a lost+found, which the guest hides anyhow.
			if e.whiteout && e.path == "lost+found" {
				continue
			}
			return e, nil
		}
		switch hdr.Typeflag {
		case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
			if strings.HasSuffix(hdr.Name, "/") {
				return layerEntry{}, layerErrorf("entry %.200q has a directory's name and a file's type", hdr.Name)
			}
		case tar.TypeDir, tar.TypeFifo:
		case tar.TypeChar, tar.TypeBlock:
			// ext4's device numbers, as Linux has them: 12 and 20 bits.
			if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
				return layerEntry{}, layerErrorf("device %.200q has the impossible number %d:%d", hdr.Name, hdr.Devmajor, hdr.Devminor)
			}
		case tar.TypeSymlink:
			// Its target is content: only the guest will follow it.
			if hdr.Linkname == "" || len(hdr.Linkname) > maxLinkBytes || strings.ContainsRune(hdr.Linkname, 0) {
				return layerEntry{}, layerErrorf("symbolic link %.200q has a target that is empty, longer than %d bytes or has a NUL byte", hdr.Name, maxLinkBytes)
			}
		case tar.TypeLink:
			if e.link, err = cleanEntryName(fmt.Sprintf("target of hard link %.200q:", hdr.Name), hdr.Linkname); err != nil {
				return layerEntry{}, err
			}
			if e.link == "" {
				return layerEntry{}, layerErrorf("hard link %.200q points to the root", hdr.Name)
			}
		default:
			return layerEntry{}, layerErrorf("entry %.200q has the unsupported type %q", hdr.Name, hdr.Typeflag)
		}
		if e.path == "" && hdr.Typeflag != tar.TypeDir {
			return layerEntry{}, layerErrorf("entry %.200q would replace the root", hdr.Name)
		}
		if e.path == "lost+found" && hdr.Typeflag != tar.TypeDir {
			return layerEntry{}, layerErrorf("lost+found is not a directory; ext4 needs it to be one")
		}
		if hdr.Uid < 0 || hdr.Gid < 0 || int64(hdr.Uid) > 1<<32-2 || int64(hdr.Gid) > 1<<32-2 {
			return layerEntry{}, layerErrorf("entry %.200q has the impossible owner %d:%d", hdr.Name, hdr.Uid, hdr.Gid)
		}
		return e, nil
	}
}

const xattrRecord = "SCHILY.xattr."

// layerXattrs keeps the extended attributes that mean the same in ext4. Those
// that direct overlayfs are the guest's to set, not the image's; system.* are
// ACLs, whose tar form would make the file unreadable.
func layerXattrs(hdr *tar.Header) (map[string]string, error) {
	var out map[string]string
	total := 0
	for k, v := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(k, xattrRecord)
		if !ok || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue
		}
		ns, rest, ok := strings.Cut(name, ".")
		if !ok || rest == "" || ns != "user" && ns != "trusted" && ns != "security" {
			continue
		}
		if len(name) > maxNameBytes || strings.ContainsAny(name, "=\x00") {
			return nil, layerErrorf("entry %.200q has an extended attribute with the impossible name %.100q", hdr.Name, name)
		}
		if total += len(name) + len(v); total > maxXattrBytes {
			return nil, layerErrorf("entry %.200q has more than %d bytes of extended attributes", hdr.Name, maxXattrBytes)
		}
		if out == nil {
			out = map[string]string{}
		}
		out[k] = v
	}
	return out, nil
}

// layerTar reads a layer's tar stream, checks it and yields a tar stream that
// the ext4 writer takes: plain names, no surprises, each path once. It is an
// io.Reader that passes file content through without copying it.
type layerTar struct {
	tr     *tar.Reader
	limits *Limits
	plan   *layerPlan

	index   int
	implied int   // directories in seen that no entry has made
	bytes   int64 // of files, as their headers say
	// written counts their content as it is handed out; expands, if set, may
	// refuse it.
	written int64
	expands func(written int64) error
	seen    map[string]entryKind
	// out holds headers and padding that wait to be read; body bytes follow.
	out  bytes.Buffer
	body int64
	pad  int
	end  bool
}

func newLayerTar(r io.Reader, limits *Limits, plan *layerPlan) *layerTar {
	return &layerTar{tr: tar.NewReader(r), limits: limits, plan: plan, seen: map[string]entryKind{"": impliedDirectory, "lost+found": impliedDirectory}}
}

const tarBlock = 512

var zeros [2 * tarBlock]byte

func (l *layerTar) Read(p []byte) (int, error) {
	for {
		switch {
		case l.out.Len() > 0:
			return l.out.Read(p)
		case l.body > 0:
			n, err := l.tr.Read(p[:min(int64(len(p)), l.body)])
			l.body, l.written = l.body-int64(n), l.written+int64(n)
			if l.expands != nil {
				if err := l.expands(l.written); err != nil {
					return 0, err
				}
			}
			if l.body == 0 {
				l.out.Write(zeros[:l.pad])
				if err == io.EOF {
					err = nil
				}
			} else if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			if n > 0 || err != nil {
				return n, err
			}
		case l.end:
			return 0, io.EOF
		default:
			if err := l.next(); err != nil {
				return 0, err
			}
		}
	}
}

func (l *layerTar) next() error {
	e, err := nextEntry(l.tr, &l.index, l.limits.LayerEntries)
	if err == io.EOF {
		l.end = true
		l.out.Write(zeros[:])
		return nil
	}
	if err != nil {
		return err
	}
	if l.plan != nil {
		if l.plan.skip[l.index] {
			return nil
		}
		if e.whiteout && l.plan.opaque[l.index] {
			e.whiteout, e.opaque = false, true
		}
	}
	if err := l.place(e); err != nil {
		return err
	}

	hdr := tar.Header{Name: e.path, ModTime: e.hdr.ModTime}
	switch {
	case e.opaque:
		hdr.Typeflag, hdr.Name = tar.TypeReg, path.Join(e.path, opaqueWhiteout)
	case e.whiteout:
		dir, file := path.Split(e.path)
		hdr.Typeflag, hdr.Name = tar.TypeReg, dir+whiteoutPrefix+file
	default:
		hdr.Typeflag = e.hdr.Typeflag
		hdr.Mode = e.hdr.Mode & 0o7777
		hdr.Uid, hdr.Gid = e.hdr.Uid, e.hdr.Gid
		hdr.Devmajor, hdr.Devminor = e.hdr.Devmajor, e.hdr.Devminor
		hdr.AccessTime, hdr.ChangeTime = e.hdr.AccessTime, e.hdr.ChangeTime
		switch hdr.Typeflag {
		case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
			hdr.Typeflag, hdr.Size = tar.TypeReg, e.hdr.Size
			if l.bytes += hdr.Size; hdr.Size < 0 || l.bytes > l.limits.LayerBytes {
				return layerErrorf("its files are longer than %d bytes in total", l.limits.LayerBytes)
			}
		case tar.TypeDir:
			hdr.Name += "/"
		case tar.TypeSymlink:
			hdr.Linkname = e.hdr.Linkname
		case tar.TypeLink:
			hdr.Linkname = e.link
		}
		if hdr.PAXRecords, err = layerXattrs(e.hdr); err != nil {
			return err
		}
		// PAX keeps fractions of a second and all three times; it costs two
		// blocks, so entries that do not need it go without.
		if !hdr.AccessTime.IsZero() || !hdr.ChangeTime.IsZero() || hdr.ModTime.Nanosecond() != 0 {
			hdr.Format = tar.FormatPAX
		}
	}
	if err := tar.NewWriter(&l.out).WriteHeader(&hdr); err != nil {
		return layerErrorf("entry %.200q: %v", e.hdr.Name, err)
	}
	l.body = hdr.Size
	l.pad = int(-hdr.Size & (tarBlock - 1))
	return nil
}

// place checks e against what came before and remembers it.
func (l *layerTar) place(e layerEntry) error {
	for dir := path.Dir(e.path); e.path != "" && dir != "."; dir = path.Dir(dir) {
		kind := l.seen[dir]
		if kind == absent {
			if l.implied++; l.index+l.implied > l.limits.LayerEntries {
				return tooManyEntries(l.limits.LayerEntries)
			}
			l.seen[dir] = impliedDirectory
			continue
		}
		if kind.isDir() {
			break
		}
		if l.plan == nil {
			return errRepeatedEntry // a later entry may replace it; look closer
		}
		if kind == symlink {
			return layerErrorf("entry %.200q lies below %.200q, which the same layer makes a symbolic link", e.hdr.Name, dir)
		}
		return layerErrorf("entry %.200q lies below %.200q, which is not a directory", e.hdr.Name, dir)
	}
	have := l.seen[e.path]
	kind := nonDirectory
	switch {
	case e.opaque:
		kind = impliedDirectory
		if have == directory {
			kind = directory
		}
	case e.whiteout:
		kind = whiteout
	case e.hdr.Typeflag == tar.TypeDir:
		kind = directory
	case e.hdr.Typeflag == tar.TypeSymlink:
		kind = symlink
	case e.hdr.Typeflag == tar.TypeLink:
		switch l.seen[e.link] {
		case nonDirectory:
		case symlink:
			kind = symlink
		case absent, whiteout:
			return layerErrorf("hard link %.200q points to %.200q, which the layer has not made before it", e.hdr.Name, e.hdr.Linkname)
		default:
			return layerErrorf("hard link %.200q points to the directory %.200q", e.hdr.Name, e.hdr.Linkname)
		}
	}
	if have != absent && !(have.isDir() && kind.isDir()) {
		if l.plan == nil {
			return errRepeatedEntry
		}
		return layerErrorf("entry %.200q replaces an earlier entry in a way that can't be carried out", e.hdr.Name)
	}
	l.seen[e.path] = kind
	return nil
}

// layerPlan says what to leave out of a layer that names a path more than once,
// so that the last entry wins as it does when tar extracts. Entries are counted
// from 1.
type layerPlan struct {
	skip map[int]bool
	// opaque are whiteouts of a directory that the same layer makes: whiteouts
	// concern lower layers only, so they become the directory's opaque mark.
	opaque map[int]bool
}

// planLayer reads all of a layer's headers.
func planLayer(r io.Reader, limits *Limits) (*layerPlan, error) {
	type owner struct {
		index int
		dir   bool
	}
	plan := &layerPlan{skip: map[int]bool{}, opaque: map[int]bool{}}
	owners := map[string]owner{}
	// children makes a replaced directory's content findable.
	children := map[string]map[string]bool{}
	whiteouts := map[string]int{}
	type hardlink struct {
		index  int
		name   string
		target string
		of     int
	}
	var links []hardlink
	var dropTree func(p string)
	dropTree = func(p string) {
		if o, ok := owners[p]; ok {
			plan.skip[o.index] = true
			delete(owners, p)
		}
		for c := range children[p] {
			dropTree(c)
		}
		delete(children, p)
	}
	tr := tar.NewReader(r)
	index, implied := 0, 0
	for {
		e, err := nextEntry(tr, &index, limits.LayerEntries)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		if e.opaque || e.path == "" {
			continue
		}
		if e.whiteout {
			if prev, ok := whiteouts[e.path]; ok {
				plan.skip[prev] = true
			}
			whiteouts[e.path] = index
			continue
		}
		isDir := e.hdr.Typeflag == tar.TypeDir
		if have, ok := owners[e.path]; ok && !(have.dir && isDir) {
			dropTree(e.path)
		} else if !ok && !isDir && len(children[e.path]) > 0 {
			dropTree(e.path) // replaces a directory that was only implied
		}
		owners[e.path] = owner{index, isDir}
		for p := e.path; ; {
			dir := path.Dir(p)
			if dir == "." || dir == "/" {
				break
			}
			if children[dir] == nil {
				if _, ok := owners[dir]; !ok {
					if implied++; index+implied > limits.LayerEntries {
						return nil, tooManyEntries(limits.LayerEntries)
					}
				}
				children[dir] = map[string]bool{}
			}
			if children[dir][p] {
				break
			}
			children[dir][p] = true
			p = dir
		}
		if e.hdr.Typeflag == tar.TypeLink {
			links = append(links, hardlink{index, e.hdr.Name, e.link, owners[e.link].index})
		}
	}
	for p, i := range whiteouts {
		o, ok := owners[p]
		switch {
		case ok && o.dir, !ok && len(children[p]) > 0:
			plan.opaque[i] = true
		case ok:
			plan.skip[i] = true
		}
	}
	for _, l := range links {
		if plan.skip[l.of] && !plan.skip[l.index] {
			return nil, layerErrorf("hard link %.200q points to a version of %.200q that a later entry replaces", l.name, l.target)
		}
	}
	return plan, nil
}
