package imageservice

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"k8s.io/klog/v2"
)

// Load stores all images of an archive: what `docker save`, `podman save`,
// `skopeo copy oci-archive:` or `buildctl` write, that is a docker-archive or an
// OCI layout (or both at once) in a tar, plain or compressed with gzip or zstd.
// The content decides, not a name. Either all images of the archive are stored
// or none. r is read twice and stays the caller's.
//
// Layers that the archive holds uncompressed are kept compressed with zstd
// (T44). Images get the archive's tags; RepoDigests stay empty.
//
// Errors: ErrInvalidArgument for an archive that can never be loaded,
// ErrDataLoss for one that is truncated or damaged, ErrFailedPrecondition for
// an image of another architecture, ErrResourceExhausted for a full disk.
func (s *Store) Load(ctx context.Context, r io.ReadSeeker, progress func(Progress)) ([]Image, error) {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	images, err := s.load(ctx, r, progress)
	if err != nil {
		return nil, fmt.Errorf("load image archive: %w", err)
	}
	return images, nil
}

func (s *Store) load(ctx context.Context, r io.ReadSeeker, progress func(Progress)) ([]Image, error) {
	size, err := r.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("the archive must be a file, since it is read twice; save it to one first: %w", err)
	}
	meter := newMeter(progress, Progress{Stage: StageReading, Total: 2 * size})
	defer meter.stop()

	var a archive
	if err := s.readArchive(ctx, r, meter, func(tr *tar.Reader) error {
		var err error
		a, err = readArchiveIndex(tr, &s.cfg.Limits)
		return err
	}); err != nil {
		return nil, err
	}
	plans, err := s.planArchive(&a)
	if err != nil {
		return nil, err
	}

	// Everything that the images will name is leased before the first look at
	// what the store has.
	var objs []object
	wanted := map[int][]wantedLayer{}
	for _, p := range plans {
		for _, doc := range p.documents {
			objs = append(objs, object{blobObject, digestBytes(doc)})
		}
		for _, l := range p.layers {
			objs = append(objs, object{layerObject, l.diffID})
			if l.blob != "" {
				objs = append(objs, object{blobObject, l.blob})
			}
			if !slices.Contains(wanted[l.entry], l) {
				wanted[l.entry] = append(wanted[l.entry], l)
			}
		}
	}
	release, err := s.lease(ctx, objs...)
	if err != nil {
		return nil, err
	}
	defer release()

	imported := layerImport{store: s, meter: meter, blobs: map[string]string{}, sizes: map[string]int64{}}
	defer imported.finish()
	for _, ls := range wanted {
		meter.addLayers(len(ls))
	}
	if err := s.readArchive(ctx, r, meter, func(tr *tar.Reader) error {
		for i := 0; ; i++ {
			hdr, err := tr.Next()
			if err == io.EOF {
				return imported.wait()
			}
			if err != nil {
				return err
			}
			if ls := wanted[i]; len(ls) > 0 {
				if err := imported.add(ctx, hdr.Name, tr, ls); err != nil {
					return err
				}
			}
		}
	}); err != nil {
		return nil, err
	}

	var images []Image
	for _, p := range plans {
		rec := imageRecord{ID: p.id, StoredAt: time.Now().UTC(), Config: *p.config, Blobs: map[string]int64{}}
		var descs []v1.Descriptor
		recompressed := false
		for _, l := range p.layers {
			blob := imported.blobs[l.diffID]
			n, ok, err := s.statBlob(blob)
			if err != nil {
				return nil, err
			}
			if !ok {
				return nil, fmt.Errorf("layer %s: its blob %s has gone: %w", l.diffID, blob, errdefs.ErrInternal)
			}
			rec.Blobs[blob] = n
			rec.Layers = append(rec.Layers, layerRecord{DiffID: l.diffID, Blob: blob, Size: imported.sizes[l.diffID]})
			hash, err := v1.NewHash(blob)
			if err != nil {
				return nil, err
			}
			mt := types.OCILayer
			if imported.plain[l.diffID] {
				mt, recompressed = types.OCILayerZStd, true
			}
			descs = append(descs, v1.Descriptor{MediaType: mt, Digest: hash, Size: n})
		}
		docs := p.documents
		if !p.hasManifest || recompressed {
			// No reference of a loaded image names a manifest, so that one that
			// fits the blobs replaces the archive's own.
			docs = [][]byte{p.rawConfig}
			m, err := synthesizeManifest(p.rawConfig, descs)
			if err != nil {
				return nil, err
			}
			docs = append(docs, m)
		}
		for _, doc := range docs {
			// A manifest made here was not leased; writing and recording it is
			// safe under the lease of a moment.
			release, err := s.lease(ctx, object{blobObject, digestBytes(doc)})
			if err != nil {
				return nil, err
			}
			defer release()
			d, err := s.writeBlob(doc)
			if err != nil {
				return nil, err
			}
			rec.Blobs[d] = int64(len(doc))
		}
		p.record = rec
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	// Tags that several images of the archive claim go to the last, as with
	// docker; all are recorded in one transaction.
	puts := make([]putImage, 0, len(plans))
	for _, p := range plans {
		puts = append(puts, putImage{p.record, p.tags})
	}
	if err := s.commit(puts); err != nil {
		return nil, err
	}
	for _, p := range plans {
		img, err := s.Resolve(p.id)
		if err != nil {
			return nil, err
		}
		klog.InfoS("Loaded image", "id", img.ID, "tags", img.RepoTags, "layers", len(img.Layers))
		images = append(images, img)
	}
	meter.done()
	return images, nil
}

