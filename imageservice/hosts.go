package imageservice

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// maxHostsBytes caps a hosts.toml; real ones have a few hundred bytes.
const maxHostsBytes = 1 << 20

// endpoint is a server that may answer for a registry's host.
type endpoint struct {
	// host is host[:port] as it appears in URLs.
	host string
	// scheme is https or http; loopback endpoints that nobody configured have
	// plainToo as well: https is tried first, as docker does.
	scheme   string
	plainToo bool
	// api is the path that stands for /v2; override says that it was given.
	api           string
	override      bool
	resolve, pull bool
	tls           *tls.Config
}

// hostKeys are the keys that containerd documents for a host and, at the top of
// the file, for its server.
type hostKeys struct {
	Capabilities []string `toml:"capabilities"`
	SkipVerify   bool     `toml:"skip_verify"`
	CA           any      `toml:"ca"`
	Client       any      `toml:"client"`
	OverridePath bool     `toml:"override_path"`
}

type hostsFile struct {
	Server string `toml:"server"`
	hostKeys
	Host map[string]hostKeys `toml:"host"`
}

// isLoopbackHost says whether host[:port] is this machine by its name alone.
func isLoopbackHost(host string) bool {
	name := (&url.URL{Host: host}).Hostname()
	if name == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(name)
	return err == nil && ip.IsLoopback()
}

// defaultHost is where a reference's domain is served.
func defaultHost(domain string) string {
	if domain == "docker.io" {
		return "registry-1.docker.io"
	}
	return domain
}

func defaultEndpoint(domain string) endpoint {
	host := defaultHost(domain)
	return endpoint{host: host, scheme: "https", plainToo: isLoopbackHost(host), api: "/v2", resolve: true, pull: true}
}

// endpointsFor returns who to ask for domain, in order, by containerd's
// convention: DIR/<host>/hosts.toml, DIR/<host_port_>/hosts.toml, else
// DIR/_default/hosts.toml, else the host itself.
func endpointsFor(dir, domain string) ([]endpoint, error) {
	if dir == "" {
		return []endpoint{defaultEndpoint(domain)}, nil
	}
	names := []string{domain}
	if i := strings.LastIndexByte(domain, ':'); i > 0 {
		names = append(names, domain[:i]+"_"+domain[i+1:]+"_")
	}
	for _, name := range append(names, "_default") {
		file := filepath.Join(dir, name, "hosts.toml")
		b, err := readHostsFile(file)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("registry configuration: %w", err)
		}
		eps, err := parseHosts(b, filepath.Dir(file), domain)
		if err != nil {
			return nil, fmt.Errorf("registry configuration %s: %w", file, err)
		}
		return eps, nil
	}
	return []endpoint{defaultEndpoint(domain)}, nil
}

func readHostsFile(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readCapped(file, f, maxHostsBytes)
}

// parseHosts reads a hosts.toml strictly: a key that is not understood is an
// error that names it. Relative files are below dir.
func parseHosts(b []byte, dir, domain string) ([]endpoint, error) {
	var f hostsFile
	dec := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) && len(strict.Errors) > 0 {
			return nil, invalidf("unknown key %.200q; known are server, capabilities, skip_verify, ca, client, override_path and [host.\"URL\"] tables", strings.Join(strict.Errors[0].Key(), "."))
		}
		return nil, invalidf("%v", err)
	}
	var eps []endpoint
	for _, raw := range hostOrder(b, f.Host) {
		ep, err := newEndpoint(raw, f.Host[raw], dir)
		if err != nil {
			return nil, fmt.Errorf("host %.200q: %w", raw, err)
		}
		eps = append(eps, ep)
	}
	server := f.Server
	if server == "" {
		ep := defaultEndpoint(domain)
		server = ep.scheme + "://" + ep.host
		// The keys at the top are for a server that is not named as well.
		configured, err := newEndpoint(server, f.hostKeys, dir)
		if err != nil {
			return nil, fmt.Errorf("server: %w", err)
		}
		configured.plainToo = ep.plainToo
		return append(eps, configured), nil
	}
	ep, err := newEndpoint(server, f.hostKeys, dir)
	if err != nil {
		return nil, fmt.Errorf("server %.200q: %w", server, err)
	}
	return append(eps, ep), nil
}

