//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/cri-vz/cri-vz/guest/api"
	"golang.org/x/sys/unix"
)

// setupTimeout bounds what pod-init does in SetUpSandbox: some rtnetlink calls.
const setupTimeout = 30 * time.Second

// SetUpSandbox makes the pod's namespaces and network, once per VM. After a
// failure the VM is good for nothing but Shutdown: the host makes another.
func (a *Agent) SetUpSandbox(ctx context.Context, r *api.SetUpSandboxRequest) (*api.SetUpSandboxResponse, error) {
	ids, err := parseIDMaps(r.UidMappings, r.GidMappings)
	if err != nil {
		return nil, fmt.Errorf("set up sandbox: %w", err)
	}
	switch r.PidMode {
	case api.NamespaceMode_POD, api.NamespaceMode_CONTAINER, api.NamespaceMode_NODE:
	default:
		return nil, invalidf("set up sandbox: pid mode %v", r.PidMode)
	}
	setup, err := parseSetup(r, ids)
	if err != nil {
		return nil, fmt.Errorf("set up sandbox: %w", err)
	}
	a.mu.Lock()
	if a.sandbox != nil {
		a.mu.Unlock()
		return nil, existsf("set up sandbox: this VM has one")
	}
	sb := &sandbox{forked: make(chan struct{}), pidMode: r.PidMode, ids: ids, pidsMax: r.PidsMax}
	a.sandbox = sb
	a.mu.Unlock()
	close(a.setUpBegun)
	defer close(a.setUpEnded)

	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	var s stepper
	// Before anything that takes time stamps or random numbers.
	s.run("clock", func() error { return setClock(r.UnixNanos) })
	s.run("entropy", func() error { return addEntropy(r.Entropy) })
	s.run("boot", func() error { return a.await(ctx, a.networked) })
	for i, in := range r.Interfaces {
		if in.Dhcp {
			s.run("DHCP on "+setup.Interfaces[i].Name, func() (err error) {
				sb.dhcp, err = startDHCP(ctx, r, setup, i)
				return err
			})
		}
	}
	// The guest's own namespaces are the pod's: nobody else is in them, and to make others,
	// to move the NICs there and to wait until pod-init has set them up takes an emulated
	// guest 130 ms. A pod with a user namespace needs some that belong to that.
	apart := ids != nil || os.Getpid() != 1 // tests
	sb.proc = "/proc/self"
	if apart {
		s.run("pod-init", func() error {
			if err := a.forkPodInit(sb, apart); err != nil {
				return err
			}
			sb.proc = "/proc/" + strconv.Itoa(sb.pod.pid)
			return nil
		})
	}
	s.run("network namespace", func() (err error) {
		sb.netns, err = os.Open(sb.proc + "/ns/net")
		return err
	})
	s.run("find interfaces", func() error {
		for i, in := range r.Interfaces {
			link, err := linkByMAC(in.Mac)
			if err != nil {
				return err
			}
			setup.Interfaces[i].Index, setup.Interfaces[i].mac = link.Index, link.HardwareAddr
			if !apart {
				continue
			}
			if err := moveLink(link.Index, sb.pod.pid); err != nil {
				return fmt.Errorf("move %s into the pod's network namespace: %w", link.Name, err)
			}
		}
		return nil
	})
	if ids != nil {
		s.run("user namespace", func() error { return a.useIDMaps(sb.pod.pid) })
	}
	s.run("pod files", func() error { return a.writePodFiles(r, ids) })
	switch {
	case s.err != nil:
	case apart:
		reply, err := sb.pod.call(ctx, &message{Op: opSetup, Setup: setup}, nil)
		s.steps, s.err = append(s.steps, reply.steps...), err
	default:
		setup.apply(&s)
	}
	resp := &api.SetUpSandboxResponse{}
	if s.err == nil && sb.dhcp != nil {
		s.run("announce", func() error {
			return sb.dhcp.announce(sb.netns, setup, func(err error) { a.log.Printf("announce: %v", err) })
		})
		resp.Lease = sb.dhcp.lease.api()
	}
	if s.err != nil {
		return nil, fmt.Errorf("set up sandbox: %w", s.err)
	}
	for _, in := range setup.Interfaces {
		if len(in.Addresses) > 0 && !sb.address.IsValid() {
			sb.address = in.Addresses[0].Addr()
		}
	}
	a.mu.Lock()
	sb.ready = true
	a.mu.Unlock()
	if !apart {
		// The first container needs it, and an emulated guest starts it in 40 ms.
		go func() {
			defer a.crash()
			a.awaitAnswer()
			if err := a.forkPodInit(sb, apart); err != nil {
				a.log.Printf("%v: the pod is lost", err)
				a.end()
			}
		}()
	}
	resp.Steps = apiSteps(s.steps)
	return resp, nil
}

