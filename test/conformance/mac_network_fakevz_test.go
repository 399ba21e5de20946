//go:build linux && fakevz

package conformance_test

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
	"github.com/cri-vz/cri-vz/test/natnet"
	"github.com/cri-vz/cri-vz/test/testnode"
)

// nat plays macOS's NAT, for all pods of the suite.
var nat struct {
	*natnet.Server
	gateway netip.Prefix
}

// startNAT has the stand-in for the framework put its machines behind a bridge of this
// node's.
func startNAT() (err error) {
	nat.gateway = netip.MustParsePrefix("10.99.0.1/24")
	if nat.Server, err = natnet.Bridge("vznat", nat.gateway, 24*time.Hour); err != nil {
		return err
	}
	return os.Setenv("FAKEVZ_NAT", "vznat")
}

// settle waits for the frame switch, which outlives the last pod by some seconds, and
// the daemon that started it, so that it may be nobody's here.
func settle(d *testnode.Daemon) error {
	for end := time.Now().Add(15 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if !slices.ContainsFunc(testnode.Processes(), func(p testnode.Process) bool { return strings.HasPrefix(p.Command, d.Bin+" switch ") }) {
			return nil
		}
		if time.Now().After(end) {
			return errors.New("the frame switch is there 15 s after the last pod")
		}
	}
}

// macPod is a pod with a web server.
type macPod struct {
	*cri.Pod
	name, ip, mac, idle string
}

func newMacPod(t *testing.T, name string, change ...func(*runtimeapi.PodSandboxConfig)) *macPod {
	t.Helper()
	cfg := podConfig(name)
	for _, f := range change {
		f(cfg)
	}
	p := &macPod{Pod: newPod(t, cfg), name: name}
	p.ip = p.Sandbox(t, p.ID).GetNetwork().GetIp()
	a, err := netip.ParseAddr(p.ip)
	if err != nil || !nat.gateway.Contains(a) { // T42
		t.Fatalf("pod %s has the address %q, %v", name, p.ip, err)
	}
	p.mac = nat.MAC(a)
	web := p.Start(t, "web")
	cri.WaitForLog(t, p.Container(t, web).GetLogPath(), "listening")
	p.idle = p.Start(t, "idle", cri.AsRoot, cri.Command("/bin/sleep", "infinity"))
	return p
}

// reaches says whether p gets other's page by its address.
func (p *macPod) reaches(t *testing.T, other *macPod) error {
	t.Helper()
	return p.gets(t, "http://"+other.ip+":3000/", "hello from "+other.name+"\n")
}

func (p *macPod) gets(t *testing.T, url, want string) error {
	t.Helper()
	if r := p.Do(t, p.idle, "/bin/get", url); r.Stdout != want {
		return fmt.Errorf("pod %s (%s) from %s: %q, %q", p.name, p.ip, url, r.Stdout, r.Stderr)
	}
	return nil
}

// connected: the pods reach each other and the host, and the host reaches them.
func connected(t *testing.T, web string, pods ...*macPod) {
	t.Helper()
	for _, p := range pods {
		cri.Eventually(t, 15*time.Second, "the host reaches "+p.name, func() error {
			got, err := get("http://" + p.ip + ":3000/")
			if err == nil && got != "hello from "+p.name+"\n" {
				err = fmt.Errorf("%q", got)
			}
			return err
		})
		cri.Eventually(t, 15*time.Second, p.name+" reaches the host", func() error { return p.gets(t, web, "the host's page") })
		for _, other := range pods {
			if other != p {
				cri.Eventually(t, 15*time.Second, p.name+" reaches "+other.name, func() error { return p.reaches(t, other) })
			}
		}
	}
}

// hostPage serves a page at the NAT's gateway.
func hostPage(t *testing.T) (url string) {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(nat.gateway.Addr().String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "the host's page") })}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return "http://" + l.Addr().String() + "/"
}

