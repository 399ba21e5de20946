package main

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func init() {
	commands["poweroff"], commands["sethostname"], commands["bridge"] = poweroff, setHostname, bridge
	commands["chmod"], commands["rawsocket"], commands["winsize"] = chmod, rawSocket, winsize
	commands["window"], commands["tty"], commands["clock"] = window, tty, clock
}

// clock [DURATION] prints the time in unix nanoseconds, after it has moved the clock
// by so much, which needs CAP_SYS_TIME.
func clock(args []string) (int, error) {
	if len(args) > 0 {
		d, err := time.ParseDuration(args[0])
		if err != nil {
			return 2, err
		}
		ts := unix.NsecToTimespec(time.Now().Add(d).UnixNano())
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
			return 1, err
		}
	}
	fmt.Println(time.Now().UnixNano())
	return 0, nil
}

func syscallMount(source, target, fstype string) error {
	return syscall.Mount(source, target, fstype, 0, "")
}

// poweroff switches the machine off; in the root pid namespace that is the pod's.
func poweroff([]string) (int, error) {
	return 1, syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
}

// setHostname NAME needs CAP_SYS_ADMIN.
func setHostname(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	return 0, unix.Sethostname([]byte(args[0]))
}

// bridge NAME makes a network bridge, which needs CAP_NET_ADMIN, and removes it.
func bridge(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 1, err
	}
	defer unix.Close(fd)
	var name [unix.IFNAMSIZ]byte
	copy(name[:len(name)-1], args[0])
	for _, request := range []uintptr{unix.SIOCBRADDBR, unix.SIOCBRDELBR} {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&name[0]))); errno != 0 {
			return 1, errno
		}
	}
	return 0, nil
}

// chmod MODE FILE.
func chmod(args []string) (int, error) {
	if len(args) != 2 {
		return 2, errUsage
	}
	mode, err := strconv.ParseUint(args[0], 8, 32)
	if err != nil {
		return 2, err
	}
	return 0, unix.Chmod(args[1], uint32(mode))
}

// rawSocket opens one, which needs CAP_NET_RAW.
func rawSocket([]string) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return 1, err
	}
	return 0, unix.Close(fd)
}

// winsize prints the columns and rows of the terminal.
func winsize([]string) (int, error) {
	ws, err := unix.IoctlGetWinsize(int(os.Stdin.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 1, err
	}
	fmt.Println(ws.Col, ws.Row)
	return 0, nil
}

// window COLUMNSxROWS waits for its terminal to have that size.
func window(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	for range 100 {
		ws, err := unix.IoctlGetWinsize(int(os.Stdin.Fd()), unix.TIOCGWINSZ)
		if err != nil {
			return 1, err
		}
		if fmt.Sprintf("%dx%d", ws.Col, ws.Row) == args[0] {
			return 0, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return 1, fmt.Errorf("the window never was %s", args[0])
}

// tty tells its terminal's name, if the name is that terminal's.
func tty([]string) (int, error) {
	name, err := os.Readlink("/proc/self/fd/0")
	if err != nil {
		return 1, err
	}
	var own, named unix.Stat_t
	if err := unix.Fstat(0, &own); err != nil {
		return 1, err
	}
	if err := unix.Stat(name, &named); err != nil {
		return 1, err
	}
	if own.Rdev != named.Rdev || own.Ino != named.Ino || own.Dev != named.Dev {
		return 1, fmt.Errorf("%s is another terminal", name)
	}
	fmt.Println(name)
	return 0, nil
}
