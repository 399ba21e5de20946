package imageservice

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// maxIndexDepth bounds indexes that contain indexes; docker's save makes two.
const maxIndexDepth = 4

// manifestTypes are sent as Accept; docker's come too because Docker Hub has
// images that exist in no other form.
var manifestTypes = []types.MediaType{
	types.OCIImageIndex, types.DockerManifestList, types.OCIManifestSchema1, types.DockerManifestSchema2,
}

var layerTypes = []types.MediaType{
	types.OCILayer, types.OCILayerZStd, types.OCIUncompressedLayer,
	types.DockerLayer, types.DockerUncompressedLayer, "application/vnd.docker.image.rootfs.diff.tar.zstd",
}

// manifest is what the store needs of an image manifest.
type manifest struct {
	digest string
	raw    []byte
	config v1.Descriptor
	layers []v1.Descriptor
}

func decodeJSON(what string, b []byte, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s is not valid JSON: %v: %w", what, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// manifestKind sniffs the media type that the document itself claims; the
// transport's claim is the fallback, as the OCI spec made the field optional.
func manifestKind(what string, raw []byte, declared types.MediaType) (types.MediaType, error) {
	var probe struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     types.MediaType `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Layers        json.RawMessage `json:"layers"`
		Config        json.RawMessage `json:"config"`
		FSLayers      json.RawMessage `json:"fsLayers"`
	}
	if err := decodeJSON(what, raw, &probe); err != nil {
		return "", err
	}
	if probe.SchemaVersion == 1 || probe.FSLayers != nil {
		return "", invalidf("%s has docker's schema 1, which is not supported; push the image again with a current tool", what)
	}
	kind := probe.MediaType
	if kind == "" {
		kind = declared
	}
	// A document that is both is the confusion of CVE-2021-41190.
	if probe.Manifests != nil && (probe.Layers != nil || probe.Config != nil) {
		return "", invalidf("%s is an index and a manifest at once", what)
	}
	if kind == "" || kind == "application/json" || strings.HasPrefix(string(kind), "text/") {
		if probe.Manifests != nil {
			kind = types.OCIImageIndex
		} else {
			kind = types.OCIManifestSchema1
		}
	}
	if !slices.Contains(manifestTypes, kind) {
		return "", invalidf("%s has the unsupported media type %.200q", what, kind)
	}
	if kind.IsIndex() != (probe.Manifests != nil) {
		return "", invalidf("%s says that it is %s and does not look like one", what, kind)
	}
	return kind, nil
}

func (s *Store) parseManifest(what string, raw []byte) (*manifest, error) {
	var m v1.Manifest
	if err := decodeJSON(what, raw, &m); err != nil {
		return nil, err
	}
	switch m.Config.MediaType {
	case types.OCIConfigJSON, types.DockerConfigJSON:
	default:
		return nil, invalidf("%s is not a container image: its config has media type %.200q", what, m.Config.MediaType)
	}
	if err := s.checkLayerCount(what, len(m.Layers)); err != nil {
		return nil, err
	}
	if err := checkDescriptor(what+": config", m.Config, s.cfg.Limits.ConfigBytes); err != nil {
		return nil, err
	}
	for i, l := range m.Layers {
		where := fmt.Sprintf("%s: layer %d", what, i+1)
		if !slices.Contains(layerTypes, l.MediaType) {
			if !l.MediaType.IsDistributable() {
				return nil, invalidf("%s has media type %s: it may not be distributed and is not in the registry", where, l.MediaType)
			}
			return nil, invalidf("%s has the unsupported media type %.200q", where, l.MediaType)
		}
		if err := checkDescriptor(where, l, s.cfg.Limits.LayerBytes); err != nil {
			return nil, err
		}
	}
	return &manifest{digest: digestBytes(raw), raw: raw, config: m.Config, layers: m.Layers}, nil
}

func (s *Store) checkLayerCount(what string, n int) error {
	if n == 0 {
		return invalidf("%s has no layers: there is no file system to run a container from", what)
	}
	if n > s.cfg.Limits.Layers {
		return invalidf("%s has %d layers, more than %d", what, n, s.cfg.Limits.Layers)
	}
	return nil
}

func checkDescriptor(what string, d v1.Descriptor, limit int64) error {
	if _, err := parseDigest(d.Digest.String()); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if d.Size < 0 || d.Size > limit {
		return invalidf("%s is said to have %d bytes; the limit is %d", what, d.Size, limit)
	}
	return nil
}

// parseConfig checks an image config against the layers that go with it and the
// architecture of the guests. Build history is dropped: it can be megabytes.
func (s *Store) parseConfig(what string, raw []byte, layers int) (*v1.ConfigFile, error) {
	var cfg v1.ConfigFile
	if err := decodeJSON(what, raw, &cfg); err != nil {
		return nil, err
	}
	if err := s.checkLayerCount(what, len(cfg.RootFS.DiffIDs)); err != nil {
		return nil, err
	}
	if layers != len(cfg.RootFS.DiffIDs) {
		return nil, invalidf("%s lists %d diff IDs for %d layers", what, len(cfg.RootFS.DiffIDs), layers)
	}
	for _, d := range cfg.RootFS.DiffIDs {
		if _, err := parseDigest(d.String()); err != nil {
			return nil, fmt.Errorf("%s: diff ID: %w", what, err)
		}
	}
	if cfg.OS != "" && cfg.OS != "linux" || cfg.Architecture != "" && !s.runs(cfg.Architecture) {
		return nil, s.wrongPlatform(what, []string{cfg.OS + "/" + cfg.Architecture})
	}
	cfg.History = nil
	return &cfg, nil
}

// runs tells whether the guests run programs of an architecture.
func (s *Store) runs(arch string) bool {
	return arch == s.cfg.Arch || arch == s.cfg.Translated && arch != ""
}

func (s *Store) wrongPlatform(what string, have []string) error {
	if len(have) > 20 {
		have = append(have[:20:20], "...")
	}
	for i, h := range have {
		if len(h) > 64 {
			have[i] = h[:64] + "..."
		}
	}
	return fmt.Errorf("%s is for %q, the guests of this node are linux/%s; use an image that is built for linux/%s: %w",
		what, strings.Join(have, ", "), s.cfg.Arch, s.cfg.Arch, errdefs.ErrFailedPrecondition)
}

// pickPlatform returns the index's entries that may hold an image for the
// guests, best first, and what platforms there are instead. Attestations and
// other entries that aren't images have the platform unknown/unknown.
func (s *Store) pickPlatform(entries []v1.Descriptor) (fit []v1.Descriptor, have []string) {
	var unsaid []v1.Descriptor
	var exact, variants [2][]v1.Descriptor // the guests' own architecture, and what they translate
	for _, d := range entries {
		if d.Annotations["vnd.docker.reference.type"] != "" {
			continue
		}
		p, foreign := d.Platform, 0
		if p != nil && p.Architecture != s.cfg.Arch {
			foreign = 1
		}
		switch {
		case p == nil || p.OS == "" && p.Architecture == "":
			unsaid = append(unsaid, d)
		case p.OS == "unknown" || p.Architecture == "unknown":
		case p.OS != "linux" || !s.runs(p.Architecture):
			have = append(have, p.OS+"/"+p.Architecture)
		case p.Variant == "" || p.Variant == "v8" || p.Variant == "v1":
			exact[foreign] = append(exact[foreign], d)
		default:
			// amd64/v3 or arm64/v9 may use instructions that the guest lacks.
			variants[foreign] = append(variants[foreign], d)
			have = append(have, p.OS+"/"+p.Architecture+"/"+p.Variant)
		}
	}
	return slices.Concat(exact[0], unsaid, variants[0], exact[1], variants[1]), have
}

// documentSource gives manifests and configs by digest; what it returns has
// been checked against the digest.
type documentSource func(d v1.Descriptor, limit int64) ([]byte, error)

// selectManifest follows indexes to the manifest for the guests' platform and
// returns it with the raw documents on the way, outermost first.
func (s *Store) selectManifest(what string, raw []byte, declared types.MediaType, get documentSource) (*manifest, [][]byte, error) {
	return s.selectManifestAt(what, raw, declared, get, 0)
}

func (s *Store) selectManifestAt(what string, raw []byte, declared types.MediaType, get documentSource, depth int) (*manifest, [][]byte, error) {
	kind, err := manifestKind(what, raw, declared)
	if err != nil {
		return nil, nil, err
	}
	if kind.IsImage() {
		m, err := s.parseManifest(what, raw)
		return m, [][]byte{raw}, err
	}
	if depth >= maxIndexDepth {
		return nil, nil, invalidf("%s: indexes are nested more than %d deep", what, maxIndexDepth)
	}
	var index v1.IndexManifest
	if err := decodeJSON(what, raw, &index); err != nil {
		return nil, nil, err
	}
	fit, have := s.pickPlatform(index.Manifests)
	var firstErr error
	for i, d := range fit {
		if i == maxCandidates {
			break
		}
		inner := fmt.Sprintf("%s: manifest %s", what, d.Digest)
		if err := checkDescriptor(inner, d, s.cfg.Limits.ManifestBytes); err != nil {
			return nil, nil, err
		}
		b, err := get(d, s.cfg.Limits.ManifestBytes)
		if err == nil {
			var m *manifest
			var docs [][]byte
			if m, docs, err = s.selectManifestAt(inner, b, d.MediaType, get, depth+1); err == nil {
				if d.Platform != nil && d.Platform.Architecture != "" {
					return m, append([][]byte{raw}, docs...), nil
				}
				// Nothing said the platform: the config does.
				if err = s.probeConfig(inner, m, get); err == nil {
					return m, append([][]byte{raw}, docs...), nil
				}
			}
		}
		if firstErr == nil {
			firstErr = err
		}
		if !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			break
		}
	}
	if firstErr != nil {
		return nil, nil, firstErr
	}
	if len(have) == 0 {
		return nil, nil, invalidf("%s is an index without any image", what)
	}
	return nil, nil, s.wrongPlatform(what, have)
}

// maxCandidates bounds the requests that one index can cause.
const maxCandidates = 8

func (s *Store) probeConfig(what string, m *manifest, get documentSource) error {
	b, err := get(m.config, s.cfg.Limits.ConfigBytes)
	if err != nil {
		return err
	}
	_, err = s.parseConfig(what, b, len(m.layers))
	return err
}

// readCapped reads all of r, at most limit bytes.
func readCapped(what string, r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, invalidf("%s is longer than %d bytes", what, limit)
	}
	return b, nil
}
