package imageservice

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/cri-vz/cri-vz/test/images"
)

func layout(t testing.TB, img v1.Image, docker bool) []images.Entry {
	t.Helper()
	e, err := images.LayoutEntries("docker.io/library/bad:1", img, docker)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// edit changes the entries whose name has the suffix.
func edit(entries []images.Entry, suffix string, f func(*images.Entry)) []images.Entry {
	out := slices.Clone(entries)
	for i := range out {
		if strings.HasSuffix(out[i].Name, suffix) {
			out[i].Body = slices.Clone(out[i].Body)
			f(&out[i])
		}
	}
	return out
}

func without(entries []images.Entry, suffix string) []images.Entry {
	return slices.DeleteFunc(slices.Clone(entries), func(e images.Entry) bool { return strings.HasSuffix(e.Name, suffix) })
}

func hexOf(t testing.TB, img v1.Image, layer int) string {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	h, err := layers[layer].Digest()
	if err != nil {
		t.Fatal(err)
	}
	return h.Hex
}

// remanifest replaces the manifest of an OCI layout and all that names it.
func remanifest(t testing.TB, entries []images.Entry, change func(*v1.Manifest)) []images.Entry {
	t.Helper()
	var index v1.IndexManifest
	var out []images.Entry
	for _, e := range entries {
		if e.Name == "index.json" {
			if err := json.Unmarshal(e.Body, &index); err != nil {
				t.Fatal(err)
			}
		}
	}
	old := index.Manifests[0].Digest.Hex
	var raw []byte
	for _, e := range entries {
		switch {
		case strings.HasSuffix(e.Name, old):
			var m v1.Manifest
			if err := json.Unmarshal(e.Body, &m); err != nil {
				t.Fatal(err)
			}
			change(&m)
			var err error
			if raw, err = json.Marshal(m); err != nil {
				t.Fatal(err)
			}
		case e.Name != "index.json":
			out = append(out, e)
		}
	}
	hash, size, err := v1.SHA256(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	index.Manifests[0].Digest, index.Manifests[0].Size = hash, size
	b, err := json.Marshal(index)
	if err != nil {
		t.Fatal(err)
	}
	return append(out, images.File("blobs/sha256/"+hash.Hex, 0o644, string(raw)), images.File("index.json", 0o644, string(b)))
}

func TestBadArchive(t *testing.T) {
	img := smallImage(t, "amd64", "bad")
	oci, docker := layout(t, img, false), layout(t, img, true)
	gz, err := images.Tar(docker...)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(repackBytes(t, "x.gz", gz))
	if err != nil {
		t.Fatal(err)
	}
	noLayers, err := images.Image("amd64", v1.Config{})
	if err != nil {
		t.Fatal(err)
	}
	tarOf := func(e []images.Entry) []byte {
		b, err := images.Tar(e...)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	flip := func(b []byte, at int) []byte {
		b = slices.Clone(b)
		b[at] ^= 0xff
		return b
	}
	for _, tt := range []struct {
		name string
		file []byte
		want func(error) bool
		text string
	}{
		{"empty file", nil, errdefs.IsInvalidArgument, "empty"},
		{"not an archive", bytes.Repeat([]byte("hello "), 1000), errdefs.IsInvalidArgument, "not a tar"},
		{"empty tar", tarOf(nil), errdefs.IsInvalidArgument, "empty"},
		{"tar without an image", tarOf([]images.Entry{images.File("README", 0o644, "x")}), errdefs.IsInvalidArgument, "manifest.json"},
		{"truncated tar", gz[:len(gz)/2], errdefs.IsDataLoss, "truncated"},
		{"truncated gzip", whole[:len(whole)/2], errdefs.IsDataLoss, "truncated"},
		{"gzip without its checksum", whole[:len(whole)-4], errdefs.IsDataLoss, "truncated"},
		{"damaged gzip", flip(whole, len(whole)-6), errdefs.IsDataLoss, "damaged"},
		{"entry with ..", tarOf(append([]images.Entry{images.File("../evil", 0o644, "x")}, docker...)), errdefs.IsInvalidArgument, `"../evil"`},
		{"absolute entry", tarOf(append([]images.Entry{images.File("/etc/evil", 0o644, "x")}, docker...)), errdefs.IsInvalidArgument, `"/etc/evil"`},
		{"symbolic link out of the archive", tarOf(append([]images.Entry{images.Symlink("a/b", "../../etc/passwd")}, docker...)), errdefs.IsInvalidArgument, "outside"},
		{"absolute symbolic link", tarOf(append([]images.Entry{images.Symlink("b", "/etc/passwd")}, docker...)), errdefs.IsInvalidArgument, "outside"},
		{"hard link out of the archive", tarOf(append([]images.Entry{images.Hardlink("b", "../etc/passwd")}, docker...)), errdefs.IsInvalidArgument, "outside"},
		{"device", tarOf(append([]images.Entry{{Header: tar.Header{Name: "d", Typeflag: tar.TypeChar}}}, docker...)), errdefs.IsInvalidArgument, "type"},
		{"link loop", tarOf(append(without(docker, "json"), images.Symlink("manifest.json", "b"), images.Symlink("b", "manifest.json"))), errdefs.IsInvalidArgument, "manifest.json"},
		{"wrong layer digest", tarOf(edit(oci, hexOf(t, img, 0), func(e *images.Entry) { e.Body[len(e.Body)-3] ^= 1 })), errdefs.IsDataLoss, "digest"},
		{"wrong layer digest in docker's", tarOf(edit(docker, diffHex(t, img, 0), func(e *images.Entry) { e.Body[600] ^= 1 })), errdefs.IsDataLoss, "digest"},
		{"missing layer", tarOf(without(oci, hexOf(t, img, 1))), errdefs.IsInvalidArgument, hexOf(t, img, 1)},
		{"missing layer in docker's", tarOf(without(without(docker, "index.json"), diffHex(t, img, 1))), errdefs.IsInvalidArgument, diffHex(t, img, 1)},
		{"missing config", tarOf(without(oci, strings.TrimPrefix(configDigest(t, img), "sha256:"))), errdefs.IsInvalidArgument, configDigest(t, img)},
		{"other architecture", tarOf(layout(t, smallImage(t, "s390x", "x"), false)), errdefs.IsFailedPrecondition, "linux/amd64"},
		{"other architecture names both", tarOf(layout(t, smallImage(t, "s390x", "x"), true)), errdefs.IsFailedPrecondition, "linux/s390x"},
		{"no layers", tarOf(layout(t, noLayers, false)), errdefs.IsInvalidArgument, "no layers"},
		{"no layers in docker's", tarOf(without(layout(t, noLayers, true), "index.json")), errdefs.IsInvalidArgument, "no layers"},
		{"config is not JSON", tarOf(edit(without(docker, "index.json"), strings.TrimPrefix(configDigest(t, img), "sha256:"), func(e *images.Entry) { e.Body = []byte("nope") })), errdefs.IsInvalidArgument, "not JSON"},
		{"config is bad JSON", tarOf(edit(without(docker, "index.json"), strings.TrimPrefix(configDigest(t, img), "sha256:"), func(e *images.Entry) { e.Body = []byte("{nope") })), errdefs.IsInvalidArgument, "not valid JSON"},
		{"config with another digest", tarOf(edit(without(docker, "index.json"), strings.TrimPrefix(configDigest(t, img), "sha256:"), func(e *images.Entry) { e.Body = append(e.Body, ' ') })), errdefs.IsDataLoss, "digest"},
		{"index.json is bad", tarOf(edit(oci, "index.json", func(e *images.Entry) { e.Body = []byte("{") })), errdefs.IsInvalidArgument, "index.json"},
		{"manifest.json is bad", tarOf(edit(without(docker, "index.json"), "manifest.json", func(e *images.Entry) { e.Body = []byte("[{}") })), errdefs.IsInvalidArgument, "manifest.json"},
		{"layer path with ..", tarOf([]images.Entry{images.File("c.json", 0o644, `{"rootfs":{"diff_ids":["sha256:`+strings.Repeat("a", 64)+`"]}}`), images.File("manifest.json", 0o644, `[{"Config":"c.json","Layers":["../../etc/passwd"]}]`)}), errdefs.IsInvalidArgument, ".."},
		{"too many images", tarOf(edit(oci, "index.json", func(e *images.Entry) {
			var index v1.IndexManifest
			if err := json.Unmarshal(e.Body, &index); err != nil {
				t.Fatal(err)
			}
			index.Manifests = slices.Repeat(index.Manifests, 1001)
			b, err := json.Marshal(index)
			if err != nil {
				t.Fatal(err)
			}
			e.Body = b
		})), errdefs.IsInvalidArgument, "more than 1000"},
		{"too many images in docker's", tarOf(edit(without(docker, "index.json"), "manifest.json", func(e *images.Entry) {
			one := strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(string(e.Body)), "["), "]")
			e.Body = []byte("[" + strings.Repeat(one+",", 1000) + one + "]")
		})), errdefs.IsInvalidArgument, "more than 1000"},
		{"bad tag", tarOf(edit(without(docker, "index.json"), "manifest.json", func(e *images.Entry) {
			e.Body = bytes.Replace(e.Body, []byte("docker.io/library/bad:1"), []byte("Not A Tag"), 1)
		})), errdefs.IsInvalidArgument, "not a tag"},
		{"artifact", tarOf(remanifest(t, oci, func(m *v1.Manifest) { m.Config.MediaType = "application/vnd.oci.empty.v1+json" })), errdefs.IsInvalidArgument, "not a container image"}, // T44
		{"unsupported layer", tarOf(remanifest(t, oci, func(m *v1.Manifest) { m.Layers[0].MediaType = "application/vnd.wasm" })), errdefs.IsInvalidArgument, "application/vnd.wasm"},
		{"foreign layer", tarOf(remanifest(t, oci, func(m *v1.Manifest) { m.Layers[0].MediaType = types.DockerForeignLayer })), errdefs.IsInvalidArgument, "distributed"},
		{"layer count", tarOf(remanifest(t, oci, func(m *v1.Manifest) { m.Layers = m.Layers[:2] })), errdefs.IsInvalidArgument, "3 diff IDs for 2 layers"},
		{"too many layers", tarOf(remanifest(t, oci, func(m *v1.Manifest) { m.Layers = slices.Repeat(m.Layers, 50) })), errdefs.IsInvalidArgument, "more than 127"},
		{"digest that is a path", tarOf(edit(oci, "index.json", func(e *images.Entry) {
			e.Body = []byte(`{"schemaVersion":2,"manifests":[{"digest":"sha256:../../../../etc/passwd"}]}`)
		})), errdefs.IsInvalidArgument, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore(t)
			_, err := s.Load(t.Context(), bytes.NewReader(tt.file), nil)
			if err == nil || !tt.want(err) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %v, want one with %q", err, tt.text)
			}
			wantEmpty(t, s)
		})
	}
}

