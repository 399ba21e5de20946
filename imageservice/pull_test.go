package imageservice

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/test/images"
)

// testRegistry is a registry on loopback whose answers a test can spoil.
type testRegistry struct {
	host string
	// spoil, if it returns true, has answered the request itself.
	spoil func(w http.ResponseWriter, r *http.Request, next http.Handler) bool

	mu   sync.Mutex
	gets map[string]int
	all  []*http.Request
}

func newRegistry(t testing.TB) *testRegistry {
	t.Helper()
	r := &testRegistry{gets: map[string]int{}}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		if req.Method == http.MethodGet {
			r.gets[req.URL.Path]++
		}
		r.all = append(r.all, req)
		spoil := r.spoil
		r.mu.Unlock()
		if spoil == nil || !spoil(w, req, inner) {
			inner.ServeHTTP(w, req)
		}
	}))
	t.Cleanup(srv.Close)
	r.host = strings.TrimPrefix(srv.URL, "http://")
	return r
}

func (r *testRegistry) set(f func(http.ResponseWriter, *http.Request, http.Handler) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.spoil = f
}

func (r *testRegistry) blobGets() map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]int{}
	for p, n := range r.gets {
		if strings.Contains(p, "/blobs/") {
			out[p] += n
		}
	}
	return out
}

func (r *testRegistry) push(t testing.TB, repo string, img v1.Image) string {
	t.Helper()
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	ref, err := name.ParseReference(r.host + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithTransport(tr)); err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

func noCredentials(t testing.TB) {
	t.Helper()
	if tt, ok := t.(*testing.T); ok {
		tt.Setenv("HOME", t.TempDir())
		tt.Setenv("DOCKER_CONFIG", t.TempDir())
		tt.Setenv("XDG_RUNTIME_DIR", t.TempDir())
		tt.Setenv("XDG_CONFIG_HOME", t.TempDir())
		tt.Setenv("REGISTRY_AUTH_FILE", "")
	}
}

func pullStore(t testing.TB, change ...func(*Config)) *Store {
	t.Helper()
	noCredentials(t)
	s := newStore(t, change...)
	s.retry = retryPolicy{attempts: 4, first: time.Millisecond, max: 10 * time.Millisecond, resumes: 50, stall: 5 * time.Second}
	return s
}

func randomLayer(t testing.TB, seed uint64, size int) v1.Layer {
	t.Helper()
	b := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(seed)})
	r.Read(b)
	l, err := images.Layer(images.Dir("data/", 0o755), images.File(fmt.Sprintf("data/%d", seed), 0o644, string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func bigImage(t testing.TB, seeds ...uint64) v1.Image {
	t.Helper()
	var layers []v1.Layer
	for _, s := range seeds {
		layers = append(layers, randomLayer(t, s, 300<<10))
	}
	img, err := images.Image("amd64", v1.Config{Cmd: []string{"x"}}, layers...)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestPull(t *testing.T) {
	reg := newRegistry(t)
	img := smallImage(t, "amd64", "one")
	digest := reg.push(t, "team/app:1", img)
	s := pullStore(t)
	var last Progress
	got, err := s.Pull(t.Context(), reg.host+"/team/app:1", nil, func(p Progress) { last = p })
	if err != nil {
		t.Fatal(err)
	}
	tag, byDigest := reg.host+"/team/app:1", reg.host+"/team/app@"+digest
	if got.ID != configDigest(t, img) || !slices.Equal(got.RepoTags, []string{tag}) || !slices.Equal(got.RepoDigests, []string{byDigest}) {
		t.Fatalf("pulled %+v", got)
	}
	if last.Stage != StageDone || last.Total == 0 || last.Bytes != last.Total || last.Layers != 3 {
		t.Errorf("last progress %+v", last)
	}
	for _, l := range got.Layers {
		fsck(t, l.Path)
	}
	// Again: no blob of a layer is fetched twice.
	before := reg.blobGets()
	if _, err := s.Pull(t.Context(), tag, nil, nil); err != nil {
		t.Fatal(err)
	}
	for p, n := range reg.blobGets() {
		if n != before[p] && !strings.HasSuffix(p, configDigest(t, img)) {
			t.Errorf("%s fetched again", p)
		}
	}
	// The tag moves and leaves the old image with its digest.
	moved := smallImage(t, "amd64", "two")
	reg.push(t, "team/app:1", moved)
	now, err := s.Pull(t.Context(), tag, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	old, err := s.Resolve(byDigest)
	if err != nil || old.ID == now.ID || len(old.RepoTags) != 0 || !slices.Equal(now.RepoTags, []string{tag}) {
		t.Errorf("after the move: old %+v (%v), new %+v", old, err, now)
	}
	for _, id := range []string{old.ID, now.ID} {
		if err := s.Remove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	wantEmpty(t, s)

	// By digest: no tag.
	got, err = s.Pull(t.Context(), byDigest, nil, nil)
	if err != nil || len(got.RepoTags) != 0 || !slices.Equal(got.RepoDigests, []string{byDigest}) {
		t.Fatalf("by digest: %+v, %v", got, err)
	}
	// Two registries, one ID; removing one reference removes all.
	second := newRegistry(t)
	second.push(t, "other:2", img)
	both, err := s.Pull(t.Context(), second.host+"/other:2", nil, nil)
	if err != nil || both.ID != got.ID || len(both.RepoDigests) != 2 {
		t.Fatalf("second registry: %+v, %v", both, err)
	}
	if err := s.Remove(t.Context(), second.host+"/other:2"); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, s)

	if _, err := s.Pull(t.Context(), reg.host+"/team/none:1", nil, nil); !errdefs.IsNotFound(err) {
		t.Errorf("no such image: %v", err)
	}
	if _, err := s.Pull(t.Context(), "127.0.0.1:1/x:1", nil, nil); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("no registry: %v", err)
	}
}

func TestPullIndex(t *testing.T) {
	reg := newRegistry(t)
	amd, arm := smallImage(t, "amd64", "a"), smallImage(t, "arm64", "b")
	attestation := smallImage(t, "unknown", "c")
	var index v1.ImageIndex = mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: attestation, Descriptor: v1.Descriptor{
			Platform:    &v1.Platform{OS: "unknown", Architecture: "unknown"},
			Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest"},
		}},
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}},
		mutate.IndexAddendum{Add: amd, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
	)
	nested := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: index})
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	for tag, idx := range map[string]v1.ImageIndex{"multi:1": index, "nested:1": nested} {
		ref, err := name.ParseReference(reg.host + "/" + tag)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.WriteIndex(ref, idx, remote.WithTransport(tr)); err != nil {
			t.Fatal(err)
		}
	}
	s := pullStore(t)
	for _, tag := range []string{"multi:1", "nested:1"} {
		got, err := s.Pull(t.Context(), reg.host+"/"+tag, nil, nil)
		if err != nil || got.ID != configDigest(t, amd) {
			t.Errorf("%s: %+v, %v", tag, got, err)
		}
	}
	for _, ref := range []string{"multi:1"} {
		other := newStore(t, func(c *Config) { c.Arch = "riscv64" })
		_, err := other.Pull(t.Context(), reg.host+"/"+ref, nil, nil)
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "linux/arm64") || !strings.Contains(err.Error(), "linux/riscv64") {
			t.Errorf("wrong platform: %v", err)
		}
		wantEmpty(t, other)
	}
}

