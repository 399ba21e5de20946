//go:build linux

package e2e_test

import (
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/cri-vz/cri-vz/guest/image"
	"github.com/cri-vz/cri-vz/test/images"
	"github.com/cri-vz/cri-vz/test/testnode"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if l := flag.Lookup("test.list"); l != nil && l.Value.String() != "" {
		os.Exit(m.Run())
	}
	code, err := testnode.Run("cve", func(base string) (int, error) { return inner(m, base) })
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// suite is what all tests share: one daemon and what it was made of.
var suite struct {
	base     string // private directory
	bin      string // cri-vz
	guests   string // private copy of the boot files
	kernel   string // kind of the guest's kernel
	images   string // built images
	registry string // host:port in the node's namespace
	node     *node
	started  time.Time
}

func inner(m *testing.M, base string) (code int, err error) {
	suite.base, suite.started = base, time.Now()
	if err := prepare(); err != nil {
		return 1, err
	}
	suite.node = newNode("main", fmt.Sprintf("vm: class.odd = { cpus = 2, memory_mib = 192, kernel = %q, pids_max = 48, hugepages_mib = 16 }", suite.kernel))
	if err := suite.node.start(); err != nil {
		return 1, err
	}
	prepared := time.Since(suite.started)
	code = m.Run()
	err = suite.node.finish()
	if code != 0 || err != nil {
		suite.node.daemon.PrintLog(os.Stderr, 25)
	}
	fmt.Printf("e2e: %d boots, %.0f s (of which %.0f s to prepare)\n", boots.Load(), time.Since(suite.started).Seconds(), prepared.Seconds())
	return code, err
}

// prepare makes binaries, images and a registry, and copies the boot files so
// that tests can damage them.
func prepare() (err error) {
	if suite.bin, err = testnode.BuildBinary(suite.base); err != nil {
		return err
	}
	suite.guests = filepath.Join(suite.base, "guests")
	if err := testnode.CopyGuest(suite.guests); err != nil {
		return err
	}
	guest, err := image.Locate(suite.guests, runtime.GOARCH)
	if err != nil {
		return err
	}
	suite.kernel = string(guest.KernelKind)
	suite.images = filepath.Join(suite.base, "images")
	if err := os.Mkdir(suite.images, 0o755); err != nil {
		return err
	}
	if _, err := images.Build(suite.images, runtime.GOARCH); err != nil {
		return err
	}
	suite.registry, err = images.Serve() // for the life of the process
	http.DefaultTransport.(*http.Transport).Proxy = nil
	return err
}
