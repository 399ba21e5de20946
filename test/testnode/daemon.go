//go:build linux

package testnode

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cri-vz/cri-vz/guest/image"
)

// subnet is the built-in network's of test daemons, gateway its bridge's
// address.
const subnet = "10.99.0.0/16"

var gateway = netip.MustParseAddr("10.99.0.1")

// BuildBinary builds cri-vz into dir and returns its path. The environment's
// CRI_VZ_BIN names one that is built already.
func BuildBinary(dir string) (string, error) {
	if bin := os.Getenv("CRI_VZ_BIN"); bin != "" {
		return bin, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	bin := filepath.Join(dir, "bin", "cri-vz")
	out, err := exec.CommandContext(ctx, "go", "build", "-o", bin, "github.com/cri-vz/cri-vz/cmd/cri-vz").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build cri-vz: %w: %s", err, out)
	}
	return bin, nil
}

// CopyGuest copies the guest that boots on this host, and no other, from the
// user's cache to dir, so that it can be damaged.
func CopyGuest(dir string) error {
	from, err := image.DefaultDir()
	if err != nil {
		return err
	}
	g, err := image.Locate(from, runtime.GOARCH)
	if err != nil {
		return err // says how to make one
	}
	src := filepath.Dir(g.InitrdPath)
	rel, err := filepath.Rel(from, src)
	if err != nil {
		return err
	}
	if err := os.CopyFS(filepath.Join(dir, rel), os.DirFS(src)); err != nil {
		return fmt.Errorf("copy the guest's boot files: %w", err)
	}
	if _, err := image.Locate(dir, runtime.GOARCH); err != nil {
		return fmt.Errorf("the copied guest: %w", err)
	}
	return nil
}

// Daemon is a `cri-vz serve` and the files that it works with. Its methods are
// called by one goroutine at a time.
type Daemon struct {
	Bin string // cri-vz
	// Dir is private to the daemon. The rest is below it.
	Dir, Root, Run, Socket, Config, Log string

	cmd  *exec.Cmd
	done chan struct{} // closed when cmd has ended
}

// NewDaemon writes the configuration of a daemon with its files in dir. guest is
// the directory of its boot files, empty for the user's cache. Lines of the form
// "TABLE: SETTING" replace what a table has, others are added to the top-level
// table.
func NewDaemon(bin, dir, guest string, lines ...string) (*Daemon, error) {
	d := &Daemon{Bin: bin, Dir: dir, Root: filepath.Join(dir, "root"), Run: filepath.Join(dir, "run")}
	d.Socket = filepath.Join(d.Run, "cri-vz.sock")
	d.Config, d.Log = filepath.Join(dir, "config.toml"), filepath.Join(dir, "log")
	settings := map[string]string{
		"images":  fmt.Sprintf("registry_config_dir = %q", filepath.Join(dir, "certs.d")),
		"network": fmt.Sprintf("conf_dir = %q\nbuiltin_subnet = %q", filepath.Join(dir, "cni"), subnet),
	}
	if guest != "" {
		settings["guest"] = fmt.Sprintf("dir = %q", guest)
	}
	top := []string{fmt.Sprintf("root = %q\nrun = %q\nlog_level = \"debug\"", d.Root, d.Run)}
	for _, l := range lines {
		if table, setting, ok := strings.Cut(l, ": "); ok {
			settings[table] = setting
			continue
		}
		top = append(top, l)
	}
	var b bytes.Buffer
	fmt.Fprintln(&b, strings.Join(top, "\n"))
	for _, table := range []string{"guest", "images", "network", "vm"} {
		if s, ok := settings[table]; ok {
			fmt.Fprintf(&b, "[%s]\n%s\n", table, s)
		}
	}
	return d, errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(d.Config, b.Bytes(), 0o644))
}

