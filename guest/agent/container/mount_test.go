//go:build linux && (amd64 || arm64)

package container

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountTable runs a container and returns its mounts by destination.
func mountTable(t *testing.T, config *Config) map[string]struct{ fstype, options, optional string } {
	t.Helper()
	table := make(map[string]struct{ fstype, options, optional string })
	for _, line := range strings.Split(strings.TrimSpace(sh(t, config, "cat /proc/self/mountinfo")), "\n") {
		// 36 35 98:0 /root /at options optional... - type source superoptions (proc(5))
		f := strings.Fields(line)
		dash := slices.Index(f, "-")
		table[f[4]] = struct{ fstype, options, optional string }{f[dash+1], f[5] + "," + f[dash+3], strings.Join(f[6:dash], " ")}
	}
	return table
}

func hasOptions(options, want string) bool {
	have := strings.Split(options, ",")
	for _, w := range strings.Split(want, ",") {
		if !slices.Contains(have, w) {
			return false
		}
	}
	return true
}

func TestMounts(t *testing.T) { // T26
	root := newRoot(t)
	volume := filepath.Join(filepath.Dir(root), "volume")
	writeTestFile(t, filepath.Join(volume, "file"), "content\n")
	config := newConfig(root)
	config.Spec.Mounts = append(config.Spec.Mounts,
		specs.Mount{Destination: "/v/rw", Type: "bind", Source: volume, Options: []string{"rbind", "rprivate", "nosuid", "nodev", "noexec", "noatime"}},
		specs.Mount{Destination: "/v/ro", Type: "bind", Source: volume, Options: []string{"rbind", "ro"}},
		specs.Mount{Destination: "/etc/new/file.conf", Type: "bind", Source: volume + "/file", Options: []string{"bind", "ro"}},
		specs.Mount{Destination: "/scratch", Type: "tmpfs", Options: []string{"mode=700", "size=1m", "ro"}},
		specs.Mount{Destination: "/scratch/sub", Type: "bind", Source: volume, Options: []string{"bind"}},
	)
	table := mountTable(t, config)
	for at, want := range map[string]struct{ fstype, options string }{
		"/proc":              {"proc", "rw,nosuid,nodev,noexec,relatime"},
		"/dev":               {"tmpfs", "rw,nosuid,size=65536k,mode=755"},
		"/dev/pts":           {"devpts", "nosuid,noexec,gid=5,mode=620,ptmxmode=666"},
		"/dev/mqueue":        {"mqueue", "rw,nosuid,nodev,noexec"},
		"/dev/shm":           {"tmpfs", "rw,nosuid,nodev,noexec,size=65536k"},
		"/sys":               {"sysfs", "ro,nosuid,nodev,noexec"},
		"/sys/fs/cgroup":     {"cgroup2", "ro,nosuid,nodev,noexec,relatime"},
		"/v/rw":              {"", "rw,nosuid,nodev,noexec,noatime"},
		"/v/ro":              {"", "ro"},
		"/etc/new/file.conf": {"", "ro"},
		"/scratch":           {"tmpfs", "ro,mode=700,size=1024k"},
		"/scratch/sub":       {"", "rw"},
	} {
		got, ok := table[at]
		if !ok || want.fstype != "" && got.fstype != want.fstype || !hasOptions(got.options, want.options) {
			t.Errorf("%s is %+v, want %+v", at, got, want)
		}
		if got.optional != "" {
			t.Errorf("%s is not private: %s", at, got.optional)
		}
	}
	if out := sh(t, config, `cat /etc/new/file.conf; echo new >/v/rw/file && cat /v/ro/file /etc/new/file.conf; touch /v/ro/x 2>&1; touch /scratch/x 2>&1; touch /scratch/sub/y && echo written; stat -c %a /scratch`); out !=
		"content\nnew\nnew\ntouch: /v/ro/x: Read-only file system\ntouch: /scratch/x: Read-only file system\nwritten\n700\n" {
		t.Errorf("output %q", out)
	}
}

