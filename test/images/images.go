// Package images builds container images for tests and the demo, without a
// network and without docker. The images hold one static program, package web,
// and the same source gives the same digests.
package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Created is the time of all files and images.
var Created = time.Date(2024, time.May, 1, 12, 0, 0, 0, time.UTC)

// compileTimeout is far above the 20 s that a first build takes on 2 cores.
const compileTimeout = 5 * time.Minute

// Build compiles the web program for linux on arch (a GOARCH) into dir, which
// must exist, and returns its path. It needs the go command and a working
// directory within this module. Callers may share dir: the file appears by
// rename.
func Build(dir, arch string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), compileTimeout)
	defer cancel()
	out := filepath.Join(dir, "web-linux-"+arch)
	tmp, err := os.MkdirTemp(dir, "web-")
	if err != nil {
		return "", fmt.Errorf("build test program: %w", err)
	}
	defer os.RemoveAll(tmp)
	built := filepath.Join(tmp, "web")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", built, "github.com/cri-vz/cri-vz/test/images/web")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build test program for linux/%s: %w: %s", arch, err, b)
	}
	if err := os.Rename(built, out); err != nil {
		return "", fmt.Errorf("build test program: %w", err)
	}
	return out, nil
}

// Layer makes a gzip-compressed layer of tar entries, in their order. Missing
// times, and modes of files (0644) and directories (0755), are filled in; parent
// directories are not. Body is a regular file's content.
func Layer(entries ...Entry) (v1.Layer, error) {
	b, err := Tar(entries...)
	if err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil },
		tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.BestSpeed))
}

// Entry is an entry of a layer.
type Entry struct {
	tar.Header
	Body []byte
}

// Tar is what [Layer] compresses.
func Tar(entries ...Entry) ([]byte, error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.Body))
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		global := h.Typeflag == tar.TypeXGlobalHeader // it has no attributes
		if h.ModTime.IsZero() && !global {
			h.ModTime = Created
		}
		if h.Mode == 0 && !global {
			switch h.Typeflag {
			case tar.TypeDir:
				h.Mode = 0o755
			case tar.TypeSymlink:
				h.Mode = 0o777
			default:
				h.Mode = 0o644
			}
		}
		if err := tw.WriteHeader(&h); err != nil {
			return nil, fmt.Errorf("tar entry %q: %w", h.Name, err)
		}
		if _, err := tw.Write(e.Body); err != nil {
			return nil, fmt.Errorf("tar entry %q: %w", h.Name, err)
		}
	}
	if err := tw.Close(); err != nil {
		return nil, fmt.Errorf("tar: %w", err)
	}
	return buf.Bytes(), nil
}

// Dir, File, Symlink and Hardlink are the common entries.
func Dir(name string, mode int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}}
}

func File(name string, mode int64, body string) Entry {
	return Entry{Header: tar.Header{Name: name, Mode: mode}, Body: []byte(body)}
}

func Symlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}}
}

func Hardlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
}

// owned gives an entry an owner.
func owned(e Entry, uid, gid int) Entry {
	e.Uid, e.Gid = uid, gid
	return e
}

