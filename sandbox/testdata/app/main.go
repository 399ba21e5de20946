// Command app is what the tests' containers run: a static program, so that its
// image is one layer with one file.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	arg := func(i int) string {
		if i < len(os.Args) {
			return os.Args[i]
		}
		return ""
	}
	switch arg(1) {
	case "echo":
		fmt.Println(arg(2))
		fmt.Fprintln(os.Stderr, "err "+arg(2))
	case "cat":
		_, _ = io.Copy(os.Stdout, os.Stdin)
	case "exit":
		n, _ := strconv.Atoi(arg(2))
		os.Exit(n)
	case "count": // a line every 10 ms, for ever
		for i := 0; ; i++ {
			fmt.Println("line", i)
			time.Sleep(10 * time.Millisecond)
		}
	case "sleep":
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		<-c
		os.Exit(7)
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("ready")
		time.Sleep(time.Hour)
	case "listen": // an echo server
		l, err := net.Listen("tcp", ":"+arg(2))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		for {
			c, err := l.Accept()
			if err != nil {
				os.Exit(1)
			}
			go func() {
				_, _ = io.Copy(c, c)
				c.Close()
			}()
		}
	case "dial": // prints what the other side says
		c, err := net.DialTimeout("tcp", arg(2), 10*time.Second)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		_, _ = io.Copy(os.Stdout, c)
	case "read":
		b, err := os.ReadFile(arg(2))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Stdout.Write(b)
	case "write":
		if err := os.WriteFile(arg(2), []byte(arg(3)), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "/amd64": // this program stands in for Rosetta
		fmt.Println("translated", os.Args[1:])
	case "stat": // mode, owner and group, as a number each
		var st syscall.Stat_t
		if err := syscall.Stat(arg(2), &st); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Printf("%o %d %d\n", st.Mode&0o7777, st.Uid, st.Gid)
	case "chown":
		uid, _ := strconv.Atoi(arg(3))
		gid, _ := strconv.Atoi(arg(4))
		if err := os.Chown(arg(2), uid, gid); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "cache": // fills the page cache with so many MiB of a file, and sleeps
		n, _ := strconv.Atoi(arg(2))
		f, err := os.Create("/cached")
		for i := 0; i < n && err == nil; i++ {
			_, err = f.Write(make([]byte, 1<<20))
		}
		if err == nil {
			err = f.Sync()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println("cached")
		time.Sleep(time.Hour)
	case "use": // so many MiB of memory
		n, _ := strconv.Atoi(arg(2))
		b := make([]byte, n<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		fmt.Println("used")
	case "poweroff": // needs CAP_SYS_BOOT in the guest's own pid namespace
		_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
		fmt.Fprintln(os.Stderr, "still here")
		os.Exit(1)
	default:
		fmt.Fprintln(os.Stderr, "unknown", os.Args)
		os.Exit(2)
	}
}
