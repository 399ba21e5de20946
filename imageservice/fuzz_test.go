package imageservice

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
	"github.com/containerd/errdefs"

	"github.com/cri-vz/cri-vz/test/images"
)

func fuzzLimits() Limits {
	l := Limits{LayerBytes: 4 << 20, LayerEntries: 1000, ArchiveEntries: 100, ArchiveMetadataBytes: 1 << 20}
	if err := l.setDefaults(); err != nil {
		panic(err)
	}
	return l
}

func FuzzArchive(f *testing.F) {
	for _, docker := range []bool{false, true} {
		b, err := images.Tar(layout(f, smallImage(f, "amd64", "x"), docker)...)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	b, err := images.Tar(legacyDocker(f, smallImage(f, "amd64", "x"))...)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{0x1f, 0x8b})
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd})
	limits := fuzzLimits()
	s := &Store{cfg: Config{Arch: "amd64", Limits: limits}}
	f.Fuzz(func(t *testing.T, b []byte) {
		zr, _, err := decompress(bytes.NewReader(b))
		if err != nil {
			return
		}
		defer zr.Close()
		a, err := readArchiveIndex(tar.NewReader(io.LimitReader(zr, 16<<20)), &limits)
		if err != nil {
			return
		}
		for name, target := range a.links {
			for _, n := range []string{name, target} {
				if strings.HasPrefix(n, "/") || n == ".." || strings.HasPrefix(n, "../") {
					t.Fatalf("link %q -> %q leaves the archive", name, target)
				}
			}
		}
		plans, err := s.planArchive(&a)
		if err != nil {
			return
		}
		for _, p := range plans {
			if len(p.layers) == 0 || len(p.layers) != len(p.config.RootFS.DiffIDs) {
				t.Fatalf("%d layers, %d diff IDs", len(p.layers), len(p.config.RootFS.DiffIDs))
			}
			for _, l := range p.layers {
				if _, err := parseDigest(l.diffID); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// FuzzLayer converts whatever comes: no panic, and names stay inside.
func FuzzLayer(f *testing.F) {
	for _, entries := range [][]images.Entry{
		{images.Dir("d/", 0o755), images.File("d/f", 0o644, "x"), images.Hardlink("h", "d/f"), images.Symlink("l", "/x")},
		{images.File("d/.wh..wh..opq", 0o644, ""), images.File("d/.wh.x", 0o644, ""), images.Dir("d/", 0o700)},
		{images.File("f", 0o644, "1"), images.File("f", 0o644, "2"), images.Dir("f/", 0o755), images.File(".wh.f", 0o644, "")},
		{images.File("../f", 0o644, "1")},
		{images.File("/.wh.lost+found", 0o644, "")},
	} {
		b, err := images.Tar(entries...)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	limits := fuzzLimits()
	f.Fuzz(func(t *testing.T, b []byte) {
		run := func(plan *layerPlan) error {
			out, err := os.CreateTemp(t.TempDir(), "x")
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			filtered := newLayerTar(bytes.NewReader(b), &limits, plan)
			return tar2ext4.ConvertTarToExt4(filtered, out, tar2ext4.ConvertWhiteout, tar2ext4.MaximumDiskSize(maxDiskBytes))
		}
		err := run(nil)
		if errors.Is(err, errRepeatedEntry) {
			plan, perr := planLayer(bytes.NewReader(b), &limits)
			if perr != nil {
				return
			}
			err = run(plan)
		}
		if err != nil {
			return
		}
		plan, err := planLayer(bytes.NewReader(b), &limits)
		if err != nil {
			return
		}
		tr := tar.NewReader(newLayerTar(bytes.NewReader(b), &limits, plan))
		for {
			hdr, err := tr.Next()
			if err != nil {
				break
			}
			for part := range strings.SplitSeq(hdr.Name, "/") {
				if part == ".." {
					t.Fatalf("entry %q", hdr.Name)
				}
			}
		}
	})
}

func FuzzHosts(f *testing.F) {
	f.Add("server='https://a'\n[host.'http://b:1/x']\ncapabilities=['pull']\nclient=[['a','b']]\n")
	f.Add("[host.\"https://a\"]\nca=['x']\nskip_verify=true\noverride_path=true")
	f.Add("host={'https://a'={}}")
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, file string) {
		eps, err := parseHosts([]byte(file), dir, "example.com")
		if err != nil {
			return
		}
		for _, e := range eps {
			if e.scheme != "https" && e.scheme != "http" || e.host == "" || e.api != "" && !strings.HasPrefix(e.api, "/") {
				t.Fatalf("endpoint %+v", e)
			}
		}
	})
}

func FuzzReference(f *testing.F) {
	for _, s := range []string{"nginx", "a:1", "localhost:5000/x@sha256:" + strings.Repeat("a", 64), "sha256:" + strings.Repeat("a", 64), "0123456789ab", "[::1]:5000/x", "A"} {
		f.Add(s)
	}
	m, err := openMetadata(filepath.Join(f.TempDir(), "images.db"))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { m.db.Close() })
	f.Fuzz(func(t *testing.T, s string) {
		if r, err := parseRef(s); err == nil {
			again, err := parseRef(r.String())
			if err != nil || again != r {
				t.Fatalf("%q is %q, which is %+v, %v", s, r, again, err)
			}
			if strings.ContainsAny(r.domain, "/\\\x00") || strings.HasPrefix(r.domain, ".") {
				t.Fatalf("domain %q would be no directory name", r.domain)
			}
		}
		if _, _, err := m.get(s); !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			t.Fatalf("resolve %q: %v", s, err)
		}
	})
}
