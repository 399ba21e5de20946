package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/cri-vz/cri-vz/sandbox/qemu/vhostvsock"
	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

const (
	// guestCID is the same in every machine: a device of our own has no CID space
	// to share.
	guestCID = 3

	// exitGrace is how long the end of a helper may come before that of a QEMU
	// which ended first: its sockets close some time before it can be reaped.
	exitGrace = 200 * time.Millisecond

	// closeTimeout bounds Close's wait for processes that got SIGKILL. Freeing a
	// guest's memory takes well under a second.
	closeTimeout = 10 * time.Second
)

// machine is one QEMU and its helpers.
type machine struct {
	config    vmm.Config
	driver    *driver
	binary    string
	virtiofsd virtiofsd
	accel     Accel

	// Made by New, given up by release.
	mounts  []string
	vsock   *vhostvsock.Device
	boot    bootFiles
	disks   []*os.File
	console *os.File

	done chan struct{} // closed when nothing of the machine runs

	mu       sync.Mutex
	files    []*os.File // what QEMU inherits, until it runs
	started  bool
	dying    bool // its end has a cause, err
	err      error
	qemu     *child
	monitor  *qmpClient // of qemu, once that is ready for commands
	helpers  []*child
	shutdown string          // reason of QMP's SHUTDOWN event
	reported map[string]bool // disks whose errors are in the log

	closeOnce sync.Once
	closeErr  error
}

// bootFiles are descriptors of what QEMU loads.
type bootFiles struct {
	protocol       bootProtocol
	kernel, initrd *os.File
}

// closeFiles gives up the owner's copies of what QEMU inherits: a tap then ends with
// QEMU, and a copy of a kernel frees its memory.
func (m *machine) closeFiles() {
	m.mu.Lock()
	files := m.files
	m.files = nil
	m.mu.Unlock()
	for _, f := range files {
		_ = f.Close()
	}
}

// keep makes f one of the files that closeFiles closes.
func (m *machine) keep(f *os.File, err error) (*os.File, error) {
	if err == nil {
		m.mu.Lock()
		m.files = append(m.files, f)
		m.mu.Unlock()
	}
	return f, err
}

// prepare opens everything that the machine needs.
func (m *machine) prepare() (err error) {
	c := m.config
	if m.boot.protocol, err = kernelProtocol(c.Kernel, c.Arch); err != nil {
		return err
	}
	if m.boot.kernel, err = m.keep(openBootFile(c.Kernel)); err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	if c.Initrd != "" {
		if m.boot.initrd, err = m.keep(openBootFile(c.Initrd)); err != nil {
			return fmt.Errorf("initrd: %w", err)
		}
	}
	if m.console, err = m.keep(writeOnly(c.Console)); err != nil {
		return fmt.Errorf("console %s: %w", c.Console.Name(), err)
	}
	for _, d := range c.Disks {
		mode := os.O_RDWR
		if d.ReadOnly {
			mode = os.O_RDONLY
		}
		f, err := m.keep(os.OpenFile(d.Path, mode, 0))
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Serial, err)
		}
		m.disks = append(m.disks, f)
	}
	for i, s := range c.Shares {
		if !s.ReadOnly {
			continue
		}
		target := filepath.Join(c.RunDir, fmt.Sprintf("share-%d", i))
		if err := mountReadOnly(s.Dir, target); err != nil {
			return fmt.Errorf("share %s: %w", s.Tag, err)
		}
		m.mounts = append(m.mounts, target)
	}
	m.vsock = vhostvsock.New(guestCID)
	return nil
}

// openBootFile opens a file so that QEMU, whoever it runs as, can open it once more
// by /proc/self/fd. A file that not everyone may read is copied for that.
func openBootFile(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if os.Geteuid() != 0 || st.Mode().Perm()&0o004 != 0 {
		return f, nil
	}
	defer f.Close()
	fd, err := unix.MemfdCreate(filepath.Base(path), unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("copy %s to memory: %w", path, err)
	}
	dst := os.NewFile(uintptr(fd), path)
	if _, err := dst.ReadFrom(f); err != nil {
		return nil, errors.Join(fmt.Errorf("copy %s to memory: %w", path, err), dst.Close())
	}
	return dst, nil
}

