package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// suite is the Debian release that guests take their kernel from, on whatever
// release the host runs.
const suite = "trixie"

// keyring verifies the archive; Debian 12's has the keys of 13 too.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// fetchTimeout bounds one apt-get run: 155 MB of kernel source at 0.5 MB/s.
const fetchTimeout = 5 * time.Minute

// Package is a Debian package that [FetchPackage] brought.
type Package struct {
	Name, Version string
	// Path is the .deb file.
	Path string
}

// FetchPackage downloads a package of Debian 13, or what it depends on first
// if it is a meta package for kernels (linux-image-cloud-*), into dir.
//
// apt-get does it, with a configuration of its own in dir: the host's mirror
// with the suite changed, no other source, the archive's keyring for every
// signature. The host's package state isn't touched and root isn't needed. On
// a host without apt-get or Debian sources the error wraps
// [errdefs.ErrUnavailable] and says what to do instead.
func FetchPackage(ctx context.Context, dir, arch, name string) (Package, error) {
	const instead = "download the package elsewhere and pass it with --kernel FILE.deb"
	if _, err := exec.LookPath("apt-get"); err != nil {
		return Package{}, fmt.Errorf("fetch %s: this host has no apt-get: %s: %w", name, instead, errdefs.ErrUnavailable)
	}
	if _, err := os.Stat(keyring); err != nil {
		return Package{}, fmt.Errorf("fetch %s: %w: install debian-archive-keyring, or %s: %w", name, err, instead, errdefs.ErrUnavailable)
	}
	sources, err := hostSources(os.DirFS("/"))
	if err != nil {
		return Package{}, fmt.Errorf("fetch %s: %w: %s", name, err, instead)
	}
	a, err := newApt(dir, arch, sources)
	if err != nil {
		return Package{}, fmt.Errorf("fetch %s: %w", name, err)
	}
	if _, err := a.run(ctx, "apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update"); err != nil {
		return Package{}, fmt.Errorf("fetch %s: %w (a missing key means that debian-archive-keyring is older than Debian 13: upgrade it)", name, err)
	}
	record, err := a.run(ctx, "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return Package{}, fmt.Errorf("fetch %s: not in %s for %s: %w", name, suite, arch, err)
	}
	real, version := realPackage(name, record)
	before, err := filepath.Glob(filepath.Join(a.downloads, "*.deb"))
	if err != nil {
		return Package{}, err
	}
	for _, old := range before {
		_ = os.Remove(old)
	}
	if _, err := a.run(ctx, "apt-get", "-q", "download", real+"="+version); err != nil {
		return Package{}, fmt.Errorf("fetch %s: %w", real, err)
	}
	debs, err := filepath.Glob(filepath.Join(a.downloads, real+"_*.deb"))
	if err != nil || len(debs) != 1 {
		return Package{}, fmt.Errorf("fetch %s: apt-get download left %d files in %s (%v)", real, len(debs), a.downloads, err)
	}
	return Package{Name: real, Version: version, Path: debs[0]}, nil
}

// realPackage follows a kernel meta package to the kernel of its version.
func realPackage(name string, record []byte) (real, version string) {
	real = name
	lines := bufio.NewScanner(bytes.NewReader(record))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ":")
		switch key {
		case "":
			return real, version
		case "Version":
			version = strings.TrimSpace(value)
		case "Depends":
			first, _, _ := strings.Cut(value, ",")
			fields := strings.Fields(first)
			if strings.HasPrefix(name, "linux-image-cloud-") && len(fields) == 3 && strings.HasPrefix(fields[0], "linux-image-") {
				real = fields[0]
			}
		}
	}
	return real, version
}

// apt runs apt's tools with a configuration of its own.
type apt struct {
	config, downloads string
}