// Command is the daemon's command line, not started; env is added to its
// environment.
func (d *Daemon) Command(env ...string) *exec.Cmd {
	cmd := exec.Command(d.Bin, "serve", "--config", d.Config)
	cmd.Env = append(os.Environ(), env...)
	// Ctrl-C on the terminal is the test's business.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// Start runs the daemon until it says that it is ready, within 30 seconds.
func (d *Daemon) Start() error { return d.StartCommand(d.Command()) }

// StartCommand is Start with a changed Command.
func (d *Daemon) StartCommand(cmd *exec.Cmd) error {
	out, err := os.OpenFile(d.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	began, err := out.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	d.cmd = cmd
	d.cmd.Stdout, d.cmd.Stderr = out, out
	if err := d.cmd.Start(); err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	d.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { _ = cmd.Wait(); close(done) }(d.cmd, d.done)
	const bound = 30 * time.Second
	for deadline := time.Now().Add(bound); ; time.Sleep(10 * time.Millisecond) {
		said, err := d.LogSince(began)
		switch {
		case err != nil:
			return err
		case strings.Contains(said, "cri-vz is ready"):
			return nil
		case d.Ended():
			return fmt.Errorf("the daemon ended: %s", said)
		case time.Now().After(deadline):
			d.Kill()
			return fmt.Errorf("the daemon was not ready within %v: %s", bound, said)
		}
	}
}

// PID is the running daemon's.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Ended tells whether the daemon that Start ran is gone.
func (d *Daemon) Ended() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// Kill ends the daemon as a crash does.
func (d *Daemon) Kill() {
	_ = d.cmd.Process.Kill()
	<-d.done
}

// Stop ends the daemon as a service manager does, within 10 seconds.
func (d *Daemon) Stop() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop the daemon: %w", err)
	}
	const bound = 10 * time.Second
	select {
	case <-d.done:
	case <-time.After(bound):
		d.Kill()
		return fmt.Errorf("the daemon did not stop within %v", bound)
	}
	if code := d.cmd.ProcessState.ExitCode(); code != 0 {
		return fmt.Errorf("the stopped daemon's exit status is %d", code)
	}
	return nil
}

// LogSince is what the daemon has logged after offset.
func (d *Daemon) LogSince(offset int64) (string, error) {
	b, err := os.ReadFile(d.Log)
	if err != nil || int64(len(b)) < offset {
		return "", err
	}
	return string(b[offset:]), nil
}

// PrintLog shows the daemon's last lines of log.
func (d *Daemon) PrintLog(w io.Writer, lines int) {
	b, _ := os.ReadFile(d.Log)
	all := strings.SplitAfter(string(b), "\n")
	fmt.Fprintf(w, "--- the daemon's last lines (%s)\n%s---\n", d.Log, strings.Join(all[max(0, len(all)-lines):], ""))
}

// Leftovers is an error that lists what there is of a daemon without pods:
// records, sockets, mounts, interfaces, and cgroups of the pods with these ids.
func (d *Daemon) Leftovers(ids ...string) error {
	var left []string
	for _, f := range append(FilesBelow(filepath.Join(d.Root, "pods")), FilesBelow(d.Run)...) {
		if f != d.Socket && f != d.Socket+".lock" {
			left = append(left, "file "+f)
		}
	}
	for _, m := range MountsBelow(d.Dir) {
		left = append(left, "mount "+m)
	}
	names, err := Links()
	if err != nil {
		return err
	}
	for _, l := range names {
		if l != "lo" && !isBridge(l) {
			left = append(left, "network interface "+l)
		}
	}
	for _, id := range ids {
		if len(id) >= 12 {
			for _, c := range CgroupsOf(id[:12]) {
				left = append(left, "cgroup "+c)
			}
		}
	}
	if len(left) > 0 {
		slices.Sort(left)
		return fmt.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
	}
	return nil
}

// isBridge: the built-in network's bridge stays for the next pod.
func isBridge(name string) bool {
	_, err := os.Stat("/sys/class/net/" + name + "/bridge")
	if err == nil {
		return true
	}
	// /sys may show another namespace's interfaces; the bridge has the gateway's
	// address.
	addrs, err := AddressesOf(name)
	return err == nil && slices.ContainsFunc(addrs, func(a netip.Prefix) bool { return a.Addr() == gateway })
}

// Processes lists the processes of pods and daemons that this process started
// or inherited.
func (d *Daemon) Processes() []Process {
	var found []Process
	for _, p := range Descendants(os.Getpid()) {
		if p.State != 'Z' && (strings.HasPrefix(p.Command, d.Bin) || strings.HasPrefix(p.Name, "qemu") || strings.HasPrefix(p.Name, "virtiofsd")) {
			found = append(found, p)
		}
	}
	return found
}
