// Web is the one program of the test images: a web server, and a toolbox for
// tests, since the images have no shell. The command is the first argument, or
// the name that the program was called by.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cri-vz/cri-vz/sandbox/vmm/vmmtest/traffic"
)

// command gets its arguments and returns the exit code.
type command func(args []string) (int, error)

var commands = map[string]command{
	"web": web, "sleep": sleep, "echo": echo, "cat": cat, "exit": exit, "env": env, "id": id, "pwd": pwd, "ls": ls,
	"tcp-echo": tcpEcho, "tcp-traffic": tcpTraffic, "udp-echo": udpEcho, "write": write, "flood": flood, "trap-term": trapTerm, "oom": oom,
	"spawn-zombies": spawnZombies, "orphan": orphan, "get": get, "hostname": hostname,
	"err": errText, "count": count, "long": long, "detach": detach, "mount": mount, "fill": fill, "reread": reread,
	"connect": connect,
}

func main() {
	name, args := filepath.Base(os.Args[0]), os.Args[1:]
	if _, ok := commands[name]; !ok || name == "web" && len(args) > 0 && commands[args[0]] != nil {
		name = "web"
		if len(args) > 0 {
			name, args = args[0], args[1:]
		}
	}
	cmd, ok := commands[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "web: no command %q\n", name)
		os.Exit(127)
	}
	code, err := cmd(args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

var errUsage = errors.New("wrong arguments")

// web serves on PORT (3000) until SIGTERM or SIGINT.
func web([]string) (int, error) {
	port := os.Getenv("PORT")
	if port == "" {
		port = "3000"
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		name, err := os.Hostname()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprintf(w, "hello from %s\n", name)
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Printf("%s %q from %s\n", r.Method, r.URL.Path, r.RemoteAddr)
			mux.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: 10 * time.Second,
	}
	l, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return 1, err
	}
	fmt.Printf("listening on %s\n", l.Addr())
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		fmt.Printf("stopping: %v\n", <-stop)
		srv.Close()
	}()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return 1, err
	}
	return 0, nil
}

// sleep waits for seconds, or for ever ("infinity").
func sleep(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	if args[0] == "infinity" {
		for {
			time.Sleep(time.Hour)
		}
	}
	d, err := time.ParseDuration(args[0] + "s")
	if err != nil {
		if d, err = time.ParseDuration(args[0]); err != nil {
			return 2, err
		}
	}
	time.Sleep(d)
	return 0, nil
}

func echo(args []string) (int, error) {
	_, err := fmt.Println(strings.Join(args, " "))
	return 0, err
}

// cat copies files, or its input, to its output.
func cat(args []string) (int, error) {
	if len(args) == 0 {
		_, err := io.Copy(os.Stdout, os.Stdin)
		return 0, err
	}
	for _, name := range args {
		f, err := os.Open(name)
		if err != nil {
			return 1, err
		}
		_, err = io.Copy(os.Stdout, f)
		f.Close()
		if err != nil {
			return 1, err
		}
	}
	return 0, nil
}

func exit(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	return strconv.Atoi(args[0])
}

func env([]string) (int, error) {
	e := os.Environ()
	slices.Sort(e)
	_, err := fmt.Println(strings.Join(e, "\n"))
	return 0, err
}

func id([]string) (int, error) {
	groups, err := os.Getgroups()
	if err != nil {
		return 1, err
	}
	slices.Sort(groups)
	_, err = fmt.Printf("uid=%d euid=%d gid=%d groups=%v\n", os.Getuid(), os.Geteuid(), os.Getgid(), groups)
	return 0, err
}

func pwd([]string) (int, error) {
	dir, err := os.Getwd()
	if err == nil {
		_, err = fmt.Println(dir)
	}
	return 0, err
}

func hostname([]string) (int, error) {
	name, err := os.Hostname()
	if err == nil {
		_, err = fmt.Println(name)
	}
	return 0, err
}