// writeOnly duplicates f, or reopens it: QEMU takes a descriptor for its console
// only if that can't be read.
func writeOnly(f *os.File) (dup *os.File, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := raw.Control(func(fd uintptr) {
		flags, ferr := unix.FcntlInt(fd, unix.F_GETFL, 0)
		switch {
		case ferr != nil:
			err = ferr
		case flags&unix.O_ACCMODE == unix.O_WRONLY:
			n, derr := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
			if err = derr; err == nil {
				dup = os.NewFile(uintptr(n), f.Name())
			}
		default:
			dup, err = os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY|os.O_APPEND, 0)
		}
	})
	return dup, errors.Join(err, cerr)
}

// Start implements vmm.Machine.
func (m *machine) Start(ctx context.Context) error {
	m.mu.Lock()
	started, dying := m.started, m.dying
	m.started = true
	m.mu.Unlock()
	switch {
	case dying:
		return fmt.Errorf("machine %s: start: it was killed: %w", m.config.ID, errdefs.ErrFailedPrecondition)
	case started:
		return fmt.Errorf("machine %s: start: it was started already: %w", m.config.ID, errdefs.ErrFailedPrecondition)
	}
	if err := m.start(ctx); err != nil {
		m.die(err)
		// Bounded: everything has got SIGKILL.
		<-m.done
		if cause := m.Err(); cause != nil {
			err = cause
		}
		return fmt.Errorf("machine %s: start: %w", m.config.ID, err)
	}
	return nil
}

func (m *machine) start(ctx context.Context) (err error) {
	vm, err := m.launch()
	m.closeFiles() // what QEMU has not got now, it doesn't need
	if err != nil {
		// A QEMU that ran has a supervisor, which launch started last.
		m.die(err)
		go m.supervise(nil, nil)
		return err
	}
	// The greeting comes as soon as the monitor is open, but commands are answered
	// by the main loop, which runs when the machine does.
	if err := vm.execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		return m.startError(ctx, err)
	}
	var status struct {
		Status string `json:"status"`
	}
	if err := vm.execute(ctx, "query-status", nil, &status); err != nil {
		return m.startError(ctx, err)
	}
	if status.Status != "running" && status.Status != "shutdown" {
		return fmt.Errorf("qemu is in state %q, not running", status.Status)
	}
	m.mu.Lock()
	m.monitor = vm
	m.mu.Unlock()
	klog.V(2).InfoS("Started machine", "machine", m.config.ID, "arch", m.config.Arch, "accelerator", m.accel, "pids", m.PIDs())
	return nil
}

// startError prefers what ended the machine to what QMP saw of it.
func (m *machine) startError(ctx context.Context, err error) error {
	if ctx.Err() != nil || !errors.Is(err, errQMPClosed) {
		return err
	}
	select {
	case <-m.done:
		if cause := m.Err(); cause != nil {
			return cause
		}
	case <-ctx.Done():
	}
	return err
}

