//go:build linux

package e2e_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/test/images"
)

const nobody = "feedfacefeedface"

func TestUnknownNames(t *testing.T) {
	n := suite.node
	ctx := timeout(t, callTimeout)
	p := sharedPodOf(t)
	for _, c := range []struct {
		name string
		call func() error
		code codes.Code
		word string
	}{
		{"PodSandboxStatus", func() error {
			_, err := n.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: nobody})
			return err
		}, codes.NotFound, nobody},
		{"CreateContainer", func() error {
			_, err := n.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: nobody, Config: &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: "x"}, Image: &runtimeapi.ImageSpec{Image: "x"}}})
			return err
		}, codes.NotFound, nobody},
		{"PortForward", func() error {
			_, err := n.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: nobody})
			return err
		}, codes.NotFound, nobody},
		{"StartContainer", func() error {
			_, err := n.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: nobody})
			return err
		}, codes.NotFound, nobody},
		{"ContainerStatus", func() error {
			_, err := n.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: nobody})
			return err
		}, codes.NotFound, nobody},
		{"ExecSync", func() error {
			_, err := n.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: nobody, Cmd: []string{"x"}})
			return err
		}, codes.NotFound, nobody},
		{"Exec", func() error {
			_, err := n.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: nobody, Cmd: []string{"x"}, Stdout: true})
			return err
		}, codes.NotFound, nobody},
		{"Attach", func() error {
			_, err := n.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: nobody, Stdout: true})
			return err
		}, codes.NotFound, nobody},
		{"ReopenContainerLog", func() error {
			_, err := n.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: nobody})
			return err
		}, codes.NotFound, nobody},
		// The CRI calls these idempotent.
		{"StopContainer", func() error {
			_, err := n.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: nobody})
			return err
		}, codes.OK, ""},
		{"RemoveContainer", func() error {
			_, err := n.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: nobody})
			return err
		}, codes.OK, ""},
		{"StopPodSandbox", func() error {
			_, err := n.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: nobody})
			return err
		}, codes.OK, ""},
		{"RemovePodSandbox", func() error {
			_, err := n.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: nobody})
			return err
		}, codes.OK, ""},
		{"RemoveImage", func() error {
			_, err := n.images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: "example.org/no/such:image"}})
			return err
		}, codes.OK, ""},
		{"ImageStatus", func() error {
			r, err := n.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: "example.org/no/such:image"}})
			if r.GetImage() != nil {
				t.Error("there is such an image")
			}
			return err
		}, codes.OK, ""},
		{"PullImage", func() error {
			_, err := n.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: suite.registry + "/no/such:image"}})
			return err
		}, codes.NotFound, "/no/such:image"},
		{"image of a container", func() error {
			_, err := n.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.config, Config: &runtimeapi.ContainerConfig{
				Metadata: &runtimeapi.ContainerMetadata{Name: "no-image"}, Image: &runtimeapi.ImageSpec{Image: "example.org/no/such:image"}}})
			return err
		}, codes.NotFound, "example.org/no/such:image"},
		{"runtime handler", func() error {
			_, err := n.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig(n, "x"), RuntimeHandler: "gvisor"})
			return err
		}, codes.NotFound, "gvisor"},
		{"container's name twice", func() error {
			_, err := p.createContext(t.Context(), "idle", asRoot)
			return err
		}, codes.AlreadyExists, "idle"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.call()
			if c.code == codes.OK {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, c.code, c.word)
		})
	}
}

