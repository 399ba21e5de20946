//go:build linux

package e2e_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.WriteString(f, text); err != nil {
		t.Fatal(err)
	}
}

// T1: not even the guest's root can change a layer or a read-only volume, because
// the host does not let it.
func TestReadOnlyIsTheHosts(t *testing.T) {
	p := sharedPodOf(t)
	before := layerDigests(t)
	dir := filepath.Join(suite.base, "host-read-only")
	if err := os.MkdirAll(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "file"), "mine\n")
	id := p.start(t, "guest-root", asRoot, privileged, command("/bin/sleep", "infinity"),
		mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/ro", Readonly: true}))
	for tag, where := range map[string]string{"layers": "/tmp/layers", "volumes": "/tmp/volumes"} {
		// A second mount of the same share, writable as far as the guest goes.
		if r := p.exec(t, id, "/app/web", "mount", "virtiofs", tag, where); r.code != 0 {
			t.Fatalf("mount share %s: %+v", tag, r)
		}
	}
	for _, found := range []struct{ share, want string }{{"/tmp/layers", ""}, {"/tmp/volumes", "file"}} {
		tried := 0
		walkGuest(t, p.pod, id, found.share, 3, func(path string) {
			if filepath.Base(path) == found.want || (found.want == "" && !strings.HasPrefix(filepath.Base(path), ".")) {
				tried++
				if r := p.exec(t, id, "/bin/write", path, "poison"); r.code == 0 {
					t.Errorf("the guest's root wrote %s", path)
				}
			}
		})
		if tried == 0 {
			t.Errorf("found nothing to attack in %s: %s", found.share, p.output(t, id, "/bin/ls", found.share))
		}
	}
	if r := p.exec(t, id, "/bin/write", "/tmp/layers/new", "poison"); r.code == 0 {
		t.Error("the guest's root made a file among the layers")
	}
	if after := layerDigests(t); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("layers changed: %v, before %v", after, before)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(b) != "mine\n" {
		t.Errorf("the read-only volume changed: %q, %v", b, err)
	}
}

// T29: a directory with a socket and a device in it is a volume like any other, but
// for these two. T30: the guest sees nothing of the folder of a single file.
func TestSpecialFilesInVolumes(t *testing.T) {
	p := sharedPodOf(t)
	dir, single := filepath.Join(suite.base, "special"), filepath.Join(suite.base, "folder")
	if err := errors.Join(os.Mkdir(dir, 0o777), os.Mkdir(single, 0o777), unix.Mknod(filepath.Join(dir, "zero"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5)))); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	writeFile(t, filepath.Join(dir, "file"), "plain\n")
	writeFile(t, filepath.Join(single, "one"), "one\n")
	writeFile(t, filepath.Join(single, "neighbour"), "not shared\n")
	id := p.start(t, "special", asRoot, privileged, command("/bin/sleep", "infinity"),
		mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/data"}), mount(&runtimeapi.Mount{HostPath: filepath.Join(single, "one"), ContainerPath: "/one"}))
	defer p.removeContainer(t, id)
	if got := p.output(t, id, "/bin/cat", "/data/file", "/one"); got != "plain\none\n" {
		t.Errorf("%q", got)
	}
	if r := p.exec(t, id, "/app/web", "connect", "/data/socket"); r.code != 1 || !strings.Contains(r.stderr, "refused") {
		t.Errorf("connect to the host's socket: %+v", r)
	}
	// Privileged, it may use any device: that of a volume is none.
	if r := p.exec(t, id, "/bin/cat", "/data/zero"); r.code != 1 || !strings.Contains(r.stderr, "permission denied") {
		t.Errorf("read the device: %+v", r)
	}
	if r := p.exec(t, id, "/app/web", "mount", "virtiofs", "volumes", "/tmp/all"); r.code != 0 {
		t.Fatalf("mount the share: %+v", r)
	}
	found := map[string]bool{}
	walkGuest(t, p.pod, id, "/tmp/all", 3, func(path string) { found[filepath.Base(path)] = true })
	if !found["file"] || found["neighbour"] {
		t.Errorf("the guest's root sees %v", found)
	}
}

// walkGuest calls f for each file at most depth levels below dir in a container.
func walkGuest(t *testing.T, p *pod, id, dir string, depth int, f func(path string)) {
	t.Helper()
	for line := range strings.Lines(p.output(t, id, "/bin/ls", dir)) {
		fields := strings.Fields(line)
		path := filepath.Join(dir, fields[len(fields)-1])
		switch {
		case line[0] == '-':
			f(path)
		case line[0] == 'd' && depth > 1:
			walkGuest(t, p, id, path, depth-1, f)
		}
	}
}

// layerDigests hashes the image store's layers.
func layerDigests(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, path := range filesBelow(filepath.Join(suite.node.root, "images")) {
		if strings.HasSuffix(path, ".db") || filepath.Base(path) == "lock" {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		h := sha256.New()
		_, err = io.Copy(h, f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		found[path] = fmt.Sprintf("%x", h.Sum(nil)[:8])
	}
	if len(found) == 0 {
		t.Fatal("the image store has no files")
	}
	return found
}

// T32: fsGroup. A user who may write to a directory by a supplementary group alone
// makes files there, which get the directory's group.
func TestFSGroup(t *testing.T) {
	p := sharedPodOf(t)
	dir := filepath.Join(suite.base, "fsgroup")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, 0, 2000), os.Chmod(dir, 0o775|os.ModeSetgid)); err != nil {
		t.Fatal(err)
	}
	id := p.start(t, "fsgroup", command("/bin/sleep", "infinity"), mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/data"}),
		security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup = &runtimeapi.Int64Value{Value: 1000}, &runtimeapi.Int64Value{Value: 1000}
			s.SupplementalGroups = []int64{2000}
		}))
	p.output(t, id, "/bin/write", "/data/file", "x")
	var st syscall.Stat_t
	if err := syscall.Stat(filepath.Join(dir, "file"), &st); err != nil || st.Uid != 1000 || st.Gid != 2000 {
		t.Errorf("on the host the file belongs to %d:%d, %v; want 1000:2000", st.Uid, st.Gid, err)
	}
	// Who is not in the group may not.
	other := p.start(t, "no-fsgroup", command("/bin/sleep", "infinity"), mount(&runtimeapi.Mount{HostPath: dir, ContainerPath: "/data"}),
		security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup = &runtimeapi.Int64Value{Value: 1001}, &runtimeapi.Int64Value{Value: 1001}
		}))
	if r := p.exec(t, other, "/bin/write", "/data/other", "x"); r.code == 0 || !strings.Contains(r.stderr, "denied") {
		t.Errorf("somebody else: %+v", r)
	}
}
