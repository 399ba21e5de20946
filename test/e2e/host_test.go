//go:build linux

package e2e_test

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

var quiet = log.New(io.Discard, "", 0)

// process is a process of this host as /proc shows it.
type process struct {
	pid, parent int
	state       byte
	name        string // at most 15 bytes
	command     string // arguments, separated by spaces
}

// processes lists all processes; those that end meanwhile are left out.
func processes() []process {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var all []process
	for _, dir := range dirs {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue
		}
		open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
		fields := strings.Fields(string(stat[end+1:]))
		if open < 0 || len(fields) < 2 {
			continue
		}
		p := process{name: string(stat[open+1 : end]), state: fields[0][0]}
		p.pid, _ = strconv.Atoi(filepath.Base(dir))
		p.parent, _ = strconv.Atoi(fields[1])
		args, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		p.command = strings.TrimSpace(strings.ReplaceAll(string(args), "\x00", " "))
		all = append(all, p)
	}
	return all
}

// descendants lists the children of pid, theirs and so on.
func descendants(pid int) []process {
	all := processes()
	var found []process
	parents := []int{pid}
	for len(parents) > 0 {
		parent := parents[0]
		parents = parents[1:]
		for _, p := range all {
			if p.parent == parent {
				found, parents = append(found, p), append(parents, p.pid)
			}
		}
	}
	return found
}

// shimOf finds the process that owns a pod.
func shimOf(pod string) (process, error) {
	for _, p := range processes() {
		if args := strings.Fields(p.command); len(args) > 2 && args[1] == "shim" && strings.Contains(p.command, pod) && p.state != 'Z' {
			return p, nil
		}
	}
	return process{}, fmt.Errorf("pod %.12s has no shim", pod)
}

// helperOf finds a process of a pod's machine by the beginning of its name.
func helperOf(pod, name string) (process, error) {
	shim, err := shimOf(pod)
	if err != nil {
		return process{}, err
	}
	for _, p := range descendants(shim.pid) {
		if strings.HasPrefix(p.name, name) && p.state != 'Z' {
			return p, nil
		}
	}
	return process{}, fmt.Errorf("pod %.12s has no %s", pod, name)
}

// mountsBelow lists mount points below dir, the deepest first.
func mountsBelow(dir string) []string {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{err.Error()}
	}
	var found []string
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			found = append(found, f[4])
		}
	}
	slices.SortFunc(found, func(a, b string) int { return len(b) - len(a) })
	return found
}

// links lists the network interfaces of the caller's namespace.
func links() ([]string, error) {
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, i := range all {
		names = append(names, i.Name)
	}
	return names, nil
}

// cgroupsOf lists cgroups with a name that contains id.
func cgroupsOf(id string) []string {
	var found []string
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(d.Name(), id) {
			found = append(found, path)
		}
		return nil
	})
	return found
}

// filesBelow lists what is in dir, not counting directories.
func filesBelow(dir string) []string {
	var found []string
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			found = append(found, path)
		}
		return nil
	})
	return found
}

func addressesOf(link string) ([]netip.Prefix, error) {
	i, err := net.InterfaceByName(link)
	if err != nil {
		return nil, err
	}
	addrs, err := i.Addrs()
	if err != nil {
		return nil, err
	}
	var found []netip.Prefix
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			found = append(found, p)
		}
	}
	return found, nil
}