// forkPodInit ends with sb.pod or an error, and sb.forked closed.
func (a *Agent) forkPodInit(sb *sandbox, apart bool) error {
	defer close(sb.forked)
	pod, err := startPodInit(a.reaper, a.paths.exe, apart, sb.pidMode == api.NamespaceMode_POD, sb.ids)
	if err != nil {
		return err
	}
	// T25: a container that eats all memory must not take the pod's parent
	// along. What it forks sets its own value.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pod.pid), []byte("-999"), 0); err != nil {
		// Tests may run without CAP_SYS_RESOURCE; a guest is no worse than unprotected.
		a.log.Printf("protect pod-init from the OOM killer: %v", err)
	}
	sb.pod = pod
	go a.watchPodInit(pod)
	return nil
}

// podInit waits for pod-init.
func (sb *sandbox) podInit(ctx context.Context) (*podClient, error) {
	select {
	case <-sb.forked:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for pod-init: %w", ctx.Err())
	}
	if sb.pod == nil {
		return nil, unavailablef("there is no pod-init")
	}
	return sb.pod, nil
}

func apiSteps(steps []namedStep) []*api.Step {
	out := make([]*api.Step, len(steps))
	for i, s := range steps {
		out[i] = &api.Step{Name: s.Name, Nanos: s.Nanos}
	}
	return out
}