// ls prints mode, owner, size and name of what is in a directory, or of a file.
func ls(args []string) (int, error) {
	if len(args) == 0 {
		args = []string{"."}
	}
	for _, name := range args {
		info, err := os.Lstat(name)
		if err != nil {
			return 1, err
		}
		if !info.IsDir() {
			printInfo(name, info)
			continue
		}
		entries, err := os.ReadDir(name)
		if err != nil {
			return 1, err
		}
		for _, e := range entries {
			if info, err = e.Info(); err != nil {
				return 1, err
			}
			printInfo(filepath.Join(name, e.Name()), info)
		}
	}
	return 0, nil
}

func printInfo(name string, info os.FileInfo) {
	uid, gid := -1, -1
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		uid, gid = int(st.Uid), int(st.Gid)
	}
	fmt.Printf("%v %d:%d %d %s", info.Mode(), uid, gid, info.Size(), filepath.Base(name))
	if target, err := os.Readlink(name); err == nil {
		fmt.Printf(" -> %s", target)
	}
	fmt.Println()
}

// tcpEcho returns to each connection on PORT what it sends.
func tcpEcho(args []string) (int, error) {
	return tcpServer(args, func(c net.Conn) { _, _ = io.Copy(c, c) })
}

// tcpTraffic serves measurements.
func tcpTraffic(args []string) (int, error) {
	return tcpServer(args, func(c net.Conn) { _ = traffic.Serve(c) })
}

func tcpServer(args []string, serve func(net.Conn)) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	l, err := net.Listen("tcp", ":"+args[0])
	if err != nil {
		return 1, err
	}
	fmt.Printf("listening on %s\n", l.Addr())
	for {
		c, err := l.Accept()
		if err != nil {
			return 1, err
		}
		go func() {
			defer c.Close()
			serve(c) // ends when the client does
		}()
	}
}

// udpEcho answers each datagram with itself.
func udpEcho(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	c, err := net.ListenPacket("udp", ":"+args[0])
	if err != nil {
		return 1, err
	}
	fmt.Printf("listening on %s\n", c.LocalAddr())
	b := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFrom(b)
		if err == nil {
			_, err = c.WriteTo(b[:n], from)
		}
		if err != nil {
			return 1, err
		}
	}
}

// reread reads a file again and again until it holds END, and says how often it
// changed, and whether it ever could not be read. What is gone is looked up
// again, for a tenth of a second and 50 times at most: between the steps of one lookup
// the file may be swapped, on any system; the slower it is the more often.
func reread(args []string) (int, error) {
	if len(args) != 2 {
		return 2, errUsage
	}
	var last string
	var changes, missed, failures int
	var first error
	for deadline := time.Now().Add(time.Minute); ; {
		b, err := os.ReadFile(args[0])
		began, tries := time.Now(), 0
		for errors.Is(err, fs.ErrNotExist) && (tries < 50 || time.Since(began) < 100*time.Millisecond) {
			missed++
			tries++
			b, err = os.ReadFile(args[0])
		}
		if err != nil {
			if failures++; first == nil {
				first = err
			}
		} else if text := strings.TrimSpace(string(b)); text != last {
			changes++
			last = text
		}
		if last == args[1] {
			break
		}
		if time.Now().After(deadline) {
			return 1, fmt.Errorf("it holds %q after a minute", last)
		}
	}
	fmt.Printf("%d values, missed %d times\n", changes, missed)
	if failures > 0 {
		return 1, fmt.Errorf("%d failures, the first: %w", failures, first)
	}
	return 0, nil
}

// connect PATH connects to a unix socket.
func connect(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	c, err := net.Dial("unix", args[0])
	if err != nil {
		return 1, err
	}
	return 0, c.Close()
}

// write puts a text and a line end into a file, and syncs it.
func write(args []string) (int, error) {
	if len(args) != 2 {
		return 2, errUsage
	}
	f, err := os.Create(args[0])
	if err != nil {
		return 1, err
	}
	defer f.Close()
	if _, err := fmt.Fprintln(f, args[1]); err != nil {
		return 1, err
	}
	if err := f.Sync(); err != nil {
		return 1, err
	}
	return 0, f.Close()
}

