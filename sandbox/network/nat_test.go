package network

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
)

func testNAT(t *testing.T, dir, subnet string) *NAT {
	t.Helper()
	p := netip.MustParsePrefix(subnet)
	n, err := NewNAT(dir, p, p.Addr().Next())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestNATResult(t *testing.T) {
	dir := t.TempDir()
	n := testNAT(t, dir, "192.168.64.0/24")
	r, err := n.SetUp(t.Context(), Pod{ID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if r.Interface != "eth0" || r.MTU != 1500 || r.MAC != "0a:76:c0:a8:40:80" ||
		!slices.Equal(r.Addresses, []netip.Prefix{netip.MustParsePrefix("192.168.64.128/24")}) ||
		len(r.Routes) != 2 || r.Routes[1].Gateway != netip.MustParseAddr("192.168.64.1") {
		t.Errorf("%+v", r)
	}
	if _, err := n.SetUp(t.Context(), Pod{ID: "a"}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second network of one pod: %v", err)
	}
	// Another daemon finds what this one gave out.
	again := testNAT(t, dir, "192.168.64.0/24")
	if pods, err := again.Pods(); err != nil || !slices.Equal(pods, []string{"a"}) {
		t.Errorf("pods %q, %v", pods, err)
	}
	if r, err := again.SetUp(t.Context(), Pod{ID: "b"}); err != nil || r.Addresses[0].Addr().String() != "192.168.64.129" {
		t.Errorf("%+v, %v", r, err)
	}
	for range 2 {
		if err := again.TearDown(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := n.SetUp(t.Context(), Pod{ID: "c", PortMappings: []PortMapping{{HostPort: 80, ContainerPort: 80}}}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a host port: %v", err)
	}
	if _, err := n.SetUp(t.Context(), Pod{ID: "c", PortMappings: []PortMapping{{ContainerPort: 80}}}); err != nil {
		t.Errorf("a port that is not published: %v", err)
	}
}

// T48: what was free for longest is used first, and only when nothing is new.
func TestNATRecycles(t *testing.T) {
	n := testNAT(t, t.TempDir(), "10.0.0.0/28") // .8 to .14
	take := func(id string) string {
		t.Helper()
		r, err := n.SetUp(t.Context(), Pod{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		return r.Addresses[0].Addr().String()
	}
	var got []string
	for _, id := range []string{"a", "b", "c"} {
		got = append(got, take(id))
	}
	for _, id := range []string{"b", "a"} {
		if err := n.TearDown(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []string{"d", "e", "f", "g", "h", "i"} {
		got = append(got, take(id))
	}
	want := []string{"10.0.0.8", "10.0.0.9", "10.0.0.10", "10.0.0.11", "10.0.0.12", "10.0.0.13", "10.0.0.14", "10.0.0.9", "10.0.0.8"}
	if !slices.Equal(got, want) {
		t.Errorf("addresses %q, want %q", got, want)
	}
	if _, err := n.SetUp(t.Context(), Pod{ID: "j"}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one pod too many: %v", err)
	}
}

func TestNATConcurrently(t *testing.T) {
	n := testNAT(t, t.TempDir(), "10.0.0.0/24")
	var mu sync.Mutex
	seen := map[string]bool{}
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			id := string(rune('a' + i))
			r, err := n.SetUp(t.Context(), Pod{ID: id})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if seen[r.MAC] {
				t.Errorf("MAC %s twice", r.MAC)
			}
			seen[r.MAC] = true
		})
	}
	all.Wait()
}

func TestNATBadRecord(t *testing.T) {
	dir := t.TempDir()
	n := testNAT(t, dir, "10.0.0.0/24")
	for _, content := range []string{"{", `{"schema":7}`, strings.Repeat(" ", natRecordLimit+1)} {
		if err := os.WriteFile(filepath.Join(dir, "nat.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := n.SetUp(t.Context(), Pod{ID: "a"}); err == nil || !strings.Contains(err.Error(), "nat.json") {
			t.Errorf("record %.10q: %v", content, err)
		}
	}
	for _, subnet := range []string{"10.0.0.0/30", "10.0.0.0/8", "fd00::/64"} {
		p := netip.MustParsePrefix(subnet)
		if _, err := NewNAT(dir, p, p.Addr().Next()); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("subnet %s: %v", subnet, err)
		}
	}
}
