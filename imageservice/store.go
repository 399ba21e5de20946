package imageservice

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"
)

// Config configures a [Store].
type Config struct {
	// Root is the store's directory; it is created with mode 0700. One process
	// at a time may have it open.
	Root string
	// RegistryConfigDir is a hosts.toml directory as containerd has it
	// ("/etc/containerd/certs.d"); empty means none.
	RegistryConfigDir string
	// Arch is the guests' GOARCH; default the host's. Images for others are
	// refused.
	Arch string
	// Translated is another GOARCH whose programs the guests can run, slower: an image
	// for it is taken where there is none for Arch. Empty means none.
	Translated string
	// Limits bound what an image may cost; zero fields mean the defaults.
	Limits Limits
}

// Store is an image store. All methods may be called concurrently.
type Store struct {
	cfg  Config
	meta *metadata
	// ctx ends when the store closes; flights run under it, not under the
	// context of whichever caller came first.
	ctx     context.Context
	cancel  context.CancelFunc
	flights flightGroup
	leases  leaseTable
	retry   retryPolicy
	// converting bounds conversions by the number of CPUs: each keeps one busy.
	converting chan struct{}

	mu     sync.Mutex
	closed bool
	// ops counts operations under way; Add only while mu is held and closed is
	// false, so that none begins once Close waits.
	ops sync.WaitGroup
}

// Open opens or makes the store at cfg.Root and removes what an earlier process
// left unfinished. It fails at once with ErrFailedPrecondition when another
// process has the store open. The caller closes it.
func Open(cfg Config) (*Store, error) {
	if cfg.Root == "" || !filepath.IsAbs(cfg.Root) {
		return nil, invalidf("image store root %q is not an absolute path", cfg.Root)
	}
	cfg.Arch = cmp.Or(cfg.Arch, runtime.GOARCH)
	if err := cfg.Limits.setDefaults(); err != nil {
		return nil, err
	}
	s := &Store{cfg: cfg, converting: make(chan struct{}, runtime.GOMAXPROCS(0)), leases: newLeaseTable(), retry: defaultRetry}
	for _, dir := range []string{cfg.Root, s.blobDir(), s.layerDir(), s.tmpDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, diskError(dir, fmt.Errorf("make image store directory: %w", err))
		}
	}
	var err error
	if s.meta, err = openMetadata(filepath.Join(cfg.Root, "images.db")); err != nil {
		return nil, err
	}
	if err := s.sweep(); err != nil {
		s.meta.db.Close()
		return nil, err
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// Close ends running pulls and loads, waits for them and releases the root. It
// may be called twice.
func (s *Store) Close() error {
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.mu.Unlock()
	if closed {
		return nil
	}
	s.cancel()
	s.ops.Wait()
	if err := s.meta.db.Close(); err != nil {
		return fmt.Errorf("close image store %s: %w", s.cfg.Root, err)
	}
	return nil
}

func (s *Store) tmpDir() string   { return filepath.Join(s.cfg.Root, "tmp") }
func (s *Store) blobDir() string  { return filepath.Join(s.cfg.Root, "blobs", "sha256") }
func (s *Store) layerDir() string { return filepath.Join(s.cfg.Root, "layers") }

// Digests in these two come from parseDigest or from a hash: they are file names.
func (s *Store) blobPath(d string) string {
	return filepath.Join(s.blobDir(), digest.Digest(d).Encoded())
}

func (s *Store) layerPath(diffID string) string {
	return filepath.Join(s.layerDir(), digest.Digest(diffID).Encoded()+".ext4")
}

// Resolve finds an image by tag, digest reference, id ("sha256:<hex>" or bare),
// or an unambiguous beginning of an id of at least 12 hex digits. A string that
// is both a name and a short id is the name. It fails with ErrNotFound, or with
// ErrInvalidArgument when the string is neither.
func (s *Store) Resolve(refOrID string) (Image, error) {
	rec, refs, err := s.meta.get(refOrID)
	if err != nil {
		return Image{}, err
	}
	return s.image(rec, refs), nil
}

// List returns all images, ordered by id.
func (s *Store) List() ([]Image, error) {
	recs, refs, err := s.meta.list()
	if err != nil {
		return nil, err
	}
	images := make([]Image, 0, len(recs))
	for _, rec := range recs {
		images = append(images, s.image(rec, refs[rec.ID]))
	}
	return images, nil
}

// Remove removes the image that refOrID stands for, with all its references,
// as the CRI's RemoveImage: one that does not exist is no error, and concurrent
// calls all succeed. Files that another image or a running operation needs
// stay; links made by [Store.Use] are not touched.
func (s *Store) Remove(ctx context.Context, refOrID string) error {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	rec, err := s.meta.remove(refOrID)
	if err != nil {
		return fmt.Errorf("remove image: %w", err)
	}
	if rec == nil {
		return nil
	}
	klog.InfoS("Removed image", "id", rec.ID)
	return s.collect(ctx, rec.objects())
}

// Usage returns what the store occupies on disk, in bytes and inodes.
func (s *Store) Usage() (bytes, inodes uint64, err error) {
	err = filepath.WalkDir(s.cfg.Root, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // removed while we walked
			}
			return err
		}
		info, err := d.Info()
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		inodes++
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			bytes += uint64(st.Blocks) * 512
		}
		return nil
	})
	if err != nil {
		return 0, 0, fmt.Errorf("usage of image store %s: %w", s.cfg.Root, err)
	}
	return bytes, inodes, nil
}

// sweep empties tmp and removes files that no record mentions: what a process
// left that died between the rename and the transaction.
func (s *Store) sweep() error {
	entries, err := os.ReadDir(s.tmpDir())
	if err != nil {
		return diskError(s.tmpDir(), err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(s.tmpDir(), e.Name())); err != nil {
			return diskError(s.tmpDir(), fmt.Errorf("remove leftovers: %w", err))
		}
	}
	recs, _, err := s.meta.list()
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	for _, rec := range recs {
		for _, o := range rec.objects() {
			keep[s.objectPath(o)] = true
		}
	}
	removed := 0
	for _, dir := range []string{s.blobDir(), s.layerDir()} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return diskError(dir, err)
		}
		for _, e := range entries {
			p := filepath.Join(dir, e.Name())
			if keep[p] {
				continue
			}
			if err := os.RemoveAll(p); err != nil {
				return diskError(p, fmt.Errorf("remove leftovers: %w", err))
			}
			removed++
		}
	}
	if removed > 0 {
		klog.InfoS("Removed unreferenced image files of an earlier process", "root", s.cfg.Root, "files", removed)
	}
	return nil
}

// commit makes images visible; everything they name is on disk and synced.
func (s *Store) commit(images []putImage) error {
	if err := s.meta.put(images); err != nil {
		return diskError(filepath.Join(s.cfg.Root, "images.db"), fmt.Errorf("record images: %w", err))
	}
	return nil
}

// begin starts an operation whose context ends with ctx or with the store.
// end must be called when the operation, and all it started, is over.
func (s *Store) begin(ctx context.Context) (opCtx context.Context, end func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, fmt.Errorf("image store %s is closed: %w", s.cfg.Root, errdefs.ErrUnavailable)
	}
	s.ops.Add(1)
	opCtx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.ctx, cancel)
	return opCtx, func() {
		stop()
		cancel()
		s.ops.Done()
	}, nil
}

func sortedKeys[M ~map[string]V, V any](m M) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