// launch starts all processes and the supervisor.
func (m *machine) launch() (_ *qmpClient, err error) {
	root := os.Geteuid() == 0
	inherited := []*os.File{} // by QEMU, as 3 and up
	inherit := func(f *os.File) int {
		inherited = append(inherited, f)
		return 2 + len(inherited)
	}
	var ours []*os.File // the children's ends, of no use here once they run
	defer func() {
		for _, f := range ours {
			_ = f.Close()
		}
	}()
	pair := func(name string) (net.Conn, int, error) {
		near, far, err := socketPair(name)
		if err != nil {
			return nil, 0, err
		}
		ours = append(ours, far)
		return near, inherit(far), nil
	}
	qmpConn, qmpFD, err := pair("qmp")
	if err != nil {
		return nil, err
	}
	vsockConn, vsockFD, err := pair("vsock")
	if err != nil {
		return nil, errors.Join(err, qmpConn.Close())
	}
	fail := func(err error) (*qmpClient, error) {
		return nil, errors.Join(err, qmpConn.Close(), vsockConn.Close())
	}

	a := newArguments(m, inherit)
	a.socket("qmp", qmpFD)
	a.add("-mon", "chardev=qmp,mode=control")
	a.socket("vsock", vsockFD)
	a.device(map[string]any{"driver": "vhost-user-vsock-pci", "chardev": "vsock"})
	var servers []shareServer
	for i, s := range m.config.Shares {
		server, conn, err := m.shareServer(i, s, root)
		if err != nil {
			return fail(fmt.Errorf("share %s: %w", s.Tag, err))
		}
		ours = append(ours, server.listener, conn)
		a.share(i, s, inherit(conn))
		servers = append(servers, server)
	}

	cmd := exec.Command(m.binary, a.list...)
	cmd.Dir = "/"
	if root {
		// No network, and none of the processes that run as the same user in sight.
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWPID,
			Credential: m.driver.credential(m.accel),
		}
	}
	vm, err := launch("qemu", cmd, inherited, false)
	if err != nil {
		return fail(err)
	}
	m.adopt(vm, true)
	// QEMU loads the kernel first, and needs them then.
	for _, s := range servers {
		c, err := launch("virtiofsd of share "+s.tag, s.cmd, []*os.File{s.listener}, s.keepCapabilities)
		if err != nil {
			m.die(err)
			break
		}
		m.adopt(c, false)
	}
	monitor := newQMPClient(qmpConn, m.event)
	go m.supervise(monitor, vsockConn.(*net.UnixConn))
	return monitor, nil
}

// shareServer is a virtiofsd to be started.
type shareServer struct {
	tag              string
	cmd              *exec.Cmd
	listener         *os.File
	keepCapabilities bool
}

// shareServer returns a share's server and a connection to it for QEMU; the caller
// closes both files.
func (m *machine) shareServer(i int, s vmm.Share, root bool) (server shareServer, conn *os.File, err error) {
	dir := s.Dir
	if s.ReadOnly {
		dir = filepath.Join(m.config.RunDir, fmt.Sprintf("share-%d", i))
	}
	cmd, err := m.virtiofsd.command(dir, s.ReadOnly, root, 3)
	if err != nil {
		return server, nil, err
	}
	cmd.Dir = "/"

	path := filepath.Join(m.config.RunDir, fmt.Sprintf("share-%d.sock", i))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return server, nil, err
	}
	defer l.Close() // and removes path: QEMU gets a connection, not an address
	// The connection waits in the listener's queue; if virtiofsd doesn't live to
	// accept it, QEMU sees it reset.
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return server, nil, err
	}
	defer c.Close()
	if conn, err = c.File(); err != nil {
		return server, nil, err
	}
	listener, err := l.File()
	if err != nil {
		return server, nil, errors.Join(err, conn.Close())
	}
	// T32: Debian 12's virtiofsd acts as the user who makes a file, without that
	// user's supplementary groups. The guest's kernel has checked the permission
	// with them; the owner and group are still whom it acts as.
	return shareServer{s.Tag, cmd, listener, root && !m.virtiofsd.rust}, conn, nil
}

// socketPair returns a connection and the file of its other end.
func socketPair(name string) (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("%s socket: %w", name, err)
	}
	near, far := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name)
	defer near.Close()
	conn, err := net.FileConn(near)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("%s socket: %w", name, err), far.Close())
	}
	return conn, far, nil
}

// adopt makes c a process of the machine, which may be dying already.
func (m *machine) adopt(c *child, qemu bool) {
	m.mu.Lock()
	if qemu {
		m.qemu = c
	} else {
		m.helpers = append(m.helpers, c)
	}
	dying := m.dying
	m.mu.Unlock()
	if dying {
		c.kill()
	}
}

