package cri

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var testImage = &v1.ConfigFile{Config: v1.Config{
	Entrypoint: []string{"/entry", "-e"}, Cmd: []string{"cmd"}, Env: []string{"A=image", "B=image"}, WorkingDir: "/srv",
	User: "www-data", StopSignal: "SIGQUIT",
}}

// container is a config with the least that CreateContainer needs, changed by edit.
func container(edit func(*runtimeapi.ContainerConfig)) *runtimeapi.ContainerConfig {
	c := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "c"},
		Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{}, Resources: &runtimeapi.LinuxContainerResources{}},
	}
	if edit != nil {
		edit(c)
	}
	return c
}

func mustTranslate(t *testing.T, c *runtimeapi.ContainerConfig) *translation {
	t.Helper()
	tr, err := translate(&runtimeapi.PodSandboxConfig{Hostname: "pod"}, c, testImage)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func TestCommandAndArguments(t *testing.T) {
	for _, tc := range []struct {
		name          string
		command, args []string
		want          []string
	}{
		{"image's own", nil, nil, []string{"/entry", "-e", "cmd"}},
		{"args replace the image's command", nil, []string{"x"}, []string{"/entry", "-e", "x"}},
		{"command replaces both", []string{"/c"}, nil, []string{"/c"}},
		{"both given", []string{"/c"}, []string{"x"}, []string{"/c", "x"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tr := mustTranslate(t, container(func(c *runtimeapi.ContainerConfig) { c.Command, c.Args = tc.command, tc.args }))
			if !slices.Equal(tr.spec.Process.Args, tc.want) {
				t.Errorf("args %q, want %q", tr.spec.Process.Args, tc.want)
			}
		})
	}
	if _, err := translate(&runtimeapi.PodSandboxConfig{}, container(nil), &v1.ConfigFile{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "config.command") {
		t.Errorf("an image without a command: %v", err)
	}
}

func TestEnvironmentAndDirectory(t *testing.T) {
	p := mustTranslate(t, container(func(c *runtimeapi.ContainerConfig) {
		c.Envs = []*runtimeapi.KeyValue{{Key: "B", Value: []byte("own")}, {Key: "C", Value: []byte("a=b\xff")}}
		c.Tty = true
	})).spec.Process
	want := []string{defaultPath, "HOSTNAME=pod", "A=image", "B=own", "TERM=xterm", "C=a=b\xff"}
	if !slices.Equal(p.Env, want) {
		t.Errorf("env %q, want %q", p.Env, want)
	}
	if p.Cwd != "/srv" || !p.Terminal {
		t.Errorf("cwd %q, terminal %v", p.Cwd, p.Terminal)
	}
}

func TestCapabilities(t *testing.T) {
	for _, tc := range []struct {
		name               string
		add, drop, ambient []string
		privileged         bool
		has, hasNot        []string
	}{
		{name: "default", has: []string{"CAP_NET_RAW"}, hasNot: []string{"CAP_NET_ADMIN"}},
		{name: "add and drop", add: []string{"net_admin"}, drop: []string{"CAP_NET_RAW"}, has: []string{"CAP_NET_ADMIN"}, hasNot: []string{"CAP_NET_RAW"}},
		{name: "drop all, add one", add: []string{"CHOWN"}, drop: []string{"ALL"}, has: []string{"CAP_CHOWN"}, hasNot: []string{"CAP_KILL"}},
		{name: "add all, drop one", add: []string{"ALL"}, drop: []string{"CHOWN"}, has: []string{"CAP_SYS_ADMIN"}, hasNot: []string{"CAP_CHOWN"}},
		{name: "privileged", privileged: true, has: []string{"CAP_SYS_ADMIN", "CAP_CHOWN"}},
		{name: "ambient", ambient: []string{"NET_BIND_SERVICE"}, has: []string{"CAP_NET_BIND_SERVICE"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			caps := mustTranslate(t, container(func(c *runtimeapi.ContainerConfig) {
				c.Linux.SecurityContext.Privileged = tc.privileged
				c.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: tc.add, DropCapabilities: tc.drop, AddAmbientCapabilities: tc.ambient}
			})).spec.Process.Capabilities
			for _, want := range tc.has {
				if !slices.Contains(caps.Bounding, want) || !slices.Contains(caps.Effective, want) || !slices.Contains(caps.Permitted, want) {
					t.Errorf("%s is missing", want)
				}
			}
			for _, bad := range tc.hasNot {
				if slices.Contains(caps.Bounding, bad) {
					t.Errorf("%s is there", bad)
				}
			}
			if len(caps.Ambient) != len(tc.ambient) || len(caps.Inheritable) != len(tc.ambient) {
				t.Errorf("ambient %v, inheritable %v", caps.Ambient, caps.Inheritable)
			}
		})
	}
}

func TestOwnMountsTakeThePlaceOfDefaults(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	target := filepath.Join(dir, "target")
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	tr := mustTranslate(t, container(func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/data/deep", HostPath: link, Readonly: true},
			{ContainerPath: "/data", HostPath: dir, Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
			{ContainerPath: "/dev/shm", HostPath: dir},
		}
	}))
	var dests []string
	byDest := map[string]specs.Mount{}
	for _, m := range tr.spec.Mounts {
		dests = append(dests, m.Destination)
		byDest[m.Destination] = m
	}
	if slices.Index(dests, "/data") > slices.Index(dests, "/data/deep") {
		t.Errorf("a parent is mounted after its child: %v", dests)
	}
	if m := byDest["/dev/shm"]; m.Source != "volume://v2" {
		t.Errorf("/dev/shm is %+v", m)
	}
	if v := tr.volumes[0]; v.GetHostPath() != target || !v.GetReadOnly() {
		t.Errorf("a symbolic link was not followed on the host (T29): %v", v)
	}
	if v := tr.volumes[1]; !v.GetHostToContainer() || v.GetReadOnly() {
		t.Errorf("propagation: %v", v)
	}
}