func diffHex(t testing.TB, img v1.Image, layer int) string {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	h, err := layers[layer].DiffID()
	if err != nil {
		t.Fatal(err)
	}
	return h.Hex
}

// TestLayerContent loads images of one layer that has the entries.
func TestLayerContent(t *testing.T) {
	dev := func(name string, major, minor int64) images.Entry {
		return images.Entry{Header: tar.Header{Name: name, Typeflag: tar.TypeChar, Devmajor: major, Devminor: minor}}
	}
	xattrs := func(e images.Entry, kv ...string) images.Entry {
		e.PAXRecords = map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			e.PAXRecords["SCHILY.xattr."+kv[i]] = kv[i+1]
		}
		return e
	}
	type expect map[string]string // debugfs request to a part of its answer, "!" for its absence
	for _, tt := range []struct {
		name    string
		entries []images.Entry
		bad     string
		want    expect
	}{
		{name: "..", entries: []images.Entry{images.File("../x", 0o644, "x")}, bad: `"../x"`},
		{name: ".. inside", entries: []images.Entry{images.File("a/../x", 0o644, "x")}, bad: ".."},
		{name: "hard link out", entries: []images.Entry{images.Hardlink("a", "../../etc/shadow")}, bad: "../../etc/shadow"},
		{name: "hard link to nothing", entries: []images.Entry{images.Hardlink("a", "etc/shadow")}, bad: "has not made"},
		{name: "hard link to a directory", entries: []images.Entry{images.Dir("d/", 0), images.Hardlink("a", "d")}, bad: "directory"},
		{name: "through a symbolic link", entries: []images.Entry{images.Symlink("l", "/etc"), images.File("l/passwd", 0o644, "x")}, bad: "symbolic link"},
		{name: "below a file", entries: []images.Entry{images.File("f", 0o644, "x"), images.File("f/g", 0o644, "x")}, bad: "not a directory"},
		{name: "long component", entries: []images.Entry{images.File(strings.Repeat("n", 256), 0o644, "x")}, bad: "256 bytes"},
		{name: "long path", entries: []images.Entry{images.File(strings.Repeat("n/", 2100)+"x", 0o644, "x")}, bad: "longer than"},
		{name: "long symbolic link", entries: []images.Entry{images.Symlink("l", strings.Repeat("x", 5000))}, bad: "4095"},
		{name: "whiteout of ..", entries: []images.Entry{images.File("d/.wh...", 0o644, "")}, bad: "whiteout"},
		{name: "impossible device", entries: []images.Entry{dev("d", 5000, 1)}, bad: "5000"},
		{name: "xattrs too long", entries: []images.Entry{xattrs(images.File("f", 0o644, "x"), "user.a", strings.Repeat("x", 5000))}, bad: "extended attributes"},
		{name: "lost+found is a file", entries: []images.Entry{images.File("lost+found", 0o644, "x")}, bad: "lost+found"},
		{name: "too many entries", entries: slices.Repeat([]images.Entry{images.Dir("d/", 0)}, 200), bad: "more than 100 entries"},
		{name: "too many implied directories", entries: []images.Entry{images.File(strings.Repeat("a/", 60)+"f", 0o644, "x"), images.File(strings.Repeat("b/", 60)+"f", 0o644, "x")}, bad: "more than 100 entries"},
		{name: "too long", entries: []images.Entry{images.File("f", 0o644, strings.Repeat("x", 2<<20))}, bad: "longer than 1048576"},

		{name: "absolute names are the image's root", entries: []images.Entry{images.Dir("/", 0o711), images.Dir("/var", 0o755), images.File("/var/x", 0o644, "ko")}, want: expect{"cat /var/x": "ko", "stat /": "Mode:  0711"}},
		{name: "symbolic link anywhere", entries: []images.Entry{images.Symlink("l", "../../../etc/passwd"), images.Symlink("m", "/"+strings.Repeat("x", 200))}, want: expect{"stat /l": "../../../etc/passwd", "stat /m": "Size: 201"}},
		{name: "parents that no entry makes", entries: []images.Entry{images.File("a/b/c", 0o644, "x")}, want: expect{"stat /a/b": "Mode:  0755"}},
		{name: "last of equal names wins", entries: []images.Entry{images.File("f", 0o600, "first"), images.Dir("d/", 0o700), images.File("g", 0o644, "g"), images.File("f", 0o644, "second"), images.Dir("d/", 0o755)}, want: expect{"cat /f": "second", "stat /d": "Mode:  0755", "cat /g": "g"}},
		{name: "directory replaces file and back", entries: []images.Entry{images.File("f", 0o644, "x"), images.Dir("f/", 0o755), images.File("f/in", 0o644, "in"), images.Dir("d/", 0o755), images.File("d/gone", 0o644, "x"), images.File("d", 0o644, "now a file")}, want: expect{"cat /f/in": "in", "cat /d": "now a file"}},
		{name: "link to a replaced file", entries: []images.Entry{images.File("f", 0o644, "1"), images.Hardlink("h", "f"), images.File("f", 0o644, "2")}, bad: "replaces"},
		{name: "whiteout and file", entries: []images.Entry{images.File("f", 0o644, "stays"), images.File(".wh.f", 0o644, "")}, want: expect{"cat /f": "stays"}},
		{name: "whiteout and directory", entries: []images.Entry{images.File(".wh.d", 0o644, ""), images.Dir("d/", 0o755), images.File("d/x", 0o644, "x")}, want: expect{"ea_list /d": "trusted.overlay.opaque", "cat /d/x": "x"}},
		{name: "opaque before its directory", entries: []images.Entry{images.File("d/.wh..wh..opq", 0o644, ""), images.Dir("d/", 0o700)}, want: expect{"ea_list /d": "trusted.overlay.opaque", "stat /d": "Mode:  0700"}},
		{name: "opaque root", entries: []images.Entry{images.File(".wh..wh..opq", 0o644, "")}, want: expect{"ea_list /": "trusted.overlay.opaque"}},
		{name: "aufs leftovers", entries: []images.Entry{images.Dir(".wh..wh.plnk/", 0o755), images.File(".wh..wh.plnk/1.2", 0o644, "x"), images.File(".wh..wh.aufs", 0o644, ""), images.File("f", 0o644, "f")}, want: expect{"cat /f": "f", "ls /": "!plnk"}},
		{name: "whiteout of lost+found", entries: []images.Entry{images.File(".wh.lost+found", 0o644, ""), images.File("f", 0o644, "f")}, want: expect{"cat /f": "f"}},
		{name: "xattrs", entries: []images.Entry{xattrs(images.File("f", 0o755, "x"), "security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "user.x", "y", "trusted.overlay.redirect", "/etc", "user.overlay.opaque", "y", "system.posix_acl_access", "x", "bogus", "z")}, want: expect{"ea_list /f": "security.capability", "ea_list  /f": "user.x", "ea_list   /f": "!overlay", "ea_list    /f": "!posix_acl"}},
		{name: "device and fifo", entries: []images.Entry{dev("null", 1, 3), {Header: tar.Header{Name: "p", Typeflag: tar.TypeFifo}}}, want: expect{"stat /null": "01:03", "stat /p": "FIFO"}},
		{name: "large ids", entries: []images.Entry{{Header: tar.Header{Name: "f", Uid: 1 << 31, Gid: 70000}, Body: []byte("x")}}, want: expect{"stat /f": "2147483648"}},
		{name: "global header", entries: []images.Entry{{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "x"}}}, images.File("f", 0o644, "f")}, want: expect{"cat /f": "f", "ls /": "!pax_global"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			layer, err := images.Layer(tt.entries...)
			if err != nil {
				t.Fatal(err)
			}
			img, err := images.Image("amd64", v1.Config{}, layer)
			if err != nil {
				t.Fatal(err)
			}
			s := newStore(t, func(c *Config) { c.Limits.LayerEntries, c.Limits.LayerBytes = 100, 1<<20 })
			got, err := loadFile(t, s, repack(t, "x.tar", layout(t, img, false)))
			if tt.bad != "" {
				if err == nil || !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tt.bad) {
					t.Errorf("error %v, want one with %q", err, tt.bad)
				}
				wantEmpty(t, s)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			fsck(t, got[0].Layers[0].Path)
			for request, want := range tt.want {
				out := debugfs(t, got[0].Layers[0].Path, request)
				if absent, ok := strings.CutPrefix(want, "!"); ok && strings.Contains(out, absent) || !ok && !strings.Contains(out, want) {
					t.Errorf("%s: want %q in\n%s", request, want, out)
				}
			}
		})
	}
}