// T39, T40: what can't be honoured is refused by the field's name, the node's network
// with advice.
func TestRefusedFields(t *testing.T) {
	p := sharedPodOf(t)
	for _, c := range []struct {
		name, field string
		change      func(*runtimeapi.PodSandboxConfig)
	}{
		{"node network", "namespace_options.network: NODE can't be had: the node's network is outside the pod's VM; run host-network pods on another node or runtime", func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		}},
		{"node ipc", "namespace_options.ipc", func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Ipc = runtimeapi.NamespaceMode_NODE
		}},
		{"no name", "config.metadata", func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = "" }},
		{"AppArmor profile", "apparmor", func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "x"}
		}},
	} {
		t.Run("pod "+c.name, func(t *testing.T) {
			cfg := podConfig(suite.node, "refused")
			c.change(cfg)
			_, err := suite.node.RunPodSandbox(timeout(t, callTimeout), &runtimeapi.RunPodSandboxRequest{Config: cfg})
			wantError(t, err, codes.InvalidArgument, c.field)
		})
	}
	socket := filepath.Join(suite.node.run, "cri-vz.sock")
	for _, c := range []struct {
		name, field string
		option      option
	}{
		{"bidirectional mount", "mounts[0].propagation", mount(&runtimeapi.Mount{HostPath: "/tmp", ContainerPath: "/x", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL})},
		{"missing host path", "mounts[0].host_path", mount(&runtimeapi.Mount{HostPath: "/no/such/path", ContainerPath: "/x"})},
		{"socket as a volume", "mounts[0].host_path", mount(&runtimeapi.Mount{HostPath: socket, ContainerPath: "/x"})}, // T29
		{"block device", "devices[0].host_path", func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/sda", ContainerPath: "/dev/sda"}}
		}}, // T37
		{"huge pages", "hugepage_limits", func(c *runtimeapi.ContainerConfig) {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 2 << 20}}}
		}},
		{"unknown capability", "capabilities", security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"FLY"}}
		})},
		{"group without user", "run_as_group", security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsGroup = &runtimeapi.Int64Value{Value: 1} })},
		{"unknown user", "somebody", security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUsername = "somebody" })},
		{"log outside of its directory", "log_path", func(c *runtimeapi.ContainerConfig) { c.LogPath = "../../x" }},
		{"relative working directory", "working_dir", func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "x" }},
	} {
		t.Run("container "+c.name, func(t *testing.T) {
			id, err := p.createContext(t.Context(), "refused", c.option)
			if err == nil {
				p.removeContainer(t, id)
			}
			wantError(t, err, codes.InvalidArgument, c.field)
		})
	}
}

func TestBadImages(t *testing.T) {
	n := suite.node
	p := sharedPodOf(t)
	layer, err := images.Layer(images.File("file", 0o644, "x\n"))
	if err != nil {
		t.Fatal(err)
	}
	other := map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]
	foreign, err := images.Image(other, v1.Config{Cmd: []string{"/x"}}, layer)
	if err != nil {
		t.Fatal(err)
	}
	mute, err := images.Image(runtime.GOARCH, v1.Config{}, layer)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("another architecture", func(t *testing.T) {
		ref, _, err := push("foreign:latest", foreign)
		if err != nil {
			t.Fatal(err)
		}
		_, err = n.images.PullImage(timeout(t, callTimeout), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
		if err == nil {
			t.Fatal("pulled")
		}
		for _, w := range []string{other, runtime.GOARCH} {
			if !strings.Contains(status.Convert(err).Message(), w) {
				t.Errorf("the error does not say %s: %v", w, err)
			}
		}
	})
	t.Run("no command", func(t *testing.T) {
		ref, _, err := push("mute:latest", mute)
		if err != nil {
			t.Fatal(err)
		}
		if err := pull(n, ref); err != nil {
			t.Fatal(err)
		}
		_, err = p.createContext(t.Context(), "mute", func(c *runtimeapi.ContainerConfig) { c.Image.Image = ref })
		wantError(t, err, codes.InvalidArgument, "config.command")
	})
	t.Run("truncated archive", func(t *testing.T) {
		img, err := images.WebServer(suite.images, runtime.GOARCH)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "app.tar.gz")
		if err := images.SaveDockerArchive(path, "docker.io/e2e/cut:1", img); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, fi.Size()/2); err != nil {
			t.Fatal(err)
		}
		out, err := n.cli("image", "load", path).CombinedOutput()
		if err == nil || !bytes.Contains(out, []byte("app.tar.gz")) {
			t.Errorf("%v: %s", err, out)
		}
		r, err := n.images.ImageStatus(timeout(t, callTimeout), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: "docker.io/e2e/cut:1"}})
		if err != nil || r.GetImage() != nil {
			t.Errorf("half an image is there: %v, %v", r, err)
		}
	})
}

