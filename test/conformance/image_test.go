//go:build linux

package conformance_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
	"github.com/cri-vz/cri-vz/test/images"
)

func imageStatus(t *testing.T, ref string) *runtimeapi.Image {
	t.Helper()
	r, err := suite.Images.ImageStatus(cri.Timeout(t, cri.CallTimeout), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetImage()
}

func removeImage(t *testing.T, ref string) {
	t.Helper()
	if _, err := suite.Images.RemoveImage(cri.Timeout(t, cri.CallTimeout), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}}); err != nil {
		t.Error(err)
	}
}

func TestImage(t *testing.T) {
	img, err := variant("image", nil)
	if err != nil {
		t.Fatal(err)
	}
	tag, digest, err := push("image:1", img)
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := push("image:2", img)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, elsewhereDigest, err := push("elsewhere/image:3", img)
	if err != nil {
		t.Fatal(err)
	}
	pull := func(ref string) string {
		t.Helper()
		r, err := suite.Images.PullImage(cri.Timeout(t, cri.CallTimeout), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
		if err != nil {
			t.Fatal(err)
		}
		return r.GetImageRef()
	}
	listed := func(id string) bool {
		t.Helper()
		r, err := suite.Images.ListImages(cri.Timeout(t, cri.CallTimeout), &runtimeapi.ListImagesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(r.GetImages(), func(i *runtimeapi.Image) bool { return i.GetId() == id })
	}
	var id string
	t.Run("pulled by digest, it has no tag", func(t *testing.T) {
		id = pull(digest)
		if got := imageStatus(t, digest); got.GetId() != id || len(got.GetRepoTags()) != 0 || !slices.Equal(got.GetRepoDigests(), []string{digest}) || got.GetSize() == 0 {
			t.Errorf("%v, pulled as %s", got, id)
		}
	})
	t.Run("pulled by other names, it is the same image with all of them", func(t *testing.T) {
		for _, ref := range []string{tag, again, elsewhere} {
			if got := pull(ref); got != id {
				t.Errorf("pull %s: %s, want %s", ref, got, id)
			}
		}
		got := imageStatus(t, tag)
		tags, digests := slices.Sorted(slices.Values(got.GetRepoTags())), slices.Sorted(slices.Values(got.GetRepoDigests()))
		wantTags, wantDigests := slices.Sorted(slices.Values([]string{tag, again, elsewhere})), slices.Sorted(slices.Values([]string{digest, elsewhereDigest}))
		if !slices.Equal(tags, wantTags) || !slices.Equal(digests, wantDigests) {
			t.Errorf("%v", got)
		}
	})
	t.Run("every kind of reference finds it", func(t *testing.T) {
		for _, ref := range []string{tag, again, elsewhere, digest, id, strings.TrimPrefix(id, "sha256:")} {
			if got := imageStatus(t, ref); got.GetId() != id {
				t.Errorf("status of %s: %v", ref, got)
			}
		}
	})
	t.Run("a list filtered by its name has it alone", func(t *testing.T) {
		r, err := suite.Images.ListImages(cri.Timeout(t, cri.CallTimeout), &runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: tag}}})
		if err != nil || len(r.GetImages()) != 1 || r.GetImages()[0].GetId() != id {
			t.Errorf("%v, %v", r, err)
		}
	})
	t.Run("as a kubelet asks for it, its containers have its id, its name and its digest", func(t *testing.T) {
		p := sharedPodOf(t)
		ctr := p.Create(t, "of-an-image", func(c *runtimeapi.ContainerConfig) {
			c.Image = &runtimeapi.ImageSpec{Image: id, UserSpecifiedImage: elsewhere}
		})
		st := p.Container(t, ctr)
		if st.GetImageId() != id || !slices.Contains([]string{tag, again, elsewhere}, st.GetImage().GetImage()) || !slices.Contains([]string{digest, elsewhereDigest}, st.GetImageRef()) {
			t.Errorf("image %v, image_ref %s, image_id %s", st.GetImage(), st.GetImageRef(), st.GetImageId())
		}
		if suite.daemon != nil && (st.GetImage().GetImage() != elsewhere || st.GetImageRef() != elsewhereDigest) {
			t.Errorf("of another name than the user's: image %v, image_ref %s", st.GetImage(), st.GetImageRef())
		}
	})
	t.Run("removed by one name, it is gone at once with all of them", func(t *testing.T) {
		removeImage(t, again)
		for _, ref := range []string{tag, again, elsewhere, digest, id} {
			if got := imageStatus(t, ref); got != nil {
				t.Errorf("status of %s: %v", ref, got)
			}
		}
		if listed(id) {
			t.Error("it is listed")
		}
		removeImage(t, tag) // idempotent
	})
	t.Run("removed by several clients at once, it is gone and nobody fails", func(t *testing.T) {
		pull(tag)
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() { removeImage(t, tag) })
		}
		wg.Wait()
		if listed(id) {
			t.Error("it is listed")
		}
	})
	t.Run("a pull that was given up ends with DeadlineExceeded or is whole", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, err := suite.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: tag}})
		if err != nil && !strings.Contains(err.Error(), "DeadlineExceeded") {
			t.Error(err)
		}
		if got := pull(tag); got != id {
			t.Errorf("the next pull: %s", got)
		}
		removeImage(t, tag)
	})
	t.Run("what no registry has is an error", func(t *testing.T) {
		if err := suite.Pull(suite.registry + "/conformance/nothing:1"); err == nil {
			t.Error("it was pulled")
		}
	})
}