func TestDecompressionBomb(t *testing.T) {
	s := newStore(t, func(c *Config) { c.Limits.ratioGrace = 1 << 20 })
	// Zeros shrink to about a thousandth.
	var sparse bytes.Buffer
	tw := tar.NewWriter(&sparse)
	if err := tw.WriteHeader(&tar.Header{Name: "zeros", Mode: 0o644, Size: 8 << 20}); err != nil {
		t.Fatal(err)
	}
	zero := make([]byte, 1<<20)
	for range 8 {
		tw.Write(zero)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	hash, _, err := v1.SHA256(bytes.NewReader(sparse.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[%q]}}`, hash)
	_, err = loadFile(t, s, repack(t, "x.gz", []images.Entry{
		images.File("c.json", 0o644, config), images.File("l.tar", 0o644, sparse.String()),
		images.File("manifest.json", 0o644, `[{"Config":"c.json","RepoTags":["bomb:1"],"Layers":["l.tar"]}]`),
	}))
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "bomb") {
		t.Errorf("error %v", err)
	}
	wantEmpty(t, s)
}

// What a path implies takes memory as entries do, also while a layer is planned.
func TestPlanIsBounded(t *testing.T) {
	layer, err := images.Tar(images.File("f", 0o644, "1"), images.File("f", 0o644, "2"),
		images.File(strings.Repeat("a/", 60)+"f", 0o644, "x"), images.File(strings.Repeat("b/", 60)+"f", 0o644, "x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := planLayer(bytes.NewReader(layer), &Limits{LayerEntries: 100}); err == nil || !strings.Contains(err.Error(), "more than 100 entries") {
		t.Errorf("124 entries and implied directories: %v", err)
	}
	if _, err := planLayer(bytes.NewReader(layer), &Limits{LayerEntries: 130}); err != nil {
		t.Error(err)
	}
}

// The holes of a sparse file take no bytes of the tar and all of them on disk.
func TestSparseBomb(t *testing.T) {
	// Half of the layer's bytes are in its other file, so that it is not the tar
	// that expands.
	noise := make([]byte, 64<<10)
	rand.NewChaCha8([32]byte{}).Read(noise)
	layer, err := images.Tar(images.Entry{Header: tar.Header{Name: "sparse", Mode: 0o644, Format: tar.FormatGNU}}, images.File("noise", 0o644, string(noise)))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		size int64
		bad  bool
	}{{"hole", 8 << 20, false}, {"bomb", 64 << 20, true}} {
		t.Run(tt.name, func(t *testing.T) {
			layer := bytes.Clone(layer)
			// The old GNU form: no data, and a real size (GNU tar manual, "Sparse Formats").
			h := layer[:512]
			h[156] = tar.TypeGNUSparse
			copy(h[386:], fmt.Sprintf("%011o\x00%011o\x00", tt.size, 0))
			copy(h[483:], fmt.Sprintf("%011o\x00", tt.size))
			copy(h[148:156], "        ")
			sum := 0
			for _, b := range h {
				sum += int(b)
			}
			copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
			hash, _, err := v1.SHA256(bytes.NewReader(layer))
			if err != nil {
				t.Fatal(err)
			}
			s := newStore(t, func(c *Config) { c.Limits.ratioGrace = 1 << 20 })
			got, err := loadFile(t, s, repack(t, "x.tar", []images.Entry{
				images.File("c.json", 0o644, fmt.Sprintf(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[%q]}}`, hash)),
				images.File("l.tar", 0o644, string(layer)), images.File("manifest.json", 0o644, `[{"Config":"c.json","RepoTags":["sparse:1"],"Layers":["l.tar"]}]`),
			}))
			if !tt.bad {
				if err != nil {
					t.Fatal(err)
				}
				if out := debugfs(t, got[0].Layers[0].Path, "stat /sparse"); !strings.Contains(out, fmt.Sprint("Size: ", tt.size)) {
					t.Error(out)
				}
				return
			}
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "bomb") {
				t.Errorf("error %v", err)
			}
			wantEmpty(t, s)
		})
	}
}