// parseSetup checks a request before anything is done for it.
func parseSetup(r *api.SetUpSandboxRequest, ids *idMaps) (*podSetup, error) {
	s := &podSetup{Hostname: r.Hostname, Sysctls: map[string]string{}}
	if len(r.Hostname) > 64 {
		return nil, invalidf("hostname %q is longer than 64 bytes", r.Hostname)
	}
	if len(r.Entropy) > maxEntropy {
		return nil, invalidf("%d bytes of entropy are more than %d", len(r.Entropy), maxEntropy)
	}
	leased := false
	for _, in := range r.Interfaces {
		p := podInterface{Name: in.Name, MTU: in.Mtu}
		if p.Name == "" {
			p.Name = "eth0"
		}
		if len(p.Name) >= unix.IFNAMSIZ || p.Name == "lo" || strings.ContainsAny(p.Name, "/ \x00") {
			return nil, invalidf("interface name %q", in.Name)
		}
		if in.SetMac != "" {
			mac, err := net.ParseMAC(in.SetMac)
			if err != nil || len(mac) != 6 {
				return nil, invalidf("interface %s: MAC %q", p.Name, in.SetMac)
			}
			p.SetMAC = mac
		}
		for _, text := range in.Addresses {
			a, err := netip.ParsePrefix(text)
			if err != nil {
				return nil, invalidf("interface %s: %w", p.Name, err)
			}
			p.Addresses = append(p.Addresses, a)
		}
		if in.Dhcp && (leased || len(p.Addresses) > 0) {
			return nil, invalidf("interface %s: DHCP gives one interface its one address", p.Name)
		}
		leased = leased || in.Dhcp
		s.Interfaces = append(s.Interfaces, p)
	}
	for _, route := range r.Routes {
		p := podRoute{Interface: route.Interface, Metric: route.Metric}
		var err error
		if route.Gateway != "" {
			if p.Gateway, err = netip.ParseAddr(route.Gateway); err != nil {
				return nil, invalidf("route to %q: gateway: %w", route.Destination, err)
			}
		}
		if route.Source != "" {
			if p.Source, err = netip.ParseAddr(route.Source); err != nil {
				return nil, invalidf("route to %q: source: %w", route.Destination, err)
			}
		}
		switch {
		case route.Destination != "":
			if p.Destination, err = netip.ParsePrefix(route.Destination); err != nil {
				return nil, invalidf("route: %w", err)
			}
		case p.Gateway.Is6():
			p.Destination = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		default:
			p.Destination = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		if p.Gateway.Is4() && p.Destination.Addr().Is6() {
			return nil, invalidf("route to %s: gateway %s is of another family", p.Destination, p.Gateway)
		}
		if p.Interface == "" {
			if len(s.Interfaces) == 0 {
				return nil, invalidf("route to %s: the pod has no interface", p.Destination)
			}
			p.Interface = s.Interfaces[0].Name
		}
		s.Routes = append(s.Routes, p)
	}
	// As under other runtimes: ping works without a capability, and so do ports below
	// 1024, which are no privilege where nobody shares the address.
	s.Sysctls["net.ipv4.ping_group_range"] = "0 " + strconv.Itoa(ids.lastGroup())
	s.Sysctls["net.ipv4.ip_unprivileged_port_start"] = "0"
	for name, value := range r.Sysctls {
		if _, err := sysctlPath(name); err != nil {
			return nil, err
		}
		s.Sysctls[name] = value
	}
	return s, nil
}

// shmSize is the pod-wide /dev/shm's, as in Docker and containerd (T26).
const shmSize = "67108864"

// writePodFiles makes what agent:// names.
func (a *Agent) writePodFiles(r *api.SetUpSandboxRequest, ids *idMaps) error {
	dir := filepath.Join(a.paths.run, "pod")
	shm := filepath.Join(dir, "shm")
	if err := os.MkdirAll(shm, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("shm", shm, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777,size="+shmSize); err != nil {
		return fmt.Errorf("mount the pod's /dev/shm: %w", err)
	}
	if err := ids.giveToRoot(shm); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"resolv.conf": resolvConf(r.Dns),
		"hosts":       hosts(r),
		"hostname":    r.Hostname + "\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
		if err := ids.giveToRoot(path); err != nil {
			return err
		}
	}
	return nil
}

func resolvConf(d *api.DNS) string {
	var b strings.Builder
	if len(d.GetSearches()) > 0 {
		b.WriteString("search " + strings.Join(d.Searches, " ") + "\n")
	}
	for _, s := range d.GetServers() {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(d.GetOptions()) > 0 {
		b.WriteString("options " + strings.Join(d.Options, " ") + "\n")
	}
	return b.String()
}

func hosts(r *api.SetUpSandboxRequest) string {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	for _, i := range r.Interfaces {
		for _, a := range i.Addresses {
			if r.Hostname != "" {
				ip, _, _ := strings.Cut(a, "/")
				b.WriteString(ip + "\t" + r.Hostname + "\n")
			}
		}
	}
	for _, alias := range r.HostAliases {
		b.WriteString(alias.Address + "\t" + strings.Join(alias.Names, " ") + "\n")
	}
	return b.String()
}

// clockTolerance is an error of the clock that is left alone: the message took some
// of it, and a step backwards is worse for programs.
const clockTolerance = 100 * time.Millisecond

// SetClock sets the guest's clock if it is wrong.
func (a *Agent) SetClock(_ context.Context, r *api.SetClockRequest) (*api.SetClockResponse, error) {
	if r.UnixNanos <= 0 {
		return nil, invalidf("set clock: %d is no time", r.UnixNanos)
	}
	off := time.Until(time.Unix(0, r.UnixNanos))
	if off.Abs() <= clockTolerance {
		return &api.SetClockResponse{}, nil
	}
	if err := setClock(r.UnixNanos); err != nil {
		return nil, err
	}
	a.log.Printf("the clock was off and is set: it moved by %v", off)
	return &api.SetClockResponse{}, nil
}

// setClock sets the clock to unix nanoseconds; 0 leaves it.
func setClock(nanos int64) error {
	if nanos == 0 {
		return nil
	}
	ts := unix.NsecToTimespec(nanos)
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set clock: %w", err)
	}
	return nil
}

const maxEntropy = 512

// addEntropy mixes bytes into the kernel's pool and makes it reseed, so that
// pods cloned from one snapshot differ.
func addEntropy(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	const rndReseedCRNG = 0x5207
	// struct rand_pool_info: bits, bytes, data.
	info := binary.NativeEndian.AppendUint32(nil, uint32(len(b)*8))
	info = binary.NativeEndian.AppendUint32(info, uint32(len(b)))
	info = append(info, b...)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info[0]))); e != 0 {
		return fmt.Errorf("add entropy: %w", e)
	}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndReseedCRNG, 0); e != 0 {
		return fmt.Errorf("reseed random numbers: %w", e)
	}
	return nil
}