// Image puts layers and a config together.
func Image(arch string, cfg v1.Config, layers ...v1.Layer) (v1.Image, error) {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.AppendLayers(img, layers...)
	if err != nil {
		return nil, fmt.Errorf("append layers: %w", err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	cf = cf.DeepCopy()
	cf.Architecture, cf.OS, cf.Config, cf.Created = arch, "linux", cfg, v1.Time{Time: Created}
	return mutate.ConfigFile(img, cf)
}

// tools are the program's names in /bin.
var tools = []string{"sleep", "echo", "cat", "exit", "env", "id", "pwd", "ls", "tcp-echo", "tcp-traffic", "udp-echo", "write", "flood", "trap-term", "oom", "spawn-zombies", "get", "hostname", "err", "count", "long", "detach"}

// WebServer is the demo's image: a web server on port 3000 as uid 1000, and the
// program's other commands in /bin. The program is built in dir.
func WebServer(dir, arch string) (v1.Image, error) {
	base, err := baseLayers(dir, arch)
	if err != nil {
		return nil, err
	}
	return Image(arch, webConfig(), base...)
}

func webConfig() v1.Config {
	return v1.Config{
		Entrypoint:   []string{"/app/web"},
		Cmd:          []string{"web"},
		Env:          []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PORT=3000"},
		User:         "app",
		WorkingDir:   "/app",
		StopSignal:   "SIGTERM",
		Labels:       map[string]string{"org.opencontainers.image.title": "cri-vz web"},
		ExposedPorts: map[string]struct{}{"3000/tcp": {}},
	}
}

func baseLayers(dir, arch string) ([]v1.Layer, error) {
	path, err := Build(dir, arch)
	if err != nil {
		return nil, err
	}
	program, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read test program: %w", err)
	}
	system := []Entry{
		Dir("bin/", 0o755), Dir("dev/", 0o755), Dir("etc/", 0o755), Dir("proc/", 0o555), Dir("root/", 0o700),
		Dir("run/", 0o755), Dir("sys/", 0o555), Dir("tmp/", 0o1777), Dir("var/", 0o755), Dir("home/", 0o755),
		owned(Dir("home/app/", 0o750), 1000, 1000),
		File("etc/passwd", 0o644, "root:x:0:0:root:/root:/app/web\napp:x:1000:1000:app:/home/app:/app/web\nnobody:x:65534:65534:nobody:/:/app/web\n"),
		File("etc/group", 0o644, "root:x:0:\napp:x:1000:\nextra:x:2000:app\nnogroup:x:65534:\n"),
	}
	for _, t := range tools {
		system = append(system, Symlink("bin/"+t, "/app/web"))
	}
	app := []Entry{
		Dir("app/", 0o755),
		{Header: tar.Header{Name: "app/web", Mode: 0o755}, Body: program},
	}
	var layers []v1.Layer
	for _, entries := range [][]Entry{system, app} {
		l, err := Layer(entries...)
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	return layers, nil
}

// Layered is WebServer's image with what an agent can get wrong on top:
//
//	/data/deleted          in a lower layer, whited out
//	/data/kept             in a lower layer, visible
//	/opaque/below          in a lower layer, hidden by an opaque directory
//	/opaque/above          the only content of /opaque
//	/replaced              "new", over "old"
//	/file-to-dir/inside    a directory over a lower layer's file
//	/bin/setuid-id         a setuid and setgid root copy of id
//	/owned                 a file of uid 1000, gid 2000, mode 0640
//	/hard-a, /hard-b       one inode
//	/xattr                 with user.test=value
//	/sticky                a directory of mode 1777
func Layered(dir, arch string) (v1.Image, error) {
	layers, err := baseLayers(dir, arch)
	if err != nil {
		return nil, err
	}
	program, err := os.ReadFile(filepath.Join(dir, "web-linux-"+arch))
	if err != nil {
		return nil, fmt.Errorf("read test program: %w", err)
	}
	xattr := File("xattr", 0o644, "x\n")
	xattr.PAXRecords = map[string]string{"SCHILY.xattr.user.test": "value"}
	for _, entries := range [][]Entry{
		{
			Dir("data/", 0o755), File("data/deleted", 0o644, "deleted\n"), File("data/kept", 0o644, "kept\n"),
			Dir("opaque/", 0o755), File("opaque/below", 0o644, "below\n"),
			File("replaced", 0o644, "old\n"), File("file-to-dir", 0o644, "file\n"),
		},
		{
			Dir("data/", 0o755), File("data/.wh.deleted", 0o644, ""),
			Dir("opaque/", 0o755), File("opaque/.wh..wh..opq", 0o644, ""), File("opaque/above", 0o644, "above\n"),
			File("replaced", 0o644, "new\n"), Dir("file-to-dir/", 0o755), File("file-to-dir/inside", 0o644, "inside\n"),
			Dir("bin/", 0o755), {Header: tar.Header{Name: "bin/setuid-id", Mode: 0o6755}, Body: program},
			owned(File("owned", 0o640, "owned\n"), 1000, 2000),
			File("hard-a", 0o644, "hard\n"), Hardlink("hard-b", "hard-a"),
			xattr, Dir("sticky/", 0o1777),
		},
	} {
		l, err := Layer(entries...)
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	cfg := webConfig()
	return Image(arch, cfg, layers...)
}

// SaveDockerArchive writes img as `docker save` does since version 25: an OCI
// layout with plain layers, and a manifest.json. A path that ends in .gz or .tgz
// is compressed. ref is a full tag.
func SaveDockerArchive(path, ref string, img v1.Image) error {
	return save(path, ref, img, true)
}

// SaveOCI writes img as an OCI layout with compressed layers in a tar.
func SaveOCI(path, ref string, img v1.Image) error {
	return save(path, ref, img, false)
}

func save(path, ref string, img v1.Image, docker bool) (err error) {
	entries, err := layoutEntries(ref, img, docker)
	if err != nil {
		return fmt.Errorf("save image %s: %w", ref, err)
	}
	b, err := Tar(entries...)
	if err != nil {
		return fmt.Errorf("save image %s: %w", ref, err)
	}
	if strings.HasSuffix(path, ".gz") || strings.HasSuffix(path, ".tgz") {
		var buf bytes.Buffer
		zw := gzip.NewWriter(&buf)
		if _, err := zw.Write(b); err != nil {
			return fmt.Errorf("save image %s: %w", ref, err)
		}
		if err := zw.Close(); err != nil {
			return fmt.Errorf("save image %s: %w", ref, err)
		}
		b = buf.Bytes()
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		return fmt.Errorf("save image %s: %w", ref, err)
	}
	return nil
}

// LayoutEntries returns the archive entries that the two Save functions write,
// for tests that damage them.
func LayoutEntries(ref string, img v1.Image, docker bool) ([]Entry, error) {
	return layoutEntries(ref, img, docker)
}

func layoutEntries(ref string, img v1.Image, docker bool) ([]Entry, error) {
	m, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	m = m.DeepCopy()
	entries := []Entry{Dir("blobs/", 0o755), Dir("blobs/sha256/", 0o755)}
	seen := map[string]bool{}
	blob := func(h v1.Hash, b []byte) string {
		name := "blobs/sha256/" + h.Hex
		if !seen[name] {
			seen[name] = true
			entries = append(entries, Entry{Header: tar.Header{Name: name}, Body: b})
		}
		return name
	}
	layers, err := img.Layers()
	if err != nil {
		return nil, err
	}
	var layerNames []string
	for i, l := range layers {
		open, hash := l.Compressed, l.Digest
		if docker {
			open, hash = l.Uncompressed, l.DiffID
			m.Layers[i].MediaType = types.OCIUncompressedLayer
		}
		rc, err := open()
		if err != nil {
			return nil, err
		}
		b, err := io.ReadAll(rc)
		rc.Close()
		if err != nil {
			return nil, err
		}
		if m.Layers[i].Digest, err = hash(); err != nil {
			return nil, err
		}
		m.Layers[i].Size = int64(len(b))
		layerNames = append(layerNames, blob(m.Layers[i].Digest, b))
	}
	rawConfig, err := img.RawConfigFile()
	if err != nil {
		return nil, err
	}
	configName := blob(m.Config.Digest, rawConfig)
	rawManifest, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	digest, _, err := v1.SHA256(bytes.NewReader(rawManifest))
	if err != nil {
		return nil, err
	}
	blob(digest, rawManifest)
	tag := ref[strings.LastIndex(ref, ":")+1:]
	index, err := json.Marshal(v1.IndexManifest{
		SchemaVersion: 2, MediaType: types.OCIImageIndex,
		Manifests: []v1.Descriptor{{
			MediaType: types.OCIManifestSchema1, Digest: digest, Size: int64(len(rawManifest)),
			Annotations: map[string]string{"io.containerd.image.name": ref, "org.opencontainers.image.ref.name": tag},
		}},
	})
	if err != nil {
		return nil, err
	}
	entries = append(entries, File("index.json", 0o644, string(index)), File("oci-layout", 0o644, `{"imageLayoutVersion":"1.0.0"}`))
	if docker {
		b, err := json.Marshal([]map[string]any{{"Config": configName, "RepoTags": []string{ref}, "Layers": layerNames}})
		if err != nil {
			return nil, err
		}
		entries = append(entries, File("manifest.json", 0o644, string(b)))
	}
	return entries, nil
}

// Registry serves an empty registry on loopback until the test ends and returns
// its host:port.
func Registry(t testing.TB) string {
	t.Helper()
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// Serve serves an empty registry on loopback for the life of the process, in the
// network namespace of the calling thread, and returns its host:port.
func Serve() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("serve a registry: %w", err)
	}
	srv := &http.Server{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0))), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = srv.Serve(l) }()
	return l.Addr().String(), nil
}
