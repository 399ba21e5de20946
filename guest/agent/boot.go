//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// step is one named part of the boot.
type step struct {
	name string
	run  func(*bootState) error
}

// bootState is what the steps share.
type bootState struct {
	*Agent
	emulated  bool // the machine's CPU is
	initramfs int  // the initial root directory, where the modules lie
	modules   []string
	control   net.Listener
	data      net.Listener
}

// Boot goes in three lists. What fails in the first is fatal: without it nobody
// can be told. The second ends with the host being able to connect; a failure
// there is fatal too. The third runs while the host is connecting already, and
// what fails there is reported in Hello and by the calls that need it.
var (
	bootEarly = []step{
		{"mount proc, sys and dev", mountKernel},
		{"console", openConsole},
		{"command line", readCommandLine},
		{"root", moveRoot},
		{"scheduling", schedule},
	}
	bootTransport = []step{
		{"vsock modules", loadTransport},
		{"listen", listen},
	}
	bootRest = []struct {
		step
		part string // of Agent.missing
	}{
		{step{"network modules", loadNetwork}, ""},
		{step{"sandbox can be set up", func(b *bootState) error { close(b.networked); return nil }}, ""},
		{step{"sandbox set-up", awaitSetUp}, ""},
		{step{"kernel settings", kernelSettings}, ""},
		{step{"modules", loadRest}, ""},
		{step{"cgroups", mountCgroups}, "cgroup"},
		{step{"scratch disk", mountScratch}, "scratch"},
		{step{"layers", mountLayersShare}, "layers"},
		{step{"volumes", mountVolumesShare}, "volumes"},
		{step{"Rosetta", useRosetta}, ""},
		{step{"protect the root", sealRoot}, ""},
	}
)

// RunInit is the main function of PID 1. It does not return: it ends by
// powering the machine off.
func RunInit() {
	log := &logger{w: os.Stderr}
	a := newAgent(guestPaths, log)
	defer a.crash()
	b := &bootState{Agent: a}
	for _, list := range [][]step{bootEarly, bootTransport} {
		for _, s := range list {
			if err := a.bootStep(s.name, func() error { return s.run(b) }); err != nil {
				log.Printf("boot failed: %s: %v", s.name, err)
				a.end()
			}
		}
	}
	go a.reaper.run(context.Background(), childSignals())
	errs := make(chan error, 2)
	go func() {
		defer a.crash()
		errs <- a.serveControl(b.control)
	}()
	go func() {
		defer a.crash()
		errs <- a.serveStreams(b.data)
	}()
	// The host dials when it reads this. It is no Printf: an emulated guest translates
	// the code of one for 10 ms.
	_, _ = os.Stderr.WriteString("cri-vz-agent: ready\r\n")
	for _, s := range bootRest {
		if err := a.bootStep(s.name, func() error { return s.run(b) }); err != nil {
			log.Printf("boot: %s: %v", s.name, err)
			if s.part != "" {
				a.bootMu.Lock()
				a.missing[s.part] = err
				a.bootMu.Unlock()
			}
		}
	}
	close(a.booted)
	log.Printf("the agent's server has ended: %v", <-errs)
	a.end()
}

func (a *Agent) bootStep(name string, f func() error) error {
	start := time.Now()
	err := f()
	took := time.Since(start)
	if err != nil {
		name += " (failed: " + err.Error() + ")"
	}
	a.bootMu.Lock()
	a.steps = append(a.steps, namedStep{name, int64(took)})
	a.bootMu.Unlock()
	a.log.Debugf("%s took %v", name, took)
	return err
}

// crash, deferred, turns a panic of a goroutine into the end of the machine: a
// half-dead agent would look like a living pod.
func (a *Agent) crash() {
	if v := recover(); v != nil {
		a.log.Printf("panic: %v: %s", v, debug.Stack())
		a.end()
	}
}

