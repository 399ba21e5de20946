//go:build linux

package testnode

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Process is a process of this host as /proc shows it.
type Process struct {
	PID, Parent int
	State       byte
	Name        string // at most 15 bytes
	Command     string // arguments, separated by spaces
}

// Processes lists all processes; those that end meanwhile are left out.
func Processes() []Process {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var all []Process
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
		p := Process{Name: string(stat[open+1 : end]), State: fields[0][0]}
		p.PID, _ = strconv.Atoi(filepath.Base(dir))
		p.Parent, _ = strconv.Atoi(fields[1])
		args, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		p.Command = strings.TrimSpace(strings.ReplaceAll(string(args), "\x00", " "))
		all = append(all, p)
	}
	return all
}

// Descendants lists the children of pid, theirs and so on.
func Descendants(pid int) []Process {
	all := Processes()
	var found []Process
	parents := []int{pid}
	for len(parents) > 0 {
		parent := parents[0]
		parents = parents[1:]
		for _, p := range all {
			if p.Parent == parent {
				found, parents = append(found, p), append(parents, p.PID)
			}
		}
	}
	return found
}

// MountsBelow lists mount points below dir, the deepest first.
func MountsBelow(dir string) []string {
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

// Links lists the network interfaces of the caller's namespace.
func Links() ([]string, error) {
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

// CgroupsOf lists cgroups with a name that contains id.
func CgroupsOf(id string) []string {
	var found []string
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(d.Name(), id) {
			found = append(found, path)
		}
		return nil
	})
	return found
}

// FilesBelow lists what is in dir, not counting directories.
func FilesBelow(dir string) []string {
	var found []string
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			found = append(found, path)
		}
		return nil
	})
	return found
}

// AddressesOf lists the addresses of a network interface.
func AddressesOf(link string) ([]netip.Prefix, error) {
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
