package imageservice

import (
	"bytes"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/cri-vz/cri-vz/test/images"
)

// A node whose guests can translate takes the other architecture where there is
// nothing better, and one whose guests can't refuses it.
func TestTranslated(t *testing.T) {
	reg := newRegistry(t)
	arm, amd, fast := smallImage(t, "arm64", "a"), smallImage(t, "amd64", "b"), smallImage(t, "amd64", "c")
	of := func(arch, variant string, img v1.Image) mutate.IndexAddendum {
		return mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch, Variant: variant}}}
	}
	unsaid := mutate.IndexAddendum{Add: amd}
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	ref := func(tag string) name.Reference {
		r, err := name.ParseReference(reg.host + "/" + tag)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	for tag, entries := range map[string][]mutate.IndexAddendum{
		"both:1":      {of("amd64", "", amd), of("arm64", "v8", arm)},
		"amd:1":       {of("amd64", "", amd)},
		"variants:1":  {of("amd64", "v3", fast), of("amd64", "v1", amd)},
		"variant:1":   {of("amd64", "", amd), of("arm64", "v9", arm)},
		"unsaid:1":    {unsaid},
		"elsewhere:1": {of("riscv64", "", smallImage(t, "riscv64", "d"))},
	} {
		if err := remote.WriteIndex(ref(tag), mutate.AppendManifests(empty.Index, entries...), remote.WithTransport(tr)); err != nil {
			t.Fatal(err)
		}
	}
	if err := remote.Write(ref("single:1"), amd, remote.WithTransport(tr)); err != nil {
		t.Fatal(err)
	}
	translating := func(c *Config) { c.Arch, c.Translated = "arm64", "amd64" }
	s, plain := pullStore(t, translating), pullStore(t, func(c *Config) { c.Arch = "arm64" })
	for tag, want := range map[string]v1.Image{
		"both:1": arm, "amd:1": amd, "variants:1": amd, "variant:1": arm, "unsaid:1": amd, "single:1": amd,
	} {
		got, err := s.Pull(t.Context(), reg.host+"/"+tag, nil, nil)
		if err != nil || got.ID != configDigest(t, want) {
			t.Errorf("%s: %+v, %v, want %s", tag, got, err, configDigest(t, want))
		}
		_, err = plain.Pull(t.Context(), reg.host+"/"+tag, nil, nil)
		if want == arm && err != nil || want == amd && (!errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "use an image that is built for linux/arm64")) {
			t.Errorf("%s without a translator: %v", tag, err)
		}
	}
	if _, err := s.Pull(t.Context(), reg.host+"/elsewhere:1", nil, nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("neither architecture: %v", err)
	}
}

// An archive with an image for both architectures gives the guests' own.
func TestTranslatedArchive(t *testing.T) {
	arm, amd := smallImage(t, "arm64", "a"), smallImage(t, "amd64", "b")
	for _, test := range []struct {
		name    string
		archive []images.Entry
		want    []v1.Image
	}{
		{"amd64 only", layout(t, amd, false), []v1.Image{amd}},
		{"amd64 only, docker's", without(layout(t, amd, true), "index.json"), []v1.Image{amd}},
		{"both by one name", together(t, layout(t, amd, false), layout(t, arm, false)), []v1.Image{arm}},
		{"both without a name", nameless(t, together(t, layout(t, amd, false), layout(t, arm, false))), []v1.Image{arm}},
	} {
		t.Run(test.name, func(t *testing.T) {
			b, err := images.Tar(test.archive...)
			if err != nil {
				t.Fatal(err)
			}
			s := newStore(t, func(c *Config) { c.Arch, c.Translated = "arm64", "amd64" })
			got, err := s.Load(t.Context(), bytes.NewReader(b), nil)
			if err != nil || len(got) != len(test.want) {
				t.Fatalf("%+v, %v", got, err)
			}
			for i, want := range test.want {
				if got[i].ID != configDigest(t, want) {
					t.Errorf("image %d is %s, want %s", i, got[i].ID, configDigest(t, want))
				}
			}
		})
	}
}

// together is one OCI layout with the images of two.
func together(t *testing.T, a, b []images.Entry) []images.Entry {
	t.Helper()
	var index, more v1.IndexManifest
	for entries, into := range map[*[]images.Entry]*v1.IndexManifest{&a: &index, &b: &more} {
		i := slices.IndexFunc(*entries, func(e images.Entry) bool { return e.Name == "index.json" })
		if err := json.Unmarshal((*entries)[i].Body, into); err != nil {
			t.Fatal(err)
		}
	}
	index.Manifests = append(index.Manifests, more.Manifests...)
	return withIndex(t, append(a, b...), index)
}

// nameless takes the names out of a layout's index.
func nameless(t *testing.T, entries []images.Entry) []images.Entry {
	t.Helper()
	var index v1.IndexManifest
	i := slices.IndexFunc(entries, func(e images.Entry) bool { return e.Name == "index.json" })
	if err := json.Unmarshal(entries[i].Body, &index); err != nil {
		t.Fatal(err)
	}
	for i := range index.Manifests {
		index.Manifests[i].Annotations = nil
	}
	return withIndex(t, entries, index)
}

// withIndex has another index, and each entry once.
func withIndex(t *testing.T, entries []images.Entry, index v1.IndexManifest) (out []images.Entry) {
	t.Helper()
	b, err := json.Marshal(index)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{"index.json": true}
	for _, e := range entries {
		if !seen[e.Name] {
			seen[e.Name] = true
			out = append(out, e)
		}
	}
	return append(out, images.File("index.json", 0o644, string(b)))
}
