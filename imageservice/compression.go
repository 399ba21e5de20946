package imageservice

import (
	"bufio"
	"bytes"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

type compression string

const (
	uncompressed compression = "plain"
	gzipped      compression = "gzip"
	zstandard    compression = "zstd"
)

var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// detectCompression looks at the content: names and media types are wrong often
// enough that docker does so too.
func detectCompression(br *bufio.Reader) compression {
	head, _ := br.Peek(4)
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		return gzipped
	case bytes.HasPrefix(head, zstdMagic):
		return zstandard
	}
	return uncompressed
}

// zstdMaxWindow is what `zstd --long=27`, the most that decoders accept by
// default, needs. It bounds the decoder's memory.
const zstdMaxWindow = 128 << 20

// decompress returns the plain content of r, whatever it is compressed with.
// Closing it frees the decoder and does not close r.
func decompress(r io.Reader) (io.ReadCloser, compression, error) {
	br := bufio.NewReaderSize(r, 256<<10)
	switch c := detectCompression(br); c {
	case gzipped:
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, c, fmt.Errorf("gzip header: %w", err)
		}
		return zr, c, nil
	case zstandard:
		zr, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(zstdMaxWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, c, fmt.Errorf("zstd header: %w", err)
		}
		return zr.IOReadCloser(), c, nil
	default:
		return io.NopCloser(br), c, nil
	}
}
