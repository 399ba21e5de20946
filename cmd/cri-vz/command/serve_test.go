package command

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/cri-vz/cri-vz/sandbox/vz"
)

// socketDir is short enough for a socket's path, unlike t.TempDir.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestMain is also a program that logs: klog writes to the real standard error.
func TestMain(m *testing.M) {
	if only := os.Getenv("CRI_VZ_TEST_LOG"); only != "" {
		if err := setVerbosity(0, only == "error"); err != nil {
			panic(err)
		}
		klog.InfoS("a note")
		klog.ErrorS(nil, "a fault")
		klog.Flush()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestLogLevel(t *testing.T) {
	for level, note := range map[string]bool{"error": false, "info": true} {
		cmd := exec.Command(os.Args[0])
		dir := t.TempDir()
		cmd.Env = append(os.Environ(), "CRI_VZ_TEST_LOG="+level, "TMPDIR="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil || strings.Contains(string(out), "a note") != note || strings.Count(string(out), "a fault") != 1 {
			t.Errorf("%s: %v\n%s", level, err, out)
		}
		if files, _ := os.ReadDir(dir); len(files) != 0 {
			t.Errorf("%s: klog wrote %v", level, files)
		}
	}
}

func TestListenSocket(t *testing.T) {
	path := filepath.Join(socketDir(t), "sock")
	refused := func(what, want string) {
		t.Helper()
		if l, err := listenSocket(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v", what, l, err)
		}
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	l, err := listenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	refused("a daemon that answers", "another daemon")
	l.(*lockedListener).Listener.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if l, err = listenSocket(path); err != nil {
		t.Fatalf("a dead daemon's socket: %v", err)
	}
	l.Close()

	// One that hangs: nobody accepts and the backlog is full.
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		c, err := net.DialTimeout("unix", path, 100*time.Millisecond)
		if err != nil {
			break
		}
		defer c.Close()
	}
	refused("a daemon that hangs", "another daemon")

	os.Remove(path)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refused("a file", "no socket")
	os.Remove(path)
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// Of daemons that start at once over a dead one's socket one gets it, and keeps
// it: none removes another's.
func TestListenSocketRace(t *testing.T) {
	path := filepath.Join(socketDir(t), "sock")
	for round := range 100 {
		dead, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		dead.(*net.UnixListener).SetUnlinkOnClose(false)
		dead.Close()

		const daemons = 8
		got := make(chan net.Listener, daemons)
		var wg sync.WaitGroup
		for range daemons {
			wg.Go(func() {
				l, err := listenSocket(path)
				if err == nil {
					got <- l
				} else if !strings.Contains(err.Error(), "another daemon") || !strings.Contains(err.Error(), path) {
					t.Errorf("round %d: %v", round, err)
				}
			})
		}
		wg.Wait()
		if len(got) != 1 {
			t.Fatalf("round %d: %d daemons listen", round, len(got))
		}
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatalf("round %d: the socket is gone: %v", round, err)
		}
		c.Close()
		l := <-got
		l.Close()
		l.Close()
	}
}

// sd_notify(3): an "@" means an abstract socket at the path's beginning only.
func TestNotifySystemd(t *testing.T) {
	path := filepath.Join(socketDir(t), "user@1000")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	notifySystemd("READY=1")
	_ = l.SetReadDeadline(time.Now().Add(5 * time.Second))
	b := make([]byte, 64)
	if n, err := l.Read(b); err != nil || string(b[:n]) != "READY=1" {
		t.Errorf("%q, %v", b[:n], err)
	}
}

// Images for amd64 are for Macs with Rosetta alone.
func TestTranslated(t *testing.T) {
	for _, test := range []struct {
		name, driver string
		features     []vz.Feature
		err          error
		want         string
	}{
		{"a Mac with Rosetta", "vz", []vz.Feature{{Name: vz.FeatureLiveShares, Available: true}, {Name: vz.FeatureRosetta, Available: true}}, nil, "amd64"},
		{"a Mac without", "vz", []vz.Feature{{Name: vz.FeatureLiveShares, Available: true}, {Name: vz.FeatureRosetta}}, nil, ""},
		{"a Mac that doesn't answer", "vz", nil, errors.New("broken"), ""},
		{"Linux", "qemu", []vz.Feature{{Name: vz.FeatureRosetta, Available: true}}, nil, ""},
	} {
		if got := translated(test.driver, func() ([]vz.Feature, error) { return test.features, test.err }); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}