// Daemons that can't work say why, in words that tell what to do.
func TestDaemonWithoutItsParts(t *testing.T) {
	empty := t.TempDir()
	for _, c := range []struct {
		name  string
		lines []string
		words []string
	}{
		{"no guest", []string{`guest: dir = "` + empty + `"`}, []string{empty, "cri-vz guest build"}},
		{"unknown key", []string{`colour = "blue"`}, []string{"colour", "unknown key"}},
		{"streaming for everybody", []string{"vm: accel = \"tcg\"\n[streaming]\naddress = \"0.0.0.0:0\""}, []string{"0.0.0.0", "loopback"}},
		{"no such kernel", []string{"vm: class.x = { cpus = 1, memory_mib = 128, kernel = \"custom\" }"}, []string{"vm.class.x", "custom", "cri-vz guest build"}},
		{"long socket path", []string{`listen = "unix:///` + strings.Repeat("x", 120) + `"`}, []string{"103 bytes"}}, // T14
	} {
		t.Run(c.name, func(t *testing.T) {
			wantRefusal(t, newNode("broken", c.lines...), nil, c.words...)
		})
	}
	for _, c := range []struct {
		name, want string
		without    func(n *node) *exec.Cmd
	}{
		{"no QEMU", "qemu-system", func(n *node) *exec.Cmd {
			// Tools of the network are wanted, QEMU is not.
			bin := t.TempDir()
			for _, tool := range []string{"iptables", "ip6tables", "nft", "ip"} {
				if path, err := exec.LookPath(tool); err == nil {
					if err := os.Symlink(path, filepath.Join(bin, tool)); err != nil {
						t.Fatal(err)
					}
				}
			}
			return n.command("PATH=" + bin)
		}},
		{"no virtiofsd", "virtiofsd is not at", func(n *node) *exec.Cmd {
			cmd := n.command()
			hide := `for d in /usr/libexec /usr/lib/qemu; do [ ! -d $d ] || mount -t tmpfs none $d || exit; done; exec "$0" "$@"`
			cmd.Path, cmd.Args = "/bin/sh", append([]string{"sh", "-c", hide}, cmd.Args...)
			cmd.SysProcAttr.Unshareflags = unix.CLONE_NEWNS
			return cmd
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNodeApart(t, "without", `vm: accel = "tcg"`)
			if err := n.startCommand(c.without(n)); err != nil {
				if !strings.Contains(err.Error(), c.want) {
					t.Errorf("the error does not say %q: %v", c.want, err)
				}
				return
			}
			p, err := n.runPod(t.Context(), podConfig(n, "without"))
			boots.Add(-1)
			if err == nil {
				p.remove(t)
				t.Error("the pod runs")
			} else if m := status.Convert(err).Message(); !strings.Contains(m, c.want) {
				t.Errorf("the error does not say %q: %v", c.want, m)
			}
			if left := filesBelow(filepath.Join(n.root, "pods")); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			if err := n.stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// wantRefusal checks that a daemon ends by itself, with an error that has all
// words.
func wantRefusal(t *testing.T, n *node, env []string, words ...string) {
	t.Helper()
	cmd := n.command(env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		if err == nil {
			t.Errorf("exit status 0: %s", out.String())
		}
	case <-time.After(15 * time.Second):
		_ = cmd.Process.Kill()
		<-done
		t.Fatalf("the daemon runs: %s", out.String())
	}
	for _, w := range words {
		if !strings.Contains(out.String(), w) {
			t.Errorf("the error does not say %q: %s", w, out.String())
		}
	}
}