// die ends the machine; the first cause is what Err reports.
func (m *machine) die(cause error) {
	m.mu.Lock()
	first := !m.dying
	if first {
		m.dying, m.err = true, cause
	}
	children := m.children()
	m.mu.Unlock()
	if first && cause != nil {
		klog.V(2).InfoS("Machine died", "machine", m.config.ID, "reason", cause) // the caller has it from Err
	}
	for _, c := range children {
		c.kill()
	}
}

// children returns all processes, QEMU first. m.mu is held.
func (m *machine) children() []*child {
	if m.qemu == nil {
		return slices.Clone(m.helpers)
	}
	return append([]*child{m.qemu}, m.helpers...)
}

// supervise sees to it that the machine ends as one, and closes done when it has.
// monitor and conn are nil if there is no QEMU.
func (m *machine) supervise(monitor *qmpClient, conn *net.UnixConn) {
	m.mu.Lock()
	vm, helpers := m.qemu, slices.Clone(m.helpers)
	m.mu.Unlock()

	var all sync.WaitGroup
	if vm != nil {
		for _, h := range helpers {
			all.Go(func() {
				<-h.gone
				m.helperEnded(monitor, h.err, h.what)
			})
		}
		all.Go(func() {
			if err := m.vsock.Serve(conn); err != nil {
				m.die(fmt.Errorf("the machine was ended: %w", err))
				return
			}
			m.helperEnded(monitor, nil, "vsock device")
		})
		all.Go(func() {
			<-monitor.done
			select {
			case <-vm.gone:
			case <-time.After(closeTimeout):
				m.die(errors.New("qemu closed its monitor and was killed"))
			}
		})
		<-vm.gone
		<-monitor.done // it has seen all events; the socket's other end is gone
		m.die(m.qemuEnded(vm))
		_ = m.vsock.Close()
	}
	for _, h := range helpers {
		<-h.gone
	}
	all.Wait()
	close(m.done)
}

// helperEnded ends the machine because a helper did, unless QEMU's own end came
// first and took the helper along.
func (m *machine) helperEnded(monitor *qmpClient, err error, what string) {
	select {
	case <-monitor.done:
		return
	case <-time.After(exitGrace):
	}
	if err == nil {
		err = fmt.Errorf("%s ended", what)
	}
	m.die(fmt.Errorf("the machine was ended, because it can't do without: %w", err))
}