// fill writes FILE until that fails, and says how far it came.
func fill(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	f, err := os.Create(args[0])
	if err != nil {
		return 1, err
	}
	defer f.Close()
	block := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	for n := 0; ; n++ {
		if _, err = f.Write(block); err == nil {
			err = f.Sync()
		}
		if err != nil {
			fmt.Printf("wrote %d MiB\n", n)
			return 1, err
		}
	}
}

// flood prints BYTES bytes in lines of 80.
func flood(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	left, err := strconv.ParseInt(args[0], 10, 64)
	if err != nil {
		return 2, err
	}
	block := []byte(strings.Repeat(strings.Repeat("0123456789", 8)[:79]+"\n", 1024))
	for left > 0 {
		n := min(left, int64(len(block)))
		if _, err := os.Stdout.Write(block[:n]); err != nil {
			return 1, err
		}
		left -= n
	}
	return 0, nil
}

// trapTerm prints each SIGTERM and goes on; only SIGKILL ends it.
func trapTerm([]string) (int, error) {
	c := make(chan os.Signal, 16)
	signal.Notify(c, syscall.SIGTERM)
	fmt.Println("trapping SIGTERM")
	for s := range c {
		fmt.Printf("ignored %v\n", s)
	}
	return 0, nil
}

// oom takes memory and touches it until something stops it.
func oom([]string) (int, error) {
	const step = 8 << 20
	var held [][]byte
	for {
		b := make([]byte, step)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		held = append(held, b)
		fmt.Printf("holding %d MiB\n", len(held)*step>>20)
	}
}

// spawnZombies leaves N children that it never waits for and N grandchildren
// whose parent is gone, then sleeps for SECONDS: someone else must reap the
// grandchildren at once and the children at its end.
func spawnZombies(args []string) (int, error) {
	n, seconds := 8, "0"
	if len(args) > 0 {
		var err error
		if n, err = strconv.Atoi(args[0]); err != nil {
			return 2, err
		}
	}
	if len(args) > 1 {
		seconds = args[1]
	}
	for range n {
		if err := exec.Command("/proc/self/exe", "exit", "0").Start(); err != nil {
			return 1, err
		}
		if err := exec.Command("/proc/self/exe", "orphan").Run(); err != nil {
			return 1, err
		}
	}
	fmt.Printf("left %d zombies and %d orphans\n", n, n)
	return sleep([]string{seconds})
}

// orphan leaves a child behind that lives a little longer.
func orphan([]string) (int, error) {
	return 0, exec.Command("/proc/self/exe", "sleep", "100ms").Start()
}

// get prints what a URL answers; exit code 22 for a status of 400 and above.
func get(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	resp, err := (&http.Client{Timeout: 10 * time.Second}).Get(args[0])
	if err != nil {
		return 1, err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(os.Stdout, resp.Body); err != nil {
		return 1, err
	}
	if resp.StatusCode >= 400 {
		return 22, fmt.Errorf("status %s", resp.Status)
	}
	return 0, nil
}

// errText prints its arguments on standard error.
func errText(args []string) (int, error) {
	_, err := fmt.Fprintln(os.Stderr, strings.Join(args, " "))
	return 0, err
}

// count prints N numbered lines, one every INTERVAL.
func count(args []string) (int, error) {
	if len(args) != 2 {
		return 2, errUsage
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return 2, err
	}
	interval, err := time.ParseDuration(args[1])
	if err != nil {
		return 2, err
	}
	for i := range n {
		if _, err := fmt.Printf("line %d\n", i+1); err != nil {
			return 1, err
		}
		time.Sleep(interval)
	}
	return 0, nil
}

// long prints one line of BYTES bytes.
func long(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return 2, err
	}
	_, err = fmt.Println(strings.Repeat("x", n))
	return 0, err
}

// detach ends at once and leaves a child behind that holds its output open for
// SECONDS.
func detach(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	cmd := exec.Command("/proc/self/exe", "sleep", args[0])
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	_, err := fmt.Println("detached")
	return 0, err
}

// mount is mount(2): TYPE SOURCE TARGET.
func mount(args []string) (int, error) {
	if len(args) != 3 {
		return 2, errUsage
	}
	if err := os.MkdirAll(args[2], 0o755); err != nil {
		return 1, err
	}
	return 0, syscallMount(args[1], args[2], args[0])
}
