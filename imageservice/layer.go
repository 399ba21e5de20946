package imageservice

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// ensureLayer makes the layer file of diffID from a blob that the store has,
// unless it is there. The caller holds leases of both.
func (s *Store) ensureLayer(ctx context.Context, diffID, blob string) (size int64, err error) {
	path := s.layerPath(diffID)
	if st, err := os.Stat(path); err == nil {
		return st.Size(), nil
	}
	err = s.flights.do(ctx, s.ctx, object{layerObject, diffID}, nil, func(ctx context.Context, _ *flight) error {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		// The flight may outlive the caller that began it.
		release, err := s.lease(ctx, object{layerObject, diffID}, object{blobObject, blob})
		if err != nil {
			return err
		}
		defer release()
		select {
		case s.converting <- struct{}{}:
		case <-ctx.Done():
			return fmt.Errorf("wait for a free CPU to convert layer %s: %w", diffID, ctx.Err())
		}
		defer func() { <-s.converting }()
		return s.convert(ctx, diffID, s.blobPath(blob))
	})
	if err != nil {
		return 0, err
	}
	st, err := os.Stat(path)
	if err != nil {
		return 0, diskError(path, err)
	}
	return st.Size(), nil
}

// convert writes the layer file of diffID from the blob at blobPath.
func (s *Store) convert(ctx context.Context, diffID, blobPath string) error {
	blob, err := os.Open(blobPath)
	if err != nil {
		return diskError(blobPath, err)
	}
	defer blob.Close()
	out, err := s.newTemp("layer")
	if err != nil {
		return err
	}
	defer out.discard()

	err = convertLayer(ctx, blob, out, diffID, &s.cfg.Limits, nil)
	if errors.Is(err, errRepeatedEntry) {
		plan, perr := s.plan(ctx, blob)
		if perr != nil {
			return s.layerFailure(diffID, out.Name(), perr)
		}
		if _, err := blob.Seek(0, io.SeekStart); err != nil {
			return diskError(blobPath, err)
		}
		if err := out.Truncate(0); err != nil {
			return diskError(out.Name(), err)
		}
		if _, err := out.Seek(0, io.SeekStart); err != nil {
			return diskError(out.Name(), err)
		}
		err = convertLayer(ctx, blob, out, diffID, &s.cfg.Limits, plan)
	}
	if err != nil {
		return s.layerFailure(diffID, out.Name(), err)
	}
	return out.commit(s.layerPath(diffID))
}

func (s *Store) plan(ctx context.Context, blob *os.File) (*layerPlan, error) {
	if _, err := blob.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	zr, _, err := decompress(ctxReader{ctx, blob})
	if err != nil {
		return nil, err
	}
	defer zr.Close()
	return planLayer(zr, &s.cfg.Limits)
}

// layerFailure says whose fault a failed conversion is.
func (s *Store) layerFailure(diffID, path string, err error) error {
	var pathErr *os.PathError
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errdefs.IsDataLoss(err), errdefs.IsResourceExhausted(err):
		return fmt.Errorf("layer %s: %w", diffID, err)
	case errors.As(err, &pathErr):
		return fmt.Errorf("layer %s: %w", diffID, diskError(path, err))
	case isDamage(err):
		return fmt.Errorf("layer %s: it is truncated or damaged: %w: %w", diffID, err, errdefs.ErrDataLoss)
	default:
		return fmt.Errorf("layer %s: %w: %w", diffID, err, errdefs.ErrInvalidArgument)
	}
}

// isDamage reports whether a reader of foreign bytes found them cut short or
// altered, as opposed to well-formed and unwanted.
func isDamage(err error) bool {
	var flateErr flate.CorruptInputError
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, gzip.ErrChecksum) || errors.Is(err, gzip.ErrHeader) ||
		errors.Is(err, zstd.ErrCRCMismatch) || errors.Is(err, zstd.ErrMagicMismatch) || errors.Is(err, zstd.ErrUnexpectedBlockSize) ||
		errors.As(err, &flateErr)
}