// processOf finds the one process of the suite's daemon with that command and argument,
// whoever its parent is: those that outlive a daemon are no longer this process's.
func processOf(t *testing.T, command, argument string) int {
	t.Helper()
	var found []int
	for _, p := range testnode.Processes() {
		if args := strings.Fields(p.Command); len(args) > 2 && args[0] == suite.daemon.Bin && args[1] == command && strings.Contains(args[2], argument) {
			found = append(found, p.PID)
		}
	}
	if len(found) != 1 {
		t.Fatalf("processes of %s %s: %v", command, argument, found)
	}
	return found[0]
}

func kill(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
}

// Two pods behind a NAT that keeps machines apart reach each other, the host and the
// host them, whoever of the daemon and the frame switch is killed. Their addresses are
// the host's DHCP server's, which is asked again in time, and told when a pod ends.
func TestMacNetwork(t *testing.T) {
	d, page := suite.daemon, hostPage(t)
	a := newMacPod(t, "mac-a")
	b := newMacPod(t, "mac-b")
	if a.ip == b.ip || a.mac == b.mac {
		t.Fatalf("both pods have %s and %s", a.ip, a.mac)
	}
	t.Run("at once", func(t *testing.T) { connected(t, page, a, b) })

	t.Run("the switch is killed", func(t *testing.T) {
		pid := processOf(t, "switch", "")
		kill(t, pid, syscall.SIGKILL)
		connected(t, page, a, b)
		if again := processOf(t, "switch", ""); again == pid {
			t.Error("it was not killed")
		}
	})
	t.Run("the daemon is killed", func(t *testing.T) {
		pid := processOf(t, "switch", "")
		d.Kill()
		if got, err := get("http://" + a.ip + ":3000/"); err != nil || got != "hello from mac-a\n" {
			t.Errorf("without a daemon: %q, %v", got, err)
		}
		if err := d.Start(); err != nil {
			t.Fatal(err)
		}
		if err := suite.Redial(); err != nil {
			t.Fatal(err)
		}
		if again := processOf(t, "switch", ""); again != pid {
			t.Error("the switch didn't survive")
		}
		connected(t, page, a, b)
	})
	t.Run("both are killed", func(t *testing.T) {
		d.Kill()
		kill(t, processOf(t, "switch", ""), syscall.SIGKILL)
		if err := d.Start(); err != nil {
			t.Fatal(err)
		}
		if err := suite.Redial(); err != nil {
			t.Fatal(err)
		}
		connected(t, page, a, b)
	})

	// T48: a day's lease is renewed after a sleep, and by the clock when half is over.
	t.Run("leases are renewed", func(t *testing.T) {
		if n := nat.Heard("renew", a.mac); n != 0 {
			t.Fatalf("renewed %d times for no reason", n)
		}
		nat.Answer(natnet.Well, 12*time.Second)
		defer nat.Answer(natnet.Well, 24*time.Hour)
		shim := processOf(t, "shim", a.ID)
		kill(t, shim, syscall.SIGSTOP)
		time.Sleep(11 * time.Second)
		kill(t, shim, syscall.SIGCONT)
		cri.Eventually(t, 12*time.Second, "a renewal after the sleep", func() error { return renewed(a.mac, 1) })
		cri.Eventually(t, 20*time.Second, "a renewal by the clock", func() error { return renewed(a.mac, 2) })
		if n := nat.Heard("renew", b.mac); n != 0 {
			t.Errorf("the other pod's shim slept, too: %d renewals", n)
		}
		connected(t, page, a, b)
	})

	t.Run("a pod's end", func(t *testing.T) {
		if !nat.Held(a.mac) || !nat.Held(b.mac) {
			t.Fatal("the server has no leases")
		}
		if _, err := a.StopPodSandbox(cri.Timeout(t, cri.CallTimeout), &runtimeapi.StopPodSandboxRequest{PodSandboxId: a.ID}); err != nil {
			t.Fatal(err)
		}
		if nat.Held(a.mac) {
			t.Error("the lease was not given back")
		}
		if !nat.Held(b.mac) {
			t.Error("the other pod's lease was")
		}
		c := newMacPod(t, "mac-c")
		if c.mac == a.mac || c.mac == b.mac { // T48
			t.Errorf("the third pod has the MAC %s of another", c.mac)
		}
		connected(t, page, b, c)
	})
}

