//go:build linux

package conformance_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

// T33: a pod as a kubelet makes one for hostUsers: false. Its root is nobody on
// the node, and owns its image's files and its volumes all the same.
func TestUserNamespace(t *testing.T) {
	st, err := suite.Status(cri.Timeout(t, cri.CallTimeout), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range st.GetRuntimeHandlers() {
		if !h.GetFeatures().GetUserNamespaces() {
			t.Errorf("handler %q doesn't offer user namespaces", h.GetName())
		}
	}
	const first = 0xE45D0000 // in the upper half of all ids, where kubelets take them from as well
	ids := []*runtimeapi.IDMapping{{HostId: first, Length: 65536}}
	userns := &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: ids, Gids: ids}
	cfg := podConfig("mapped")
	cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = userns
	p := newPod(t, cfg)

	dir := filepath.Join(suite.base, "mapped-volumes")
	for path, owner := range map[string]int{"data": 0, "of-app": 1000, "shared": first} {
		if err := os.MkdirAll(filepath.Join(dir, path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(filepath.Join(dir, path), owner, owner); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(dir, "hosts"), "127.0.0.1 localhost\n")
	writeFile(t, filepath.Join(dir, "termination-log"), "")
	mapped := func(m *runtimeapi.Mount) cri.Option {
		m.UidMappings, m.GidMappings = ids, ids
		return cri.Mount(m)
	}
	inside := func(c *runtimeapi.ContainerConfig) {
		if c.Linux.SecurityContext.NamespaceOptions == nil {
			c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{}
		}
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = userns
	}
	id := p.Start(t, "mapped", cri.AsRoot, inside, cri.Command("/bin/sleep", "infinity"),
		mapped(&runtimeapi.Mount{HostPath: dir + "/data", ContainerPath: "/data"}),
		mapped(&runtimeapi.Mount{HostPath: dir + "/of-app", ContainerPath: "/of-app", Readonly: true}),
		mapped(&runtimeapi.Mount{HostPath: dir + "/hosts", ContainerPath: "/etc/hosts"}),
		mapped(&runtimeapi.Mount{HostPath: dir + "/termination-log", ContainerPath: "/dev/termination-log"}),
		cri.Mount(&runtimeapi.Mount{HostPath: dir + "/shared", ContainerPath: "/shared"}))

	if got := strings.Fields(p.Output(t, id, "/bin/cat", "/proc/self/uid_map")); strings.Join(got, " ") != fmt.Sprint("0 ", first, " 65536") {
		t.Errorf("uid_map: %v", got)
	}
	for _, c := range []struct{ path, want string }{
		{"/data", "0:0"}, {"/of-app", "1000:1000"}, {"/shared", "0:0"}, {"/etc/passwd", "0:0"}, {"/home/app", "1000:1000"}, {"/etc/hosts", "0:0"},
	} {
		if got := p.Output(t, id, "/bin/ls", filepath.Dir(c.path)); !strings.Contains(got, " "+c.want+" ") {
			t.Errorf("ls of %s: %q, want %s to belong to %s", filepath.Dir(c.path), got, c.path, c.want)
		}
	}
	for _, path := range []string{"/data/new", "/etc/hosts", "/dev/termination-log", "/shared/new", "/anywhere", "/dev/shm/new"} {
		p.Output(t, id, "/bin/write", path, "written")
	}
	if r := p.Do(t, id, "/bin/write", "/of-app/new", "x"); r.Code == 0 {
		t.Errorf("a read-only volume was written to: %+v", r)
	}
	for path, owner := range map[string]uint32{"data/new": 0, "shared/new": first, "hosts": 0, "termination-log": 0} {
		var st syscall.Stat_t
		if err := syscall.Stat(filepath.Join(dir, path), &st); err != nil || st.Uid != owner || st.Gid != owner {
			t.Errorf("on the host %s belongs to %d:%d, %v; want %d", path, st.Uid, st.Gid, err, owner)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "termination-log")); err != nil || string(b) != "written\n" {
		t.Errorf("the termination log: %q, %v", b, err)
	}
	for field, as := range map[string]func(*runtimeapi.LinuxContainerSecurityContext){
		"run_as_user": func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.RunAsUser = &runtimeapi.Int64Value{Value: 65536}
		},
		"run_as_group": func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.RunAsGroup = &runtimeapi.Int64Value{Value: 65536}
		},
		"supplemental_groups": func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.SupplementalGroups = []int64{65536} },
	} {
		_, err := p.CreateContext(cri.Timeout(t, cri.CallTimeout), "unmapped", cri.AsRoot, inside, func(c *runtimeapi.ContainerConfig) { as(c.Linux.SecurityContext) })
		cri.WantError(t, err, codes.InvalidArgument, field, "65535")
	}
	// The image's own user, and a restart.
	if got := p.Run(t, "app", inside, cri.Command("/bin/id")); got.Code != 0 || !strings.Contains(got.Stdout, "uid=1000") {
		t.Errorf("the image's user: %+v", got)
	}
}