func TestPullFailures(t *testing.T) {
	img := bigImage(t, 1, 2)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	first, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	isFirst := func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+first.String())
	}
	type spoil = func(http.ResponseWriter, *http.Request, http.Handler) bool
	for _, tt := range []struct {
		name  string
		spoil func() spoil
		want  func(error) bool // nil: it succeeds
		text  string
	}{
		{name: "drops mid-blob and resumes", spoil: func() spoil {
			var n atomic.Int32
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				if !isFirst(r) {
					return false
				}
				if i := n.Add(1); i > 5 {
					return false
				} else if i > 1 && r.Header.Get("Range") == "" {
					http.Error(w, "resume without Range", http.StatusBadRequest)
					return true
				}
				next.ServeHTTP(&cutWriter{ResponseWriter: w, left: 40 << 10}, r)
				panic(http.ErrAbortHandler)
			}
		}},
		{name: "no ranges", spoil: func() spoil {
			var n atomic.Int32
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				if !isFirst(r) {
					return false
				}
				r.Header.Del("Range")
				if n.Add(1) <= 2 {
					next.ServeHTTP(&cutWriter{ResponseWriter: w, left: 40 << 10}, r)
					panic(http.ErrAbortHandler)
				}
				return false
			}
		}},
		{name: "503 and 429 at first", spoil: func() spoil {
			var n atomic.Int32
			return func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				switch n.Add(1) {
				case 1:
					w.WriteHeader(http.StatusServiceUnavailable)
				case 2, 5:
					w.Header().Set("Retry-After", "0")
					w.WriteHeader(http.StatusTooManyRequests)
				default:
					return false
				}
				return true
			}
		}},
		{name: "503 for ever", spoil: func() spoil {
			return func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				if isFirst(r) {
					w.WriteHeader(http.StatusServiceUnavailable)
				}
				return isFirst(r)
			}
		}, want: errdefs.IsUnavailable, text: "503"},
		{name: "wrong bytes", spoil: func() spoil {
			return func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				if isFirst(r) {
					size, _ := layers[0].Size()
					w.Write(bytes.Repeat([]byte("x"), int(size)))
				}
				return isFirst(r)
			}
		}, want: errdefs.IsDataLoss, text: first.String()},
		{name: "too many bytes", spoil: func() spoil {
			return func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				if isFirst(r) {
					w.Write(make([]byte, 4<<20))
				}
				return isFirst(r)
			}
		}, want: errdefs.IsDataLoss, text: "more than"},
		{name: "missing blob", spoil: func() spoil {
			return func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				if isFirst(r) {
					http.NotFound(w, r)
				}
				return isFirst(r)
			}
		}, want: errdefs.IsNotFound, text: first.String()},
		{name: "huge manifest", spoil: func() spoil {
			return func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				if strings.Contains(r.URL.Path, "/manifests/") {
					w.Write(bytes.Repeat([]byte(" "), 5<<20))
					return true
				}
				return false
			}
		}, want: errdefs.IsInvalidArgument, text: "longer than"},
		{name: "manifest is not JSON", spoil: func() spoil {
			return func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				if strings.Contains(r.URL.Path, "/manifests/") {
					io.WriteString(w, "<html>")
					return true
				}
				return false
			}
		}, want: errdefs.IsInvalidArgument, text: "not valid JSON"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reg := newRegistry(t)
			reg.push(t, "x:1", img)
			reg.set(tt.spoil())
			s := pullStore(t)
			got, err := s.Pull(t.Context(), reg.host+"/x:1", nil, nil)
			if tt.want == nil {
				if err != nil || got.ID != configDigest(t, img) {
					t.Fatalf("pulled %+v, %v", got, err)
				}
				return
			}
			if err == nil || !tt.want(err) || !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), reg.host+"/x:1") {
				t.Errorf("error %v, want one that names %q", err, tt.text)
			}
			wantEmpty(t, s)
		})
	}
}

