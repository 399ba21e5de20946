//go:build linux

package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// T2: where mounts of "/" propagate, as systemd has it, a pod's mounts are no more
// the host's than where they don't, which is how this suite runs in a container. T3:
// what is below a read-only volume is read-only on the host's side, too. T5: the VM
// runs below the cgroup that the pod asks for.
func TestSharedRoot(t *testing.T) {
	n := newNodeApart(t, "shared-root", `vm: accel = "tcg"`)
	cmd := n.command()
	cmd.Path, cmd.Args = "/bin/sh", append([]string{"sh", "-c", `mount --make-rshared / && exec "$0" "$@"`}, cmd.Args...)
	cmd.SysProcAttr.Unshareflags = unix.CLONE_NEWNS
	if err := n.startCommand(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.stop(); err != nil {
			t.Error(err)
		}
	})
	daemon := strconv.Itoa(cmd.Process.Pid)
	// host runs a command where the daemon has its mounts.
	host := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("nsenter", append([]string{"-t", daemon, "-m"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", args, err, out)
		}
	}
	// mounts are the daemon's mount points below what a pod has.
	mounts := func() (found []string) {
		b, err := os.ReadFile("/proc/" + daemon + "/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		shared := false
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			shared = shared || f[4] == "/" && strings.Contains(line, " shared:")
			if strings.HasPrefix(f[4], filepath.Join(n.root, "pods")+"/") {
				found = append(found, f[4])
			}
		}
		if !shared {
			t.Fatal("the daemon's / is not shared")
		}
		return found
	}
	web, err := webImage()
	if err == nil {
		err = pull(n, web)
	}
	if err != nil {
		t.Fatal(err)
	}

	fixed, live := filepath.Join(n.dir, "fixed"), filepath.Join(n.dir, "live")
	for _, dir := range []string{filepath.Join(fixed, "below"), filepath.Join(live, "later")} {
		if err := os.MkdirAll(dir, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(fixed, "top"), "mine\n")
	host("mount", "-t", "tmpfs", "none", filepath.Join(fixed, "below"))
	host("sh", "-c", `echo mine >"$0"`, filepath.Join(fixed, "below", "deep"))

	const parent = "cri-vz-e2e-parent"
	cfg := podConfig(n, "shared-root")
	cfg.Linux.CgroupParent = "/" + parent
	t.Cleanup(func() {
		for _, dir := range cgroupsOf(parent) {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		}
	})
	p, err := n.runPod(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.remove(t) })
	shim, err := shimOf(p.id)
	if err != nil {
		t.Fatal(err)
	}
	members := append(descendants(shim.PID), shim)
	if len(members) < 4 {
		t.Errorf("processes %v, want a shim, a VMM and two virtiofsds at least", members)
	}
	for _, q := range members {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", q.PID))
		if want := "/" + parent + "/cri-vz-" + p.id; err != nil || !strings.Contains(string(b), want+"\n") {
			t.Errorf("%s is not in the cgroup %s: %s, %v", q.Name, want, b, err)
		}
	}

	id, err := p.createAndStart(t.Context(), "guest-root", asRoot, privileged, command("/bin/sleep", "infinity"),
		mount(&runtimeapi.Mount{HostPath: fixed, ContainerPath: "/fixed", Readonly: true, RecursiveReadOnly: true}),
		mount(&runtimeapi.Mount{HostPath: live, ContainerPath: "/live", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}))
	if err != nil {
		t.Fatal(err)
	}
	// A second mount of the share, writable as far as the guest goes.
	if r := p.exec(t, id, "/app/web", "mount", "virtiofs", "volumes", "/tmp/volumes"); r.code != 0 {
		t.Fatalf("mount the share: %+v", r)
	}
	tried := map[string]bool{}
	walkGuest(t, p, id, "/tmp/volumes", 3, func(path string) {
		if name := filepath.Base(path); name == "top" || name == "deep" {
			tried[name] = true
			if r := p.exec(t, id, "/bin/write", path, "poison"); r.code == 0 {
				t.Errorf("the guest's root wrote %s", path)
			}
		}
	})
	if len(tried) != 2 {
		t.Errorf("of the files of the read-only volume only %v were found", tried)
	}
	host("sh", "-c", `echo new >"$0"`, filepath.Join(fixed, "below", "deep")) // it is the host's to change

	host("mount", "-t", "tmpfs", "none", filepath.Join(live, "later"))
	host("sh", "-c", `echo inside >"$0"`, filepath.Join(live, "later", "file"))
	eventually(t, 5*time.Second, "a mount of the host in the container", func() error {
		if r := p.exec(t, id, "/bin/cat", "/live/later/file"); r.stdout != "inside\n" {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})

	if found := mounts(); len(found) > 0 {
		t.Errorf("the pod's mounts are the host's: %v", found)
	}
	killShim(t, p, id)
	if found := mounts(); len(found) > 0 {
		t.Errorf("a killed shim left mounts: %v", found)
	}
	for _, dir := range []string{filepath.Join(fixed, "below"), filepath.Join(live, "later")} {
		eventually(t, 5*time.Second, "the host's own mounts to be free", func() error {
			return exec.Command("nsenter", "-t", daemon, "-m", "umount", dir).Run()
		})
	}
}
