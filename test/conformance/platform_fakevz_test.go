//go:build linux && fakevz

package conformance_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/cri-vz/cri-vz/guest/image"
)

// notOnMac are tests of what a Mac can't do, as patterns of -skip, and why.
var notOnMac = map[string]string{
	"^TestMountPropagation$/HOST_TO_CONTAINER": "a mount that the host makes later is not seen through the framework's shares",
	"^TestReadOnlyMounts$/readonly_leaves":     "the framework shares a directory read-only with all that is below",
	"^TestPodNetwork$":                         "host ports on UDP: they are TCP proxies (TestMacHostPorts)",
	"^TestUserNamespace$":                      "volumes in a user namespace: files on shares have one owner (T47)",
}

// platform makes the node a Mac with this machine's processor: a daemon that was
// built with the stand-in for the Virtualization framework, and a guest that a user
// makes there from a kernel package. // T50
func platform(bin, base string) (guests string, settings []string, err error) {
	cache, err := image.DefaultDir()
	if err != nil {
		return "", nil, err
	}
	packages, err := filepath.Glob(filepath.Join(cache, runtime.GOARCH, string(image.KindStock), "source-*"))
	if err != nil || len(packages) == 0 {
		return "", nil, errors.Join(errors.New("no kernel package in the cache: run `make guest`"), err)
	}
	guests = filepath.Join(base, "guests")
	agent := filepath.Join(base, "agent")
	for _, args := range [][]string{
		{"go", "build", "-trimpath", "-ldflags=-s -w", "-o", agent, "github.com/cri-vz/cri-vz/cmd/cri-vz-agent"},
		{bin, "guest", "build", "--dir", guests, "--agent", agent, "--kernel", packages[0]},
	} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", nil, fmt.Errorf("%s: %w: %s", cmd, err, out)
		}
	}
	if err := startNAT(); err != nil {
		return "", nil, err
	}
	var skip []string
	for pattern, why := range notOnMac {
		fmt.Printf("not on a Mac: %s: %s\n", pattern, why)
		skip = append(skip, pattern)
	}
	if s := flag.Lookup("test.skip").Value; s.String() != "" {
		skip = append(skip, s.String())
	}
	return guests, []string{`vm: driver = "vz"`}, flag.Set("test.skip", strings.Join(skip, "|"))
}