// cutWriter passes so many bytes of a body and drops the rest.
type cutWriter struct {
	http.ResponseWriter
	left int
}

func (c *cutWriter) Write(p []byte) (int, error) {
	n := min(len(p), c.left)
	c.left -= n
	if _, err := c.ResponseWriter.Write(p[:n]); err != nil {
		return 0, err
	}
	if n < len(p) {
		c.ResponseWriter.(http.Flusher).Flush()
		return n, errors.New("cut")
	}
	return n, nil
}

func TestPullCancel(t *testing.T) {
	reg := newRegistry(t)
	img := bigImage(t, 1)
	reg.push(t, "x:1", img)
	arrived := make(chan struct{}, 8)
	let := make(chan struct{})
	reg.set(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") || strings.HasSuffix(r.URL.Path, configDigest(t, img)) {
			return false
		}
		arrived <- struct{}{}
		select {
		case <-let:
			return false
		case <-r.Context().Done():
			return true
		}
	})
	s := pullStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := s.Pull(ctx, reg.host+"/x:1", nil, nil)
		first <- err
	}()
	<-arrived
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	wantEmpty(t, s)

	// One caller gives up, the other gets the image from the same download.
	ctx, cancel = context.WithCancel(t.Context())
	go func() {
		_, err := s.Pull(ctx, reg.host+"/x:1", nil, nil)
		first <- err
	}()
	<-arrived
	go func() {
		_, err := s.Pull(context.Background(), reg.host+"/x:1", nil, nil)
		second <- err
	}()
	waitFor(t, "two callers of one download", func() bool {
		s.flights.mu.Lock()
		defer s.flights.mu.Unlock()
		for _, f := range s.flights.m {
			return f.waiters == 2
		}
		return false
	})
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	close(let)
	if err := <-second; err != nil {
		t.Errorf("the other caller: %v", err)
	}
	if n := len(arrived); n != 0 {
		t.Errorf("%d more requests for the blob", n)
	}
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 10 s for %s", what)
		}
	}
}

