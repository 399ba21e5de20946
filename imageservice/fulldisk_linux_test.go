package imageservice

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// tmpfs mounts a small file system until the test ends.
func tmpfs(t testing.TB, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Fatalf("mount a tmpfs: %v (this test needs root)", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// The bad input of issue 2: a full disk while pulling.
func TestFullDisk(t *testing.T) {
	big := bigImage(t, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
	small := smallImage(t, "amd64", "fits")
	reg := newRegistry(t)
	reg.push(t, "big:1", big)
	reg.push(t, "small:1", small)
	for name, op := range map[string]func(*Store) error{
		"pull": func(s *Store) error {
			_, err := s.Pull(t.Context(), reg.host+"/big:1", nil, nil)
			return err
		},
		"load": func(s *Store) error {
			_, err := loadFile(t, s, repack(t, "x.gz", layout(t, big, true)))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(tmpfs(t, "size=3m,mode=0700"), "images")
			s := pullStore(t, func(c *Config) { c.Root = root })
			err := op(s)
			if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), root) || !strings.Contains(err.Error(), "free space") {
				t.Errorf("error %v, want a full disk that names %s and a remedy", err, root)
			}
			wantEmpty(t, s)
			if _, err := s.Pull(t.Context(), reg.host+"/small:1", nil, nil); err != nil {
				t.Errorf("an image that fits, afterwards: %v", err)
			}
		})
	}
}

// Use across file systems copies.
func TestUseOtherFileSystem(t *testing.T) {
	s := newStore(t)
	got, err := loadFile(t, s, repack(t, "x.tar", layout(t, smallImage(t, "amd64", "x"), false)))
	if err != nil {
		t.Fatal(err)
	}
	dir := tmpfs(t, "size=8m")
	for range 2 {
		layers, err := s.Use(t.Context(), got[0].ID, dir)
		if err != nil || len(layers) != 3 {
			t.Fatalf("use: %v, %v", layers, err)
		}
		for i, l := range layers {
			have, err := os.ReadFile(l.Path)
			if err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile(got[0].Layers[i].Path)
			if err != nil || string(have) != string(want) {
				t.Errorf("%s differs from %s (%v)", l.Path, got[0].Layers[i].Path, err)
			}
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 3 {
		t.Errorf("%d files in the link directory, %v", len(entries), err)
	}
}
