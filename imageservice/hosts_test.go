package imageservice

import (
	"encoding/pem"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func pemOf(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func TestParseHosts(t *testing.T) {
	for _, tt := range []struct {
		name, file string
		want       string // host list, or the text of an error
		bad        bool
	}{
		{name: "empty", file: "", want: "https registry-1.docker.io /v2 rp"},
		{name: "order of the file", file: "server='https://s'\n[host.'https://b']\n[host.'https://a']\ncapabilities=['pull']\n[host.'http://c:1/x/']\ncapabilities=['resolve','push']", want: "https b /v2 rp;https a /v2 p;http c:1 /x/v2 r;https s /v2 rp"},
		{name: "override_path", file: "[host.'https://a/proxy']\noverride_path=true", want: "https a /proxy rp;https registry-1.docker.io /v2 rp"},
		{name: "no scheme", file: "server='localhost:5000'", want: "http localhost:5000 /v2 rp"},
		{name: "unknown key", file: "sever='https://x'", want: "sever", bad: true},
		{name: "unknown key of a host", file: "[host.'https://x']\nskip_verfy=true", want: "skip_verfy", bad: true},
		{name: "unknown capability", file: "[host.'https://x']\ncapabilities=['pul']", want: "pul", bad: true},
		{name: "other scheme", file: "server='ftp://x'", want: "https://", bad: true},
		{name: "credentials in the URL", file: "server='https://u:p@x'", want: "credentials", bad: true},
		{name: "not TOML", file: "server=", want: "", bad: true},
		{name: "wrong type", file: "server='https://x'\nca=7", want: "ca must be", bad: true},
		{name: "missing ca", file: "server='https://x'\nca='none.pem'", want: "none.pem", bad: true},
		{name: "client of three", file: "server='https://x'\nclient=[['a','b','c']]", want: "client", bad: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			eps, err := parseHosts([]byte(tt.file), t.TempDir(), "docker.io")
			if tt.bad {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v, want one with %q", err, tt.want)
				}
				return
			}
			var got []string
			for _, e := range eps {
				caps := ""
				if e.resolve {
					caps += "r"
				}
				if e.pull {
					caps += "p"
				}
				got = append(got, strings.Join([]string{e.scheme, e.host, e.api, caps}, " "))
			}
			if s := strings.Join(got, ";"); err != nil || s != tt.want {
				t.Errorf("got %s, %v; want %s", s, err, tt.want)
			}
		})
	}
}

func TestEndpointsFor(t *testing.T) {
	dir := t.TempDir()
	writeHosts(t, dir, "a:5000", "server='https://one'")
	writeHosts(t, dir, "b_5000_", "server='https://two'")
	writeHosts(t, dir, "_default", "server='https://three'")
	for domain, want := range map[string]string{"a:5000": "one", "b:5000": "two", "c": "three"} {
		if eps, err := endpointsFor(dir, domain); err != nil || eps[0].host != want {
			t.Errorf("%s: %+v, %v", domain, eps, err)
		}
	}
	for domain, plain := range map[string]bool{"localhost:5000": true, "127.0.0.1:5000": true, "[::1]:5000": true, "10.0.0.1": false, "example.com": false, "localhost.example.com": false} {
		if eps, err := endpointsFor("", domain); err != nil || eps[0].plainToo != plain || eps[0].scheme != "https" {
			t.Errorf("%s: %+v, %v", domain, eps, err)
		}
	}
	writeHosts(t, dir, "bad", "x=1")
	if _, err := endpointsFor(dir, "bad"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "hosts.toml") {
		t.Errorf("bad file: %v", err)
	}
}
