// Command kernel builds the fast guest kernel for amd64: Debian 13's Linux
// source package, `make allnoconfig` with x86_64.config, everything built in.
//
//	go run ./hack/kernel [-dir DIR] [-jobs N]
//
// It takes a quarter of an hour on two cores, once: the result is kept under a
// hash of the package, the configuration and the compiler. `cri-vz guest
// build` then makes a guest of it, and `cri-vz serve` prefers that to the
// stock one. There is no arm64 part: those guests boot the stock kernel.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/cri-vz/cri-vz/guest/image"
)

//go:embed x86_64.config
var config []byte

const sourcePackage = "linux-source-6.12"

func main() {
	dir := flag.String("dir", "", "guest directory (default: where cri-vz looks)")
	jobs := flag.Int("jobs", runtime.NumCPU(), "compiler processes at once")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *dir, *jobs); err != nil {
		fmt.Fprintf(os.Stderr, "kernel: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, dir string, jobs int) error {
	if runtime.GOARCH != "amd64" || runtime.GOOS != "linux" {
		return errors.New("the fast kernel is built on linux/amd64 only; other hosts boot the stock kernel")
	}
	if dir == "" {
		var err error
		if dir, err = image.DefaultDir(); err != nil {
			return err
		}
	}
	compiler, err := tools(ctx)
	if err != nil {
		return err
	}
	pkg, err := image.FetchPackage(ctx, filepath.Join(dir, "apt", "amd64"), "amd64", sourcePackage)
	if err != nil {
		return err
	}
	defer os.Remove(pkg.Path)
	key := sha256.Sum256(fmt.Appendf(nil, "%s %s\n%s\n%s", pkg.Name, pkg.Version, compiler, config))
	vmlinux := filepath.Join(dir, "kernels", "vmlinux-"+hex.EncodeToString(key[:])[:16])
	if _, err := image.CheckKernel(vmlinux, "amd64"); err == nil {
		fmt.Printf("kernel: %s %s is built already\n", pkg.Name, pkg.Version)
	} else if err := build(ctx, pkg, vmlinux, jobs); err != nil {
		return fmt.Errorf("build %s %s: %w", pkg.Name, pkg.Version, err)
	}
	if err := image.AddFastKernel(dir, "amd64", vmlinux, pkg.Name+" "+pkg.Version); err != nil {
		return err
	}
	fmt.Println("kernel: done; `cri-vz guest build` makes a guest of it")
	return nil
}

// tools finds what the build runs and returns the compiler's version.
func tools(ctx context.Context) (compiler string, err error) {
	for _, tool := range []string{"gcc", "ld", "make", "flex", "bison", "bc", "perl", "xz", "tar", "strip"} {
		if _, err := exec.LookPath(tool); err != nil {
			return "", fmt.Errorf("%w: run `hack/setup kernel`, which installs what a kernel build needs", err)
		}
	}
	if _, err := os.Stat("/usr/include/gelf.h"); err != nil {
		return "", fmt.Errorf("libelf's headers are missing (%w): run `hack/setup kernel`", err)
	}
	out, err := exec.CommandContext(ctx, "gcc", "--version").Output()
	if err != nil {
		return "", fmt.Errorf("gcc --version: %w", err)
	}
	compiler, _, _ = strings.Cut(string(out), "\n")
	return compiler, nil
}

func build(ctx context.Context, pkg image.Package, vmlinux string, jobs int) (err error) {
	if err := os.MkdirAll(filepath.Dir(vmlinux), 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp(filepath.Dir(vmlinux), "build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)

	fmt.Printf("kernel: unpacking %s %s\n", pkg.Name, pkg.Version)
	tree, tarball := filepath.Join(work, "linux"), filepath.Join(work, "linux.tar.xz")
	if err := image.ExtractFile(pkg.Path, "usr/src/"+sourcePackage+".tar.xz", tarball); err != nil {
		return err
	}
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	if err := command(ctx, work, io.Discard, "tar", "-xJf", tarball, "-C", tree, "--strip-components=1"); err != nil {
		return err
	}
	if err := os.Remove(tarball); err != nil {
		return err
	}

	fragment := filepath.Join(work, "fragment.config")
	if err := os.WriteFile(fragment, config, 0o644); err != nil {
		return err
	}
	if err := command(ctx, tree, io.Discard, "make", "-s", "allnoconfig", "KCONFIG_ALLCONFIG="+fragment); err != nil {
		return err
	}
	taken, err := os.ReadFile(filepath.Join(tree, ".config"))
	if err != nil {
		return err
	}
	if missed := notTaken(config, taken); len(missed) > 0 {
		return fmt.Errorf("these lines of x86_64.config did not take (renamed, or a dependency is missing): %s", strings.Join(missed, ", "))
	}

	fmt.Printf("kernel: compiling with %d processes; this takes a while\n", jobs)
	var log bytes.Buffer
	if err := command(ctx, tree, &log, "make", fmt.Sprintf("-j%d", jobs), "vmlinux"); err != nil {
		text := log.Bytes()
		return fmt.Errorf("%w\n%s", err, text[max(0, len(text)-4000):])
	}
	stripped := filepath.Join(work, "vmlinux.stripped")
	if err := command(ctx, tree, io.Discard, "strip", "-o", stripped, "vmlinux"); err != nil {
		return err
	}
	if _, err := image.CheckKernel(stripped, "amd64"); err != nil {
		return err
	}
	return os.Rename(stripped, vmlinux)
}

// command runs one step. Names and times that make puts into a kernel are
// fixed, so that equal sources make equal bytes.
func command(ctx context.Context, dir string, stdout io.Writer, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C",
		"KBUILD_BUILD_TIMESTAMP=1970-01-01 00:00:00 UTC", "KBUILD_BUILD_USER=cri-vz",
		"KBUILD_BUILD_HOST=cri-vz", "KBUILD_BUILD_VERSION=1")
	cmd.Stdout, cmd.Stderr = stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return nil
}

// notTaken returns the lines of fragment that the configuration made from it
// doesn't have.
func notTaken(fragment, taken []byte) []string {
	has := map[string]bool{}
	set := map[string]bool{}
	lines := bufio.NewScanner(bytes.NewReader(taken))
	for lines.Scan() {
		has[lines.Text()] = true
		name, _, _ := strings.Cut(lines.Text(), "=")
		set[name] = true
	}
	var missed []string
	for line := range strings.Lines(string(fragment)) {
		line = strings.TrimSpace(line)
		if off, ok := strings.CutSuffix(strings.TrimPrefix(line, "# "), " is not set"); ok && strings.HasPrefix(off, "CONFIG_") {
			if set[off] {
				missed = append(missed, line)
			}
			continue
		}
		if strings.HasPrefix(line, "CONFIG_") && !has[line] {
			missed = append(missed, line)
		}
	}
	return missed
}
