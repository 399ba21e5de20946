package vz

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/sandbox/qemu/vhostvsock"
)

// guest is a QEMU, its file servers and its vsock device.
type guest struct {
	vsock  *vhostvsock.Device
	shares []*shareDevice
	qemu   *process
	relays []*relay
	qmp    io.Writer     // QEMU's standard input
	gone   chan struct{} // closed when nothing of it is left
	err    error

	mu sync.Mutex // shares' directories
}

// startGuest runs a configuration, and returns when the guest's CPUs do.
func startGuest(c *VirtualMachineConfiguration) (_ *guest, err error) {
	g := &guest{vsock: vhostvsock.New(3), gone: make(chan struct{})}
	var ours []*os.File // the children's ends
	defer func() {
		for _, f := range ours {
			f.Close()
		}
		if err != nil {
			g.release()
		}
	}()
	var inherited []*os.File
	inherit := func(f *os.File) int {
		ours = append(ours, f)
		inherited = append(inherited, f)
		return 2 + len(inherited)
	}
	pair := func(kind int) (int, *os.File, error) {
		near, far, err := socketPair(kind)
		if err != nil {
			return 0, nil, err
		}
		return inherit(far), near, nil
	}

	binary, machine, cpu := "qemu-system-x86_64", "q35", "max,-erms,-fsrm"
	if TestArch == "arm64" {
		binary, machine, cpu = "qemu-system-aarch64", "virt,gic-version=3", "max,pauth-impdef=on"
	}
	mem := fmt.Sprintf("%dM", c.memory>>20)
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-machine", machine + ",accel=tcg,memory-backend=mem", "-cpu", cpu,
		"-smp", fmt.Sprint(c.cpus), "-m", mem, "-object", "memory-backend-memfd,id=mem,size=" + mem + ",share=on",
		"-kernel", c.boot.kernel, "-append", c.boot.cmdline, "-qmp", "stdio",
	}
	if c.boot.initrd != "" {
		args = append(args, "-initrd", c.boot.initrd)
	}
	device := func(v map[string]any) {
		b, _ := json.Marshal(v)
		args = append(args, "-device", string(b))
	}
	for i, con := range c.consoles {
		fd, near, err := pair(unix.SOCK_STREAM)
		if err != nil {
			return nil, err
		}
		g.relays = append(g.relays, newRelay(near, con.attachment.read, con.attachment.write))
		args = append(args, "-chardev", fmt.Sprintf("socket,id=con%d,fd=%d", i, fd))
		device(map[string]any{"driver": "virtio-serial-pci", "id": fmt.Sprintf("serial%d", i)})
		device(map[string]any{"driver": "virtconsole", "chardev": fmt.Sprintf("con%d", i), "bus": fmt.Sprintf("serial%d.0", i)})
	}
	for range c.entropy {
		device(map[string]any{"driver": "virtio-rng-pci"})
	}
	for range c.balloons {
		device(map[string]any{"driver": "virtio-balloon-pci"})
	}
	for i, d := range c.disks {
		d := d.(*VirtioBlockDeviceConfiguration)
		node := fmt.Sprintf("disk%d", i)
		b, _ := json.Marshal(map[string]any{
			"driver": "raw", "node-name": node, "read-only": d.attachment.readOnly,
			"file": map[string]any{"driver": "file", "filename": d.attachment.path, "read-only": d.attachment.readOnly},
		})
		args = append(args, "-blockdev", string(b))
		device(map[string]any{"driver": "virtio-blk-pci", "drive": node, "serial": d.id, "werror": "report", "rerror": "report"})
	}
	for i, n := range c.nics {
		id := fmt.Sprintf("nic%d", i)
		mtu := 1500
		if f, ok := n.attachment.(*FileHandleNetworkDeviceAttachment); ok {
			fd, near, err := pair(unix.SOCK_DGRAM)
			if err != nil {
				return nil, err
			}
			mtu = f.mtu
			g.relays = append(g.relays, newRelay(near, f.fd, f.fd))
			args = append(args, "-netdev", fmt.Sprintf("dgram,id=%s,local.type=fd,local.str=%d", id, fd))
		} else if bridge := os.Getenv("FAKEVZ_NAT"); bridge != "" {
			tap, err := openTap(bridge)
			if err != nil {
				return nil, err
			}
			args = append(args, "-netdev", fmt.Sprintf("tap,id=%s,fd=%d", id, inherit(tap)))
		} else {
			args = append(args, "-netdev", "user,id="+id)
		}
		device(map[string]any{"driver": "virtio-net-pci", "netdev": id, "mac": n.mac.hw.String(), "host_mtu": mtu, "romfile": ""})
	}
	for i, s := range c.shares {
		sd, front, err := serveShare(s.(*VirtioFileSystemDeviceConfiguration))
		if err != nil {
			return nil, err
		}
		g.shares = append(g.shares, sd)
		args = append(args, "-chardev", fmt.Sprintf("socket,id=fs%d,fd=%d", i, inherit(front)))
		device(map[string]any{"driver": "vhost-user-fs-pci", "chardev": fmt.Sprintf("fs%d", i), "tag": sd.tag, "queue-size": 1024})
	}
	var vsock net.Conn
	for range c.sockets {
		fd, near, err := pair(unix.SOCK_STREAM)
		if err != nil {
			return nil, err
		}
		vsock, err = net.FileConn(near)
		near.Close()
		if err != nil {
			return nil, err
		}
		args = append(args, "-chardev", fmt.Sprintf("socket,id=vsock,fd=%d", fd))
		device(map[string]any{"driver": "vhost-user-vsock-pci", "chardev": "vsock"})
	}

	cmd := exec.Command(binary, args...)
	cmd.ExtraFiles = inherited
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	ours = append(ours, write)
	cmd.Stdout = write
	if g.qemu, err = launch(cmd); err != nil {
		out.Close()
		return nil, err
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		if vsock != nil {
			_ = g.vsock.Serve(vsock.(*net.UnixConn))
		}
	}()
	go func() {
		<-g.qemu.gone
		_ = g.vsock.Close()
		<-served
		g.err = g.qemu.err
		g.release()
		out.Close()
		in.Close()
		close(g.gone)
	}()
	// Closed here and not by the deferred call alone: with a copy of its own,
	// reading would never end.
	write.Close()
	g.qmp = in
	if err := running(in, out); err != nil {
		g.kill()
		return nil, errors.Join(err, g.wait())
	}
	return g, nil
}

