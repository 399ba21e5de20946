//go:build linux

package e2e_test

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/test/images"
)

// A disk that is full while pulling and while running costs what wanted to be
// written, and nothing else (T9).
func TestFullDisk(t *testing.T) {
	n := newNodeApart(t, "full", `vm: accel = "tcg"`)
	if err := os.Mkdir(n.root, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", n.root, "tmpfs", 0, "size=32m,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(n.root, 0); err != nil {
			t.Error(err)
		}
	})
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.stop(); err != nil {
			t.Error(err)
		}
	})

	t.Run("pull", func(t *testing.T) {
		noise := make([]byte, 40<<20)
		for i := range noise {
			noise[i] = byte(i*i>>7) ^ byte(i>>13)
		}
		layer, err := images.Layer(images.File("noise", 0o644, string(noise)))
		if err != nil {
			t.Fatal(err)
		}
		img, err := images.Image(runtime.GOARCH, v1.Config{}, layer)
		if err != nil {
			t.Fatal(err)
		}
		tag, _, err := push("noise:1", img)
		if err != nil {
			t.Fatal(err)
		}
		_, err = n.images.PullImage(timeout(t, callTimeout), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: tag}})
		wantError(t, err, codes.ResourceExhausted, "full", n.root)
		var st unix.Statfs_t
		if err := unix.Statfs(n.root, &st); err != nil {
			t.Fatal(err)
		}
		if used := (st.Blocks - st.Bfree) * uint64(st.Bsize); used > 4<<20 {
			t.Errorf("%d KiB are left of an image that could not be pulled: %v", used>>10, filesBelow(n.root))
		}
	})
	t.Run("run", func(t *testing.T) {
		web, err := webImage()
		if err != nil {
			t.Fatal(err)
		}
		if err := pull(n, web); err != nil {
			t.Fatal(err)
		}
		p, err := n.runPod(t.Context(), podConfig(n, "full"))
		if err != nil {
			t.Fatal(err)
		}
		idle := p.start(t, "idle", command("/bin/sleep", "infinity"))
		ctr := p.start(t, "fills", asRoot, command("/app/web", "fill", "/file"))
		st := p.waitExit(t, ctr, time.Minute)
		if out := readLog(t, st.GetLogPath()); st.GetExitCode() != 1 || !strings.Contains(out.stderr, "input/output error") {
			t.Errorf("exit code %d, output %v; want 1 and an I/O error", st.GetExitCode(), out)
		}
		const reason = "the host failed to serve the scratch disk: No space left on device"
		if st.GetMessage() != reason {
			t.Errorf("the container's message is %q, want %q", st.GetMessage(), reason)
		}
		r, err := n.PodSandboxStatus(timeout(t, callTimeout), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
		if err != nil || !strings.Contains(r.GetInfo()["info"], reason) {
			t.Errorf("the pod's status says nothing of its disk: %v, %v", r.GetInfo(), err)
		}
		if out := p.output(t, idle, "/bin/echo", "still here"); out != "still here\n" {
			t.Errorf("exec: %q", out)
		}
		began := time.Now()
		p.remove(t)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("stop and remove took %v", took)
		}
		if left := filesBelow(filepath.Join(n.root, "pods")); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}
