package imageservice

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// maxReferenceBytes is far above what a name (255), a tag (128) and a digest
// need; it bounds the regular expressions' work.
const maxReferenceBytes = 1024

var (
	// At least 12 characters keep a short id from being mistaken for a name:
	// crictl prints 13, docker 12.
	shortIDPattern = regexp.MustCompile(`^[0-9a-f]{12,64}$`)
	fullIDPattern  = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// imageRef is a normalised reference: a name with either a tag or a digest.
type imageRef struct {
	// domain and path are "docker.io" and "library/nginx".
	domain, path string
	tag          string
	digest       digest.Digest
}

// parseRef normalises a reference as the CRI expects: nginx is
// docker.io/library/nginx:latest, and a digest beats a tag.
func parseRef(s string) (imageRef, error) {
	if len(s) > maxReferenceBytes {
		return imageRef{}, invalidf("image reference of %d bytes is longer than %d", len(s), maxReferenceBytes)
	}
	named, err := reference.ParseDockerRef(s)
	if err != nil {
		return imageRef{}, invalidf("image reference %q: %v", s, err)
	}
	r := imageRef{domain: reference.Domain(named), path: reference.Path(named)}
	if c, ok := named.(reference.Canonical); ok {
		r.digest = c.Digest()
		if r.digest.Algorithm() != digest.SHA256 {
			return imageRef{}, invalidf("image reference %q: digest algorithm %s is not supported, only sha256", s, r.digest.Algorithm())
		}
		return r, nil
	}
	if t, ok := named.(reference.Tagged); ok {
		r.tag = t.Tag()
		return r, nil
	}
	return imageRef{}, invalidf("image reference %q has neither a tag nor a digest", s)
}

func (r imageRef) name() string { return r.domain + "/" + r.path }

func (r imageRef) String() string {
	if r.digest != "" {
		return r.name() + "@" + r.digest.String()
	}
	return r.name() + ":" + r.tag
}

// identifier is the last part of the manifest's URL.
func (r imageRef) identifier() string {
	if r.digest != "" {
		return r.digest.String()
	}
	return r.tag
}

// NormalizeReference returns the full form of an image reference, as it appears
// in RepoTags or RepoDigests: "nginx" becomes "docker.io/library/nginx:latest".
// It fails with ErrInvalidArgument.
func NormalizeReference(s string) (string, error) {
	r, err := parseRef(s)
	if err != nil {
		return "", err
	}
	return r.String(), nil
}

// parseDigest accepts sha256 only and nothing but 64 lower-case hex digits
// after it, so that the result is safe as a file name.
func parseDigest(s string) (digest.Digest, error) {
	hex, ok := strings.CutPrefix(s, "sha256:")
	if !ok || !fullIDPattern.MatchString(hex) {
		if len(s) > 100 {
			s = s[:100] + "..."
		}
		return "", invalidf("%q is not a sha256 digest", s)
	}
	return digest.Digest(s), nil
}

func notFound(refOrID string) error {
	if len(refOrID) > maxReferenceBytes {
		refOrID = refOrID[:100] + "..."
	}
	return fmt.Errorf("image %q: %w", refOrID, errdefs.ErrNotFound)
}
