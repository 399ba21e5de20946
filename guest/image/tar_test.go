package image

import (
	"archive/tar"
	"io"
	"maps"
	"slices"
	"testing"
)

func writeTar(t *testing.T, w io.Writer, files map[string][]byte) {
	t.Helper()
	out := tar.NewWriter(w)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := out.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(files[name]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Write(files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}