func TestPullConcurrent(t *testing.T) {
	reg := newRegistry(t)
	// Overlapping images: layer 2 is in all of them.
	for i := range 4 {
		reg.push(t, fmt.Sprintf("x:%d", i), bigImage(t, 2, uint64(10+i)))
	}
	s := pullStore(t)
	errs := make(chan error)
	for i := range 16 {
		go func() {
			_, err := s.Pull(context.Background(), fmt.Sprintf("%s/x:%d", reg.host, i%4), nil, nil)
			errs <- err
		}()
	}
	for range 16 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	configs := map[string]bool{}
	list, err := s.List()
	if err != nil || len(list) != 4 {
		t.Fatalf("%d images, %v", len(list), err)
	}
	for _, img := range list {
		configs[img.ID] = true
	}
	for p, n := range reg.blobGets() {
		if n != 1 && !configs[filepath.Base(p)] {
			t.Errorf("%s fetched %d times", p, n)
		}
	}
	// Pulls and removals at once end in a store that is whole or empty.
	for i := range 32 {
		go func() {
			if i%2 == 0 {
				errs <- s.Remove(context.Background(), fmt.Sprintf("%s/x:%d", reg.host, i%4))
				return
			}
			_, err := s.Pull(context.Background(), fmt.Sprintf("%s/x:%d", reg.host, i%4), nil, nil)
			if errdefs.IsNotFound(err) {
				err = nil // removed between the record and the look at it
			}
			errs <- err
		}()
	}
	for range 32 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if list, err = s.List(); err != nil {
		t.Fatal(err)
	}
	for _, img := range list {
		for _, l := range img.Layers {
			if _, err := os.Stat(l.Path); err != nil {
				t.Errorf("image %v: %v", img.RepoTags, err)
			}
		}
		if err := s.Remove(t.Context(), img.ID); err != nil {
			t.Error(err)
		}
	}
	wantEmpty(t, s)
}

func TestCredentials(t *testing.T) {
	img := smallImage(t, "amd64", "secret")
	const user, pass = "robot", "hunter2"
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+pass))
	protect := func(scheme string, reg *testRegistry) {
		reg.set(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			want := basic
			if scheme == "bearer" {
				if r.URL.Path == "/token" {
					if r.Header.Get("Authorization") != basic {
						w.WriteHeader(http.StatusUnauthorized)
						return true
					}
					json.NewEncoder(w).Encode(map[string]string{"token": "t0ken"})
					return true
				}
				want = "Bearer t0ken"
			}
			if r.Header.Get("Authorization") == want {
				return false
			}
			challenge := `Basic realm="x"`
			if scheme == "bearer" {
				challenge = fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, reg.host)
			}
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
	}
	for _, scheme := range []string{"basic", "bearer"} {
		t.Run(scheme, func(t *testing.T) {
			reg := newRegistry(t)
			reg.push(t, "x:1", img)
			protect(scheme, reg)
			ref := reg.host + "/x:1"
			s := pullStore(t)
			for _, tt := range []struct {
				name string
				auth *runtimeapi.AuthConfig
				ok   bool
			}{
				{"none", nil, false},
				{"wrong", &runtimeapi.AuthConfig{Username: user, Password: "x"}, false},
				{"for another host", &runtimeapi.AuthConfig{Username: user, Password: pass, ServerAddress: "https://example.com/v1/"}, false},
				{"user and password", &runtimeapi.AuthConfig{Username: user, Password: pass}, true},
				{"auth", &runtimeapi.AuthConfig{Auth: base64.StdEncoding.EncodeToString([]byte(user + ":" + pass))}, true},
				{"for this host", &runtimeapi.AuthConfig{Username: user, Password: pass, ServerAddress: reg.host}, true},
			} {
				_, err := s.Pull(t.Context(), ref, tt.auth, nil)
				if tt.ok && err != nil || !tt.ok && !errdefs.IsUnauthorized(err) {
					t.Errorf("%s: %v", tt.name, err)
				}
				if err != nil && strings.Contains(err.Error(), pass) {
					t.Errorf("%s: the error tells the password: %v", tt.name, err)
				}
			}
			if scheme == "bearer" {
				if _, err := s.Pull(t.Context(), ref, &runtimeapi.AuthConfig{RegistryToken: "t0ken"}, nil); err != nil {
					t.Errorf("registry token: %v", err)
				}
			}
			// Docker's config.json, when the CRI gives nothing.
			dir := t.TempDir()
			t.Setenv("DOCKER_CONFIG", dir)
			cfg := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, reg.host, base64.StdEncoding.EncodeToString([]byte(user+":"+pass)))
			if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(cfg), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Pull(t.Context(), ref, nil, nil); err != nil {
				t.Errorf("config.json: %v", err)
			}
		})
	}
	t.Run("mirror and blob storage see none", func(t *testing.T) {
		mirror, storage, reg := newRegistry(t), newRegistry(t), newRegistry(t)
		storage.push(t, "x:1", img)
		reg.push(t, "x:1", img)
		protect("basic", reg)
		inner := reg.spoil
		reg.set(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
			if inner(w, r, next) {
				return true
			}
			if strings.Contains(r.URL.Path, "/blobs/") {
				http.Redirect(w, r, "http://"+storage.host+r.URL.Path+"?X-Signature=s3cret", http.StatusTemporaryRedirect)
				return true
			}
			return false
		})
		dir := t.TempDir()
		writeHosts(t, dir, reg.host, fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", reg.host, mirror.host))
		s := pullStore(t, func(c *Config) { c.RegistryConfigDir = dir })
		storage.all = nil
		if _, err := s.Pull(t.Context(), reg.host+"/x:1", &runtimeapi.AuthConfig{Username: user, Password: pass}, nil); err != nil {
			t.Fatal(err)
		}
		if len(mirror.all) == 0 || len(storage.all) == 0 {
			t.Fatalf("mirror was asked %d times, storage %d times", len(mirror.all), len(storage.all))
		}
		for _, r := range append(mirror.all, storage.all...) {
			if h := r.Header.Get("Authorization"); h != "" {
				t.Errorf("%s %s got %q", r.Method, r.URL, h)
			}
		}
	})
}