// TestRecursiveReadonly: "ro" covers the top mount alone, "rro" all below.
func TestRecursiveReadonly(t *testing.T) {
	root := newRoot(t)
	for option, want := range map[string]string{"ro": "submount written\n", "rro": "touch: /v/shm/x: Read-only file system\n"} {
		config := newConfig(root)
		// A tree with a mount below it that container-init has at hand: its own
		// root, once /dev/shm is on it.
		config.Spec.Mounts = append(config.Spec.Mounts, specs.Mount{Destination: "/v", Type: "bind", Source: root + "/dev", Options: []string{"rbind", option}})
		out := sh(t, config, `touch /v/x 2>&1; touch /v/shm/x 2>&1 && echo submount written; true`)
		if out != "touch: /v/x: Read-only file system\n"+want {
			t.Errorf("%s: output %q", option, out)
		}
	}
}

func TestPropagation(t *testing.T) {
	root := newRoot(t)
	volume := filepath.Join(filepath.Dir(root), "volume")
	if err := os.MkdirAll(filepath.Join(volume, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(volume, volume, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(volume, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("", volume, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	for option, want := range map[string]string{"": "", "rprivate": "", "rslave": "master:"} {
		config := newConfig(root)
		options := []string{"rbind"}
		if option != "" {
			options = append(options, option)
		}
		config.Spec.Mounts = append(config.Spec.Mounts, specs.Mount{Destination: "/v", Type: "bind", Source: volume, Options: options})
		got := mountTable(t, config)["/v"].optional
		if want == "" && got != "" || !strings.HasPrefix(got, want) {
			t.Errorf("%q: optional fields are %q, want %q", option, got, want)
		}
	}
}

func TestDevices(t *testing.T) {
	root := newRoot(t)
	config := newConfig(root)
	mode, id := os.FileMode(0o640), uint32(33)
	config.Spec.Linux.Devices = []specs.LinuxDevice{
		{Path: "/dev/net/tun", Type: "c", Major: 10, Minor: 200, FileMode: &mode, UID: &id, GID: &id},
		{Path: "/dev/zero", Type: "c", Major: 1, Minor: 5, FileMode: &mode},
	}
	out := sh(t, config, `cd /dev; stat -c '%n %F %t:%T %a %u:%g' null zero full random urandom tty net/tun
for l in fd stdin stdout stderr ptmx; do echo $l $(readlink $l); done
echo x >null; head -c 3 zero | wc -c; echo x 2>/dev/null >full || echo full; echo hello >/dev/stdout | cat`)
	want := `null character special file 1:3 666 0:0
zero character special file 1:5 640 0:0
full character special file 1:7 666 0:0
random character special file 1:8 666 0:0
urandom character special file 1:9 666 0:0
tty character special file 5:0 666 0:0
net/tun character special file a:c8 640 33:33
fd /proc/self/fd
stdin /proc/self/fd/0
stdout /proc/self/fd/1
stderr /proc/self/fd/2
ptmx pts/ptmx
3
full
hello
`
	if out != want {
		t.Errorf("output\n%s\nwant\n%s", out, want)
	}
	t.Run("no mount for dev", func(t *testing.T) {
		config := newConfig(newRoot(t))
		config.Spec.Mounts = config.Spec.Mounts[:1]
		if got := mountTable(t, config)["/dev"].fstype; got != "tmpfs" {
			t.Errorf("/dev is %q", got)
		}
	})
}

func TestMaskedAndReadonlyPaths(t *testing.T) {
	root := newRoot(t)
	writeTestFile(t, filepath.Join(root, "secret/file"), "secret")
	writeTestFile(t, filepath.Join(root, "fixed/file"), "fixed")
	config := newConfig(root)
	config.Spec.Linux.MaskedPaths = append(config.Spec.Linux.MaskedPaths, "/proc/uptime", "/secret", "/etc/passwd", "/bin/stty", "/no/such", "/etc/passwd/below")
	config.Spec.Linux.ReadonlyPaths = append(config.Spec.Linux.ReadonlyPaths, "/fixed", "/no/such")
	out := sh(t, config, `ls /secret | wc -l; touch /secret/x 2>&1; wc -c </etc/passwd; stat -c %t:%T /etc/passwd; /bin/stty 2>&1; wc -c </proc/uptime
touch /fixed/x 2>&1; cat /fixed/file; echo; echo 1 2>&1 >/proc/sys/kernel/hostname; touch /writable && echo ok`)
	want := `0
touch: /secret/x: Read-only file system
0
1:3
sh: /bin/stty: Permission denied
0
touch: /fixed/x: Read-only file system
fixed
sh: can't create /proc/sys/kernel/hostname: Read-only file system
ok
`
	if out != want {
		t.Errorf("output\n%s\nwant\n%s", out, want)
	}
}

func TestReadonlyRoot(t *testing.T) {
	config := newConfig(newRoot(t))
	config.Spec.Root.Readonly = true
	config.Spec.Mounts = append(config.Spec.Mounts, specs.Mount{Destination: "/made/for/tmp", Type: "tmpfs"})
	out := sh(t, config, `touch /x 2>&1; touch /made/for/tmp/x && touch /dev/shm/x && echo ok; stat -c %a /made/for/tmp; mount -o remount,rw / 2>&1 || true`)
	if !strings.HasPrefix(out, "touch: /x: Read-only file system\nok\n1777\n") || !strings.Contains(out, "mount:") {
		t.Errorf("output %q", out)
	}
}

// TestMountTargetsStayInside: links in the image lead nowhere but into it.
func TestMountTargetsStayInside(t *testing.T) {
	root := newRoot(t)
	outside := filepath.Join(filepath.Dir(root), "outside")
	volume := filepath.Join(filepath.Dir(root), "volume")
	writeTestFile(t, filepath.Join(outside, "kept"), "")
	writeTestFile(t, filepath.Join(volume, "file"), "volume\n")
	for name, target := range map[string]string{
		"abs": outside, "up": "../../../../../../../../../../" + outside, "loop": "loop",
		"var-run": "/run", "rel": "etc/../../x/y",
	} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	for at, inside := range map[string]string{
		"/abs": outside, "/abs/new/dir": outside + "/new/dir", "/up/z": outside + "/z",
		"/var-run/secrets/k8s": "/run/secrets/k8s", "/rel": "/x/y", "/../../esc": "/esc",
	} {
		config := newConfig(root)
		config.Spec.Mounts = append(config.Spec.Mounts, specs.Mount{Destination: at, Type: "bind", Source: volume, Options: []string{"rbind"}})
		table := mountTable(t, config)
		if _, ok := table[inside]; !ok {
			t.Errorf("%s: nothing mounted at %s", at, inside)
		}
	}
	config := newConfig(root, "true")
	config.Spec.Mounts = append(config.Spec.Mounts, specs.Mount{Destination: "/loop/x", Type: "tmpfs"})
	if e, _ := mustFail(t, config); !strings.Contains(e.Message, "too many levels of symbolic links") {
		t.Errorf("error is %v", e)
	}
	// A link in the source would lead to the guest's files.
	if err := os.Symlink("/etc", filepath.Join(volume, "link")); err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{volume + "/link", volume + "/link/passwd"} {
		config := newConfig(root, "true")
		config.Spec.Mounts = append(config.Spec.Mounts, specs.Mount{Destination: "/v", Type: "bind", Source: source})
		if e, _ := mustFail(t, config); !strings.Contains(e.Message, "symbolic links") {
			t.Errorf("%s: error is %v", source, e)
		}
	}
	entries, err := os.ReadDir(outside)
	if err != nil || len(entries) != 1 {
		t.Errorf("outside of the root: %v, %v", entries, err)
	}
}

// TestPathRace swaps a directory for a link that leads outside while targets
// are made below it (CVE-2019-19921, CVE-2021-30465).
func TestPathRace(t *testing.T) {
	tmp, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(tmp, "outside")
	base := filepath.Join(tmp, "root")
	for _, d := range []string{outside + "/deep", base + "/dir/deep"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../outside", base+"/link"); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(base, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var stop atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		for !stop.Load() {
			_ = unix.Renameat2(fd, "dir", fd, "link", unix.RENAME_EXCHANGE)
		}
	}()
	defer func() { stop.Store(true); <-done }()
	for i := range 3000 {
		var got int
		var err error
		if i%2 == 0 {
			got, err = rootDir{fd}.make("/dir/deep/../deep/file", true)
		} else {
			got, err = rootDir{fd}.open("/dir/deep", unix.O_PATH)
		}
		if err != nil {
			continue // a lookup that lost the race may fail, as long as it stays inside
		}
		where, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(got))
		unix.Close(got)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(where, base+"/") {
			t.Fatalf("a path of the container led to %s", where)
		}
	}
	if entries, _ := os.ReadDir(outside + "/deep"); len(entries) != 0 {
		t.Errorf("made outside of the root: %v", entries)
	}
}

func TestParseMountOptions(t *testing.T) {
	for _, test := range []struct {
		options string
		want    mountOptions
	}{
		{"rbind,rprivate,ro", mountOptions{bind: true, recursive: true, set: unix.MOUNT_ATTR_RDONLY, propagation: unix.MS_PRIVATE, recPropagation: true}},
		{"ro,rw", mountOptions{clear: unix.MOUNT_ATTR_RDONLY}},
		{"rw,ro", mountOptions{set: unix.MOUNT_ATTR_RDONLY}},
		{"bind,rro,slave", mountOptions{bind: true, recSet: unix.MOUNT_ATTR_RDONLY, propagation: unix.MS_SLAVE}},
		{"relatime", mountOptions{clear: unix.MOUNT_ATTR__ATIME}},
		{"strictatime,noatime", mountOptions{set: unix.MOUNT_ATTR_NOATIME, clear: unix.MOUNT_ATTR__ATIME}},
		{"noatime,strictatime", mountOptions{set: unix.MOUNT_ATTR_STRICTATIME, clear: unix.MOUNT_ATTR__ATIME}},
		{"rnoatime,rnosuid", mountOptions{recSet: unix.MOUNT_ATTR_NOATIME | unix.MOUNT_ATTR_NOSUID, recClear: unix.MOUNT_ATTR__ATIME}},
		{"size=1m,newinstance,defaults", mountOptions{data: []string{"size=1m", "newinstance"}}},
		{"rshared", mountOptions{propagation: unix.MS_SHARED, recPropagation: true}},
	} {
		got, err := parseMountOptions(strings.Split(test.options, ","))
		if err != nil || !reflect.DeepEqual(got, test.want) {
			t.Errorf("%s: %+v, %v; want %+v", test.options, got, err, test.want)
		}
	}
	for _, option := range []string{"remount", "idmap", "tmpcopyup", "a\x00b"} {
		if _, err := parseMountOptions([]string{option}); err == nil {
			t.Errorf("%q was accepted", option)
		}
	}
}

func FuzzParseMountOptions(f *testing.F) {
	f.Add("rbind,rprivate,ro")
	f.Add("noatime,rstrictatime,size=1,=,\x00")
	f.Fuzz(func(t *testing.T, s string) {
		o, err := parseMountOptions(strings.Split(s, ","))
		if err != nil {
			return
		}
		for _, attr := range []struct{ set, clear uint64 }{{o.set, o.clear}, {o.recSet, o.recClear}} {
			// What the kernel demands of mount_setattr's arguments.
			if attr.set&attr.clear&^unix.MOUNT_ATTR__ATIME != 0 {
				t.Errorf("%q sets and clears the same attribute: %x", s, attr)
			}
			if atime := attr.set & unix.MOUNT_ATTR__ATIME; atime != 0 && attr.clear&unix.MOUNT_ATTR__ATIME != unix.MOUNT_ATTR__ATIME {
				t.Errorf("%q sets an atime mode without clearing the field: %x", s, attr)
			}
			if atime := attr.set & unix.MOUNT_ATTR__ATIME; atime&(atime-1) != 0 {
				t.Errorf("%q asks for two atime modes: %x", s, attr)
			}
		}
	})
}
