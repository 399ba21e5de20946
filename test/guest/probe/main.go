// Command probe is the only file of the guest tests' container image: a static
// program that does, by its first argument, what a test wants to see done inside
// a container, on any architecture.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch args[0] {
	case "echo":
		fmt.Println(strings.Join(args[1:], " "))
	case "complain":
		fmt.Fprintln(os.Stderr, strings.Join(args[1:], " "))
	case "exit":
		code, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		os.Exit(code)
	case "sleep":
		// Dies of SIGTERM though it may be PID 1.
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		d, err := time.ParseDuration(args[1])
		if err != nil {
			return err
		}
		select {
		case <-c:
			os.Exit(42)
		case <-time.After(d):
		}
	case "cat":
		_, err := io.Copy(os.Stdout, os.Stdin)
		return err
	case "read":
		for _, name := range args[1:] {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			os.Stdout.Write(b)
		}
	case "write":
		return os.WriteFile(args[1], []byte(args[2]), 0o644)
	case "ls":
		entries, err := os.ReadDir(args[1])
		if err != nil {
			return err
		}
		for _, e := range entries {
			fmt.Println(e.Name())
		}
	case "id":
		groups, err := os.Getgroups()
		if err != nil {
			return err
		}
		host, _ := os.Hostname()
		fmt.Println("uid", os.Getuid(), "gid", os.Getgid(), "groups", groups, "pid", os.Getpid(), "host", host)
	case "env":
		env := os.Environ()
		sort.Strings(env)
		fmt.Println(strings.Join(env, "\n"))
	case "serve":
		// Echoes until the client's end of file, then says goodbye.
		l, err := net.Listen("tcp", "127.0.0.1:"+args[1])
		if err != nil {
			return err
		}
		fmt.Println("listening")
		for {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
				fmt.Fprint(c, "bye")
			}()
		}
	case "flood":
		// Writes n MiB.
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		b := make([]byte, 1<<20)
		for range n {
			if _, err := os.Stdout.Write(b); err != nil {
				return err
			}
		}
	case "eat":
		// Eats memory until it is killed.
		var all [][]byte
		for {
			b := make([]byte, 1<<20)
			for i := range b {
				b[i] = 1
			}
			all = append(all, b)
			_ = all
		}
	case "spawn":
		// Leaves a child behind that keeps the streams.
		c := exec.Command("/probe", args[1:]...)
		c.Stdout, c.Stderr = os.Stdout, os.Stderr
		if err := c.Start(); err != nil {
			return err
		}
		fmt.Println("spawned")
	case "orphans":
		// Forks n children that end at once and waits for none.
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		for range n {
			c := exec.Command("/probe", "exit", "0")
			if err := c.Start(); err != nil {
				return err
			}
		}
	case "killinit":
		for s := syscall.Signal(1); s < 32; s++ {
			if err := syscall.Kill(1, s); err != nil {
				return fmt.Errorf("signal %d: %w", s, err)
			}
		}
	case "mknod":
		// Succeeds if no block device can be opened, wherever it is made.
		for _, path := range args[1:] {
			for _, major := range []int{7, 253, 254, 259} {
				for minor := range 2 {
					if err := syscall.Mknod(path, syscall.S_IFBLK|0o600, major<<8|minor); err != nil {
						fmt.Println(path, major, err)
						continue
					}
					f, err := os.Open(path)
					if err == nil {
						f.Close()
						return fmt.Errorf("block device %d:%d can be read", major, minor)
					}
					fmt.Println(path, major, minor, err)
					os.Remove(path)
				}
			}
		}
	case "socket":
		// Makes the kernel load the module of a netlink family.
		family, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW, family)
		if err != nil {
			return err
		}
		return syscall.Close(fd)
	case "vsock":
		// Succeeds if the agent answers nobody in here.
		for _, cid := range []uint32{0, 1, 2, 3, 0xffffffff} {
			for _, port := range []uint32{1024, 1025} {
				fd, err := syscall.Socket(40, syscall.SOCK_STREAM, 0)
				if err != nil {
					return err
				}
				tv := syscall.Timeval{Sec: 2}
				_ = syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &tv)
				addr := [16]byte{0: 40}
				*(*uint32)(unsafe.Pointer(&addr[4])) = port
				*(*uint32)(unsafe.Pointer(&addr[8])) = cid
				_, _, e := syscall.Syscall(syscall.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&addr)), 16)
				fmt.Println("connect", cid, port, e)
				if e == 0 {
					n, err := syscall.Read(fd, make([]byte, 1))
					fmt.Println("read", n, err)
					if err == syscall.EAGAIN || n > 0 {
						return fmt.Errorf("the agent accepted CID %d, port %d", cid, port)
					}
				}
				syscall.Close(fd)
			}
		}
	case "ttyname":
		name, err := os.Readlink("/proc/self/fd/0")
		if err != nil {
			return err
		}
		f, err := os.Stat(name)
		if err != nil {
			return err
		}
		fd, err := os.Stdin.Stat()
		if err != nil {
			return err
		}
		fmt.Println(name, os.SameFile(f, fd))
	case "tty":
		if _, err := os.Stat("/dev/console"); err != nil {
			return err
		}
		name, err := os.Readlink("/proc/self/fd/0")
		if err != nil {
			return err
		}
		named, err := os.Stat(name)
		if err != nil {
			return err
		}
		if own, err := os.Stdin.Stat(); err != nil || !os.SameFile(own, named) {
			return fmt.Errorf("%s is not the terminal: %v", name, err)
		}
		fmt.Println("console is there, and", name)
		buf := make([]byte, 100)
		n, err := os.Stdin.Read(buf)
		if err != nil {
			return err
		}
		fmt.Printf("read %q\n", buf[:n])
	default:
		return fmt.Errorf("unknown verb %q", args[0])
	}
	return nil
}