// readArchive calls f with a tar reader at the archive's start and, after f,
// reads the rest so that a damaged end or checksum does not go unnoticed.
func (s *Store) readArchive(ctx context.Context, r io.ReadSeeker, meter *meter, f func(*tar.Reader) error) error {
	if _, err := r.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("seek: %w", err)
	}
	zr, kind, err := decompress(countReader{ctxReader{ctx, r}, meter.add})
	if err == nil {
		defer zr.Close()
		if err = f(tar.NewReader(zr)); err == nil {
			_, err = io.Copy(io.Discard, io.LimitReader(zr, s.cfg.Limits.LayerBytes))
		}
	}
	switch {
	case err == nil, ctx.Err() != nil, errdefs.IsInvalidArgument(err), errdefs.IsDataLoss(err), errdefs.IsFailedPrecondition(err), errdefs.IsResourceExhausted(err):
		return err
	case isDamage(err):
		return fmt.Errorf("the file is truncated or damaged (%s): %w: %w", kind, err, errdefs.ErrDataLoss)
	case errors.Is(err, tar.ErrHeader):
		return fmt.Errorf("the file is not a tar archive, or damaged (%s): %w: %w", kind, err, errdefs.ErrInvalidArgument)
	}
	return err
}

// archive is an index of what is in the file: positions of entries by name, and
// the content of those that are JSON.
type archive struct {
	files map[string]archiveFile
	// links are symbolic and hard links, which docker's older save wrote for
	// layers that several images share.
	links map[string]string
}

type archiveFile struct {
	index int
	size  int64
	json  []byte
}

// archiveName checks a name of the archive itself. Unlike a layer's entries,
// no tool writes absolute ones here, so that they mean no good.
func archiveName(name string) (string, error) {
	if len(name) > maxPathBytes {
		return "", invalidf("archive entry name of %d bytes is longer than %d", len(name), maxPathBytes)
	}
	if strings.HasPrefix(name, "/") {
		return "", invalidf("archive entry %.200q has an absolute path", name)
	}
	if slices.Contains(strings.Split(name, "/"), "..") {
		return "", invalidf("archive entry %.200q contains ..", name)
	}
	return path.Clean(name), nil
}

