package imageservice

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Buckets: images maps an id to an imageRecord, refs maps a reference to a
// refRecord. Everything else is derived from these two.
var (
	imagesBucket = []byte("images")
	refsBucket   = []byte("refs")
	metaBucket   = []byte("meta")
	schemaKey    = []byte("schema")
)

// schemaVersion changes when an older binary would misread what is stored.
const schemaVersion = "1"

type imageRecord struct {
	ID       string        `json:"id"`
	StoredAt time.Time     `json:"storedAt"`
	Config   v1.ConfigFile `json:"config"`
	Layers   []layerRecord `json:"layers"`
	// Blobs are all blobs that the image keeps alive: manifests, indexes, the
	// config and compressed layers. An image that came in two encodings keeps
	// both, because both have references.
	Blobs map[string]int64 `json:"blobs"`
}

type layerRecord struct {
	DiffID string `json:"diffID"`
	Blob   string `json:"blob"`
	Size   int64  `json:"size"`
}

type refRecord struct {
	ID string `json:"id"`
}

type metadata struct{ db *bolt.DB }

func openMetadata(path string) (*metadata, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{
		// The lock is free or it is not: a second daemon must not wait for the
		// first one to end.
		Timeout: 100 * time.Millisecond,
	})
	if err != nil {
		// bbolt panics on some damage and errors on other; both name the file.
		if errors.Is(err, bolterrors.ErrTimeout) {
			return nil, fmt.Errorf("image store %s is in use by another process; stop that one, or give this one a root of its own: %w", path, errdefs.ErrFailedPrecondition)
		}
		return nil, diskError(path, fmt.Errorf("open image metadata: %w", err))
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, b := range [][]byte{imagesBucket, refsBucket, metaBucket} {
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		meta := tx.Bucket(metaBucket)
		switch have := meta.Get(schemaKey); {
		case have == nil:
			return meta.Put(schemaKey, []byte(schemaVersion))
		case string(have) != schemaVersion:
			return fmt.Errorf("written with schema %q, this version reads %q; use the version that wrote it, or move the file away to start with no images: %w", have, schemaVersion, errdefs.ErrFailedPrecondition)
		}
		return nil
	})
	if err != nil {
		db.Close()
		return nil, diskError(path, err)
	}
	return &metadata{db: db}, nil
}

func getRecord(tx *bolt.Tx, id string) (*imageRecord, error) {
	b := tx.Bucket(imagesBucket).Get([]byte(id))
	if b == nil {
		return nil, nil
	}
	return decodeRecord(id, b)
}

func decodeRecord(id string, b []byte) (*imageRecord, error) {
	var r imageRecord
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("image record %s: %v: %w", id, err, errdefs.ErrDataLoss)
	}
	return &r, nil
}

// putImage is a record to store and the references that shall point to it.
type putImage struct {
	record imageRecord
	refs   []string
}

