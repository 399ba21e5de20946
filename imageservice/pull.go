package imageservice

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
)

// maxParallelDownloads is docker's and containerd's default of three.
const maxParallelDownloads = 3

// Pull fetches an image by tag or digest, as the CRI's PullImage. A tag that
// pointed to another image moves; a pull by digest makes no tag. auth may be
// nil; it is shown to the registry of the reference only (or to the host that it
// names), never to a mirror, and never logged.
//
// Errors: ErrInvalidArgument for a bad reference or an image that can't work
// here, ErrNotFound, ErrUnauthenticated and ErrPermissionDenied as the registry
// says, ErrUnavailable when it can't be reached after retries,
// ErrFailedPrecondition for another architecture, ErrDataLoss for content that
// is not what its digest says, ErrResourceExhausted for a full disk.
func (s *Store) Pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig, progress func(Progress)) (Image, error) {
	r, err := parseRef(ref)
	if err != nil {
		return Image{}, err
	}
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return Image{}, err
	}
	defer end()
	start := time.Now()
	img, err := s.pull(ctx, r, auth, progress)
	if err != nil {
		return Image{}, fmt.Errorf("pull image %s: %w", r, err)
	}
	klog.InfoS("Pulled image", "image", r.String(), "id", img.ID, "layers", len(img.Layers), "took", time.Since(start))
	return img, nil
}

func (s *Store) pull(ctx context.Context, ref imageRef, auth *runtimeapi.AuthConfig, progress func(Progress)) (Image, error) {
	endpoints, err := endpointsFor(s.cfg.RegistryConfigDir, ref.domain)
	if err != nil {
		return Image{}, err
	}
	repo := &repository{ref: ref, endpoints: endpoints, auth: auth, retry: s.retry, limits: &s.cfg.Limits}
	defer repo.close()
	meter := newMeter(progress, Progress{Ref: ref.String(), Stage: StageResolving})
	defer meter.stop()

	get := func(d v1.Descriptor, limit int64) ([]byte, error) {
		kind := "blobs"
		if d.MediaType.IsIndex() || d.MediaType.IsImage() {
			kind = "manifests"
		}
		b, _, err := repo.document(ctx, kind, d.Digest.String(), d.Digest.String(), limit)
		return b, err
	}
	top, mediaType, err := repo.document(ctx, "manifests", ref.identifier(), ref.digest.String(), s.cfg.Limits.ManifestBytes)
	if err != nil {
		return Image{}, err
	}
	m, documents, err := s.selectManifest("manifest", top, mediaType, get)
	if err != nil {
		return Image{}, err
	}
	rawConfig, err := get(m.config, s.cfg.Limits.ConfigBytes)
	if err != nil {
		return Image{}, err
	}
	config, err := s.parseConfig("config "+m.config.Digest.String(), rawConfig, len(m.layers))
	if err != nil {
		return Image{}, err
	}
	documents = append(documents, rawConfig)

	var objs []object
	for _, doc := range documents {
		objs = append(objs, object{blobObject, digestBytes(doc)})
	}
	var total int64
	sizes := map[string]int64{}
	for i, l := range m.layers {
		objs = append(objs, object{blobObject, l.Digest.String()}, object{layerObject, config.RootFS.DiffIDs[i].String()})
		if _, ok := sizes[l.Digest.String()]; !ok {
			sizes[l.Digest.String()] = l.Size
			total += l.Size
		}
	}
	release, err := s.lease(ctx, objs...)
	if err != nil {
		return Image{}, err
	}
	defer release()
	meter.addLayers(len(m.layers))
	meter.expect(StageFetching, total)

	rec := imageRecord{
		ID: digestBytes(rawConfig), StoredAt: time.Now().UTC(), Config: *config,
		Blobs: map[string]int64{}, Layers: make([]layerRecord, len(m.layers)),
	}
	if err := s.pullLayers(ctx, repo, m, config, meter, rec.Layers); err != nil {
		return Image{}, err
	}
	for d, n := range sizes {
		rec.Blobs[d] = n
	}
	for _, doc := range documents {
		d, err := s.writeBlob(doc)
		if err != nil {
			return Image{}, err
		}
		rec.Blobs[d] = int64(len(doc))
	}
	refs := []string{ref.name() + "@" + digestBytes(top)}
	if ref.tag != "" {
		refs = append(refs, ref.String())
	}
	if err := ctx.Err(); err != nil {
		return Image{}, err
	}
	if err := s.commit([]putImage{{rec, refs}}); err != nil {
		return Image{}, err
	}
	img, err := s.Resolve(rec.ID)
	if err != nil {
		return Image{}, err
	}
	meter.done()
	return img, nil
}

// pullLayers downloads and converts layers, a few at a time: one is converted
// while others arrive. The first failure ends the rest.
func (s *Store) pullLayers(ctx context.Context, repo *repository, m *manifest, config *v1.ConfigFile, meter *meter, out []layerRecord) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	places := make(chan struct{}, maxParallelDownloads)
	var wg sync.WaitGroup
	for i, l := range m.layers {
		wg.Go(func() {
			diffID := config.RootFS.DiffIDs[i].String()
			err := s.ensureBlob(ctx, repo, l, places, meter)
			var size int64
			if err == nil {
				size, err = s.ensureLayer(ctx, diffID, l.Digest.String())
			}
			if err != nil {
				cancel(fmt.Errorf("layer %d of %d: %w", i+1, len(m.layers), err))
				return
			}
			out[i] = layerRecord{DiffID: diffID, Blob: l.Digest.String(), Size: size}
			meter.layerDone()
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// ensureBlob downloads a blob unless the store has it. The caller holds a lease.
func (s *Store) ensureBlob(ctx context.Context, repo *repository, d v1.Descriptor, places chan struct{}, meter *meter) error {
	key := object{blobObject, d.Digest.String()}
	have := func() (bool, error) {
		n, ok, err := s.statBlob(key.digest)
		if ok && n != d.Size {
			return false, invalidf("blob %s has %d bytes, the manifest says %d", d.Digest, n, d.Size)
		}
		return ok, err
	}
	if ok, err := have(); err != nil || ok {
		meter.add(d.Size)
		return err
	}
	select {
	case places <- struct{}{}:
		defer func() { <-places }()
	case <-ctx.Done():
		return ctx.Err()
	}
	var joined []*flight
	err := s.flights.do(ctx, s.ctx, key, func(f *flight) {
		joined = append(joined, f)
		meter.follow(f)
	}, func(ctx context.Context, f *flight) error {
		if ok, err := have(); err != nil || ok {
			f.done.Store(d.Size)
			return err
		}
		release, err := s.lease(ctx, key)
		if err != nil {
			return err
		}
		defer release()
		t, err := s.newTemp("blob")
		if err != nil {
			return err
		}
		defer t.discard()
		if err := repo.blob(ctx, d, t, func(n int64) { f.done.Add(n) }); err != nil {
			return err
		}
		return t.commit(s.blobPath(key.digest))
	})
	for _, f := range joined {
		meter.unfollow(f)
	}
	if err != nil {
		return err
	}
	meter.add(d.Size)
	// A blob that someone else fetched by a manifest that lied about the size.
	ok, err := have()
	if err == nil && !ok {
		err = fmt.Errorf("blob %s has gone: %w", d.Digest, errdefs.ErrInternal)
	}
	return err
}