func readArchiveIndex(tr *tar.Reader, limits *Limits) (archive, error) {
	a := archive{files: map[string]archiveFile{}, links: map[string]string{}}
	var kept, total int64
	for i := 0; ; i++ {
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return a, err
		}
		if i >= limits.ArchiveEntries {
			return a, invalidf("the archive has more than %d entries", limits.ArchiveEntries)
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		name, err := archiveName(hdr.Name)
		if err != nil {
			return a, err
		}
		switch hdr.Typeflag {
		case tar.TypeReg:
			if hdr.Size > limits.LayerBytes {
				return a, invalidf("archive entry %.200q has %d bytes; the limit is %d", hdr.Name, hdr.Size, limits.LayerBytes)
			}
			// All together: an archive of sparse or compressed nothing is a bomb.
			if total += hdr.Size; total/int64(limits.Layers) > limits.LayerBytes {
				return a, invalidf("the archive expands to more than %d bytes", total)
			}
			f := archiveFile{index: i, size: hdr.Size}
			if hdr.Size <= max(limits.ConfigBytes, limits.ManifestBytes) {
				br := bufio.NewReaderSize(tr, 512)
				if looksLikeJSON(br) {
					if kept += hdr.Size; kept > limits.ArchiveMetadataBytes {
						return a, invalidf("the archive has more than %d bytes of JSON documents", limits.ArchiveMetadataBytes)
					}
					if f.json, err = io.ReadAll(br); err != nil {
						return a, err
					}
				}
			}
			delete(a.links, name)
			a.files[name] = f
		case tar.TypeSymlink, tar.TypeLink:
			target := hdr.Linkname
			if hdr.Typeflag == tar.TypeSymlink && !strings.HasPrefix(target, "/") {
				target = path.Join(path.Dir(name), target)
			}
			target = path.Clean(target)
			if strings.HasPrefix(target, "/") || target == ".." || strings.HasPrefix(target, "../") || len(target) > maxPathBytes {
				return a, invalidf("archive entry %.200q links to %.200q, which is outside of the archive", hdr.Name, hdr.Linkname)
			}
			delete(a.files, name)
			a.links[name] = target
		case tar.TypeDir:
		default:
			return a, invalidf("archive entry %.200q has the unsupported type %q", hdr.Name, hdr.Typeflag)
		}
	}
	if len(a.files) == 0 {
		return a, invalidf("the archive is empty, or not an archive")
	}
	return a, nil
}

func looksLikeJSON(br *bufio.Reader) bool {
	head, _ := br.Peek(64)
	head = bytes.TrimLeft(head, " \t\r\n")
	return len(head) > 0 && (head[0] == '{' || head[0] == '[')
}

// maxArchiveLinks bounds a chain of links; docker's are one long.
const maxArchiveLinks = 8

// find follows links inside the archive.
func (a *archive) find(name string) (archiveFile, bool) {
	for range maxArchiveLinks {
		if f, ok := a.files[name]; ok {
			return f, true
		}
		target, ok := a.links[name]
		if !ok {
			return archiveFile{}, false
		}
		name = target
	}
	return archiveFile{}, false
}

func blobName(d string) string { return "blobs/sha256/" + strings.TrimPrefix(d, "sha256:") }

// plannedImage is an image of the archive and where its parts are.
type plannedImage struct {
	id        string
	tags      []string
	config    *v1.ConfigFile
	rawConfig []byte
	layers    []wantedLayer
	// documents are the JSON blobs to keep.
	documents   [][]byte
	hasManifest bool
	record      imageRecord
}

// wantedLayer is a layer in the archive's entry number entry.
type wantedLayer struct {
	entry  int
	diffID string
	// blob is the digest that the entry must have; empty where the archive
	// doesn't say (docker-archive).
	blob string
}

// planArchive finds the images of the archive. An OCI layout is preferred, as
// its manifests are the originals; docker's manifest.json beside it adds tags.
func (s *Store) planArchive(a *archive) ([]*plannedImage, error) {
	var plans []*plannedImage
	byID := map[string]*plannedImage{}
	add := func(p *plannedImage) {
		if have := byID[p.id]; have != nil {
			have.tags = append(have.tags, p.tags...)
			return
		}
		byID[p.id] = p
		plans = append(plans, p)
	}
	_, isDocker := a.find("manifest.json")
	var ociErr error
	if f, ok := a.find("index.json"); ok {
		if f.json == nil {
			return nil, invalidf("index.json is not JSON or longer than %d bytes", s.cfg.Limits.ManifestBytes)
		}
		var index v1.IndexManifest
		if err := decodeJSON("index.json", f.json, &index); err != nil {
			return nil, err
		}
		if err := checkImageCount("index.json", len(index.Manifests)); err != nil {
			return nil, err
		}
		for _, d := range index.Manifests {
			if d.Annotations["vnd.docker.reference.type"] != "" {
				continue
			}
			p, err := s.planOCI(a, d)
			if err != nil {
				if ociErr == nil {
					ociErr = err
				}
				// An archive may hold an image for several platforms as
				// separate entries: one that fits is enough.
				if errdefs.IsFailedPrecondition(err) {
					continue
				}
				return nil, err
			}
			add(p)
		}
	}
	if isDocker {
		if err := s.planDocker(a, add); err != nil {
			return nil, err
		}
	}
	plans = s.preferNative(plans)
	if len(plans) == 0 {
		if ociErr != nil {
			return nil, ociErr
		}
		return nil, invalidf("the archive is neither what docker save writes (it has no manifest.json) nor an OCI layout (it has no index.json with an image)")
	}
	return plans, nil
}

