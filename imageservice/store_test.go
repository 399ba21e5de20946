package imageservice

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"github.com/cri-vz/cri-vz/test/images"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

func newStore(t testing.TB, change ...func(*Config)) *Store {
	t.Helper()
	cfg := Config{Root: filepath.Join(t.TempDir(), "images"), Arch: "amd64"}
	for _, c := range change {
		c(&cfg)
	}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// smallImage has three layers with a whiteout and an opaque directory.
func smallImage(t testing.TB, arch string, salt string) v1.Image {
	t.Helper()
	var layers []v1.Layer
	for _, entries := range [][]images.Entry{
		{images.Dir("etc/", 0o755), images.File("etc/passwd", 0o644, "root:x:0:0::/:\n"), images.Dir("d/", 0o755), images.File("d/old", 0o600, "old")},
		{images.File("etc/.wh.passwd", 0o644, ""), images.Dir("d/", 0o755), images.File("d/.wh..wh..opq", 0o644, ""), images.File("d/new", 0o4755, "new")},
		{images.File("salt", 0o644, salt), images.Hardlink("salt2", "salt"), images.Symlink("link", "/etc/../../outside")},
	} {
		l, err := images.Layer(entries...)
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, l)
	}
	img, err := images.Image(arch, v1.Config{Cmd: []string{"/bin/x"}, Env: []string{"A=b"}, User: "app", Labels: map[string]string{"salt": salt}}, layers...)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func configDigest(t testing.TB, img v1.Image) string {
	t.Helper()
	h, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

func loadFile(t testing.TB, s *Store, path string) ([]Image, error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return s.Load(t.Context(), f, nil)
}

func rec(t testing.TB, s *Store, id string) *imageRecord {
	t.Helper()
	r, _, err := s.meta.get(id)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// files lists what the store has besides its metadata.
func files(t testing.TB, s *Store) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(s.cfg.Root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == "images.db" {
			return err
		}
		rel, err := filepath.Rel(s.cfg.Root, p)
		out = append(out, rel)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func wantEmpty(t testing.TB, s *Store) {
	t.Helper()
	if have := files(t, s); len(have) > 0 {
		t.Errorf("left behind: %q", have)
	}
	if list, err := s.List(); err != nil || len(list) > 0 {
		t.Errorf("images left: %v, %v", list, err)
	}
}

// debugfs asks e2fsprogs, which shares no code with the writer.
func debugfs(t testing.TB, image, request string) string {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("e2fsprogs is used on Linux only")
	}
	var stderr bytes.Buffer
	cmd := exec.Command("debugfs", "-R", request, image)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin", "DEBUGFS_PAGER=cat")
	cmd.Path = findTool(t, "debugfs")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("debugfs %s: %v: %s", request, err, stderr.Bytes())
	}
	return string(out) + strings.TrimPrefix(stderr.String(), "debugfs ")
}

func findTool(t testing.TB, name string) string {
	t.Helper()
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin"} {
		if p := filepath.Join(dir, name); exec.Command(p, "-V").Run() == nil {
			return p
		}
	}
	t.Fatalf("%s is missing: install e2fsprogs", name)
	return ""
}

func fsck(t testing.TB, image string) {
	t.Helper()
	if runtime.GOOS != "linux" {
		return
	}
	out, err := exec.Command(findTool(t, "e2fsck"), "-fn", image).CombinedOutput()
	if err == nil {
		return
	}
	for line := range strings.Lines(string(out)) {
		switch {
		case strings.HasPrefix(line, "Pass "), strings.HasPrefix(line, "e2fsck "), strings.Contains(line, "non-contiguous"),
			strings.Contains(line, "Filesystem still has errors"), strings.TrimSpace(line) == "":
		case strings.HasPrefix(line, "Padding at end of inode bitmap is not set"):
			// hcsshim's writer leaves it; the kernel does not look at it.
		default:
			t.Errorf("e2fsck %s: %v\n%s", image, err, out)
			return
		}
	}
}

func repack(t testing.TB, dst string, entries []images.Entry) string {
	t.Helper()
	b, err := images.Tar(entries...)
	if err != nil {
		t.Fatal(err)
	}
	return repackBytes(t, dst, b)
}

func repackBytes(t testing.TB, dst string, b []byte) string {
	t.Helper()
	var buf bytes.Buffer
	switch filepath.Ext(dst) {
	case ".gz":
		zw := gzip.NewWriter(&buf)
		zw.Write(b)
		zw.Close()
	case ".zst":
		zw, err := zstd.NewWriter(&buf)
		if err != nil {
			t.Fatal(err)
		}
		zw.Write(b)
		zw.Close()
	default:
		buf.Write(b)
	}
	path := filepath.Join(t.TempDir(), dst)
	if err := os.WriteFile(path, buf.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoad(t *testing.T) {
	img := smallImage(t, "amd64", "one")
	other := smallImage(t, "amd64", "two")
	entries := func(ref string, img v1.Image, docker bool) []images.Entry {
		e, err := images.LayoutEntries(ref, img, docker)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	// The extension only tells repack how to compress; the store never sees it.
	for _, tt := range []struct {
		name, ext string
		docker    bool
	}{
		{"docker-archive", ".tar", true},
		{"docker-archive gzip", ".gz", true},
		{"docker-archive zstd", ".zst", true},
		{"oci", ".tar", false},
		{"oci gzip", ".gz", false},
		{"oci zstd", ".zst", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore(t)
			path := repack(t, "x"+tt.ext, entries("docker.io/library/a:1", img, tt.docker))
			var last Progress
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			got, err := s.Load(t.Context(), f, func(p Progress) { last = p })
			if err != nil {
				t.Fatal(err)
			}
			if last.Stage != StageDone || last.Layers != 3 || last.LayersTotal != 3 {
				t.Errorf("last progress %+v", last)
			}
			if len(got) != 1 || got[0].ID != configDigest(t, img) || !slices.Equal(got[0].RepoTags, []string{"docker.io/library/a:1"}) || len(got[0].RepoDigests) != 0 {
				t.Fatalf("loaded %+v", got)
			}
			if c := got[0].Config.Config; c.User != "app" || c.Env[0] != "A=b" || c.Cmd[0] != "/bin/x" {
				t.Errorf("config %+v", c)
			}
			if len(got[0].Layers) != 3 || got[0].Size == 0 {
				t.Fatalf("layers %+v", got[0].Layers)
			}
			for _, l := range got[0].Layers {
				fsck(t, l.Path)
				if st, err := os.Stat(l.Path); err != nil || st.Mode() != 0o444 || st.Size() != l.Size {
					t.Errorf("%s: %v, %v; want mode 0444 and %d bytes", l.Path, st, err, l.Size)
				}
			}
			// Overlay's forms of a whiteout and of an opaque directory.
			if out := debugfs(t, got[0].Layers[1].Path, "stat /etc/passwd"); !strings.Contains(out, "character special") || !strings.Contains(out, "00:00") {
				t.Errorf("whiteout:\n%s", out)
			}
			if out := debugfs(t, got[0].Layers[1].Path, "ea_list /d"); !strings.Contains(out, "trusted.overlay.opaque") {
				t.Errorf("opaque directory:\n%s", out)
			}
			if out := debugfs(t, got[0].Layers[1].Path, "stat /d/new"); !strings.Contains(out, "Mode:  04755") {
				t.Errorf("setuid file:\n%s", out)
			}
			if out := debugfs(t, got[0].Layers[2].Path, "cat /salt2"); out[:3] != "one" {
				t.Errorf("hard link: %q", out)
			}
			// T44: compressed layers are kept, and nothing is there but what the
			// record names: no temporary and no plain tar.
			for _, l := range rec(t, s, got[0].ID).Layers {
				f, err := os.Open(s.blobPath(l.Blob))
				if err != nil {
					t.Fatal(err)
				}
				if _, kind, err := decompress(f); err != nil || kind == uncompressed {
					t.Errorf("blob of layer %s is %s, %v", l.DiffID, kind, err)
				}
				f.Close()
			}
			want := map[string]bool{}
			for _, o := range rec(t, s, got[0].ID).objects() {
				rel, _ := filepath.Rel(s.cfg.Root, s.objectPath(o))
				want[rel] = true
			}
			for _, f := range files(t, s) {
				if !want[f] {
					t.Errorf("unexpected file %s", f)
				}
				delete(want, f)
			}
			if len(want) > 0 {
				t.Errorf("missing files %v", want)
			}
			if err := s.Remove(t.Context(), got[0].ID); err != nil {
				t.Fatal(err)
			}
			wantEmpty(t, s)
		})
	}

	t.Run("several images share layers", func(t *testing.T) {
		s := newStore(t)
		a, b := entries("a:1", img, false), entries("b:2", other, false)
		// One index.json with both entries.
		merged := mergeLayouts(t, a, b)
		got, err := loadFile(t, s, repack(t, "x.tar", merged))
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 2 || got[0].Layers[0].Path != got[1].Layers[0].Path || got[0].Layers[2].Path == got[1].Layers[2].Path {
			t.Fatalf("loaded %+v", got)
		}
		if err := s.Remove(t.Context(), "a:1"); err != nil {
			t.Fatal(err)
		}
		for _, l := range got[1].Layers {
			if _, err := os.Stat(l.Path); err != nil {
				t.Errorf("layer of the image that stays: %v", err)
			}
		}
		if _, err := os.Stat(got[0].Layers[2].Path); !os.IsNotExist(err) {
			t.Errorf("layer of the removed image: %v", err)
		}
		if err := s.Remove(t.Context(), "b:2"); err != nil {
			t.Fatal(err)
		}
		wantEmpty(t, s)
	})

	t.Run("docker before 25 links layers", func(t *testing.T) {
		s := newStore(t)
		got, err := loadFile(t, s, repack(t, "x.tar", legacyDocker(t, img)))
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 1 || got[0].ID != configDigest(t, img) || !slices.Equal(got[0].RepoTags, []string{"docker.io/library/old:1", "docker.io/library/old:2"}) {
			t.Fatalf("loaded %+v", got)
		}
	})
}

// legacyDocker is the archive of docker before version 25: a directory for each
// layer, one of which is a symbolic link to the other's tar.
func legacyDocker(t testing.TB, img v1.Image) []images.Entry {
	t.Helper()
	raw, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	config := strings.TrimPrefix(configDigest(t, img), "sha256:") + ".json"
	entries := []images.Entry{images.File(config, 0o644, string(raw))}
	var names []string
	for i, l := range layers {
		rc, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(rc)
		rc.Close()
		if err != nil {
			t.Fatal(err)
		}
		real, name := fmt.Sprintf("real%d/layer.tar", i), fmt.Sprintf("layer%d/layer.tar", i)
		entries = append(entries, images.File(real, 0o644, string(b)), images.Symlink(name, "../"+real))
		names = append(names, name)
	}
	manifest := fmt.Sprintf(`[{"Config":%q,"RepoTags":["old:1","old:2"],"Layers":["%s"]}]`, config, strings.Join(names, `","`))
	return append(entries, images.File("manifest.json", 0o644, manifest), images.File("repositories", 0o644, "{}"))
}

func mergeLayouts(t testing.TB, a, b []images.Entry) []images.Entry {
	t.Helper()
	var out []images.Entry
	var index []v1.IndexManifest
	for _, e := range append(slices.Clone(a), b...) {
		if e.Name == "index.json" {
			var m v1.IndexManifest
			if err := decodeJSON("index", e.Body, &m); err != nil {
				t.Fatal(err)
			}
			index = append(index, m)
			continue
		}
		out = append(out, e)
	}
	index[0].Manifests = append(index[0].Manifests, index[1].Manifests...)
	j, err := marshalJSON(index[0])
	if err != nil {
		t.Fatal(err)
	}
	return append(out, images.File("index.json", 0o644, string(j)))
}

func TestResolveAndRemove(t *testing.T) {
	s := newStore(t)
	img := smallImage(t, "amd64", "one")
	e, err := images.LayoutEntries("docker.io/library/a:1", img, false)
	if err != nil {
		t.Fatal(err)
	}
	got, err := loadFile(t, s, repack(t, "x.tar", e))
	if err != nil {
		t.Fatal(err)
	}
	id := got[0].ID
	hex := strings.TrimPrefix(id, "sha256:")
	for _, ref := range []string{id, hex, hex[:12], "sha256:" + hex[:13], "a:1", "library/a:1", "docker.io/library/a:1"} {
		if img, err := s.Resolve(ref); err != nil || img.ID != id {
			t.Errorf("Resolve(%q) = %s, %v", ref, img.ID, err)
		}
	}
	for _, ref := range []string{"a", "a:2", hex[:11], "example.com/a:1", strings.Repeat("0", 64), "sha256:" + strings.Repeat("0", 64), "a@" + id} {
		if _, err := s.Resolve(ref); !errdefs.IsNotFound(err) {
			t.Errorf("Resolve(%q): %v, want not found", ref, err)
		}
	}
	for _, ref := range []string{"", "A:1", "a:1:2", strings.Repeat("a", 2000), "../etc"} {
		if _, err := s.Resolve(ref); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Resolve(%q): %v, want invalid argument", ref, err)
		}
	}
	// Unknown images are no error, and five at once all succeed.
	if err := s.Remove(t.Context(), "nothing:here"); err != nil {
		t.Error(err)
	}
	errs := make(chan error, 5)
	for range 5 {
		go func() { errs <- s.Remove(context.Background(), "a:1") }()
	}
	for range 5 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	wantEmpty(t, s)
}

func TestOpen(t *testing.T) {
	root := filepath.Join(t.TempDir(), "images")
	s, err := Open(Config{Root: root, Arch: "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Root: root}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "another process") {
		t.Errorf("second open: %v", err)
	}
	e, err := images.LayoutEntries("a:1", smallImage(t, "amd64", "x"), true)
	if err != nil {
		t.Fatal(err)
	}
	got, err := loadFile(t, s, repack(t, "x.tar", e))
	if err != nil {
		t.Fatal(err)
	}
	// What a process leaves that dies at its work.
	for _, name := range []string{"tmp/blob-1", "tmp/layer-2", "layers/" + strings.Repeat("a", 64) + ".ext4", "blobs/sha256/" + strings.Repeat("b", 64)} {
		if err := os.WriteFile(filepath.Join(root, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	before := len(files(t, s))
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load(t.Context(), bytes.NewReader(nil), nil); !errdefs.IsUnavailable(err) {
		t.Errorf("load after close: %v", err)
	}
	s = newStore(t, func(c *Config) { c.Root = root })
	if after := len(files(t, s)); after != before-4 {
		t.Errorf("%d files before, %d after", before, after)
	}
	again, err := s.Resolve("a:1")
	if err != nil || again.ID != got[0].ID {
		t.Errorf("after reopen: %v, %v", again, err)
	}
	if n, inodes, err := s.Usage(); err != nil || n == 0 || inodes < 5 {
		t.Errorf("Usage() = %d, %d, %v", n, inodes, err)
	}
}
