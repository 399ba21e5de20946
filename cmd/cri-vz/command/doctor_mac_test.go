package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/cmd/cri-vz/config"
	"github.com/cri-vz/cri-vz/sandbox/vz"
)

// aMac is one that lacks nothing. What codesign shows is as it prints it: the path
// on stderr, the property list on stdout, on one line.
func aMac(t *testing.T) (mac, map[string]string, map[string]uint32) {
	t.Helper()
	root := t.TempDir()
	text := map[string]string{"kern.osproductversion": "15.1", "machdep.cpu.brand_string": "Apple M4"}
	number := map[string]uint32{"kern.hv_support": 1}
	return mac{
		arch: "arm64",
		text: func(name string) (string, error) {
			if v, ok := text[name]; ok {
				return v, nil
			}
			return "", fmt.Errorf("sysctl %s: %w", name, unix.ENOENT)
		},
		number: func(name string) (uint32, error) {
			if v, ok := number[name]; ok {
				return v, nil
			}
			return 0, unix.ENOENT
		},
		driver: func() error { return nil },
		features: func() ([]vz.Feature, error) {
			return []vz.Feature{{Name: "live shares", Available: true}, {Name: "Rosetta", Available: true}}, nil
		},
		signature: func(_ context.Context, program string) ([]byte, error) {
			return fmt.Appendf(nil, "Executable=%s\n%s", program, `<?xml version="1.0" encoding="UTF-8"?><plist version="1.0"><dict><key>com.apple.security.virtualization</key><true/></dict></plist>`), nil
		},
		volume: func(string) (volume, error) { return volume{root, "apfs", false}, nil },
	}, text, number
}