func renewed(mac string, least int) error {
	if n := nat.Heard("renew", mac); n < least {
		return fmt.Errorf("renewed %d times", n)
	}
	return nil
}

// T42: a pod without an address isn't made, and who asked for it learns why.
// Which answers are none is tested of the agent.
func TestMacNetworkWithoutDHCP(t *testing.T) {
	nat.Answer(natnet.Silent, 0)
	defer nat.Answer(natnet.Well, 0)
	_, err := runPod(cri.Timeout(t, cri.CallTimeout), podConfig("no-address"))
	cri.WantError(t, err, codes.Unavailable, "sandbox set-up", "DHCP on eth0", "no answer to DISCOVER", "bootpd")
}

// Ports of the host lead to the pod by way of its shim.
func TestMacHostPorts(t *testing.T) {
	const everywhere, loopback = 12080, 12081
	ports := func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.PortMappings = []*runtimeapi.PortMapping{
			{ContainerPort: 3000, HostPort: everywhere},
			{ContainerPort: 3000, HostPort: loopback, HostIp: "127.0.0.1"},
			{ContainerPort: 3001}, // not published
		}
	}
	p := newMacPod(t, "mac-ports", ports)
	answers := func(t *testing.T) {
		t.Helper()
		for _, at := range []string{"127.0.0.1", "[::1]", nat.gateway.Addr().String()} {
			if got, err := get("http://" + at + ":" + strconv.Itoa(everywhere) + "/"); err != nil || got != "hello from mac-ports\n" {
				t.Errorf("%s: %q, %v", at, got, err)
			}
		}
		if got, err := get("http://127.0.0.1:" + strconv.Itoa(loopback) + "/"); err != nil || got != "hello from mac-ports\n" {
			t.Errorf("%q, %v", got, err)
		}
	}
	t.Run("answer", answers)
	t.Run("on one address only", func(t *testing.T) {
		if got, err := get("http://" + nat.gateway.Addr().String() + ":" + strconv.Itoa(loopback) + "/"); err == nil {
			t.Errorf("%q", got)
		}
	})
	t.Run("survive the daemon", func(t *testing.T) {
		suite.daemon.Kill()
		answers(t)
		if err := suite.daemon.Start(); err != nil {
			t.Fatal(err)
		}
		if err := suite.Redial(); err != nil {
			t.Fatal(err)
		}
		answers(t)
	})
	t.Run("what can't be published", func(t *testing.T) {
		before, err := objects(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name string
			m    *runtimeapi.PortMapping
			want []string
		}{
			{"a port that is taken", &runtimeapi.PortMapping{ContainerPort: 1, HostPort: everywhere}, []string{"host port 12080", "address already in use", "choose another port"}},
			{"UDP", &runtimeapi.PortMapping{ContainerPort: 53, HostPort: 12053, Protocol: runtimeapi.Protocol_UDP}, []string{"host port 12053/udp", "TCP"}},
			{"no address of the host's", &runtimeapi.PortMapping{ContainerPort: 1, HostPort: 12082, HostIp: "192.0.2.1"}, []string{"host port 12082", "no such address"}},
		} {
			cfg := podConfig("mac-refused")
			cfg.PortMappings = []*runtimeapi.PortMapping{tt.m}
			_, err := runPod(cri.Timeout(t, cri.CallTimeout), cfg)
			cri.WantError(t, err, codes.FailedPrecondition, tt.want...)
		}
		if after, err := objects(t.Context()); err != nil || !slices.Equal(before, after) {
			t.Errorf("left: %v, before: %v, %v", after, before, err)
		}
		answers(t)
	})
	t.Run("are gone with the pod", func(t *testing.T) {
		if _, err := p.StopPodSandbox(cri.Timeout(t, cri.CallTimeout), &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
			t.Fatal(err)
		}
		for _, port := range []int{everywhere, loopback} {
			l, err := net.Listen("tcp", ":"+strconv.Itoa(port))
			if err != nil {
				t.Error(err)
				continue
			}
			l.Close()
		}
	})
}
