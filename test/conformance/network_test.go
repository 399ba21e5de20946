//go:build linux

package conformance_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

func TestNetworkFiles(t *testing.T) {
	p := sharedPodOf(t)
	for _, c := range []struct{ promise, file, want string }{
		{"host name", "/etc/hostname", `^` + p.Config.GetHostname() + `\n$`},
		{"DNS", "/etc/resolv.conf", `(?s)search example.test\n.*nameserver 192.0.2.53\n.*options ndots:3\n`},
	} {
		t.Run(c.promise, func(t *testing.T) {
			if got := p.Output(t, p.Idle, "/bin/cat", c.file); !regexp.MustCompile(c.want).MatchString(got) {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
	if got := p.Output(t, p.Idle, "/bin/hostname"); got != "shared-pod\n" && got != p.Config.GetHostname()+"\n" {
		t.Errorf("host name %q", got)
	}
}

// The node reaches a pod by its address as soon as something listens, and by the
// host ports that were asked for, on TCP and UDP.
func TestPodNetwork(t *testing.T) {
	cfg := podConfig("ports")
	cfg.PortMappings = []*runtimeapi.PortMapping{
		{ContainerPort: 3000, HostPort: 12000},
		{ContainerPort: 3001, HostPort: 12001, HostIp: "127.0.0.1"},
		{ContainerPort: 3002, HostPort: 12002, Protocol: runtimeapi.Protocol_UDP},
		{ContainerPort: 3003}, // without a host port
	}
	p := newPod(t, cfg)
	ip := p.Sandbox(t, p.ID).GetNetwork().GetIp()
	if _, err := netip.ParseAddr(ip); err != nil {
		t.Fatal(err)
	}
	for _, port := range []string{"3000", "3001"} {
		id := p.Start(t, "web-"+port, cri.Env("PORT", port))
		cri.WaitForLog(t, p.Container(t, id).GetLogPath(), "listening")
	}
	udp := p.Start(t, "udp", cri.Command("/app/web", "udp-echo", "3002"))
	cri.WaitForLog(t, p.Container(t, udp).GetLogPath(), "listening")
	for _, c := range []struct{ promise, address string }{
		{"address of the pod", ip + ":3000"},
		{"host port", "127.0.0.1:12000"},
		{"host port on one address of the node", "127.0.0.1:12001"},
	} {
		t.Run(c.promise, func(t *testing.T) {
			if got, err := get("http://" + c.address + "/"); err != nil || got != "hello from ports\n" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	t.Run("host port on UDP", func(t *testing.T) {
		if got, err := udpExchange("127.0.0.1:12002", "hello"); err != nil || got != "hello" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("nothing answers when the pod is gone", func(t *testing.T) {
		if _, err := p.StopPodSandbox(cri.Timeout(t, cri.CallTimeout), &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
			t.Fatal(err)
		}
		if got, err := get("http://127.0.0.1:12000/"); err == nil {
			t.Errorf("%q", got)
		}
	})
}

// udpExchange sends a datagram until an answer comes.
func udpExchange(address, text string) (string, error) {
	c, err := net.Dial("udp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	buf := make([]byte, 1500)
	for range 10 {
		if _, err := io.WriteString(c, text); err != nil {
			return "", err
		}
		if err := c.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			return "", err
		}
		n, err := c.Read(buf)
		if err == nil {
			return string(buf[:n]), nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return "", err
		}
	}
	return "", fmt.Errorf("no answer from %s", address)
}

func get(url string) (string, error) {
	resp, err := (&http.Client{Timeout: 5 * time.Second}).Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}
