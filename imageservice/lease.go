package imageservice

import (
	"context"
	"fmt"
	"os"
	"sync"

	"k8s.io/klog/v2"
)

// objectKind tells the two kinds of files that the store counts references of.
type objectKind uint8

const (
	blobObject objectKind = iota
	layerObject
)

// object is a file of the store, named by what it holds.
type object struct {
	kind   objectKind
	digest string
}

func (s *Store) objectPath(o object) string {
	if o.kind == layerObject {
		return s.layerPath(o.digest)
	}
	return s.blobPath(o.digest)
}

func (r *imageRecord) objects() []object {
	var objs []object
	for d := range r.Blobs {
		objs = append(objs, object{blobObject, d})
	}
	for _, l := range r.Layers {
		objs = append(objs, object{layerObject, l.DiffID})
	}
	return objs
}

// leaseTable counts who relies on an object that no record may mention yet.
type leaseTable struct {
	// turn (capacity 1) serialises removal with the taking of leases: whoever
	// has a lease and then sees the file may rely on it. It is a channel, since
	// it is held while files are unlinked.
	turn chan struct{}

	mu sync.Mutex
	n  map[object]int
}

func newLeaseTable() leaseTable {
	return leaseTable{turn: make(chan struct{}, 1), n: map[object]int{}}
}

// lease keeps objects from being removed until release is called, which removes
// those that nothing needs any more.
func (s *Store) lease(ctx context.Context, objs ...object) (release func(), err error) {
	select {
	case s.leases.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for image removal to end: %w", ctx.Err())
	}
	s.leases.mu.Lock()
	for _, o := range objs {
		s.leases.n[o]++
	}
	s.leases.mu.Unlock()
	<-s.leases.turn
	var once sync.Once
	return func() {
		once.Do(func() {
			s.leases.mu.Lock()
			for _, o := range objs {
				if s.leases.n[o]--; s.leases.n[o] == 0 {
					delete(s.leases.n, o)
				}
			}
			s.leases.mu.Unlock()
			// Not under the caller's context: a cancelled pull cleans up too.
			if err := s.collect(context.Background(), objs); err != nil {
				klog.ErrorS(err, "Could not remove unneeded image files", "root", s.cfg.Root)
			}
		})
	}, nil
}

// collect removes those of objs that neither a record nor a lease needs.
func (s *Store) collect(ctx context.Context, objs []object) error {
	select {
	case s.leases.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("wait for image removal to end: %w", ctx.Err())
	}
	defer func() { <-s.leases.turn }()
	recs, _, err := s.meta.list()
	if err != nil {
		return fmt.Errorf("find unneeded image files: %w", err)
	}
	keep := map[object]bool{}
	for _, rec := range recs {
		for _, o := range rec.objects() {
			keep[o] = true
		}
	}
	s.leases.mu.Lock()
	for o := range s.leases.n {
		keep[o] = true
	}
	s.leases.mu.Unlock()
	var first error
	for _, o := range objs {
		if keep[o] {
			continue
		}
		if err := os.Remove(s.objectPath(o)); err != nil && !os.IsNotExist(err) && first == nil {
			first = fmt.Errorf("remove image file: %w", err)
		}
	}
	return first
}
