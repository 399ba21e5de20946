package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// testNAT has a switch command that does nothing.
func testNAT(t *testing.T, dir string) *NAT {
	t.Helper()
	n, err := NewNAT(dir, filepath.Join(dir, "run"), "true")
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestNATResult(t *testing.T) {
	dir := t.TempDir()
	n := testNAT(t, dir)
	r, err := n.Prepare(t.Context(), Pod{ID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if r.MTU != 1500 || !strings.HasPrefix(r.MAC, "0a:76:") || !strings.HasSuffix(r.MAC, ":00") ||
		r.Switch == nil || r.Switch.MAC != strings.Replace(r.MAC, "0a:76:", "0a:77:", 1) || r.Switch.Socket != filepath.Join(dir, "run", SwitchSocket) {
		t.Errorf("%+v, %+v", r, r.Switch)
	}
	if set, err := n.SetUp(t.Context(), "a"); err != nil || set.Interface != "eth0" || set.MAC != r.MAC || set.MTU != 1500 || !set.DHCP || len(set.Addresses) != 0 {
		t.Errorf("%+v, %v", set, err)
	}
	if _, err := n.SetUp(t.Context(), "b"); !errdefs.IsNotFound(err) {
		t.Errorf("the network of a pod without one: %v", err)
	}
	if _, err := n.Prepare(t.Context(), Pod{ID: "a"}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second network of one pod: %v", err)
	}
	// Another daemon finds what this one gave out.
	again := testNAT(t, dir)
	if pods, err := again.Pods(); err != nil || !slices.Equal(pods, []string{"a"}) {
		t.Errorf("pods %q, %v", pods, err)
	}
	if b, err := again.Prepare(t.Context(), Pod{ID: "b"}); err != nil || b.MAC != strings.TrimSuffix(r.MAC, "00")+"01" {
		t.Errorf("%+v, %v", b, err)
	}
	// One of another root has another pool.
	if o, err := testNAT(t, t.TempDir()).Prepare(t.Context(), Pod{ID: "a"}); err != nil || o.MAC == r.MAC {
		t.Errorf("%+v, %v", o, err)
	}
	for range 2 {
		if err := again.TearDown(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(n.Leased("a", netip.MustParseAddr("192.168.64.2"), 60), n.Released("a")); err != nil {
		t.Errorf("the lease of a pod that is gone: %v", err)
	}
}

func TestNATHostPorts(t *testing.T) {
	n := testNAT(t, t.TempDir())
	for _, protocol := range []string{"udp", "sctp"} {
		m := PortMapping{HostPort: 53, ContainerPort: 53, Protocol: protocol}
		if _, err := n.Prepare(t.Context(), Pod{ID: protocol, PortMappings: []PortMapping{m}}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "host port 53/"+protocol) {
			t.Errorf("%s: %v", protocol, err)
		}
	}
	if pods, err := n.Pods(); err != nil || len(pods) != 0 {
		t.Errorf("what was refused is there: %q, %v", pods, err)
	}
	web := PortMapping{HostPort: 80, ContainerPort: 8080, Protocol: "tcp", HostIP: "127.0.0.1"}
	r, err := n.Prepare(t.Context(), Pod{ID: "a", PortMappings: []PortMapping{{ContainerPort: 80, Protocol: "udp"}, web}})
	if err != nil || !slices.Equal(r.HostPorts, []PortMapping{web}) {
		t.Errorf("%+v, %v", r, err)
	}
}

// T48: a MAC that was never used is taken first, then the one that was free for
// longest, and none while its last pod's lease may live.
func TestNATRecycles(t *testing.T) {
	n := testNAT(t, t.TempDir())
	now := time.Unix(1_800_000_000, 0)
	n.now = func() time.Time { return now }
	take := func(id string) string {
		t.Helper()
		r, err := n.Prepare(t.Context(), Pod{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		return r.MAC
	}
	down := func(id string) {
		t.Helper()
		if err := n.TearDown(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	macs := map[string]string{}
	var used []string
	for i := range natPool {
		id := fmt.Sprint("p", i)
		macs[id] = take(id)
		if slices.Contains(used, macs[id]) {
			t.Fatalf("%s is given out twice", macs[id])
		}
		used = append(used, macs[id])
	}
	if _, err := n.Prepare(t.Context(), Pod{ID: "more"}); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "are in use") {
		t.Errorf("one pod too many: %v", err)
	}
	lease := func(id, a string, seconds uint32) {
		t.Helper()
		if err := n.Leased(id, netip.MustParseAddr(a), seconds); err != nil {
			t.Fatal(err)
		}
	}
	lease("p1", "192.168.64.11", 600) // gives it back
	lease("p2", "192.168.64.12", 600) // doesn't
	lease("p3", "192.168.64.13", 600) // gives it back, later
	for _, id := range []string{"p1", "p3"} {
		if err := n.Released(id); err != nil {
			t.Fatal(err)
		}
	}
	down("p4") // nothing is known of a lease
	down("p2")
	down("p1")
	down("p3")
	if got := take("q1"); got != macs["p1"] {
		t.Errorf("%s, want that of p1, %s", got, macs["p1"])
	}
	if got := take("q3"); got != macs["p3"] {
		t.Errorf("%s, want that of p3, %s", got, macs["p3"])
	}
	_, err := n.Prepare(t.Context(), Pod{ID: "q2"})
	if until := now.Add(600 * time.Second).UTC().Format(time.RFC3339); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "wait until "+until) {
		t.Errorf("while leases live: %v, want %s", err, until)
	}
	now = now.Add(601 * time.Second)
	if got := take("q2"); got != macs["p2"] {
		t.Errorf("%s, want that of p2, %s", got, macs["p2"])
	}
	now = now.Add(natLease)
	if got := take("q4"); got != macs["p4"] {
		t.Errorf("%s, want that of p4, %s", got, macs["p4"])
	}
}

// Two pods with one address would be two pods of which one can't be reached.
func TestNATAddressOfAnother(t *testing.T) {
	n := testNAT(t, t.TempDir())
	for _, id := range []string{"a", "b"} {
		if _, err := n.Prepare(t.Context(), Pod{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	a := netip.MustParseAddr("192.168.64.2")
	for range 2 {
		if err := n.Leased("a", a, 60); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Leased("b", a, 60); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "pod a's") {
		t.Errorf("the address of another pod: %v", err)
	}
	if err := n.TearDown(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := n.Leased("b", a, 60); err != nil {
		t.Errorf("the address of a pod that is gone: %v", err)
	}
}

func TestNATConcurrently(t *testing.T) {
	n := testNAT(t, t.TempDir())
	var mu sync.Mutex
	seen := map[string]bool{}
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			r, err := n.Prepare(t.Context(), Pod{ID: fmt.Sprint(i)})
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
	n := testNAT(t, dir)
	for _, content := range []string{"{", `{"schema":7}`, `{"schema":2,"pool":"zz"}`, strings.Repeat(" ", natRecordLimit+1)} {
		if err := os.WriteFile(filepath.Join(dir, "nat.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := n.Prepare(t.Context(), Pod{ID: "a"}); err == nil || !strings.Contains(err.Error(), "nat.json") {
			t.Errorf("record %.10q: %v", content, err)
		}
	}
}