// hostOrder returns the host tables in the order of the file, which is the order
// they are tried in; a map forgets it.
func hostOrder(b []byte, hosts map[string]hostKeys) []string {
	var order []string
	var p unstable.Parser
	p.Reset(b)
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind != unstable.Table {
			continue
		}
		var parts []string
		for it := e.Key(); it.Next(); {
			parts = append(parts, string(it.Node().Data))
		}
		if len(parts) == 2 && parts[0] == "host" && !slices.Contains(order, parts[1]) {
			if _, ok := hosts[parts[1]]; ok {
				order = append(order, parts[1])
			}
		}
	}
	for _, h := range sortedKeys(hosts) {
		if !slices.Contains(order, h) {
			order = append(order, h)
		}
	}
	return order
}

func newEndpoint(raw string, k hostKeys, dir string) (endpoint, error) {
	if !strings.Contains(raw, "://") {
		scheme := "https"
		if isLoopbackHost(raw) {
			scheme = "http"
		}
		raw = scheme + "://" + raw
	}
	u, err := url.Parse(raw)
	if err != nil {
		return endpoint{}, invalidf("not a URL: %v", err)
	}
	if u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.Hostname() == "" {
		return endpoint{}, invalidf("must be an https:// or http:// URL with a host")
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return endpoint{}, invalidf("must have no user, query or fragment; credentials belong in docker's config.json or the CRI's AuthConfig")
	}
	ep := endpoint{host: u.Host, scheme: u.Scheme, api: strings.TrimSuffix(path.Clean("/"+u.Path), "/"), override: k.OverridePath}
	if !k.OverridePath && !strings.HasSuffix(ep.api, "/v2") {
		ep.api += "/v2"
	}
	ep.resolve, ep.pull = k.Capabilities == nil, k.Capabilities == nil
	for _, c := range k.Capabilities {
		switch c {
		case "resolve":
			ep.resolve = true
		case "pull":
			ep.pull = true
		case "push": // nothing is ever pushed
		default:
			return endpoint{}, invalidf("unknown capability %.100q; known are pull, resolve and push", c)
		}
	}
	cas, err := stringList("ca", k.CA)
	if err != nil {
		return endpoint{}, err
	}
	pairs, err := clientPairs(k.Client)
	if err != nil {
		return endpoint{}, err
	}
	if !k.SkipVerify && len(cas) == 0 && len(pairs) == 0 {
		return ep, nil
	}
	ep.tls = &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: k.SkipVerify} //nolint:gosec // the administrator asked for it by name
	abs := func(p string) string {
		if filepath.IsAbs(p) {
			return p
		}
		return filepath.Join(dir, p)
	}
	if len(cas) > 0 {
		if ep.tls.RootCAs, err = x509.SystemCertPool(); err != nil {
			ep.tls.RootCAs = x509.NewCertPool()
		}
		for _, ca := range cas {
			pem, err := readHostsFile(abs(ca))
			if err != nil {
				return endpoint{}, fmt.Errorf("ca: %w", err)
			}
			if !ep.tls.RootCAs.AppendCertsFromPEM(pem) {
				return endpoint{}, invalidf("ca %s has no PEM certificate", abs(ca))
			}
		}
	}
	for _, p := range pairs {
		cert, err := tls.LoadX509KeyPair(abs(p[0]), abs(p[1]))
		if err != nil {
			return endpoint{}, fmt.Errorf("client certificate: %w", err)
		}
		ep.tls.Certificates = append(ep.tls.Certificates, cert)
	}
	return ep, nil
}

func stringList(key string, v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		var out []string
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, invalidf("%s must be a string or a list of strings", key)
			}
			out = append(out, s)
		}
		return out, nil
	}
	return nil, invalidf("%s must be a string or a list of strings", key)
}

// clientPairs reads the three forms of client: "file", ["file", ...], where
// each holds certificate and key, and [["cert", "key"], ...].
func clientPairs(v any) ([][2]string, error) {
	list, ok := v.([]any)
	if !ok {
		files, err := stringList("client", v)
		if err != nil || len(files) == 0 {
			return nil, err
		}
		return [][2]string{{files[0], files[0]}}, nil
	}
	var out [][2]string
	for _, e := range list {
		switch e := e.(type) {
		case string:
			out = append(out, [2]string{e, e})
		case []any:
			p, err := stringList("client", e)
			if err != nil {
				return nil, err
			}
			if len(p) == 2 && p[1] == "" {
				p = p[:1]
			}
			switch len(p) {
			case 1:
				out = append(out, [2]string{p[0], p[0]})
			case 2:
				out = append(out, [2]string{p[0], p[1]})
			default:
				return nil, invalidf("client has a list of %d files; it must be certificate and key", len(p))
			}
		default:
			return nil, invalidf("client must be a file, or a list of files or pairs of files")
		}
	}
	return out, nil
}