// maxArchiveImages bounds the images of one archive: each may cost the reading of a
// config of megabytes, and all may name the same one.
const maxArchiveImages = 1000

func checkImageCount(what string, n int) error {
	if n > maxArchiveImages {
		return invalidf("%s names %d images, more than %d", what, n, maxArchiveImages)
	}
	return nil
}

// preferNative drops what guests could only translate, where the archive has an image
// of their own architecture that goes by the same name, or none.
func (s *Store) preferNative(plans []*plannedImage) []*plannedImage {
	native := func(p *plannedImage) bool {
		return p.config.Architecture == "" || p.config.Architecture != s.cfg.Translated
	}
	taken := map[string]bool{}
	for _, p := range plans {
		if native(p) {
			for _, tag := range p.tags {
				taken[tag] = true
			}
			taken[""] = taken[""] || len(p.tags) == 0
		}
	}
	return slices.DeleteFunc(plans, func(p *plannedImage) bool {
		if native(p) {
			return false
		}
		if len(p.tags) == 0 {
			return taken[""]
		}
		p.tags = slices.DeleteFunc(p.tags, func(tag string) bool { return taken[tag] })
		return len(p.tags) == 0
	})
}

func (s *Store) planOCI(a *archive, d v1.Descriptor) (*plannedImage, error) {
	get := func(d v1.Descriptor, limit int64) ([]byte, error) {
		f, ok := a.find(blobName(d.Digest.String()))
		if !ok {
			return nil, fmt.Errorf("the archive has no blob %s: %w", d.Digest, errdefs.ErrNotFound)
		}
		if f.json == nil || f.size > limit {
			return nil, invalidf("blob %s is not JSON or longer than %d bytes", d.Digest, limit)
		}
		if got := digestBytes(f.json); got != d.Digest.String() {
			return nil, digestMismatch("blob "+d.Digest.String(), got, d.Digest.String())
		}
		return f.json, nil
	}
	what := "image " + d.Digest.String()
	if err := checkDescriptor(what, d, s.cfg.Limits.ManifestBytes); err != nil {
		return nil, err
	}
	if p := d.Platform; p != nil && p.Architecture != "" && p.Architecture != "unknown" && (p.OS != "linux" || !s.runs(p.Architecture)) {
		return nil, s.wrongPlatform(what, []string{p.OS + "/" + p.Architecture})
	}
	raw, err := get(d, s.cfg.Limits.ManifestBytes)
	if err != nil {
		return nil, missingIsInvalid(err)
	}
	m, docs, err := s.selectManifest(what, raw, d.MediaType, get)
	if err != nil {
		return nil, missingIsInvalid(err)
	}
	rawConfig, err := get(m.config, s.cfg.Limits.ConfigBytes)
	if err != nil {
		return nil, missingIsInvalid(err)
	}
	cfg, err := s.parseConfig(what+": config", rawConfig, len(m.layers))
	if err != nil {
		return nil, err
	}
	p := &plannedImage{id: digestBytes(rawConfig), config: cfg, rawConfig: rawConfig, documents: append(docs, rawConfig), hasManifest: true}
	for i, l := range m.layers {
		f, ok := a.find(blobName(l.Digest.String()))
		if !ok {
			return nil, invalidf("%s: layer %d (%s) is not in the archive", what, i+1, l.Digest)
		}
		if f.size != l.Size {
			return nil, invalidf("%s: layer %d (%s) has %d bytes in the archive and %d in the manifest", what, i+1, l.Digest, f.size, l.Size)
		}
		p.layers = append(p.layers, wantedLayer{f.index, cfg.RootFS.DiffIDs[i].String(), l.Digest.String()})
	}
	if tag := ociTag(d.Annotations); tag != "" {
		p.tags = []string{tag}
	}
	return p, nil
}