// convertLayer writes the compressed or plain layer tar in blob to out as an
// ext4 image and checks the tar against diffID. Decompression, hashing and
// writing run side by side.
func convertLayer(ctx context.Context, blob io.Reader, out io.ReadWriteSeeker, diffID string, limits *Limits, plan *layerPlan) (err error) {
	var compressed atomic.Int64
	zr, _, err := decompress(countReader{ctxReader{ctx, blob}, func(n int64) { compressed.Add(n) }})
	if err != nil {
		return err
	}
	defer zr.Close()
	expands := func(to int64) error {
		if to > limits.LayerBytes {
			return layerErrorf("it expands to more than %d bytes", limits.LayerBytes)
		}
		if to > limits.ratioGrace && to/limits.LayerRatio > compressed.Load() {
			return layerErrorf("it expands more than %d fold, as a decompression bomb does", limits.LayerRatio)
		}
		return nil
	}
	var expanded int64
	bounded := countReader{zr, func(n int64) { expanded += n }}
	guard := readerFunc(func(p []byte) (int, error) {
		n, err := bounded.Read(p)
		if err := expands(expanded); err != nil {
			return 0, err
		}
		return n, err
	})
	fan := startFanout(guard)
	defer fan.stop()
	defer func() {
		// hcsshim's writer panics where it trusts its input; the filter should
		// make that impossible, and one bad image must not end the daemon.
		if p := recover(); p != nil {
			err = layerErrorf("the ext4 writer failed: %v", p)
		}
	}()
	// Result file systems are laid out for maxDiskBytes: without the option the
	// writer stops at 16 GiB.
	filter := newLayerTar(fan, limits, plan)
	filter.expands = expands // holes of sparse files are in no tar
	if err := tar2ext4.ConvertTarToExt4(filter, out, tar2ext4.ConvertWhiteout, tar2ext4.MaximumDiskSize(maxDiskBytes)); err != nil {
		return err
	}
	if f, ok := out.(interface{ Truncate(int64) error }); ok {
		// The writer seeks past the end of the last group's free blocks.
		end, err := out.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		if err := f.Truncate(end); err != nil {
			return err
		}
	}
	// What follows the end of the tar belongs to the diff ID as well.
	if _, err := io.Copy(io.Discard, fan); err != nil {
		return err
	}
	got, err := fan.sum()
	if err != nil {
		return err
	}
	if got != diffID {
		return digestMismatch("uncompressed layer", got, diffID)
	}
	return nil
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// fanout reads a source in one goroutine, hashes it in a second and hands it to
// its reader in a third. Eight chunks of 256 KiB are under way at most.
type fanout struct {
	data, hash chan *chunk
	free       chan *chunk
	quit       chan struct{}
	once       sync.Once
	wg         sync.WaitGroup
	cur        *chunk
	off        int
	err        error // of the source, set before data is closed
	digest     string
}

type chunk struct {
	buf  [256 << 10]byte
	n    int
	refs atomic.Int32
}

const fanoutChunks = 8

func startFanout(src io.Reader) *fanout {
	f := &fanout{
		data: make(chan *chunk, fanoutChunks),
		hash: make(chan *chunk, fanoutChunks),
		free: make(chan *chunk, fanoutChunks),
		quit: make(chan struct{}),
	}
	for range fanoutChunks {
		f.free <- new(chunk)
	}
	f.wg.Go(func() {
		defer close(f.data)
		defer close(f.hash)
		for {
			var c *chunk
			select {
			case c = <-f.free:
			case <-f.quit:
				return
			}
			n, err := io.ReadFull(src, c.buf[:])
			if n > 0 {
				c.n = n
				c.refs.Store(2)
				// Neither blocks: there are no more chunks than places.
				f.data <- c
				f.hash <- c
			}
			if err == io.ErrUnexpectedEOF && n > 0 {
				// ReadFull says so of a short last chunk; a source that is cut
				// short says it again when asked for more.
				continue
			}
			if err != nil {
				f.err = err
				return
			}
		}
	})
	f.wg.Go(func() {
		h := sha256.New()
		for c := range f.hash {
			h.Write(c.buf[:c.n])
			f.release(c)
		}
		f.digest = digestOf(h)
	})
	return f
}

func (f *fanout) release(c *chunk) {
	if c.refs.Add(-1) == 0 {
		f.free <- c
	}
}

func (f *fanout) Read(p []byte) (int, error) {
	for f.cur == nil {
		c, ok := <-f.data
		if !ok {
			if f.err == nil {
				return 0, io.ErrClosedPipe
			}
			return 0, f.err
		}
		f.cur, f.off = c, 0
	}
	n := copy(p, f.cur.buf[f.off:f.cur.n])
	if f.off += n; f.off == f.cur.n {
		f.release(f.cur)
		f.cur = nil
	}
	return n, nil
}

// sum returns the digest of the whole source, which must have been read to its
// end.
func (f *fanout) sum() (string, error) {
	f.wg.Wait()
	if f.err != io.EOF {
		return "", f.err
	}
	return f.digest, nil
}

// stop ends the goroutines; it waits for a read of the source that is under way.
func (f *fanout) stop() {
	f.once.Do(func() { close(f.quit) })
	f.wg.Wait()
}