func TestDoctorOnAMac(t *testing.T) {
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	feature := func(name, reason string) func() ([]vz.Feature, error) {
		return func() ([]vz.Feature, error) { return []vz.Feature{{Name: name, Reason: reason}}, nil }
	}
	signed := func(out string, err error) func(context.Context, string) ([]byte, error) {
		return func(context.Context, string) ([]byte, error) { return []byte(out), err }
	}
	for _, test := range []struct {
		name, check  string
		change       func(m *mac, text map[string]string, number map[string]uint32)
		result       string
		detail, mend string
	}{
		{"the first macOS", "macOS", func(_ *mac, s map[string]string, _ map[string]uint32) { s["kern.osproductversion"] = "13.0" }, resultOK, "macOS 13.0", ""},
		{"an old macOS", "macOS", func(_ *mac, s map[string]string, _ map[string]uint32) { s["kern.osproductversion"] = "12.7.6" }, resultFailed, "macOS 12.7.6", "update it"},
		{"no version", "macOS", func(_ *mac, s map[string]string, _ map[string]uint32) { delete(s, "kern.osproductversion") }, resultFailed, "kern.osproductversion", "sw_vers"},
		{"a strange version", "macOS", func(_ *mac, s map[string]string, _ map[string]uint32) { s["kern.osproductversion"] = "?" }, resultFailed, "macOS ?", "update it"},

		{"Apple silicon", "processor", nil, resultOK, "Apple M4 (Apple silicon, arm64 guests)", ""},
		{"Intel", "processor", func(m *mac, s map[string]string, _ map[string]uint32) {
			m.arch, s["machdep.cpu.brand_string"] = "amd64", "Intel(R) Core(TM) i7"
		}, resultOK, "Intel(R) Core(TM) i7 (Intel, amd64 guests)", ""},
		{"translated", "processor", func(m *mac, _ map[string]string, n map[string]uint32) {
			m.arch, n["sysctl.proc_translated"] = "amd64", 1
		}, resultFailed, "translated by Rosetta", "cri-vz for arm64"},
		{"no virtualization", "processor", func(_ *mac, _ map[string]string, n map[string]uint32) { n["kern.hv_support"] = 0 }, resultFailed, "without virtualization", "nested virtualization"},

		{"a driver", "driver", nil, resultOK, "Virtualization framework", ""},
		{"built without cgo", "driver", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.driver = func() error { return errdefs.ErrNotImplemented }
		}, resultFailed, "not implemented", "make build"},
		{"a driver for a later macOS", "driver", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.driver = func() error { return errdefs.ErrFailedPrecondition }
		}, resultFailed, "precondition", "update it"},
		{"no features", "driver", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.features = func() ([]vz.Feature, error) { return nil, broken }
		}, resultFailed, "broken", "make build"},
		{"no live shares", "driver", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.features = feature("live shares", "no dispatch_sync_f")
		}, resultWarning, "host paths can't be volumes: no dispatch_sync_f", "report this"},

		{"signed", "entitlement", nil, resultOK, program, ""},
		{"not signed", "entitlement", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.signature = signed("code object is not signed at all\n", broken)
		}, resultFailed, "broken: code object is not signed at all", "--entitlements hack/vz.entitlements '" + program + "'"},
		{"signed without it", "entitlement", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.signature = signed("Executable="+program+"\n", nil)
		}, resultFailed, "lacks com.apple.security.virtualization", "codesign --force --sign - "},
		{"signed with the opposite", "entitlement", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.signature = signed("<dict><key>com.apple.security.virtualization</key><false/></dict>", nil)
		}, resultFailed, "lacks com.apple.security.virtualization", "codesign"},

		{"APFS", "file system", nil, resultOK, "APFS at /", ""},
		{"no volume", "file system", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.volume = func(string) (volume, error) { return volume{}, broken }
		}, resultFailed, "broken", "another `root`"},
		{"another file system", "file system", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.volume = func(string) (volume, error) { return volume{"/Volumes/stick", "exfat", true}, nil }
		}, resultFailed, "/Volumes/stick is on exfat", "APFS"},
		{"ownership ignored (T47)", "file system", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.volume = func(string) (volume, error) { return volume{"/Volumes/disk", "apfs", true}, nil }
		}, resultWarning, "ignores ownership", "internal disk"},
		{"case ignored (T47)", "file system", func(m *mac, _ map[string]string, _ map[string]uint32) {
			// Here two names of one directory have to do.
			dir := filepath.Join(t.TempDir(), "root")
			if err := errors.Join(os.Mkdir(dir, 0o700), os.Symlink("root", filepath.Join(filepath.Dir(dir), "ROOT"))); err != nil && !errors.Is(err, os.ErrExist) {
				t.Fatal(err)
			}
			m.volume = func(string) (volume, error) { return volume{dir, "apfs", false}, nil }
		}, resultWarning, "case makes no difference", "case-sensitive APFS"},

		{"Rosetta", "Rosetta", nil, resultOK, "there is Rosetta", ""},
		{"Rosetta not installed", "Rosetta", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.features = feature("Rosetta", "run `softwareupdate --install-rosetta`")
		}, resultWarning, "amd64 don't run", "softwareupdate --install-rosetta"},
		{"Rosetta on Intel", "Rosetta", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.arch, m.features = "amd64", feature("Rosetta", "an Intel Mac needs none")
		}, resultOK, "not used: an Intel Mac", ""},
		{"Rosetta without a driver", "Rosetta", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.features = func() ([]vz.Feature, error) { return nil, broken }
		}, resultFailed, "broken", "make build"},
		{"no word of Rosetta", "Rosetta", func(m *mac, _ map[string]string, _ map[string]uint32) {
			m.features = func() ([]vz.Feature, error) { return nil, nil }
		}, resultOK, "not used", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			m, text, number := aMac(t)
			if test.change != nil {
				test.change(&m, text, number)
			}
			for _, c := range m.checks() {
				if c.name != test.check {
					continue
				}
				f := c.run(t.Context(), &config.Config{Root: "/somewhere"})
				if f.Result != test.result || !strings.Contains(f.Detail, test.detail) || !strings.Contains(f.Mend, test.mend) {
					t.Errorf("%+v, want %s with %q, and to mend it %q", f, test.result, test.detail, test.mend)
				}
				if (f.Result == resultOK) != (f.Mend == "") {
					t.Errorf("%+v: what is not well has a way to mend it, and nothing else has", f)
				}
				return
			}
			t.Fatalf("there is no check %q", test.check)
		})
	}
}

// Where the daemon can't make its sockets, doctor says so before it is started (T14).
func TestDoctorLongRun(t *testing.T) {
	long := "/Users/" + strings.Repeat("x", 80) + "/.cri-vz"
	f := checkSocket(t.Context(), &config.Config{Run: long, Listen: "unix:///s"})
	if f.Result != resultFailed || !strings.Contains(f.Detail, "103") || !strings.Contains(f.Mend, "shorter `run`") {
		t.Errorf("%+v", f)
	}
}
