//go:build linux

package vhostvsock

import "sync"

const chunkSize = 16 << 10

var chunks = sync.Pool{New: func() any { return new([chunkSize]byte) }}

// buffer is a queue of bytes that takes memory as bytes arrive and gives it back
// as they are read: at most one chunk more than it holds bytes, however small the
// packets are in which they came.
type buffer struct {
	chunks []*[chunkSize]byte
	off    int // of the first byte in the first chunk
	n      int
}

func (b *buffer) write(p []byte) {
	for len(p) > 0 {
		end := b.off + b.n
		if end == len(b.chunks)*chunkSize {
			b.chunks = append(b.chunks, chunks.Get().(*[chunkSize]byte))
		}
		k := copy(b.chunks[end/chunkSize][end%chunkSize:], p)
		b.n += k
		p = p[k:]
	}
}

func (b *buffer) read(p []byte) (n int) {
	for n < len(p) && b.n > 0 {
		k := copy(p[n:], b.chunks[0][b.off:min(chunkSize, b.off+b.n)])
		n, b.n, b.off = n+k, b.n-k, b.off+k
		if b.off == chunkSize || b.n == 0 {
			b.drop()
		}
	}
	return n
}

// drop gives back the first chunk.
func (b *buffer) drop() {
	chunks.Put(b.chunks[0])
	copy(b.chunks, b.chunks[1:])
	b.chunks[len(b.chunks)-1] = nil
	b.chunks, b.off = b.chunks[:len(b.chunks)-1], 0
}

func (b *buffer) free() {
	for len(b.chunks) > 0 {
		b.drop()
	}
	*b = buffer{}
}