func newApt(dir, arch string, sources []source) (*apt, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if strings.ContainsAny(dir, "\"\\\n;") {
		return nil, fmt.Errorf("directory %q: apt's configuration can't name it: %w", dir, errdefs.ErrInvalidArgument)
	}
	a := &apt{config: filepath.Join(dir, "apt.conf"), downloads: filepath.Join(dir, "downloads")}
	for _, sub := range []string{"downloads", "lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	var list strings.Builder
	for _, s := range sources {
		fmt.Fprintf(&list, "deb [signed-by=%s] %s %s main\n", keyring, s.uri, s.suite)
	}
	// The host's own configuration is read first (proxies are in it). Its
	// hooks and its wish for desktop metadata are not ours.
	config := fmt.Sprintf(`Dir::State "%[1]s";
Dir::State::lists "%[1]s/lists";
Dir::State::status "%[1]s/status";
Dir::Cache "%[1]s";
Dir::Cache::archives "%[1]s/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Etc::sourcelist "%[1]s/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "%[2]s";
#clear APT::Architectures;
APT::Architectures { "%[2]s"; };
APT::Sandbox::User "root";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::Languages "none";
Acquire::Retries "3";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::DEP-11-icons-hidpi;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large-hidpi;
`, dir, arch)
	for name, text := range map[string]string{"apt.conf": config, "sources.list": list.String(), "status": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	return a, nil
}

func (a *apt) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = a.downloads
	cmd.Env = append(os.Environ(), "APT_CONFIG="+a.config, "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		said := strings.TrimSpace(stderr.String())
		return nil, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, said[max(0, len(said)-1000):])
	}
	return stdout.Bytes(), nil
}

// source is one line of a sources.list.
type source struct{ uri, suite string }

// hostSources finds the mirror that the host's apt uses for Debian and returns
// it with the suite changed: the release, and its security updates if the host
// takes those. The name of the mirror thus is the host's business.
func hostSources(root fs.FS) ([]source, error) {
	var all []source
	paths := []string{"etc/apt/sources.list"}
	for _, pattern := range []string{"etc/apt/sources.list.d/*.sources", "etc/apt/sources.list.d/*.list"} {
		found, err := fs.Glob(root, pattern)
		if err != nil {
			return nil, err
		}
		paths = append(paths, found...)
	}
	for _, path := range paths {
		text, err := fs.ReadFile(root, path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the host's package sources: %w", err)
		}
		if strings.HasSuffix(path, ".sources") {
			all = append(all, parseDeb822(string(text))...)
		} else {
			all = append(all, parseSourcesList(string(text))...)
		}
	}
	var sources []source
	for _, want := range []string{"", "-security"} {
		i := slices.IndexFunc(all, func(s source) bool {
			release, ok := strings.CutSuffix(s.suite, want)
			return ok && slices.Contains([]string{"bookworm", "trixie", "forky", "sid", "stable", "oldstable", "testing", "unstable"}, release)
		})
		if i >= 0 {
			sources = append(sources, source{uri: all[i].uri, suite: suite + want})
		}
	}
	if len(sources) == 0 || sources[0].suite != suite {
		return nil, fmt.Errorf("no Debian mirror in /etc/apt/sources.list or sources.list.d (is this host Debian 12 or later?): %w", errdefs.ErrUnavailable)
	}
	return sources, nil
}

// parseSourcesList reads sources.list(5)'s one-line format.
func parseSourcesList(text string) []source {
	var found []source
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb")
		if !ok || rest == "" || rest[0] != ' ' && rest[0] != '\t' {
			continue
		}
		rest = strings.TrimSpace(rest)
		if strings.HasPrefix(rest, "[") {
			_, after, closed := strings.Cut(rest, "]")
			if !closed {
				continue
			}
			rest = after
		}
		if f := strings.Fields(rest); len(f) >= 3 && slices.Contains(f[2:], "main") {
			found = append(found, source{uri: f[0], suite: f[1]})
		}
	}
	return found
}

// parseDeb822 reads sources.list(5)'s deb822 format.
func parseDeb822(text string) []source {
	var found []source
	fields := map[string][]string{}
	flush := func() {
		if slices.Contains(fields["types"], "deb") && slices.Contains(fields["components"], "main") &&
			len(fields["uris"]) > 0 && !slices.Contains(fields["enabled"], "no") {
			for _, s := range fields["suites"] {
				found = append(found, source{uri: fields["uris"][0], suite: s})
			}
		}
		fields = map[string][]string{}
	}
	var key string
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.TrimSpace(line) == "":
			flush()
			key = ""
		case line[0] == '#':
		case line[0] == ' ' || line[0] == '\t':
			fields[key] = append(fields[key], strings.Fields(line)...)
		default:
			name, value, _ := strings.Cut(line, ":")
			key = strings.ToLower(name)
			fields[key] = strings.Fields(value)
		}
	}
	flush()
	return found
}