// missingIsInvalid keeps "the archive lacks a blob" from being read as "no such
// image" by a caller.
func missingIsInvalid(err error) error {
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%v: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

// ociTag returns the reference that an index entry's annotations name.
// containerd and docker write the full name beside the spec's ref.name, which
// may be no more than a tag (OCI image-spec annotations.md).
func ociTag(annotations map[string]string) string {
	for _, key := range []string{"io.containerd.image.name", "org.opencontainers.image.ref.name"} {
		name := annotations[key]
		if key != "io.containerd.image.name" && !strings.ContainsAny(name, "/:") {
			continue
		}
		if ref, err := parseRef(name); err == nil && ref.tag != "" {
			return ref.String()
		}
	}
	return ""
}

var hexName = regexp.MustCompile(`^[0-9a-f]{64}$`)

func (s *Store) planDocker(a *archive, add func(*plannedImage)) error {
	f, _ := a.find("manifest.json")
	if f.json == nil {
		return invalidf("manifest.json is not JSON or longer than %d bytes", s.cfg.Limits.ManifestBytes)
	}
	var entries []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := decodeJSON("manifest.json", f.json, &entries); err != nil {
		return err
	}
	if len(entries) == 0 {
		return invalidf("manifest.json names no image")
	}
	if err := checkImageCount("manifest.json", len(entries)); err != nil {
		return err
	}
	for i, e := range entries {
		what := fmt.Sprintf("manifest.json: image %d", i+1)
		if len(e.RepoTags) > 0 {
			what = fmt.Sprintf("manifest.json: image %.200q", e.RepoTags[0])
		}
		name, err := archiveName(e.Config)
		if err != nil {
			return fmt.Errorf("%s: config: %w", what, err)
		}
		cf, ok := a.find(name)
		if !ok {
			return invalidf("%s: its config %.200q is not in the archive", what, e.Config)
		}
		if cf.json == nil || cf.size > s.cfg.Limits.ConfigBytes {
			return invalidf("%s: its config %.200q is not JSON or longer than %d bytes", what, e.Config, s.cfg.Limits.ConfigBytes)
		}
		cfg, err := s.parseConfig(what+": config", cf.json, len(e.Layers))
		if err != nil {
			return err
		}
		p := &plannedImage{id: digestBytes(cf.json), config: cfg, rawConfig: cf.json, documents: [][]byte{cf.json}}
		if want := strings.TrimSuffix(path.Base(name), ".json"); hexName.MatchString(want) && p.id != "sha256:"+want {
			return digestMismatch(what+": config", p.id, "sha256:"+want)
		}
		for j, l := range e.Layers {
			name, err := archiveName(l)
			if err != nil {
				return fmt.Errorf("%s: layer %d: %w", what, j+1, err)
			}
			lf, ok := a.find(name)
			if !ok {
				return invalidf("%s: layer %d (%.200q) is not in the archive", what, j+1, l)
			}
			w := wantedLayer{entry: lf.index, diffID: cfg.RootFS.DiffIDs[j].String()}
			if dir, hex := path.Split(name); dir == "blobs/sha256/" && hexName.MatchString(hex) {
				w.blob = "sha256:" + hex
			}
			p.layers = append(p.layers, w)
		}
		for _, t := range e.RepoTags {
			ref, err := parseRef(t)
			if err != nil || ref.tag == "" {
				return invalidf("%s: %.200q is not a tag", what, t)
			}
			p.tags = append(p.tags, ref.String())
		}
		add(p)
	}
	return nil
}

func synthesizeManifest(rawConfig []byte, layers []v1.Descriptor) ([]byte, error) {
	hash, err := v1.NewHash(digestBytes(rawConfig))
	if err != nil {
		return nil, err
	}
	return marshalJSON(v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Config:        v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: hash, Size: int64(len(rawConfig))},
		Layers:        layers,
	})
}

