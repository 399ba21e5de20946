//go:build linux

package e2e_test

import (
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/test/images"
)

func TestImages(t *testing.T) {
	n := suite.node
	ctx := timeout(t, callTimeout)
	img, err := variant("images")
	if err != nil {
		t.Fatal(err)
	}
	id, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	tag, digest, err := push("images:1", img)
	if err != nil {
		t.Fatal(err)
	}
	status := func(ref string) *runtimeapi.Image {
		t.Helper()
		r, err := n.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
		if err != nil {
			t.Fatal(err)
		}
		return r.GetImage()
	}
	for _, ref := range []string{digest, tag} {
		r, err := n.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
		if err != nil {
			t.Fatal(err)
		}
		if r.GetImageRef() != id.String() {
			t.Errorf("pull %s: %s, want the config's digest %s", ref, r.GetImageRef(), id)
		}
	}
	for _, ref := range []string{tag, digest, id.String(), id.Hex, id.Hex[:12]} {
		if got := status(ref); got.GetId() != id.String() || !slices.Equal(got.GetRepoTags(), []string{tag}) || !slices.Equal(got.GetRepoDigests(), []string{digest}) || got.GetSize() == 0 {
			t.Errorf("status of %s: %v", ref, got)
		}
	}
	archive := filepath.Join(t.TempDir(), "oci.tar")
	if err := images.SaveOCI(archive, "docker.io/e2e/same:2", img); err != nil {
		t.Fatal(err)
	}
	if out, err := n.cli("image", "load", archive).CombinedOutput(); err != nil {
		t.Fatalf("load: %v: %s", err, out)
	}
	if got := status("docker.io/e2e/same:2"); got.GetId() != id.String() || len(got.GetRepoTags()) != 2 {
		t.Errorf("one image from two places: %v", got)
	}
	fs, err := n.images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range append(fs.GetImageFilesystems(), fs.GetContainerFilesystems()...) { // T41
		if !strings.HasPrefix(u.GetFsId().GetMountpoint(), n.root) || u.GetUsedBytes().GetValue() == 0 {
			t.Errorf("file system %v", u)
		}
	}
	for range 2 {
		if _, err := n.images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: tag}}); err != nil {
			t.Error(err)
		}
	}
	if got := status(id.String()); got != nil {
		t.Errorf("after RemoveImage: %v", got)
	}
}

// T24: as many layers as images may have.
func TestManyLayers(t *testing.T) {
	p := sharedPodOf(t)
	base, err := images.WebServer(suite.images, runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := base.Layers()
	if err != nil {
		t.Fatal(err)
	}
	const count = 127
	for i := len(layers); i < count; i++ {
		l, err := images.Layer(images.File(fmt.Sprintf("layer-%d", i), 0o644, fmt.Sprintln(i)))
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, l)
	}
	img, err := images.Image(runtime.GOARCH, v1.Config{}, layers...)
	if err != nil {
		t.Fatal(err)
	}
	id := startImage(t, p.pod, "many", img, "/bin/sleep", "infinity")
	if got := p.output(t, id, "/bin/cat", "/layer-2", "/layer-64", "/layer-126"); got != "2\n64\n126\n" {
		t.Errorf("%q", got)
	}
}

// startImage pushes and pulls img and starts a container from it.
func startImage(t *testing.T, p *pod, name string, img v1.Image, cmd ...string) string {
	t.Helper()
	_, digest, err := push(name+":latest", img)
	if err != nil {
		t.Fatal(err)
	}
	if err := pull(p.node, digest); err != nil {
		t.Fatal(err)
	}
	return p.start(t, name, command(cmd...), func(c *runtimeapi.ContainerConfig) { c.Image.Image = digest })
}