// T29: what is on the host decides; the other refusals are in the API's table.
func TestRefusedHostPaths(t *testing.T) {
	dir := t.TempDir()
	sock := filepath.Join(dir, "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, p := range []string{filepath.Join(dir, "missing"), sock, "/dev/null", "relative", ""} {
		_, err := translate(&runtimeapi.PodSandboxConfig{}, container(mounts(&runtimeapi.Mount{ContainerPath: "/x", HostPath: p})), testImage)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "mounts[0].host_path") {
			t.Errorf("%q: %v", p, err)
		}
	}
}

// T37: a device of the guest's own, with the permissions that were asked for.
func TestGuestDevices(t *testing.T) {
	tr := mustTranslate(t, container(func(c *runtimeapi.ContainerConfig) {
		c.Devices = []*runtimeapi.Device{{HostPath: "/dev/fuse", ContainerPath: "/dev/f", Permissions: "r"}}
	}))
	dev, rules := tr.spec.Linux.Devices, tr.spec.Linux.Resources.Devices
	if len(dev) != 1 || dev[0].Path != "/dev/f" || dev[0].Major != 10 || dev[0].Minor != 229 {
		t.Errorf("devices %+v", dev)
	}
	if len(rules) != 1 || !rules[0].Allow || rules[0].Access != "r" || *rules[0].Major != 10 || *rules[0].Minor != 229 {
		t.Errorf("rules %+v", rules)
	}
}

func TestLogPathStaysInItsDirectory(t *testing.T) {
	for path, want := range map[string]string{"a/0.log": "/logs/a/0.log", "": ""} {
		if got, err := containerLogPath("/logs", path); err != nil || got != want {
			t.Errorf("containerLogPath(%q) = %q, %v", path, got, err)
		}
	}
	for _, path := range []string{"../x", "/etc/passwd", "a/../../x"} {
		if _, err := containerLogPath("/logs", path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("containerLogPath(%q): %v", path, err)
		}
	}
}

func TestStopSignals(t *testing.T) {
	for s, want := range map[string]uint32{
		"": 15, "SIGTERM": 15, "term": 15, "9": 9, "SIGRTMIN+3": 37, "RTMAX-1": 63, "SIGRTMINPLUS3": 37, "SIGRTMAXMINUS2": 62, "64": 64,
	} {
		if got, ok := parseSignal(s); !ok || got != want {
			t.Errorf("parseSignal(%q) = %d, %v; want %d", s, got, ok, want)
		}
	}
	for _, s := range []string{"0", "65", "-1", "SIGFOO", "SIGTERM+1", "RTMIN+99", "RTMAX+1", "RTMIN-1", "SIG"} {
		if n, ok := parseSignal(s); ok {
			t.Errorf("parseSignal(%q) = %d", s, n)
		}
	}
	if tr := mustTranslate(t, container(nil)); tr.stopSignal != 3 {
		t.Errorf("the image's signal: %d", tr.stopSignal)
	}
	tr := mustTranslate(t, container(func(c *runtimeapi.ContainerConfig) { c.StopSignal = runtimeapi.Signal_SIGNAL_SIGUSR1 }))
	if tr.stopSignal != 10 {
		t.Errorf("the request's signal: %d", tr.stopSignal)
	}
	// Every signal that the CRI can name must be known.
	for _, name := range runtimeapi.Signal_name {
		name = strings.TrimPrefix(name, "SIGNAL_")
		if _, ok := parseSignal(name); !ok && name != "RUNTIME_DEFAULT" {
			t.Errorf("signal %s of the CRI is unknown", name)
		}
	}
}

// T19: the cap drops the rest and reports no error, also when io.Copy fills it:
// an embedded bytes.Buffer would offer its ReadFrom and go around the cap.
func TestExecSyncOutputIsCapped(t *testing.T) {
	var c capped
	n, err := io.Copy(&c, io.LimitReader(zeros{}, 20<<20))
	if n != 20<<20 || err != nil {
		t.Fatal(n, err)
	}
	if c.kept.Len() != maxExecSyncOutput {
		t.Errorf("kept %d bytes", c.kept.Len())
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func FuzzParseSignal(f *testing.F) {
	f.Add("SIGRTMIN+3")
	f.Fuzz(func(t *testing.T, s string) {
		if n, ok := parseSignal(s); ok && (n < 1 || n > 64) {
			t.Errorf("parseSignal(%q) = %d", s, n)
		}
	})
}