func writeHosts(t testing.TB, dir, host, content string) {
	t.Helper()
	d := filepath.Join(dir, host)
	if err := os.MkdirAll(d, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d, "hosts.toml"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestMirror(t *testing.T) {
	img := smallImage(t, "amd64", "mirrored")
	reg := newRegistry(t)
	reg.push(t, "library/nginx:1", img)
	reg.push(t, "proxy/library/nginx:1", img)
	for _, tt := range []struct{ name, hosts string }{
		{"host", fmt.Sprintf("server = \"https://registry-1.docker.io\"\n[host.\"http://%s\"]\n", reg.host)},
		{"first host is down", fmt.Sprintf("[host.\"http://127.0.0.1:1\"]\n[host.\"http://%s/v2\"]\n", reg.host)},
		{"server", fmt.Sprintf("server = \"http://%s\"\n", reg.host)},
		{"override_path", fmt.Sprintf("[host.\"http://%s/v2/proxy\"]\noverride_path = true\n", reg.host)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			writeHosts(t, dir, "docker.io", tt.hosts)
			s := pullStore(t, func(c *Config) { c.RegistryConfigDir = dir })
			reg.mu.Lock()
			reg.all = nil
			reg.mu.Unlock()
			got, err := s.Pull(t.Context(), "nginx:1", nil, nil)
			if err != nil || !slices.Equal(got.RepoTags, []string{"docker.io/library/nginx:1"}) {
				t.Fatalf("pulled %+v, %v", got, err)
			}
			asked := false
			for _, r := range reg.all {
				asked = asked || r.URL.Query().Get("ns") == "docker.io"
			}
			if !asked {
				t.Error("the mirror was not told which registry is meant")
			}
		})
	}
}

func TestTLS(t *testing.T) {
	img := smallImage(t, "amd64", "tls")
	plain := newRegistry(t)
	plain.push(t, "x:1", img)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resp, err := http.Get("http://" + plain.host + r.URL.RequestURI())
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		for k := range resp.Header {
			w.Header().Set(k, resp.Header.Get(k))
		}
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, resp.Body)
	}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	host := strings.TrimPrefix(srv.URL, "https://")
	pem := pemOf(srv.Certificate().Raw)
	for _, tt := range []struct {
		name, hosts string
		ok          bool
	}{
		{"unknown authority", "server = \"https://" + host + "\"\n", false},
		{"skip_verify", "server = \"https://" + host + "\"\nskip_verify = true\n", true},
		{"ca", "server = \"https://" + host + "\"\nca = \"ca.pem\"\n", true},
		{"plain HTTP refused by the server", "server = \"http://" + host + "\"\n", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			writeHosts(t, dir, host, tt.hosts)
			if err := os.WriteFile(filepath.Join(dir, host, "ca.pem"), pem, 0o644); err != nil {
				t.Fatal(err)
			}
			s := pullStore(t, func(c *Config) { c.RegistryConfigDir = dir })
			_, err := s.Pull(t.Context(), host+"/x:1", nil, nil)
			if (err == nil) != tt.ok {
				t.Errorf("pull: %v", err)
			}
		})
	}
}