// powerOff does not return in a guest. Like every wait, the last sync has a
// bound: the scratch disk may be full or gone.
func powerOff() {
	if os.Getpid() != 1 {
		panic("power off called outside a guest")
	}
	synced := make(chan struct{})
	go func() {
		unix.Sync()
		close(synced)
	}()
	select {
	case <-synced:
	case <-time.After(time.Second):
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	// No way to power off: stop the machine in the other ways there are.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	os.Exit(1)
}

func mountKernel(b *bootState) error {
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	b.initramfs = fd
	unix.Umask(0o022)
	// T20: pivot_root refuses the initial root file system as the old root, for
	// the containers as well. Everything goes on a tmpfs that moves onto it.
	if err := os.MkdirAll("/root", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("root", "/root", "tmpfs", 0, "mode=755,size=1m"); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		source, target, fstype string
		flags                  uintptr
		data                   string
	}{
		{"proc", "proc", "proc", safe, ""},
		{"sysfs", "sys", "sysfs", safe, ""},
		{"devtmpfs", "dev", "devtmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=755"},
		{"devpts", "dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=620,ptmxmode=666,gid=5"},
		{"run", "run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
		{"layers", "l", "tmpfs", 0, "mode=755"}, // has a device node: the whiteout
	} {
		target := "/root/" + m.target
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// openConsole makes /dev/console the standard streams: the kernel could not
// give them to PID 1 if its console came later.
func openConsole(b *bootState) error {
	fd, err := unix.Open("/root/dev/console", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		// A guest without a console works, and says nothing.
		if fd, err = unix.Open("/root/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
	}
	defer unix.Close(fd)
	for std := range 3 {
		if err := unix.Dup3(fd, std, 0); err != nil {
			return os.NewSyscallError("dup3", err)
		}
	}
	return nil
}

func readCommandLine(b *bootState) error {
	line, err := os.ReadFile("/root/proc/cmdline")
	if err != nil {
		return err
	}
	for _, f := range strings.Fields(string(line)) {
		switch f {
		case "crivz.debug":
			b.log.debug = true
		case "crivz.emulated":
			b.emulated = true
		}
	}
	return nil
}

// moveRoot puts the new root in the initial one's place.
func moveRoot(b *bootState) error {
	const agent = "/root/agent"
	if err := os.WriteFile(agent, nil, 0o755); err != nil {
		return err
	}
	// A read-only bind mount instead of a copy: every process that the agent
	// forks executes through it, and no container can overwrite the binary by
	// way of /proc/PID/exe (runc CVE-2019-5736).
	self := "/init"
	if err := unix.Mount(self, agent, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", self, err)
	}
	if err := unix.Mount("", agent, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("make the agent read-only: %w", err)
	}
	if err := bindModules(); err != nil {
		return err
	}
	if err := os.Chdir("/root"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return os.NewSyscallError("chroot", err)
	}
	return os.Chdir("/")
}

// schedule has no process of an emulated guest interrupt another because it has
// something to do now: the agent's threads, and by inheritance all that come from them,
// are batch work. The switch to another process costs 0.1 ms and more there, as it
// empties the emulator's caches of addresses and code; a relay and the server that it
// serves take the CPU from each other with each packet. A failure costs speed only.
func schedule(b *bootState) error {
	if b.emulated {
		if err := batch(); err != nil {
			b.log.Printf("schedule as batch work: %v", err)
		}
	}
	return nil
}

// batch makes batch work of all the caller's threads.
func batch() error {
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_BATCH}
	for done := map[string]bool{}; ; {
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		before := len(done)
		for _, t := range threads {
			if done[t.Name()] {
				continue
			}
			done[t.Name()] = true
			tid, err := strconv.Atoi(t.Name())
			if err != nil {
				return err
			}
			if err := unix.SchedSetAttr(tid, &attr, 0); err != nil && err != unix.ESRCH {
				return os.NewSyscallError("sched_setattr", err)
			}
		}
		if len(done) == before {
			return nil // a thread's children are scheduled as it is
		}
	}
}

// bindModules makes what RunModprobe needs visible in the new root. The kernel's
// own threads share PID 1's root, and so does the program they start.
func bindModules() error {
	if !exists("/" + moduleOnDemand) {
		return nil
	}
	if err := os.WriteFile("/root/"+moduleOnDemand, nil, 0o644); err != nil {
		return err
	}
	if err := os.Mkdir("/root/modules", 0o755); err != nil {
		return err
	}
	for _, name := range []string{moduleOnDemand, "modules"} {
		if err := unix.Mount("/"+name, "/root/"+name, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", name, err)
		}
		if err := unix.Mount("", "/root/"+name, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", name, err)
		}
	}
	return nil
}

// loadTransport loads the listed modules that the way to vsock can be made of.
func loadTransport(b *bootState) error {
	lines, err := readModules(b.initramfs, moduleList, false)
	if err != nil {
		return err
	}
	for _, l := range lines {
		b.modules = append(b.modules, l[0])
	}
	return b.load(func(name string) bool {
		return strings.Contains(name, "vsock") || name == "virtio_pci" || name == "virtio" ||
			strings.HasPrefix(name, "virtio_ring") || strings.HasPrefix(name, "virtio_pci_")
	})
}

// loadNetwork loads what the pod's NIC needs.
func loadNetwork(b *bootState) error {
	// See RunModprobe. DHCP's sockets are the first to need it.
	err := os.WriteFile("/proc/sys/kernel/modprobe", []byte(b.paths.exe), 0)
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, b.load(func(name string) bool { return name == "virtio_net" || strings.HasSuffix(name, "failover") }))
}

func loadRest(b *bootState) error {
	err := b.load(func(string) bool { return true })
	unix.Close(b.initramfs)
	return err
}

// load loads those of the modules still to be loaded that match by name
// (without .ko, with _ for -), in the list's order, which is that of their
// dependencies.
func (b *bootState) load(match func(name string) bool) error {
	var errs []error
	var later []string
	for _, m := range b.modules {
		name := strings.ReplaceAll(strings.TrimSuffix(filepath.Base(m), ".ko"), "-", "_")
		if !match(name) {
			later = append(later, m)
		} else if err := loadModule(b.initramfs, m); err != nil {
			errs = append(errs, err)
		}
	}
	b.modules = later
	return errors.Join(errs...)
}

func listen(b *bootState) error {
	var err error
	if b.control, err = listenVsock(api.PortControl); err != nil {
		return err
	}
	b.data, err = listenVsock(api.PortData)
	return err
}

// listenVsock listens on every CID: the guest's own may change (QEMU after
// hot-plug or restore), and a listener bound to it would go deaf.
func listenVsock(port uint32) (net.Listener, error) {
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
	if err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	return hostOnly{l}, nil
}

// hostOnly accepts connections of the host only: containers have AF_VSOCK too.
type hostOnly struct{ net.Listener }

func (l hostOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if addr, ok := c.RemoteAddr().(*vsock.Addr); ok && addr.ContextID == unix.VMADDR_CID_HOST {
			return c, nil
		}
		c.Close()
	}
}

// serveControl serves the API until l is closed.
func (a *Agent) serveControl(l net.Listener) error {
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(
		func(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
			defer a.crash()
			start := time.Now()
			resp, err := method(ctx, unmarshal)
			a.log.Debugf("%s took %v: %v", info.FullMethod, time.Since(start), err)
			return resp, statusOf(err)
		}))
	if err != nil {
		return err
	}
	api.RegisterAgentService(server, a)
	return server.Serve(context.Background(), controlListener{l, a})
}

// controlListener's connections tell when the answer to SetUpSandbox has been sent:
// the first that is written after that has ended, or another one shortly before it.
type controlListener struct {
	net.Listener
	a *Agent
}

func (l controlListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return controlConn{c, l.a}, nil
}

type controlConn struct {
	net.Conn
	a *Agent
}

func (c controlConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if isDone(c.a.setUpEnded) {
		c.a.sent()
	}
	return n, err
}

// kernelSettings are what a node's administrator or systemd sets elsewhere.
func kernelSettings(b *bootState) error {
	// T25
	errs := []error{os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)}
	for name, value := range map[string]string{
		// The kernel's default, made for small machines, is too low for a pod of
		// databases; these are what distributions and container hosts set.
		"vm/max_map_count":                 "262144",
		"fs/inotify/max_user_instances":    "8192",
		"fs/inotify/max_user_watches":      "524288",
		"kernel/keys/maxkeys":              "10000",
		"kernel/keys/maxbytes":             "1000000",
		"vm/overcommit_memory":             "1",
		"kernel/unprivileged_bpf_disabled": "1",
	} {
		err := os.WriteFile("/proc/sys/"+name, []byte(value), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// setUpFirst is how long the rest of the boot waits for the host to ask for the
// sandbox. It asks at once; the bound is for one that has something else in mind.
const setUpFirst = 300 * time.Millisecond

// awaitSetUp lets the sandbox's set-up go first. It is what the host waits for,
// and an emulated guest has one CPU for both. Whoever needs the boot ends the wait.
func awaitSetUp(b *bootState) error {
	select {
	case <-b.setUpBegun:
	case <-b.bootWanted:
	case <-time.After(setUpFirst):
	}
	if isDone(b.setUpBegun) {
		select {
		case <-b.setUpEnded: // bounded: setupTimeout
			b.awaitAnswer()
		case <-b.bootWanted:
		}
	}
	return nil
}

// answerWithin bounds the wait for an answer whose host has hung up.
const answerWithin = 100 * time.Millisecond

// awaitAnswer waits until the answer to SetUpSandbox is on its way, or somebody needs
// what is to come after it.
func (a *Agent) awaitAnswer() {
	select {
	case <-a.answered:
	case <-a.bootWanted:
	case <-time.After(answerWithin):
	}
}

func mountCgroups(b *bootState) error {
	dir := b.paths.cgroup
	if err := unix.Mount("cgroup2", dir, "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount cgroup2: %w", err)
	}
	if err := enableControllers(dir); err != nil {
		return err
	}
	pod := filepath.Join(dir, "pod")
	if err := os.Mkdir(pod, 0o755); err != nil {
		return err
	}
	return enableControllers(pod)
}

// mountScratch finds the scratch disk by its serial number.
func mountScratch(b *bootState) error {
	device, err := diskBySerial("/sys/block", api.DiskScratch)
	if err != nil {
		return err
	}
	dir := b.paths.scratch
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	s := &scratch{dir: dir, device: device, quota: true}
	err = unix.Mount(device, dir, "ext4", unix.MS_NOATIME, "prjquota")
	if err != nil {
		// The disk or the kernel has no quotas: usage is counted by walking.
		s.quota = false
		err = unix.Mount(device, dir, "ext4", unix.MS_NOATIME, "")
	}
	if err != nil {
		return fmt.Errorf("mount %s as ext4: %w", device, err)
	}
	b.bootMu.Lock()
	b.scratch = s
	b.bootMu.Unlock()
	return nil
}

// diskBySerial returns the device of the block device with a serial number.
func diskBySerial(sys, serial string) (string, error) {
	entries, err := os.ReadDir(sys)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(sys, e.Name(), "serial"))
		if err == nil && strings.TrimSpace(string(b)) == serial {
			return "/dev/" + e.Name(), nil
		}
	}
	return "", fmt.Errorf("no disk has the serial number %q", serial)
}

func mountLayersShare(b *bootState) error {
	if err := b.layers.init(); err != nil {
		return err
	}
	return mountShare(api.ShareLayers, b.paths.layers, unix.MS_RDONLY)
}

func mountVolumesShare(b *bootState) error {
	return mountShare(api.ShareVolumes, b.paths.volumes, 0)
}

func mountShare(tag, dir string, flags uintptr) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(tag, dir, "virtiofs", flags|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("mount virtiofs share %q: %w", tag, err)
	}
	return nil
}

// sealRoot makes the root read-only: nothing has to be written there any more.
func sealRoot(*bootState) error {
	return unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
}
