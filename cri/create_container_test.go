package cri

import (
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/imageservice"
)

// image_ref is a digested reference, as far as there is one, and of the repository
// that the user named.
func TestDigestedRef(t *testing.T) {
	id := "sha256:" + strings.Repeat("1", 64)
	digest := func(repository, digit string) string { return repository + "@sha256:" + strings.Repeat(digit, 64) }
	hub, local := digest("docker.io/library/web", "a"), digest("127.0.0.1:5000/web", "b")
	img := imageservice.Image{ID: id, RepoDigests: []string{local, digest("docker.io/library/web", "0"), hub}}
	for _, c := range []struct {
		name string
		img  imageservice.Image
		spec *runtimeapi.ImageSpec
		want string
	}{
		{"a tag", img, &runtimeapi.ImageSpec{Image: "127.0.0.1:5000/web:1"}, local},
		{"a short name", img, &runtimeapi.ImageSpec{Image: "web"}, img.RepoDigests[1]},
		{"as a kubelet asks", img, &runtimeapi.ImageSpec{Image: id, UserSpecifiedImage: "web:1"}, img.RepoDigests[1]},
		{"a digest", img, &runtimeapi.ImageSpec{Image: id, UserSpecifiedImage: "web@" + strings.SplitN(hub, "@", 2)[1]}, hub},
		{"the id alone", img, &runtimeapi.ImageSpec{Image: id}, local},
		{"a repository that only begins so", img, &runtimeapi.ImageSpec{Image: "127.0.0.1:5000/webs:1"}, local},
		{"from an archive", imageservice.Image{ID: id}, &runtimeapi.ImageSpec{Image: "web"}, id},
	} {
		if got := digestedRef(c.img, c.spec); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}