// put stores records (merged with those that are there) and points references
// to them; one that pointed elsewhere moves. It is one transaction.
func (m *metadata) put(images []putImage) error {
	return m.db.Update(func(tx *bolt.Tx) error {
		for _, img := range images {
			rec := img.record
			old, err := getRecord(tx, rec.ID)
			if err != nil {
				return err
			}
			if old != nil {
				rec.StoredAt = old.StoredAt
				for d, n := range old.Blobs {
					rec.Blobs[d] = n
				}
			}
			b, err := marshalJSON(rec)
			if err != nil {
				return err
			}
			if err := tx.Bucket(imagesBucket).Put([]byte(rec.ID), b); err != nil {
				return err
			}
			rb, err := marshalJSON(refRecord{ID: rec.ID})
			if err != nil {
				return err
			}
			for _, ref := range img.refs {
				if err := tx.Bucket(refsBucket).Put([]byte(ref), rb); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func marshalJSON(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", v, err)
	}
	return b, nil
}

// refsByID inverts the refs bucket.
func refsByID(tx *bolt.Tx) (map[string][]string, error) {
	refs := map[string][]string{}
	err := tx.Bucket(refsBucket).ForEach(func(k, v []byte) error {
		var r refRecord
		if err := json.Unmarshal(v, &r); err != nil {
			return fmt.Errorf("reference record %q: %v: %w", k, err, errdefs.ErrDataLoss)
		}
		refs[r.ID] = append(refs[r.ID], string(k))
		return nil
	})
	return refs, err
}

// resolve finds the id that a reference or id stands for.
func resolve(tx *bolt.Tx, refOrID string) (string, error) {
	images := tx.Bucket(imagesBucket)
	if hex := strings.TrimPrefix(refOrID, "sha256:"); fullIDPattern.MatchString(hex) {
		if images.Get([]byte("sha256:"+hex)) == nil {
			return "", notFound(refOrID)
		}
		return "sha256:" + hex, nil
	}
	// A reference goes first: "deadbeefdeadbeef" may be a repository's name.
	if ref, err := parseRef(refOrID); err == nil {
		if b := tx.Bucket(refsBucket).Get([]byte(ref.String())); b != nil {
			var r refRecord
			if err := json.Unmarshal(b, &r); err != nil {
				return "", fmt.Errorf("reference record %s: %v: %w", ref, err, errdefs.ErrDataLoss)
			}
			return r.ID, nil
		}
	} else if !shortIDPattern.MatchString(strings.TrimPrefix(refOrID, "sha256:")) {
		return "", err
	}
	hex := strings.TrimPrefix(refOrID, "sha256:")
	if !shortIDPattern.MatchString(hex) {
		return "", notFound(refOrID)
	}
	prefix := []byte("sha256:" + hex)
	c := images.Cursor()
	k, _ := c.Seek(prefix)
	if !bytes.HasPrefix(k, prefix) {
		return "", notFound(refOrID)
	}
	id := string(k)
	if k, _ = c.Next(); bytes.HasPrefix(k, prefix) {
		return "", invalidf("image id %q is ambiguous: it begins both %s and %s; give more of it", refOrID, id, k)
	}
	return id, nil
}

// remove deletes the image's record and every reference to it and returns the
// record; nil when there is no such image.
func (m *metadata) remove(refOrID string) (*imageRecord, error) {
	var rec *imageRecord
	err := m.db.Update(func(tx *bolt.Tx) error {
		id, err := resolve(tx, refOrID)
		if err != nil {
			return err
		}
		if rec, err = getRecord(tx, id); err != nil {
			return err
		}
		refs, err := refsByID(tx)
		if err != nil {
			return err
		}
		for _, ref := range refs[id] {
			if err := tx.Bucket(refsBucket).Delete([]byte(ref)); err != nil {
				return err
			}
		}
		return tx.Bucket(imagesBucket).Delete([]byte(id))
	})
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	return rec, err
}

// list returns all records with their references.
func (m *metadata) list() (recs []*imageRecord, refs map[string][]string, err error) {
	err = m.db.View(func(tx *bolt.Tx) error {
		if refs, err = refsByID(tx); err != nil {
			return err
		}
		return tx.Bucket(imagesBucket).ForEach(func(k, v []byte) error {
			r, err := decodeRecord(string(k), v)
			if err == nil {
				recs = append(recs, r)
			}
			return err
		})
	})
	return recs, refs, err
}

func (m *metadata) get(refOrID string) (rec *imageRecord, refs []string, err error) {
	err = m.db.View(func(tx *bolt.Tx) error {
		id, err := resolve(tx, refOrID)
		if err != nil {
			return err
		}
		if rec, err = getRecord(tx, id); err != nil {
			return err
		}
		if rec == nil {
			return notFound(refOrID)
		}
		all, err := refsByID(tx)
		refs = all[id]
		return err
	})
	return rec, refs, err
}

// image makes the public form of a record.
func (s *Store) image(rec *imageRecord, refs []string) Image {
	img := Image{ID: rec.ID, Config: rec.Config, StoredAt: rec.StoredAt}
	for _, ref := range refs {
		if strings.Contains(ref, "@") {
			img.RepoDigests = append(img.RepoDigests, ref)
		} else {
			img.RepoTags = append(img.RepoTags, ref)
		}
	}
	slices.Sort(img.RepoTags)
	slices.Sort(img.RepoDigests)
	for _, n := range rec.Blobs {
		img.Size += uint64(n)
	}
	counted := map[string]bool{}
	for _, l := range rec.Layers {
		img.Layers = append(img.Layers, Layer{DiffID: l.DiffID, Path: s.layerPath(l.DiffID), Size: l.Size})
		if !counted[l.DiffID] {
			counted[l.DiffID] = true
			img.Size += uint64(l.Size)
		}
	}
	return img
}
