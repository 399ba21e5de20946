package imageservice

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// tempFile is a file in tmp that gets its final name when it is complete.
type tempFile struct {
	*os.File
	done bool
}

func (s *Store) newTemp(kind string) (*tempFile, error) {
	f, err := os.CreateTemp(s.tmpDir(), kind+"-*")
	if err != nil {
		return nil, diskError(s.tmpDir(), fmt.Errorf("make temporary file: %w", err))
	}
	return &tempFile{File: f}, nil
}

// commit syncs the file and renames it to final, mode 0444. Only the contents
// and the name are durable together; the caller's metadata comes after.
func (t *tempFile) commit(final string) error {
	if err := t.Chmod(0o444); err != nil {
		return diskError(t.Name(), err)
	}
	if err := t.Sync(); err != nil {
		return diskError(t.Name(), fmt.Errorf("sync: %w", err))
	}
	if err := t.Close(); err != nil {
		return diskError(t.Name(), err)
	}
	if err := os.Rename(t.Name(), final); err != nil {
		return diskError(final, err)
	}
	t.done = true
	return syncDir(filepath.Dir(final))
}

// discard removes the file unless it was committed; it may be deferred.
func (t *tempFile) discard() {
	if !t.done {
		t.Close()
		os.Remove(t.Name())
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return diskError(dir, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return diskError(dir, fmt.Errorf("sync directory: %w", err))
	}
	return nil
}

func digestOf(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

func digestBytes(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// writeBlob stores a small blob that is in memory; its digest was checked or is
// computed here. The caller holds a lease of it.
func (s *Store) writeBlob(b []byte) (string, error) {
	d := digestBytes(b)
	if _, err := os.Stat(s.blobPath(d)); err == nil {
		return d, nil
	}
	t, err := s.newTemp("blob")
	if err != nil {
		return "", err
	}
	defer t.discard()
	if _, err := io.Copy(t, bytes.NewReader(b)); err != nil {
		return "", diskError(t.Name(), err)
	}
	return d, t.commit(s.blobPath(d))
}

// statBlob returns the blob's size, or false when the store does not have it.
func (s *Store) statBlob(d string) (int64, bool, error) {
	st, err := os.Stat(s.blobPath(d))
	if errors.Is(err, os.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, diskError(s.blobPath(d), err)
	}
	return st.Size(), true, nil
}

// ctxReader ends reads when its context does.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// countReader adds what passes through to n.
type countReader struct {
	r io.Reader
	n func(int64)
}

func (c countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n(int64(n))
	return n, err
}

func digestMismatch(what, got, want string) error {
	return fmt.Errorf("%s: content has digest %s instead of %s; it was damaged on the way or is not what was named: %w", what, got, want, errdefs.ErrDataLoss)
}