// layerImport stores layers that come out of an archive one after the other;
// each is converted while the next one is read.
type layerImport struct {
	store *Store
	meter *meter
	wg    sync.WaitGroup

	mu       sync.Mutex
	err      error
	blobs    map[string]string // diff ID to the blob that holds it
	plain    map[string]bool   // diff IDs whose blob was compressed here
	sizes    map[string]int64  // of layer files
	releases []func()
}

func (im *layerImport) failed() error {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.err
}

// finish waits for conversions and gives up the leases of blobs.
func (im *layerImport) finish() {
	im.wg.Wait()
	for _, release := range im.releases {
		release()
	}
}

func (im *layerImport) wait() error {
	im.wg.Wait()
	return im.failed()
}

// add stores the content of an archive entry as the layers it is wanted for;
// more than one only when a hostile or odd archive says so.
func (im *layerImport) add(ctx context.Context, name string, r io.Reader, layers []wantedLayer) error {
	if err := im.failed(); err != nil {
		return err
	}
	blob, plain, err := im.storeBlob(ctx, name, r, layers)
	if err != nil {
		return err
	}
	for _, l := range layers {
		im.mu.Lock()
		im.blobs[l.diffID] = blob
		if plain {
			if im.plain == nil {
				im.plain = map[string]bool{}
			}
			im.plain[l.diffID] = true
		}
		im.mu.Unlock()
		im.wg.Go(func() {
			size, err := im.store.ensureLayer(ctx, l.diffID, blob)
			if err != nil {
				err = fmt.Errorf("%.200q: %w", name, err)
			}
			im.mu.Lock()
			if err != nil && im.err == nil {
				im.err = err
			}
			im.sizes[l.diffID] = size
			im.mu.Unlock()
			im.meter.layerDone()
		})
	}
	return nil
}

// storeBlob writes the entry as a blob, compressed if it is not, and returns
// its digest.
func (im *layerImport) storeBlob(ctx context.Context, name string, r io.Reader, layers []wantedLayer) (blob string, plain bool, err error) {
	s := im.store
	br := bufio.NewReaderSize(r, 256<<10)
	plain = detectCompression(br) == uncompressed
	t, err := s.newTemp("blob")
	if err != nil {
		return "", false, err
	}
	defer t.discard()
	source, stored := sha256.New(), sha256.New()
	dst := io.MultiWriter(t)
	var zw *zstd.Encoder
	if plain {
		// The fastest level: these bytes are kept for save and repair only.
		if zw, err = zstd.NewWriter(io.MultiWriter(t, stored), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1)); err != nil {
			return "", false, err
		}
		defer zw.Close()
		dst = zw
	}
	_, err = io.CopyBuffer(writerOnly{io.MultiWriter(dst, source)}, readerOnly{br}, make([]byte, 256<<10))
	if err != nil {
		if isDamage(err) || ctx.Err() != nil {
			return "", false, err
		}
		return "", false, diskError(t.Name(), fmt.Errorf("copy %.200q out of the archive: %w", name, err))
	}
	for _, l := range layers {
		want := l.blob
		if want == "" && plain {
			want = l.diffID
		}
		if got := digestOf(source); want != "" && got != want {
			return "", false, digestMismatch(fmt.Sprintf("layer %.200q", name), got, want)
		}
	}
	blob = digestOf(source)
	if plain {
		if err := zw.Close(); err != nil {
			return "", false, diskError(t.Name(), err)
		}
		blob = digestOf(stored)
	}
	release, err := s.lease(ctx, object{blobObject, blob})
	if err != nil {
		return "", false, err
	}
	im.releases = append(im.releases, release)
	if _, ok, err := s.statBlob(blob); err != nil {
		return "", false, err
	} else if ok {
		return blob, plain, nil
	}
	return blob, plain, t.commit(s.blobPath(blob))
}

// writerOnly and readerOnly keep io.Copy from finding a shortcut whose buffer
// is 32 KiB.
type writerOnly struct{ io.Writer }
type readerOnly struct{ io.Reader }
