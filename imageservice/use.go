package imageservice

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/opencontainers/go-digest"
)

// linkNameDigits of a diff ID name a layer in a pod. They must not be fewer
// than 32: who makes images could otherwise find two layers with one name.
const linkNameDigits = 32

// Use makes the image's layers available in linkDir, which exists and belongs
// to the caller, and returns them from the bottom up, Path being the link. From
// then on the removal of the image does not touch them; the caller removes the
// links. Names are the same for the same layer, and a layer that is already
// there is left alone, so that a second container of a pod costs nothing.
//
// The links are hard links: linkDir should be on the store's file system. Where
// that can't be, the file is cloned or, at last, copied, which costs the layer's
// size once per linkDir.
//
// A layer that the image names twice appears once, at its upper place: overlayfs
// refuses the same directory twice, and the lower one is hidden entirely.
//
// refOrID is as in [Store.Resolve]. Use may run concurrently, also for one
// linkDir.
func (s *Store) Use(ctx context.Context, refOrID, linkDir string) ([]Layer, error) {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	img, err := s.Resolve(refOrID)
	if err != nil {
		return nil, err
	}
	var objs []object
	for _, l := range img.Layers {
		objs = append(objs, object{layerObject, l.DiffID})
	}
	release, err := s.lease(ctx, objs...)
	if err != nil {
		return nil, err
	}
	defer release()
	// Again: it may have been removed before the lease was there.
	if _, err := s.Resolve(img.ID); err != nil {
		return nil, err
	}
	var layers []Layer
	seen := map[string]bool{}
	for _, l := range slices.Backward(img.Layers) {
		if seen[l.DiffID] {
			continue
		}
		seen[l.DiffID] = true
		dst := filepath.Join(linkDir, digest.Digest(l.DiffID).Encoded()[:linkNameDigits]+".ext4")
		if err := linkLayer(ctx, l.Path, dst); err != nil {
			return nil, fmt.Errorf("image %s: link layer %s: %w", img.ID, l.DiffID, err)
		}
		l.Path = dst
		layers = append(layers, l)
	}
	slices.Reverse(layers)
	return layers, nil
}

func linkLayer(ctx context.Context, src, dst string) error {
	err := os.Link(src, dst)
	switch {
	case err == nil, errors.Is(err, os.ErrExist):
		return nil
	case errors.Is(err, syscall.EXDEV), errors.Is(err, syscall.ENOTSUP), errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EMLINK):
	default:
		return diskError(dst, err)
	}
	in, err := os.Open(src)
	if err != nil {
		return diskError(src, err)
	}
	defer in.Close()
	out, err := os.CreateTemp(filepath.Dir(dst), ".layer-*")
	if err != nil {
		return diskError(dst, err)
	}
	t := &tempFile{File: out}
	defer t.discard()
	if err := cloneFile(in, out); err != nil {
		if _, err := io.Copy(out, ctxReader{ctx, in}); err != nil {
			return diskError(dst, err)
		}
	}
	return t.commit(dst)
}
