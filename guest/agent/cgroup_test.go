//go:build linux && (amd64 || arm64)

package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestSettings(t *testing.T) {
	for _, c := range []struct{ name, json, want string }{
		{"none", `{}`, ``},
		{"zero is unchanged", `{"memory":{"limit":0},"cpu":{"shares":0,"quota":0,"period":0},"pids":{"limit":0}}`, ``},
		{"memory", `{"memory":{"limit":1048576,"reservation":4096}}`, `memory.low=4096 memory.max=1048576 memory.swap.max=0`},
		{"swap", `{"memory":{"limit":1000,"swap":1500}}`, `memory.max=1000 memory.swap.max=500`},
		{"no limit", `{"memory":{"limit":-1}}`, `memory.max=max memory.swap.max=max`},
		{"swap below limit", `{"memory":{"limit":1000,"swap":500}}`, `!`},
		{"cpu", `{"cpu":{"shares":1024,"quota":50000,"period":100000}}`, `cpu.weight=39 cpu.max=50000 100000`},
		{"no quota", `{"cpu":{"quota":-1}}`, `cpu.max=max 100000`},
		{"least shares", `{"cpu":{"shares":2}}`, `cpu.weight=1`},
		{"most shares", `{"cpu":{"shares":999999999}}`, `cpu.weight=10000`},
		{"host cpus (T28)", `{"cpu":{"cpus":"0-3","mems":"0"}}`, ``},
		{"pids", `{"pids":{"limit":-1}}`, `pids.max=max`},
		{"unified", `{"unified":{"memory.oom.group":"1","cpu.idle":"0"}}`, `cpu.idle=0 memory.oom.group=1`},
		{"unified out of it", `{"unified":{"../x.y":"1"}}`, `!`},
		{"unified core file", `{"unified":{"cgroup.procs":"1"}}`, `!`},
		{"huge pages", `{"hugepageLimits":[{"pageSize":"2MB","limit":0},{"pageSize":"1GB","limit":5}]}`, `hugetlb.2MB.max=0 hugetlb.1GB.max=5`},
		{"huge path", `{"hugepageLimits":[{"pageSize":"../x","limit":5}]}`, `!`},
	} {
		var r specs.LinuxResources
		if err := json.Unmarshal([]byte(c.json), &r); err != nil {
			t.Fatal(err)
		}
		set, err := settings(&r)
		var got []string
		for _, s := range set {
			got = append(got, s.file+"="+s.value)
		}
		text := strings.Join(got, " ")
		if err != nil {
			text = "!"
		}
		if text != c.want {
			t.Errorf("%s: got %q (%v), want %q", c.name, text, err, c.want)
		}
	}
}

// TestApplyUndoes: an update is all or none (T28).
func TestApplyUndoes(t *testing.T) {
	c := cgroup(t.TempDir())
	for name, value := range map[string]string{"memory.max": "100", "pids.max": "5"} {
		if err := os.WriteFile(c.file(name), []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.apply([]setting{{"memory.max", "200"}, {"pids.max", "9"}, {"cpu.max", "1"}}); err == nil {
		t.Error("a missing controller was not noticed")
	}
	for name, want := range map[string]string{"memory.max": "100", "pids.max": "5"} {
		if got, err := c.read(name); got != want {
			t.Errorf("%s is %q, %v after a failure, want %q", name, got, err, want)
		}
	}
	if err := c.apply([]setting{{"memory.max", "200"}, {"memory.swap.max", "0"}}); err != nil {
		t.Errorf("no swap accounting: %v", err)
	}
}

// TestDisband: what an exec has left running moves to the container's cgroup.
func TestDisband(t *testing.T) {
	r := testReaper()
	parent := cgroup(filepath.Join(cgroupRoot(t), fmt.Sprintf("cri-vz-disband-%d", os.Getpid())))
	child := cgroup(parent.file("exec-x"))
	if err := os.MkdirAll(string(child), 0o755); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := parent.remove(); err != nil {
			t.Error(err)
		}
	}()
	pid := startIn(t, r, child)
	if err := child.disband(); err != nil {
		t.Fatal(err)
	}
	if got := parent.procs(); len(got) != 1 || got[0] != pid {
		t.Errorf("processes of the parent are %v, want %d", got, pid)
	}
}

func TestParseStats(t *testing.T) {
	p := parsePressure("cpu", "some avg10=1.50 avg60=0.25 avg300=0.00 total=12345\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\nnonsense\n")
	if len(p) != 2 || p[0].Kind != "some" || p[0].Avg10 != 1.5 || p[0].TotalUsec != 12345 || p[1].Kind != "full" {
		t.Errorf("got %v", p)
	}
	n := parseNetDev("Inter-|   Receive\n face |bytes packets\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 0 0 0 0 0 40 5 6 0 0 0 0 0\n bad: 1\n")
	if len(n) != 1 || n[0].Name != "eth0" || n[0].RxBytes != 10 || n[0].RxErrors != 3 || n[0].TxBytes != 40 || n[0].TxPackets != 5 {
		t.Errorf("got %v", n)
	}
}

func TestSysctlPath(t *testing.T) {
	for _, c := range []struct{ name, want string }{
		{"net.ipv4.ip_forward", "net/ipv4/ip_forward"},
		{"net/ipv4/conf/eth0.1/rp_filter", "net/ipv4/conf/eth0.1/rp_filter"},
		{"net.ipv4.conf.eth0/1.rp_filter", "net/ipv4/conf/eth0.1/rp_filter"},
		{"kernel.shmmax", "kernel/shmmax"},
		{"vm.overcommit_memory", ""},
		{"kernel.core_pattern", ""},
		{"net.ipv4....vm", ""},
		{"net/../vm/x", ""},
		{"", ""},
	} {
		if got, err := sysctlPath(c.name); got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%q: %q, %v, want %q", c.name, got, err, c.want)
		}
	}
}

