package sandbox

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/sandbox/network"
	"github.com/cri-vz/cri-vz/sandbox/shim"
	"github.com/cri-vz/cri-vz/sandbox/shim/shimtest"
)

// dhcpShim is a shim process whose guests get an address by DHCP: one that follows
// from the MAC, or the same for all.
func dhcpShim(podDir string, same bool) int {
	c, err := shim.ReadConfig(podDir)
	if err != nil {
		return 1
	}
	mac, err := net.ParseMAC(c.MAC)
	if err != nil {
		return 1
	}
	a := net.IPv4(192, 168, 64, 2+mac[5])
	if same {
		a = net.IPv4(192, 168, 64, 2)
	}
	return fakeShim(podDir, &shimtest.Driver{Lease: &guestapi.Lease{Address: a.String() + "/24", Gateway: "192.168.64.1", Seconds: 600}})
}

// newNATEnv has real shim processes and a real frame switch; the guests are not real.
func newNATEnv(t *testing.T, shim string) (e *env, state string) {
	t.Helper()
	e = newFakeEnv(t)
	e.close()
	state = filepath.Join(filepath.Dir(e.o.Root), "net")
	nat, err := network.NewNAT(state, e.o.Run, self(t), "switch")
	if err != nil {
		t.Fatal(err)
	}
	e.o.Network, e.o.ShimCommand = nat, []string{self(t), shim}
	e.open()
	return e, state
}

// free are the MACs that were used, and until when a lease of each may live.
func free(t *testing.T, state string) (until []time.Time) {
	t.Helper()
	var record struct {
		Free []struct{ Until time.Time }
	}
	b, err := os.ReadFile(filepath.Join(state, "nat.json"))
	if err == nil {
		err = json.Unmarshal(b, &record)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range record.Free {
		until = append(until, f.Until)
	}
	return until
}

// A pod's address comes from its guest, survives the daemon, and goes back with the
// pod. A pod that died can't give it back. // T42, T48
func TestRunWithDHCP(t *testing.T) {
	e, state := newNATEnv(t, "dhcp-shim")
	a, b := e.run("a"), e.run("b")
	for p, want := range map[*Pod]string{a: "192.168.64.2", b: "192.168.64.3"} {
		if st := p.Status(); !st.Ready || len(st.IPs) != 1 || st.IPs[0].String() != want {
			t.Errorf("status %+v, want %s", st, want)
		}
	}
	e.close()
	e.open()
	again := func(p *Pod) *Pod {
		t.Helper()
		p, err := e.pods.Get(p.ID())
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	a, b = again(a), again(b)
	if st := a.Status(); !st.Ready || len(st.IPs) != 1 || st.IPs[0].String() != "192.168.64.2" {
		t.Errorf("after a restart: %+v", st)
	}
	if err := a.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := free(t, state); len(got) != 1 || !got[0].IsZero() {
		t.Errorf("after a stop, leases live until %v", got)
	}
	if err := b.rec.Shim.kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, "the pod's end", 10*time.Second, func() bool { return !b.Status().Ready })
	if st := b.Status(); len(st.IPs) != 0 {
		t.Errorf("a dead pod has %v", st.IPs)
	}
	if err := b.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := free(t, state); len(got) != 2 || time.Until(got[1]) < 9*time.Minute || time.Until(got[1]) > 11*time.Minute {
		t.Errorf("after a shim's death, leases live until %v", got)
	}
}

// T42: no pod without an address, and none with another pod's.
func TestRunWithoutAnAddress(t *testing.T) {
	for _, tt := range []struct {
		shim, want string
		good       int // pods before it
	}{
		{"fake-shim", "reports no address", 0},
		{"same-address-shim", "which is pod", 1},
	} {
		t.Run(tt.shim, func(t *testing.T) {
			e, state := newNATEnv(t, tt.shim)
			for range tt.good {
				e.run("good")
			}
			_, err := e.pods.Run(t.Context(), podConfig("bad"), "")
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "sandbox set-up") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v", err)
			}
			if n := len(e.pods.List()); n != tt.good {
				t.Errorf("%d pods", n)
			}
			if got := free(t, state); len(got) != 1 || !got[0].IsZero() {
				t.Errorf("leases live until %v", got)
			}
		})
	}
}
