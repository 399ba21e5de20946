//go:build linux

package conformance_test

import (
	"runtime"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"

	"github.com/cri-vz/cri-vz/test/images"
)

// Images as volumes: whole or a part of one, read-only, for as long as the
// container lives, whatever becomes of the image.
func TestImageVolumes(t *testing.T) {
	p := sharedPodOf(t)
	var layers []v1.Layer
	for _, entries := range [][]images.Entry{
		{images.File("below", 0o644, "below\n"), images.File("same", 0o644, "below\n")},
		{images.File("same", 0o644, "above\n"), images.Dir("dir", 0o755), images.File("dir/file", 0o644, "inside\n"),
			images.Symlink("dir/out", "../../../../etc"), images.Symlink("out", "/etc")},
	} {
		l, err := images.Layer(entries...)
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, l)
	}
	img, err := images.Image(runtime.GOARCH, v1.Config{}, layers...)
	if err != nil {
		t.Fatal(err)
	}
	_, ref, err := push("volume:1", img)
	if err != nil {
		t.Fatal(err)
	}
	if err := suite.Pull(ref); err != nil {
		t.Fatal(err)
	}
	from := func(dest, sub string) cri.Option {
		return cri.Mount(&runtimeapi.Mount{ContainerPath: dest, Readonly: true, Image: &runtimeapi.ImageSpec{Image: ref}, ImageSubPath: sub})
	}
	id := p.Start(t, "image-volumes", cri.AsRoot, cri.Command("/bin/sleep", "infinity"), from("/whole", ""), from("/part", "dir"), from("/one", "dir/file"))
	if _, err := suite.Images.RemoveImage(cri.Timeout(t, cri.CallTimeout), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}}); err != nil {
		t.Fatal(err)
	}
	for _, m := range p.Container(t, id).GetMounts() {
		if want, err := img.ConfigName(); err != nil || m.GetImage().GetImageRef() != want.String() {
			t.Errorf("the mount at %s is of %v, want image_ref %s, %v", m.GetContainerPath(), m.GetImage(), want, err)
		}
	}
	if got := p.Output(t, id, "/bin/cat", "/whole/below", "/whole/same", "/whole/dir/file", "/part/file", "/one"); got != "below\nabove\ninside\ninside\ninside\n" {
		t.Errorf("read %q", got)
	}
	if got := p.Output(t, id, "/bin/ls", "/whole"); strings.Contains(got, "lost+found") {
		t.Errorf("the file system shows its own workings: %s", got)
	}
	for _, path := range []string{"/whole/new", "/part/file", "/one"} {
		if r := p.Do(t, id, "/bin/write", path, "x"); r.Code == 0 || !strings.Contains(r.Stderr, "read-only") {
			t.Errorf("write %s: %+v", path, r)
		}
	}
	// The pod has the layers still, but there is no image of that name.
	_, err = p.CreateContext(t.Context(), "image-volume-gone", from("/whole", ""))
	cri.WantError(t, err, codes.NotFound, ref, "/whole")
	if err := suite.Pull(ref); err != nil {
		t.Fatal(err)
	}
	for sub, words := range map[string][]string{
		"none":    {`"none"`, "nothing there"},
		"dir/out": {"dir/out"},
		"out":     {"out"},
	} {
		_, err := p.CreateContext(t.Context(), "image-volume-bad", from("/whole", sub))
		if err == nil {
			t.Errorf("image_sub_path %q was accepted", sub)
			continue
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("image_sub_path %q: %v, want %q in it", sub, err, w)
			}
		}
	}
}
