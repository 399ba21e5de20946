package images

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

func TestImages(t *testing.T) {
	dir := t.TempDir()
	for _, arch := range []string{"amd64", "arm64"} {
		img, err := Layered(dir, arch)
		if err != nil {
			t.Fatal(err)
		}
		layers, err := img.Layers()
		if err != nil || len(layers) < 3 {
			t.Errorf("%s: %d layers, %v", arch, len(layers), err)
		}
		// The same source gives the same image.
		again, err := Layered(t.TempDir(), arch)
		if err != nil {
			t.Fatal(err)
		}
		a, errA := img.Digest()
		b, errB := again.Digest()
		if errA != nil || errB != nil || a != b {
			t.Errorf("%s: %s, then %s (%v, %v)", arch, a, b, errA, errB)
		}
		cf, err := img.ConfigFile()
		if err != nil || cf.Architecture != arch || cf.OS != "linux" || cf.Config.User != "app" {
			t.Errorf("%s: config %+v, %v", arch, cf, err)
		}
	}
}

func TestSaveDockerArchive(t *testing.T) {
	dir := t.TempDir()
	img, err := WebServer(dir, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "demo.tar")
	if err := SaveDockerArchive(path, "docker.io/library/demo:latest", img); err != nil {
		t.Fatal(err)
	}
	// Read by code that shares nothing with ours.
	got, err := tarball.ImageFromPath(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	want, errW := img.ConfigName()
	have, errH := got.ConfigName()
	if errW != nil || errH != nil || want != have {
		t.Errorf("config %s, want %s (%v, %v)", have, want, errH, errW)
	}
}

func TestCommands(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the program is for linux")
	}
	dir := t.TempDir()
	program, err := Build(dir, runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	linked := filepath.Join(dir, "echo")
	if err := os.Symlink(program, linked); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, out string
		args      []string
		code      int
	}{
		{"echo", "a b\n", []string{program, "echo", "a", "b"}, 0},
		{"by its name", "web\n", []string{linked, "web"}, 0},
		{"exit", "", []string{program, "exit", "42"}, 42},
		{"unknown", "", []string{program, "nonsense"}, 127},
		{"cat", "in", []string{program, "cat"}, 0},
		{"flood", "", []string{program, "flood", "0"}, 0},
		{"zombies", "left 2 zombies and 2 orphans\n", []string{program, "spawn-zombies", "2"}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			cmd := exec.CommandContext(t.Context(), tt.args[0], tt.args[1:]...)
			cmd.Stdin, cmd.Stdout = strings.NewReader("in"), &out
			err := cmd.Run()
			if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != tt.code || out.String() != tt.out {
				t.Errorf("printed %q and ended with %v; want %q and %d", out.String(), err, tt.out, tt.code)
			}
		})
	}
}
