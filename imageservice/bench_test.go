package imageservice

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// benchLayer is a layer of 200 MiB in 3,000 files that compress about 3 to 1,
// as a distribution's do.
func benchLayer(b *testing.B) []byte {
	b.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	words := make([][]byte, 4096)
	for i := range words {
		words[i] = make([]byte, 4+r.IntN(12))
		for j := range words[i] {
			words[i][j] = byte(r.Uint32())
		}
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for i := range 3000 {
		size := 70 << 10
		body := make([]byte, 0, size+16)
		for len(body) < size {
			body = append(body, words[r.IntN(len(words))]...)
		}
		if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("usr/lib/%d/%d", i%50, i), Mode: 0o644, Size: int64(len(body))}); err != nil {
			b.Fatal(err)
		}
		if _, err := tw.Write(body); err != nil {
			b.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		b.Fatal(err)
	}
	return buf.Bytes()
}

// BenchmarkLayerConversion measures a blob's way to an ext4 file, checked and
// synced, in bytes of the uncompressed tar. The design's goal is 400 MB/s; "gunzip"
// is inflate alone, on one CPU, which is all that a gzip'ed layer has to wait for.
func BenchmarkLayerConversion(b *testing.B) {
	plain := benchLayer(b)
	var gz, zs bytes.Buffer
	gw := gzip.NewWriter(&gz)
	gw.Write(plain)
	gw.Close()
	zw, err := zstd.NewWriter(&zs)
	if err != nil {
		b.Fatal(err)
	}
	zw.Write(plain)
	zw.Close()
	b.Run("gunzip", func(b *testing.B) {
		b.SetBytes(int64(len(plain)))
		buf := make([]byte, 256<<10)
		for b.Loop() {
			zr, err := gzip.NewReader(bytes.NewReader(gz.Bytes()))
			if err != nil {
				b.Fatal(err)
			}
			// Plain Reads, as the conversion's.
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{zr}, buf); err != nil {
				b.Fatal(err)
			}
		}
	})
	for _, bb := range []struct {
		name string
		blob []byte
	}{{"plain", plain}, {"gzip", gz.Bytes()}, {"zstd", zs.Bytes()}} {
		b.Run(bb.name, func(b *testing.B) {
			s := newStore(b)
			blob := filepath.Join(b.TempDir(), "blob")
			if err := os.WriteFile(blob, bb.blob, 0o600); err != nil {
				b.Fatal(err)
			}
			diffID := digestBytes(plain)
			b.SetBytes(int64(len(plain)))
			for b.Loop() {
				if err := s.convert(context.Background(), diffID, blob); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
