//go:build linux

// Command testinit is PID 1 of the guests in which the conformance suite runs. It
// loads the modules that the guest image lists, listens on vsock port 1024 and
// obeys one-line commands, so that the suite depends on no agent.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest/traffic"
)

// port is where commands arrive; echoPort returns whatever it gets; trafficPort
// serves traffic, and relayPort is joined to a TCP server of traffic in another
// process.
const (
	port        = 1024
	echoPort    = 1025
	trafficPort = 1125
	relayPort   = 1126

	tcpServer = "127.0.0.1:1127"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "tcp-server" {
		say("testinit: %v", serveTCP())
		return
	}
	if err := boot(); err != nil {
		say("testinit: %v", err)
		power(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	select {}
}

// say writes a line to the console.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}

func boot() error {
	for _, m := range []struct{ dir, fs string }{
		{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}, {"/tmp", "tmpfs"},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fs, m.dir, m.fs, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	if strings.Contains(string(cmdline), "testinit=hang") {
		say("testinit: hanging as told")
		return nil
	}
	if err := loadModules("/modules.list"); err != nil {
		return err
	}
	for _, p := range []struct {
		number uint32
		serve  func(net.Conn)
	}{
		{echoPort, echo}, {trafficPort, serveTraffic}, {relayPort, relay},
		{port, command}, // last: who is answered here may use the others
	} {
		l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, p.number, nil)
		if err != nil {
			return fmt.Errorf("listen on port %d: %w", p.number, err)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					say("testinit: accept: %v", err)
					return
				}
				go p.serve(c)
			}
		}()
	}
	say("testinit: ready")
	return nil
}

// loadModules loads the files that list names, in its order. A module that is
// already there, or built in, is no error.
func loadModules(list string) error {
	b, err := os.ReadFile(list)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(b)) {
		if !filepath.IsAbs(name) {
			name = filepath.Join("/", name)
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		flags := 0
		if filepath.Ext(name) != ".ko" {
			flags = unix.MODULE_INIT_COMPRESSED_FILE
		}
		err = unix.FinitModule(int(f.Fd()), "", flags)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			say("testinit: load %s: %v", name, err)
		}
	}
	return nil
}

func power(how int) {
	unix.Sync()
	_ = unix.Reboot(how)
}

func echo(c net.Conn) {
	defer c.Close()
	_, _ = io.Copy(c, c)
}

func serveTraffic(c net.Conn) {
	defer c.Close()
	if err := traffic.Serve(c); err != nil {
		say("testinit: traffic: %v", err)
	}
}

// startTCP starts the TCP server at the first need of it: nothing that a boot
// should wait for.
var startTCP = sync.OnceValue(func() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	up, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	up.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, up); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	cmd := exec.Command("/proc/self/exe", "tcp-server")
	cmd.Stderr = os.Stderr
	ready, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		_, err = ready.Read(make([]byte, 1))
	}
	return err
})

// serveTCP returns only what ended it.
func serveTCP() error {
	l, err := net.Listen("tcp", tcpServer)
	if err != nil {
		return err
	}
	fmt.Println("listening")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go serveTraffic(c)
	}
}

// loopback measures what TCP carries between this process and the server; see
// [traffic.Measure].
func loopback(way string, streams int, bytes int64) (time.Duration, error) {
	if err := startTCP(); err != nil {
		return 0, err
	}
	move := traffic.Send
	if way == "receive" {
		move = traffic.Receive
	}
	return traffic.Measure(func() (io.ReadWriteCloser, error) { return net.Dial("tcp", tcpServer) }, streams, bytes, move)
}

// relay is the least that a forwarded port can be: it joins c to a TCP connection.
func relay(c net.Conn) {
	defer c.Close()
	err := startTCP()
	var t net.Conn
	if err == nil {
		t, err = net.Dial("tcp", tcpServer)
	}
	if err != nil {
		say("testinit: relay: %v", err)
		return
	}
	defer t.Close()
	type reader struct{ io.Reader }
	type writer struct{ io.Writer }
	go func() {
		_, _ = io.CopyBuffer(writer{t}, reader{c}, make([]byte, 256<<10))
		t.Close()
	}()
	_, _ = io.CopyBuffer(writer{c}, reader{t}, make([]byte, 256<<10))
}

// command answers each line with "ok RESULT" or "error TEXT"; both are quoted.
func command(c net.Conn) {
	defer c.Close()
	in := bufio.NewScanner(c)
	for in.Scan() {
		word, rest, _ := strings.Cut(in.Text(), " ")
		out, err := do(word, rest)
		if err != nil {
			fmt.Fprintf(c, "error %q\n", err)
		} else {
			fmt.Fprintf(c, "ok %q\n", out)
		}
	}
}