// The image's user is what the status says, as a number or as a name.
func TestImageUser(t *testing.T) {
	for i, c := range []struct {
		user string
		uid  int64 // -1: none
		name string
	}{
		{"1002", 1002, ""}, {"www-data", -1, "www-data"}, {"1003:1004", 1003, ""}, {"www-data:1004", -1, "www-data"},
	} {
		t.Run(c.user, func(t *testing.T) {
			tag, _ := imageOf(t, fmt.Sprintf("user:%d", i), func(cfg *v1.Config) { cfg.User = c.user })
			img := imageStatus(t, tag)
			uid := int64(-1)
			if img.GetUid() != nil {
				uid = img.GetUid().GetValue()
			}
			if uid != c.uid || img.GetUsername() != c.name {
				t.Errorf("uid %d, user name %q, want %d %q", uid, img.GetUsername(), c.uid, c.name)
			}
		})
	}
}

func TestImageFsInfo(t *testing.T) {
	if _, err := testImage(); err != nil {
		t.Fatal(err)
	}
	r, err := suite.Images.ImageFsInfo(cri.Timeout(t, cri.CallTimeout), &runtimeapi.ImageFsInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.GetImageFilesystems()) == 0 {
		t.Fatal("no file system")
	}
	for _, u := range append(r.GetImageFilesystems(), r.GetContainerFilesystems()...) { // T41
		if !strings.HasPrefix(u.GetFsId().GetMountpoint(), "/") || u.GetTimestamp() == 0 {
			t.Errorf("%v", u)
		}
	}
	if u := r.GetImageFilesystems()[0]; u.GetUsedBytes().GetValue() == 0 {
		t.Errorf("nothing is used: %v", u)
	}
}

// layered is the image that has what unpacking can get wrong.
func layered(t *testing.T) string {
	t.Helper()
	if _, err := webServer(); err != nil { // makes the directory
		t.Fatal(err)
	}
	img, err := images.Layered(suite.base+"/images", runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	tag, _, err := push("layered:latest", img)
	if err != nil {
		t.Fatal(err)
	}
	if err := suite.Pull(tag); err != nil {
		t.Fatal(err)
	}
	return tag
}

// What layers say is what a container sees: whiteouts, opaque directories,
// owners, set-user-id programs, hard links.
func TestLayers(t *testing.T) {
	p := sharedPodOf(t)
	id := p.Start(t, "layered", cri.Image(layered(t)), cri.Command("/bin/sleep", "infinity"))
	for _, c := range []struct{ promise, path, want, not string }{
		{"a whiteout hides one file", "/data", "kept\n", "deleted"},
		{"an opaque directory hides all below it", "/opaque", "above\n", "below"},
		{"a file is replaced", "/replaced", "-rw-r--r-- 0:0 4 replaced\n", "?"},
		{"a file becomes a directory", "/file-to-dir", "inside\n", "?"},
		{"owner and mode are kept", "/owned", "-rw-r----- 1000:2000 6 owned\n", "?"},
		{"set-user-id is kept", "/bin/setuid-id", "ugrwxr-xr-x 0:0 ", "?"},
		{"hard links are files", "/hard-b", " 5 hard-b\n", "?"},
		{"nothing else is at the top", "/", "data\n", "lost+found"},
	} {
		t.Run(c.promise, func(t *testing.T) {
			if got := p.Output(t, id, "/bin/ls", c.path); !strings.Contains(got, c.want) || strings.Contains(got, c.not) {
				t.Errorf("ls %s: %q, want %q", c.path, got, c.want)
			}
		})
	}
}
