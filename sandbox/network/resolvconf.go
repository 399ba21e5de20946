package network

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// maxResolvConf bounds what is read of a resolv.conf; real ones have a few
// hundred bytes, and glibc itself stops at far less.
const maxResolvConf = 64 << 10

// hostResolvConfs are read in this order. A local resolver (systemd-resolved,
// NetworkManager's dnsmasq) puts its own loopback address into the first and
// the servers that it asks itself into one of the others.
var hostResolvConfs = []string{
	"/etc/resolv.conf",
	"/run/systemd/resolve/resolv.conf",
	"/run/NetworkManager/no-stub-resolv.conf",
}

// HostResolvConf is the host's resolver configuration as a pod without a
// dns_config can use it: a name server on the host's loopback (or one that
// needs an interface of the host, fe80::1%eth0) means nothing in a VM and is
// replaced by the servers behind it. Where there are none, the error wraps
// errdefs.ErrNotFound, and the searches and options are returned nevertheless.
func HostResolvConf() (DNS, error) {
	return hostResolvConf(hostResolvConfs)
}

func hostResolvConf(paths []string) (DNS, error) {
	host, err := readResolvConf(paths[0])
	if err != nil {
		return DNS{}, err
	}
	usable := func(servers []string) []string {
		return slices.DeleteFunc(slices.Clone(servers), func(s string) bool { return !reachableFromPod(s) })
	}
	servers := usable(host.Servers)
	// No server at all means one on the loopback (resolv.conf(5)).
	replace := len(servers) < len(host.Servers) || len(host.Servers) == 0
	for _, path := range paths[1:] {
		if !replace {
			break
		}
		real, err := readResolvConf(path)
		if err != nil {
			return DNS{}, err
		}
		for _, s := range usable(real.Servers) {
			replace = false
			if !slices.Contains(servers, s) {
				servers = append(servers, s)
			}
		}
		if len(host.Searches) == 0 {
			host.Searches = real.Searches
		}
	}
	host.Servers = servers
	if len(servers) == 0 {
		return host, fmt.Errorf("the host's name servers can't be used by a pod: %s has only loopback or link-local ones and %s names no other; give the pod a dns_config: %w",
			paths[0], strings.Join(paths[1:], ", "), errdefs.ErrNotFound)
	}
	return host, nil
}

func reachableFromPod(server string) bool {
	a, err := netip.ParseAddr(server)
	// 0.0.0.0 is the host itself for glibc.
	return err == nil && !a.IsLoopback() && !a.IsUnspecified() && a.Zone() == "" && !a.IsLinkLocalUnicast()
}

// readResolvConf answers with an empty DNS for a file that isn't there.
func readResolvConf(path string) (DNS, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return DNS{}, nil
	}
	if err != nil {
		return DNS{}, fmt.Errorf("host's resolver configuration: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxResolvConf+1))
	if err != nil {
		return DNS{}, fmt.Errorf("host's resolver configuration %s: %w", path, err)
	}
	if len(b) > maxResolvConf {
		return DNS{}, fmt.Errorf("host's resolver configuration %s is larger than %d bytes: %w", path, maxResolvConf, errdefs.ErrInvalidArgument)
	}
	return parseResolvConf(string(b)), nil
}

// parseResolvConf reads a resolv.conf as glibc does: unknown and malformed
// lines are skipped, the last search or domain line wins, options add up.
// What it returns can be written into another resolv.conf as it is.
func parseResolvConf(text string) DNS {
	var d DNS
	for line := range strings.Lines(text) {
		if i := strings.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		words := strings.Fields(line)
		if len(words) < 2 {
			continue
		}
		values := slices.DeleteFunc(words[1:], func(w string) bool {
			return strings.ContainsFunc(w, func(r rune) bool { return r <= ' ' || r > '~' })
		})
		if len(values) == 0 {
			continue
		}
		switch words[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(values[0]); err == nil {
				d.Servers = append(d.Servers, a.Unmap().String())
			}
		case "search":
			d.Searches = values
		case "domain":
			d.Searches = values[:1]
		case "options":
			d.Options = append(d.Options, values...)
		}
	}
	return d
}