func do(word, rest string) (string, error) {
	arg, more, _ := strings.Cut(rest, " ")
	switch word {
	case "ping":
		return "pong", nil
	case "poweroff", "reset":
		how := unix.LINUX_REBOOT_CMD_POWER_OFF
		if word == "reset" {
			how = unix.LINUX_REBOOT_CMD_RESTART
		}
		go func() {
			time.Sleep(20 * time.Millisecond) // lets the answer out
			power(how)
		}()
		return "", nil
	case "mount": // mount TAG: at /mnt/TAG
		dir := filepath.Join("/mnt", arg)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", err
		}
		return dir, unix.Mount(arg, dir, "virtiofs", 0, "")
	case "remount-rw":
		return "", unix.Mount("", arg, "", unix.MS_REMOUNT, "")
	case "read":
		b, err := os.ReadFile(arg)
		return string(b), err
	case "write": // in place, as an attacker would
		f, err := os.OpenFile(arg, os.O_WRONLY|os.O_CREATE, 0o644)
		if err != nil {
			return "", err
		}
		_, err = f.WriteString(more)
		return "", errors.Join(err, f.Close())
	case "create":
		f, err := os.OpenFile(arg, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			return "", err
		}
		return "", f.Close()
	case "remove":
		return "", os.Remove(arg)
	case "size": // size FILE: of what can be read
		f, err := os.Open(arg)
		if err != nil {
			return "", err
		}
		defer f.Close()
		n, err := io.Copy(io.Discard, f)
		return strconv.FormatInt(n, 10), err
	case "hold": // hold FILE: opens it for good
		f, err := os.Open(arg)
		heldFile = f
		return "", err
	case "held": // what the held file has
		b, err := io.ReadAll(io.NewSectionReader(heldFile, 0, 1<<20))
		return string(b), err
	case "mountlayer": // mountlayer FILE: an ext4 image, at the path that is returned
		return mountLayer(arg)
	case "clock":
		return strconv.FormatInt(time.Now().UnixNano(), 10), nil
	case "chmod":
		return "", os.Chmod(arg, 0o777)
	case "list":
		entries, err := os.ReadDir(arg)
		names := make([]string, len(entries))
		for i, e := range entries {
			names[i] = e.Name()
		}
		return strings.Join(names, " "), err
	case "disk": // disk SERIAL: the name of its file in /dev
		return disk(rest)
	case "blockwrite": // blockwrite NAME TEXT: at offset 0
		f, err := os.OpenFile("/dev/"+arg, os.O_WRONLY|os.O_SYNC, 0)
		if err != nil {
			return "", err
		}
		_, err = f.WriteString(more)
		return "", errors.Join(err, f.Close())
	case "blockfill": // blockfill NAME: from the start to the end
		f, err := os.OpenFile("/dev/"+arg, os.O_WRONLY|os.O_SYNC, 0)
		if err != nil {
			return "", err
		}
		defer f.Close()
		for chunk := []byte(strings.Repeat("z", 64<<10)); ; {
			if _, err := f.Write(chunk); errors.Is(err, unix.ENOSPC) { // the end of the device
				return "", nil
			} else if err != nil {
				return "", err
			}
		}
	case "blocksum": // blocksum NAME: size and digest
		f, err := os.Open("/dev/" + arg)
		if err != nil {
			return "", err
		}
		defer f.Close()
		h := sha256.New()
		n, err := io.Copy(h, f)
		return fmt.Sprintf("%d %s", n, hex.EncodeToString(h.Sum(nil))), err
	case "nics": // MAC and MTU of each
		dirs, err := filepath.Glob("/sys/class/net/e*")
		if err != nil {
			return "", err
		}
		var out []string
		for _, d := range dirs {
			mac, _ := os.ReadFile(filepath.Join(d, "address"))
			mtu, _ := os.ReadFile(filepath.Join(d, "mtu"))
			out = append(out, strings.TrimSpace(string(mac))+"/"+strings.TrimSpace(string(mtu)))
		}
		return strings.Join(out, " "), nil
	case "machine": // architecture, CPUs, MiB of memory
		var u unix.Utsname
		var s unix.Sysinfo_t
		if err := errors.Join(unix.Uname(&u), unix.Sysinfo(&s)); err != nil {
			return "", err
		}
		cpus, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*")
		return fmt.Sprintf("%s %d %d", unix.ByteSliceToString(u.Machine[:]), len(cpus), s.Totalram*uint64(s.Unit)>>20), err
	case "console": // console N TEXT: N lines
		n, err := strconv.Atoi(arg)
		if err != nil {
			return "", err
		}
		for range n {
			say("%s", more)
		}
		return "", nil
	case "loopback": // loopback send|receive STREAMS BYTES: nanoseconds
		var streams int
		var bytes int64
		if _, err := fmt.Sscan(more, &streams, &bytes); err != nil {
			return "", err
		}
		took, err := loopback(arg, streams, bytes)
		return strconv.FormatInt(took.Nanoseconds(), 10), err
	case "spin": // keeps one CPU busy for good
		go func() {
			for n := 0; ; n++ {
			}
		}()
		return "", nil
	}
	return "", fmt.Errorf("no such command: %s", word)
}

// heldFile is the last one that was told to be held.
var heldFile *os.File

// mountLayer mounts an image as the agent does its layers. // T24
func mountLayer(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer ctl.Close()
	n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return "", err
	}
	name := fmt.Sprintf("/dev/loop%d", n)
	loop, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer loop.Close()
	c := unix.LoopConfig{Fd: uint32(f.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_DIRECT_IO | unix.LO_FLAGS_AUTOCLEAR}}
	if err := unix.IoctlLoopConfigure(int(loop.Fd()), &c); err != nil {
		return "", fmt.Errorf("%s on %s: %w", name, path, err)
	}
	dir := fmt.Sprintf("/mnt/layer%d", n)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	return dir, unix.Mount(name, dir, "ext4", unix.MS_RDONLY, "noload")
}

// disk finds the block device with a serial number.
func disk(serial string) (string, error) {
	files, err := filepath.Glob("/sys/block/*/serial")
	if err != nil {
		return "", err
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == serial {
			return filepath.Base(filepath.Dir(f)), nil
		}
	}
	return "", fmt.Errorf("no disk with serial %s", serial)
}