func TestUse(t *testing.T) {
	s := newStore(t)
	img := smallImage(t, "amd64", "use")
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	// The first layer again on top: overlayfs takes a directory once.
	img, err = images.Image("amd64", v1.Config{}, append(layers, layers[0])...)
	if err != nil {
		t.Fatal(err)
	}
	got, err := loadFile(t, s, repack(t, "x.tar", layout(t, img, false)))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	first, err := s.Use(t.Context(), got[0].ID, dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(got[0].Layers) != 4 || len(first) != 3 || first[0].DiffID != got[0].Layers[1].DiffID || first[2].DiffID != got[0].Layers[3].DiffID {
		t.Fatalf("image layers %v, used %v", got[0].Layers, first)
	}
	again, err := s.Use(t.Context(), "bad:1", dir)
	if err != nil || !slices.Equal(first, again) {
		t.Errorf("again: %v, %v", again, err)
	}
	for _, l := range first {
		if filepath.Dir(l.Path) != dir {
			t.Errorf("link %s is not in %s", l.Path, dir)
		}
	}
	if err := s.Remove(t.Context(), got[0].ID); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, s)
	for _, l := range first {
		fsck(t, l.Path)
	}
	if _, err := s.Use(t.Context(), got[0].ID, dir); !errdefs.IsNotFound(err) {
		t.Errorf("use of a removed image: %v", err)
	}
}

func TestFileSystemErrors(t *testing.T) {
	s := newStore(t)
	if err := os.WriteFile(filepath.Join(s.cfg.Root, "x"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Root: filepath.Join(s.cfg.Root, "x")}); err == nil {
		t.Error("opened a store in a file")
	}
	if _, err := Open(Config{Root: "relative"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("relative root: %v", err)
	}
	if _, err := Open(Config{Root: t.TempDir(), Limits: Limits{LayerBytes: 1 << 50}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("limit too high: %v", err)
	}
	if err := diskError("p", errors.New("x")); errdefs.IsResourceExhausted(err) {
		t.Error("any error is a full disk")
	}
}
