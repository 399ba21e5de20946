package qemu

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// arguments is QEMU's command line. Whatever a caller chose goes through JSON or is
// an argument of its own, as QEMU's older syntax gives commas a meaning.
type arguments struct {
	list    []string
	inherit func(*os.File) int
	sets    int
}

func diskNode(i int) string { return fmt.Sprintf("disk%d", i) }

// newArguments describes m but for its monitor, vsock device and shares. inherit
// returns the number by which QEMU will know a file.
func newArguments(m *machine, inherit func(*os.File) int) *arguments {
	c, p := m.config, platforms[m.config.Arch]
	a := &arguments{inherit: inherit}
	mem := fmt.Sprintf("%dM", c.MemoryBytes>>20)
	cpu := p.cpuTCG
	if m.accel == AccelKVM {
		cpu = "host"
	}
	a.add("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-name", "guest="+strings.ReplaceAll(c.ID, ",", ",,"),
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", p.machine+",accel="+string(m.accel)+",memory-backend=mem", "-cpu", cpu,
		"-smp", strconv.Itoa(c.CPUs), "-m", mem,
		// Shared, so that the vhost-user devices see the guest's memory.
		"-object", "memory-backend-memfd,id=mem,size="+mem+",share=on")
	if m.boot.protocol == bootPVH {
		a.add("-bios", "qboot.rom")
	}
	cmdline := "console=" + p.console
	if m.accel == AccelTCG {
		cmdline += " crivz.emulated" // the agent saves switches between processes
	}
	if m.accel == AccelTCG && c.Arch == "amd64" {
		// An emulated guest sees the host's own counter, and its kernel would time that
		// with an emulated chip. While the host gave it no processor it missed most of
		// the chip's time: the guest's clock ran 10 to 80 times too fast, each bound in
		// it ran out early, and no container started (T7).
		if khz := tscKHz(); khz != 0 {
			cmdline += fmt.Sprintf(" tsc_early_khz=%d", khz)
		}
	}
	a.add("-kernel", procFD(inherit(m.boot.kernel)), "-append", strings.TrimSpace(cmdline+" "+c.Cmdline))
	if m.boot.initrd != nil {
		a.add("-initrd", procFD(inherit(m.boot.initrd)))
	}
	a.add("-chardev", "file,id=console,append=on,path="+a.fdset(m.console), "-serial", "chardev:console")
	a.add("-object", "rng-builtin,id=rng")
	a.virtio("rng", map[string]any{"rng": "rng"})
	a.virtio("balloon", map[string]any{"free-page-reporting": true})
	for i, d := range c.Disks {
		a.disk(i, d, m.disks[i])
	}
	for i, n := range c.NICs {
		a.nic(i, n)
	}
	return a
}

func (a *arguments) add(args ...string) { a.list = append(a.list, args...) }

func (a *arguments) json(option string, v map[string]any) {
	b, err := json.Marshal(v)
	if err != nil { // strings, numbers and booleans can't fail
		panic(err)
	}
	a.add(option, string(b))
}

func (a *arguments) device(v map[string]any) { a.json("-device", v) }

// virtio adds a device of virtio 1. QEMU's default speaks the draft before it as well:
// more for a guest to attack and to set up, 5 ms for each device of an emulated one.
func (a *arguments) virtio(device string, v map[string]any) {
	v["driver"], v["disable-legacy"] = "virtio-"+device+"-pci", "on"
	a.device(v)
}

// fdset passes a file that QEMU opens by name.
func (a *arguments) fdset(f *os.File) string {
	a.sets++
	a.add("-add-fd", fmt.Sprintf("fd=%d,set=%d", a.inherit(f), a.sets))
	return fmt.Sprintf("/dev/fdset/%d", a.sets)
}

func procFD(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// socket is a character device on a connected socket.
func (a *arguments) socket(id string, fd int) {
	a.add("-chardev", fmt.Sprintf("socket,id=%s,fd=%d", id, fd))
}

func (a *arguments) disk(i int, d vmm.Disk, f *os.File) {
	node := diskNode(i)
	a.json("-blockdev", map[string]any{
		"driver": "raw", "node-name": node, "read-only": d.ReadOnly, "discard": "unmap",
		"file": map[string]any{
			"driver": "file", "filename": a.fdset(f), "read-only": d.ReadOnly, "discard": "unmap",
			"auto-read-only": false,
		},
	})
	// report: a full host disk is an I/O error in the guest; the default would stop
	// the guest. // T9
	a.virtio("blk", map[string]any{
		"drive": node, "serial": d.Serial,
		"werror": "report", "rerror": "report",
	})
}

func (a *arguments) nic(i int, n vmm.NIC) {
	id := fmt.Sprintf("nic%d", i)
	a.add("-netdev", fmt.Sprintf("tap,id=%s,fd=%d,vhost=off", id, a.inherit(n.Tap)))
	a.virtio("net", map[string]any{
		"netdev": id, "mac": n.MAC.String(),
		"host_mtu": n.MTU, // 0: the device says nothing of it
		"romfile":  "",    // nothing boots from the network
	})
}

func (a *arguments) share(i int, s vmm.Share, fd int) {
	id := fmt.Sprintf("share%d", i)
	a.socket(id, fd)
	a.device(map[string]any{"driver": "vhost-user-fs-pci", "chardev": id, "tag": s.Tag, "queue-size": 1024})
}