// TestDevicePolicy runs the compiled program in the kernel, on a process that
// opens device nodes.
func TestDevicePolicy(t *testing.T) {
	number := func(n int64) *int64 { return &n }
	null := uint64(unix.Mkdev(1, 3))
	for _, c := range []struct {
		name  string
		rules []specs.LinuxDeviceCgroup
		disk  uint64
		want  string // of null, kmsg for reading and loop0
	}{
		{"default", nil, 0, "null"},
		{"deny all", []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}, 0, "null"},
		{"kmsg", []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: number(1), Minor: number(11), Access: "rw"}}, 0, "null kmsg"},
		{"kmsg, writing only", []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: number(1), Minor: number(11), Access: "w"}}, 0, "null"},
		{"privileged (T37)", []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}, null, "null kmsg"},
		{"taken away", []specs.LinuxDeviceCgroup{{Allow: false, Type: "c", Major: number(1), Access: "r"}}, 0, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			rules, err := deviceRules(&specs.LinuxResources{Devices: c.rules}, nil, c.disk)
			if err != nil {
				t.Fatal(err)
			}
			cg := cgroup(filepath.Join(cgroupRoot(t), fmt.Sprintf("cri-vz-devices-%d", os.Getpid())))
			if err := cg.create(nil); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := cg.remove(); err != nil {
					t.Error(err)
				}
			}()
			if err := cg.allowDevices(rules); err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			for name, dev := range map[string]struct{ mode, major, minor uint32 }{
				"null": {unix.S_IFCHR, 1, 3}, "kmsg": {unix.S_IFCHR, 1, 11}, "loop0": {unix.S_IFBLK, 7, 0},
			} {
				if err := unix.Mknod(dir+"/"+name, dev.mode|0o600, int(unix.Mkdev(dev.major, dev.minor))); err != nil {
					t.Fatal(err)
				}
			}
			got := runIn(t, testReaper(), cg, dir, `o=; for d in null kmsg loop0; do if (exec 5<$d) 2>/dev/null; then o="$o$d "; fi; done; echo $o`)
			if strings.TrimSpace(got) != c.want {
				t.Errorf("%q can be opened, want %q", got, c.want)
			}
		})
	}
	for _, bad := range []specs.LinuxDeviceCgroup{{Type: "x"}, {Access: "rx"}} {
		if _, err := deviceRules(&specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{bad}}, nil, 0); err == nil {
			t.Errorf("rule %v was accepted", bad)
		}
	}
}

// T37: a privileged container finds the guest's devices, but for those that the pod
// stands on, and what it brings along at their places stays.
func TestGuestDevices(t *testing.T) {
	dir := t.TempDir()
	disk := uint64(unix.Mkdev(254, 0))
	if err := os.Mkdir(dir+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	for name, dev := range map[string]struct{ mode, major, minor uint32 }{
		"kmsg": {unix.S_IFCHR, 1, 11}, "sub/rtc": {unix.S_IFCHR, 250, 0}, "tty1": {unix.S_IFCHR, 4, 1}, "console": {unix.S_IFCHR, 5, 1},
		"loop0": {unix.S_IFBLK, 7, 0}, "vda": {unix.S_IFBLK, 254, 0}, "vdb": {unix.S_IFBLK, 254, 16}, "null": {unix.S_IFCHR, 1, 3},
	} {
		if err := unix.Mknod(dir+"/"+name, dev.mode|0o640, int(unix.Mkdev(dev.major, dev.minor))); err != nil {
			t.Fatal(err)
		}
	}
	found, err := guestDevices(dir, disk)
	if err != nil {
		t.Fatal(err)
	}
	spec := &specs.Spec{
		Linux:  &specs.Linux{Devices: []specs.LinuxDevice{{Path: "/dev/null", Type: "c", Major: 1, Minor: 5}}},
		Mounts: []specs.Mount{{Destination: "/dev/kmsg"}},
	}
	addDevices(spec, append(found, onDemand...))
	var got []string
	for _, d := range spec.Linux.Devices {
		got = append(got, fmt.Sprintf("%s %s %d:%d", d.Path, d.Type, d.Major, d.Minor))
	}
	want := "/dev/null c 1:5, /dev/sub/rtc c 250:0, /dev/vdb b 254:16, /dev/fuse c 10:229, /dev/net/tun c 10:200"
	if text := strings.Join(got, ", "); text != want {
		t.Errorf("got %s, want %s", text, want)
	}
	if len(found) == 0 || *found[0].FileMode != 0o640 {
		t.Errorf("%+v", found)
	}
	for _, c := range []struct {
		rules []specs.LinuxDeviceCgroup
		want  bool
	}{
		{nil, false}, {[]specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}, false},
		{[]specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: new(int64), Access: "rwm"}}, false},
		{[]specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}, true},
	} {
		if got := allDevices(&specs.LinuxResources{Devices: c.rules}); got != c.want {
			t.Errorf("%v: privileged %v, want %v", c.rules, got, c.want)
		}
	}
}