// openTap makes a tap on a bridge that plays the framework's NAT, which keeps machines
// apart. It ends with its last descriptor.
func openTap(bridge string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	tap := os.NewFile(uintptr(fd), "tap")
	ifr, err := unix.NewIfreq("nat%d")
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		tap.Close()
		return nil, fmt.Errorf("tap: %w", err)
	}
	for _, args := range [][]string{
		{"ip", "link", "set", ifr.Name(), "master", bridge},
		{"bridge", "link", "set", "dev", ifr.Name(), "isolated", "on"},
		{"ip", "link", "set", ifr.Name(), "up"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			tap.Close()
			return nil, fmt.Errorf("%q: %w: %s", args, err, out)
		}
	}
	return tap, nil
}

// running returns when QEMU's main loop runs.
func running(in io.Writer, out io.Reader) error {
	if _, err := io.WriteString(in, `{"execute":"qmp_capabilities"}`); err != nil {
		return err
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), `{"return"`) {
			go func() { _, _ = io.Copy(io.Discard, out) }() // events; ends with QEMU
			return nil
		}
	}
	return errors.New("QEMU didn't start")
}

// setMemory inflates the balloon, or lets air out, and doesn't wait for the guest.
func (g *guest) setMemory(bytes int64) error {
	_, err := fmt.Fprintf(g.qmp, `{"execute":"balloon","arguments":{"value":%d}}`, bytes)
	return err
}

func (g *guest) kill() {
	if g.qemu != nil {
		_ = g.qemu.cmd.Process.Kill()
	}
}

// wait returns when nothing of the guest is left: nil if it powered itself off.
func (g *guest) wait() error {
	<-g.gone
	return g.err
}

func (g *guest) release() {
	for _, r := range g.relays {
		r.close()
	}
	for _, s := range g.shares {
		s.close()
	}
}

// process is a child that ends with the thread that started it, at the latest.
type process struct {
	cmd  *exec.Cmd
	gone chan struct{}
	err  error
}

func launch(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, gone: make(chan struct{})}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the signal comes when the thread ends
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		if err := cmd.Wait(); err != nil {
			p.err = fmt.Errorf("%s: %w: %s", cmd.Path, err, stderr.Bytes())
		}
		close(p.gone)
	}()
	return p, <-started
}

func socketPair(kind int) (near, far *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far"), nil
}

// relay copies between QEMU and descriptors that are the driver's, by number, for as
// long as the machine lives: if the driver has let go of them, they fail. // T50
type relay struct {
	near       *os.File
	nearFD     int
	stop, done chan struct{}
}

func newRelay(near *os.File, read, write int) *relay {
	r := &relay{near: near, nearFD: int(near.Fd()), stop: make(chan struct{}), done: make(chan struct{}, 2)}
	go r.copy(r.nearFD, write, true)
	go r.copy(read, r.nearFD, false)
	return r
}

// copy moves what one read returns with one write, so that datagrams stay whole.
func (r *relay) copy(from, to int, provoke bool) {
	defer func() { r.done <- struct{}{} }()
	buf := make([]byte, 128<<10)
	for {
		select {
		case <-r.stop:
			return
		default:
		}
		fds := []unix.PollFd{{Fd: int32(from), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 100)
		if errors.Is(err, unix.EINTR) || err == nil && n == 0 {
			if provoke {
				runtime.GC()
			}
			continue
		}
		if err != nil || fds[0].Revents&unix.POLLNVAL != 0 {
			return
		}
		n, err = unix.Read(from, buf)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil || n == 0 {
			return
		}
		_, _ = unix.Write(to, buf[:n])
	}
}

func (r *relay) close() {
	close(r.stop)
	<-r.done
	<-r.done
	r.near.Close()
}