// qemuEnded says why QEMU is gone; nil if the guest powered itself off.
func (m *machine) qemuEnded(vm *child) error {
	if vm.err != nil {
		return vm.err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch m.shutdown {
	case "guest-shutdown":
		return nil
	case "guest-reset":
		return errors.New("the guest reset itself: its kernel panicked or it rebooted, its console says more")
	case "guest-panic":
		return errors.New("the guest's kernel panicked, its console says more")
	case "":
		return fmt.Errorf("qemu exited: %s", vm.stderr)
	}
	return fmt.Errorf("qemu ended for the reason %q", m.shutdown)
}

// event receives QEMU's events (docs/interop/qemu-qmp-ref).
func (m *machine) event(e qmpEvent) {
	switch e.Name {
	case "SHUTDOWN":
		var data struct {
			Reason string `json:"reason"`
		}
		if err := json.Unmarshal(e.Data, &data); err != nil {
			klog.V(4).InfoS("Unexpected event of QEMU", "machine", m.config.ID, "event", e.Name, "err", err)
		}
		m.mu.Lock()
		if m.shutdown == "" || data.Reason == "guest-panic" {
			m.shutdown = data.Reason
		}
		m.mu.Unlock()
	case "GUEST_PANICKED":
		m.mu.Lock()
		m.shutdown = "guest-panic"
		m.mu.Unlock()
	case "BLOCK_IO_ERROR": // T9
		var data struct {
			Node      string `json:"node-name"`
			Operation string `json:"operation"`
			Reason    string `json:"reason"`
		}
		if err := json.Unmarshal(e.Data, &data); err != nil {
			klog.V(4).InfoS("Unexpected event of QEMU", "machine", m.config.ID, "event", e.Name, "err", err)
			return
		}
		// The guest decides how often this happens, so each disk has one line.
		m.mu.Lock()
		if m.reported == nil {
			m.reported = map[string]bool{}
		}
		first := !m.reported[data.Node]
		m.reported[data.Node] = true
		m.mu.Unlock()
		if first {
			if m.config.DiskFailed != nil {
				m.config.DiskFailed(m.diskOf(data.Node), data.Reason)
			}
			klog.ErrorS(errors.New(data.Reason), "Disk of machine fails, the guest sees I/O errors", "machine", m.config.ID,
				"disk", m.diskOf(data.Node), "operation", data.Operation)
		}
	}
}

// diskOf is the serial of the disk with a node name of arguments.disk.
func (m *machine) diskOf(node string) string {
	for i, d := range m.config.Disks {
		if node == diskNode(i) {
			return d.Serial
		}
	}
	return node
}

// Dial implements vmm.Machine.
func (m *machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	c, err := m.vsock.Dial(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("machine %s: %w", m.config.ID, err)
	}
	return c, nil
}

// Progress implements vmm.Machine.
func (m *machine) Progress() (uint64, error) {
	m.mu.Lock()
	vm := m.qemu
	m.mu.Unlock()
	if vm == nil {
		return 0, fmt.Errorf("machine %s: progress: it doesn't run: %w", m.config.ID, errdefs.ErrFailedPrecondition)
	}
	n, err := vm.cpuTime()
	if err != nil {
		return 0, fmt.Errorf("machine %s: progress: %w", m.config.ID, err)
	}
	return n, nil
}

// PIDs implements vmm.Machine.
func (m *machine) PIDs() []int {
	m.mu.Lock()
	defer m.mu.Unlock()
	var pids []int
	for _, c := range m.children() {
		pids = append(pids, c.pid())
	}
	return pids
}

// Kill implements vmm.Machine.
func (m *machine) Kill(ctx context.Context) error {
	m.mu.Lock()
	started := m.started
	m.started = true // from now on Start refuses
	m.mu.Unlock()
	m.die(nil)
	if !started {
		close(m.done)
	}
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("machine %s: wait for processes %v to be gone after SIGKILL: %w", m.config.ID, m.PIDs(), ctx.Err())
	}
}

// Done implements vmm.Machine.
func (m *machine) Done() <-chan struct{} { return m.done }

// Err implements vmm.Machine.
func (m *machine) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Close implements vmm.Machine.
func (m *machine) Close() error {
	m.closeOnce.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		m.closeErr = errors.Join(m.Kill(ctx), m.release())
	})
	return m.closeErr
}

// release gives up what prepare has made.
func (m *machine) release() error {
	var errs []error
	if m.vsock != nil {
		errs = append(errs, m.vsock.Close())
	}
	m.closeFiles()
	for _, dir := range m.mounts {
		if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", dir, err))
			continue // never remove what may still show the share
		}
		errs = append(errs, os.Remove(dir))
	}
	m.mounts = nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("machine %s: release: %w", m.config.ID, err)
	}
	return nil
}

// credential is who QEMU runs as.
func (d *driver) credential(a Accel) *syscall.Credential {
	c := &syscall.Credential{Uid: d.opts.UID, Gid: d.opts.GID}
	// QEMU before version 9 opens /dev/kvm by its name.
	if st, err := os.Stat(d.kvm); err == nil && a == AccelKVM && st.Mode().Perm()&0o060 == 0o060 {
		c.Groups = []uint32{st.Sys().(*syscall.Stat_t).Gid}
	}
	return c
}
