package network

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// T43
func TestHostResolvConf(t *testing.T) {
	const missing = "\x00"
	for _, tt := range []struct {
		name             string
		etc, systemd, nm string
		want             DNS
		wantErr          error
	}{
		{
			name: "plain",
			etc:  "# made by dhcp\nnameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch a.example b.example\noptions ndots:5 edns0\n",
			want: DNS{Servers: []string{"192.0.2.1", "2001:db8::1"}, Searches: []string{"a.example", "b.example"}, Options: []string{"ndots:5", "edns0"}},
		},
		{
			name:    "plain, the resolver's own file is not read",
			etc:     "nameserver 192.0.2.1\n",
			systemd: "nameserver 192.0.2.99\n",
			want:    DNS{Servers: []string{"192.0.2.1"}},
		},
		{
			name:    "systemd-resolved stub",
			etc:     "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan\n",
			systemd: "nameserver 192.0.2.7\nnameserver 192.0.2.8\nsearch other\n",
			want:    DNS{Servers: []string{"192.0.2.7", "192.0.2.8"}, Searches: []string{"lan"}, Options: []string{"edns0", "trust-ad"}},
		},
		{
			name:    "stub and a real server",
			etc:     "nameserver 127.0.0.53\nnameserver 192.0.2.1\n",
			systemd: "nameserver 192.0.2.1\nnameserver 192.0.2.2\n",
			want:    DNS{Servers: []string{"192.0.2.1", "192.0.2.2"}},
		},
		{
			name:    "NetworkManager's dnsmasq",
			etc:     "nameserver 127.0.1.1\n",
			systemd: missing,
			nm:      "search corp\nnameserver 198.51.100.1\n",
			want:    DNS{Servers: []string{"198.51.100.1"}, Searches: []string{"corp"}},
		},
		{
			name:    "IPv6 loopback, mapped loopback, unspecified, zone",
			etc:     "nameserver ::1\nnameserver ::ffff:127.0.0.1\nnameserver 0.0.0.0\nnameserver fe80::1%eth0\n",
			systemd: "nameserver 2001:db8::53\n",
			want:    DNS{Servers: []string{"2001:db8::53"}},
		},
		{
			name:    "no server at all means the loopback",
			etc:     "search lan\n",
			systemd: "nameserver 192.0.2.7\n",
			want:    DNS{Servers: []string{"192.0.2.7"}, Searches: []string{"lan"}},
		},
		{
			name: "no file at all", etc: missing, systemd: missing, nm: missing,
			wantErr: errdefs.ErrNotFound,
		},
		{
			name: "only loopback anywhere", etc: "nameserver 127.0.0.1\nsearch lan\n", systemd: "nameserver 127.0.0.53\n",
			want: DNS{Searches: []string{"lan"}}, wantErr: errdefs.ErrNotFound,
		},
		{
			name: "domain and search, last wins; garbage is skipped",
			etc:  "nameserver\nnameserver nonsense\nnameserver 192.0.2.1 ; why\n\tsearch a\ndomain b c\nsearch \x01 \u00e9 d\nsortlist x\noptions\n",
			want: DNS{Servers: []string{"192.0.2.1"}, Searches: []string{"d"}},
		},
		{
			name: "CRLF", etc: "nameserver 192.0.2.1\r\nsearch a\r\n",
			want: DNS{Servers: []string{"192.0.2.1"}, Searches: []string{"a"}},
		},
		{
			name: "too large", etc: strings.Repeat("#", maxResolvConf+1), wantErr: errdefs.ErrInvalidArgument,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			var paths []string
			for i, text := range []string{tt.etc, tt.systemd, tt.nm} {
				p := filepath.Join(dir, string(rune('a'+i)))
				paths = append(paths, p)
				if text != missing {
					if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			got, err := hostResolvConf(paths)
			if !errors.Is(err, tt.wantErr) {
				t.Fatalf("error %v, want %v", err, tt.wantErr)
			}
			if diff := cmp.Diff(tt.want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func FuzzParseResolvConf(f *testing.F) {
	f.Add("nameserver 127.0.0.53\noptions edns0\nsearch a b\n")
	f.Add("domain x\nnameserver fe80::1%\xff\n;\n#")
	f.Fuzz(func(t *testing.T, text string) {
		d := parseResolvConf(text)
		// What comes out must survive being written into another resolv.conf.
		var b strings.Builder
		for _, s := range d.Servers {
			b.WriteString("nameserver " + s + "\n")
		}
		if len(d.Searches) > 0 {
			b.WriteString("search " + strings.Join(d.Searches, " ") + "\n")
		}
		if len(d.Options) > 0 {
			b.WriteString("options " + strings.Join(d.Options, " ") + "\n")
		}
		if diff := cmp.Diff(d, parseResolvConf(b.String()), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%q is not stable:\n%s", text, diff)
		}
	})
}
