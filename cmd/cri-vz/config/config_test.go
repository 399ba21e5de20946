package config

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/cri-vz/cri-vz/sandbox"
)

func write(t *testing.T, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestTheDocumentedDefaultIsAValidFile(t *testing.T) {
	if _, err := Load(write(t, string(Default)), Flags{}); err != nil {
		t.Error(err)
	}
}

func TestOverrides(t *testing.T) {
	for _, tc := range []struct {
		name, file           string
		flags                Flags
		wantRoot, wantListen string
	}{
		{"file", "root = '/a'\nrun = '/b'", Flags{}, "/a", "unix:///b/cri-vz.sock"},
		{"file with listen", "run = '/b'\nlisten = 'unix:///c/s'", Flags{Root: "/r"}, "/r", "unix:///c/s"},
		{"flags win", "root = '/a'\nrun = '/b'", Flags{Root: "/r", Run: "/x"}, "/r", "unix:///x/cri-vz.sock"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := Load(write(t, tc.file), tc.flags)
			if err != nil {
				t.Fatal(err)
			}
			if c.Root != tc.wantRoot || c.Listen != tc.wantListen {
				t.Errorf("root %q, listen %q", c.Root, c.Listen)
			}
		})
	}
}

// A list in the file replaces the default one.
func TestListsAreReplaced(t *testing.T) {
	c, err := Load(write(t, "[network]\nbin_dirs = ['/x']"), Flags{})
	if err != nil || len(c.Network.BinDirs) != 1 || c.Network.BinDirs[0] != "/x" {
		t.Errorf("%v, %v", c, err)
	}
}

func TestBadConfigurationsAreNamed(t *testing.T) {
	for _, tc := range []struct{ name, file, want string }{
		{"unknown key", "[vm]\nacel = 'kvm'", "vm.acel (line 2)"},
		{"unknown section", "[virtual]\nx = 1", "virtual"},
		{"type", "root = 7", "line 1"},
		{"syntax", "root = ", "line 1"},
		{"relative root", "root = 'var'", "root:"},
		{"tcp socket", "listen = 'tcp://1.2.3.4:5'", "listen:"},
		{"long socket (T14)", "listen = 'unix:///" + strings.Repeat("x", 120) + "'", "at most 103 bytes"},
		{"accelerator", "[vm]\naccel = 'fast'", "vm.accel"},
		{"driver", "[vm]\ndriver = 'xen'", "vm.driver"},
		{"class", "[vm.class.tiny]\ncpus = 1\nmemory_mib = 1", "vm.class.tiny.memory_mib"},
		{"class without CPUs", "[vm.class.x]\nmemory_mib = 64", "vm.class.x.cpus"},
		{"kernel", "[vm.default]\nkernel = 'slow'", "vm.default.kernel"},
		{"too few processes", "[vm.default]\npids_max = 3", "vm.default.pids_max"},
		{"half a huge page", "[vm.default]\nhugepages_mib = 3", "vm.default.hugepages_mib"},
		{"class without a name", "[vm.class.'']\ncpus = 1\nmemory_mib = 64", "vm.class:"},
		{"boots", "[vm]\nboots = -1", "vm.boots"},
		{"subnet", "[network]\nbuiltin_subnet = '10.0.0.0'", "network.builtin_subnet"},
		{"streaming address", "[streaming]\naddress = '0.0.0.0:0'", "streaming.address"},
		{"streaming address without port", "[streaming]\naddress = '127.0.0.1'", "streaming.address"},
		{"log level", "log_level = 'loud'", "log_level"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Load(write(t, tc.file), Flags{})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v does not name %q", err, tc.want)
			}
		})
	}
	if _, err := Load(filepath.Join(t.TempDir(), "missing.toml"), Flags{}); err == nil {
		t.Error("a missing file is not an error")
	}
}

// What `config default` prints is what holds without a file, on this system too.
func TestThePrintedDefaultIsTheDefault(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, PlatformDefault(), 0o600); err != nil {
		t.Fatal(err)
	}
	written, err := Load(path, Flags{})
	if err != nil {
		t.Fatal(err)
	}
	none, err := Load("", Flags{})
	if err != nil || !reflect.DeepEqual(written, none) {
		t.Errorf("with the printed file %+v, without one %+v, %v", written, none, err)
	}
}

// On a Mac everything is below the user's home, and the socket's path fits for a long
// name too (T14).
func TestDefaultsOnAMac(t *testing.T) {
	home := "/Users/" + strings.Repeat("x", 48)
	t.Setenv("HOME", home)
	c, err := decode(Default, &Config{})
	if err != nil {
		t.Fatal(err)
	}
	platformDefaults(c, "darwin")
	if c.VM.Driver != "vz" || c.Root != home+"/Library/Application Support/cri-vz" || c.Run != home+"/.cri-vz" {
		t.Errorf("driver %s, root %s, run %s", c.VM.Driver, c.Root, c.Run)
	}
	c.Listen = "unix://" + filepath.Join(c.Run, "cri-vz.sock")
	if err := errors.Join(c.validate(), sandbox.CheckRun(c.Run)); err != nil {
		t.Error(err)
	}
}

// The README's crictl.yaml, for Linux and for a Mac, name the default socket.
func TestREADMEsSockets(t *testing.T) {
	readme, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", "/Users/you")
	for _, goos := range []string{"linux", "darwin"} {
		c, err := decode(Default, &Config{})
		if err != nil {
			t.Fatal(err)
		}
		platformDefaults(c, goos)
		socket := "unix://" + filepath.Join(c.Run, "cri-vz.sock")
		if want := "\nruntime-endpoint: " + socket + "\nimage-endpoint: " + socket + "\ntimeout: "; !strings.Contains(string(readme), want) {
			t.Errorf("%s: no %q", goos, want)
		}
	}
}
