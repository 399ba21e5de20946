// Command init is the smallest guest that proves a boot: it loads the modules
// of /modules.list as an agent would, reports on the console and powers off.
package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	defer func() {
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}()
	loaded := 0
	if f, err := os.Open("/modules.list"); err == nil {
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			path, _, _ := strings.Cut(lines.Text(), " ")
			if err := load(path, 0); err != nil {
				fmt.Printf("test-init: %s: %v\n", path, err)
				return
			}
			loaded++
		}
	}
	for _, name := range []string{"bridge", "nft-chain-2-nat"} {
		if err := demand(name); err != nil {
			fmt.Printf("test-init: %s on demand: %v\n", name, err)
		}
	}
	for _, dir := range []string{"/proc", "/sys"} {
		_ = os.Mkdir(dir, 0o755)
	}
	_ = unix.Mount("proc", "/proc", "proc", 0, "")
	_ = unix.Mount("sysfs", "/sys", "sysfs", 0, "")
	version, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	uptime, _ := os.ReadFile("/proc/uptime")
	filesystems, _ := os.ReadFile("/proc/filesystems")
	for _, fs := range []string{"ext4", "overlay", "virtiofs", "tmpfs", "cgroup2"} {
		if !strings.Contains(string(filesystems), "\t"+fs+"\n") {
			fmt.Printf("test-init: no %s in /proc/filesystems\n", fs)
		}
	}
	if fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0); err != nil {
		fmt.Printf("test-init: AF_VSOCK: %v\n", err)
	} else {
		_ = unix.Close(fd)
	}
	if _, err := os.Stat("/sys/block/vda"); err == nil {
		disk()
	}
	fmt.Printf("test-init: ready kernel=%s modules=%d uptime=%s\n",
		strings.TrimSpace(string(version)), loaded, strings.Fields(string(uptime))[0])
}

// disk mounts the scratch disk with project quotas and writes to it.
func disk() {
	for _, dir := range []string{"/devs", "/scratch"} {
		_ = os.Mkdir(dir, 0o755)
	}
	if err := unix.Mount("devtmpfs", "/devs", "devtmpfs", 0, ""); err != nil {
		fmt.Printf("test-init: devtmpfs: %v\n", err)
		return
	}
	if err := unix.Mount("/devs/vda", "/scratch", "ext4", 0, "prjquota"); err != nil {
		fmt.Printf("test-init: mount scratch disk with prjquota: %v\n", err)
		return
	}
	if err := os.WriteFile("/scratch/file", make([]byte, 1<<20), 0o644); err != nil {
		fmt.Printf("test-init: write to scratch disk: %v\n", err)
		return
	}
	var st unix.Statfs_t
	_ = unix.Statfs("/scratch", &st)
	_ = unix.Unmount("/scratch", 0)
	fmt.Printf("test-init: scratch GiB=%d\n", st.Blocks*uint64(st.Bsize)>>30)
}

// demand loads what /modules.ondemand names for a module or alias.
func demand(name string) error {
	text, err := os.ReadFile("/modules.ondemand")
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if words[0] != name {
			continue
		}
		for _, path := range words[1:] {
			if err := load(path, unix.MODULE_INIT_COMPRESSED_FILE); err != nil && err != unix.EEXIST {
				return fmt.Errorf("%s: %w", path, err)
			}
		}
		return nil
	}
	return fmt.Errorf("not in /modules.ondemand")
}

func load(path string, flags int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", flags)
}
