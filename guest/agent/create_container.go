//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cri-vz/cri-vz/guest/agent/container"
	"github.com/cri-vz/cri-vz/guest/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// CreateContainer mounts the root file system, makes the cgroup and the
// standard streams, and resolves the user. A failure leaves nothing behind.
func (a *Agent) CreateContainer(ctx context.Context, r *api.CreateContainerRequest) (*api.CreateContainerResponse, error) {
	if err := checkID("container", r.Id); err != nil {
		return nil, err
	}
	parts := []string{"cgroup", "scratch"}
	if len(r.Layers) > 0 {
		parts = append(parts, "layers")
	}
	if err := a.require(ctx, parts...); err != nil {
		return nil, fmt.Errorf("create container %q: %w", r.Id, err)
	}
	sb, err := a.pod()
	if err != nil {
		return nil, fmt.Errorf("create container %q: %w", r.Id, err)
	}
	c := &ctr{id: r.Id, execs: map[string]*process{}, reserved: map[string]bool{}, settled: make(chan struct{})}
	a.mu.Lock()
	if a.containers[r.Id] != nil {
		a.mu.Unlock()
		return nil, existsf("create container %q: it exists", r.Id)
	}
	a.counter++
	c.number = a.counter
	a.containers[r.Id] = c
	a.mu.Unlock()

	if err := a.create(c, sb, r); err != nil {
		if e := a.destroy(c); e != nil {
			a.log.Printf("undo the creation of container %s: %v", c.id, e)
		}
		a.mu.Lock()
		delete(a.containers, r.Id)
		a.mu.Unlock()
		close(c.settled)
		return nil, fmt.Errorf("create container %q: %w", r.Id, err)
	}
	c.mu.Lock()
	c.state = created
	c.mu.Unlock()
	close(c.settled)
	return &api.CreateContainerResponse{User: c.user}, nil
}

func (a *Agent) create(c *ctr, sb *sandbox, r *api.CreateContainerRequest) error {
	var spec specs.Spec
	if err := json.Unmarshal(r.Spec, &spec); err != nil {
		return invalidf("OCI spec: %w", err)
	}
	if spec.Process == nil || len(spec.Process.Args) == 0 {
		return invalidf("OCI spec: process.args is empty: there is no command to execute")
	}
	if len(r.Env) > 0 {
		spec.Process.Env = nil
		for _, b := range r.Env {
			spec.Process.Env = append(spec.Process.Env, string(b))
		}
	}
	if spec.Linux == nil {
		spec.Linux = &specs.Linux{}
	}
	c.spec = &spec
	c.dir = filepath.Join(a.paths.run, "containers", strconv.Itoa(c.number))
	c.cgroup = cgroup(filepath.Join(a.paths.cgroup, "pod", c.id))
	if err := a.choosePID(c, sb, r); err != nil {
		return err
	}

	// Root of a user namespace is not this directory's owner, and passes through.
	if err := os.MkdirAll(c.dir, 0o711); err != nil {
		return err
	}
	rootfs := filepath.Join(c.dir, "rootfs")
	if err := os.Mkdir(rootfs, 0o755); err != nil {
		return err
	}
	var err error
	if c.layers, err = a.layers.acquire(r.Layers); err != nil {
		return err
	}
	if c.writable, err = a.scratch.makeWritable(c.number); err != nil {
		return fmt.Errorf("writable layer: %w", err)
	}
	if len(c.layers) == 0 {
		// The root directory looks like the topmost layer's, if there is one.
		if err := sb.ids.giveToRoot(c.writable.upper()); err != nil {
			return fmt.Errorf("writable layer: %w", err)
		}
	}
	if err := a.layers.mountOverlay(c.layers, c.writable, rootfs); err != nil {
		return err
	}
	c.mounts = append(c.mounts, rootfs)
	readonly := spec.Root != nil && spec.Root.Readonly
	spec.Root = &specs.Root{Path: rootfs, Readonly: readonly}

	if err := a.resolveMounts(c); err != nil {
		return err
	}
	if err := c.resolveUser(r.User); err != nil {
		return err
	}
	if spec.Process.OOMScoreAdj == nil {
		// Else it would inherit pod-init's, which the OOM killer spares (T25).
		spec.Process.OOMScoreAdj = new(int)
	}
	disk := a.scratch.number()
	rules, err := deviceRules(spec.Linux.Resources, spec.Linux.Devices, disk)
	if err != nil {
		return err
	}
	if allDevices(spec.Linux.Resources) {
		devices, err := guestDevices("/dev", disk)
		if err != nil {
			return err
		}
		if sb.ids == nil { // in a user namespace nodes are the guest's, which has these once they are in use
			devices = append(devices, onDemand...)
		}
		addDevices(&spec, devices)
	}
	if sb.pidsMax > 0 {
		// Each time, because the pod's cgroup may be younger than its sandbox: the
		// boot goes on while that is set up.
		if err := cgroup(filepath.Dir(string(c.cgroup))).write("pids.max", strconv.FormatInt(sb.pidsMax, 10)); err != nil {
			return err
		}
	}
	if err := c.cgroup.create(spec.Linux.Resources); err != nil {
		return err
	}
	if err := c.cgroup.allowDevices(rules); err != nil {
		return err
	}
	spec.Process.Terminal = r.Tty
	if err := sb.ids.mayForkInto(a.paths.cgroup, c.cgroup); err != nil {
		return err
	}
	var p *process
	if r.Tty {
		p, err = ownTerminal(&spec, sb.ids)
	}
	if p == nil && err == nil {
		p, err = a.newStdio(r.Tty, r.Stdin, spec.Process.ConsoleSize, sb.ids)
	}
	if err != nil {
		return fmt.Errorf("standard streams: %w", err)
	}
	if p.stdio.stdin != nil {
		p.stdio.stdin.once = r.StdinOnce
	}
	c.mu.Lock()
	c.init = p
	c.mu.Unlock()
	return nil
}

// newStdio makes a process with its streams.
func (a *Agent) newStdio(tty, stdin bool, size *specs.Box, ids *idMaps) (*process, error) {
	if !tty {
		s, child, err := newPipes(stdin)
		if err != nil {
			return nil, err
		}
		return ids.owned(newProcess(s, child))
	}
	s, slave, err := newTerminal(a.paths.devpts, size)
	if err != nil {
		return nil, err
	}
	return ids.owned(newProcess(s, [3]*os.File{slave, slave, slave}))
}

// ownTerminal makes a process with a terminal of the devpts that the container will
// have, so that it has a name there. Nil if the spec mounts none.
func ownTerminal(spec *specs.Spec, ids *idMaps) (*process, error) {
	devpts, err := container.NewTerminals(spec, ids.hostGroup)
	if devpts == nil || err != nil {
		return nil, err
	}
	var s *stdio
	var slave *os.File
	fd, err := unix.Openat(int(devpts.Fd()), "ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err == nil {
		s, slave, err = terminal(fd, spec.Process.ConsoleSize)
	}
	if err != nil {
		devpts.Close()
		return nil, fmt.Errorf("terminal of the container's devpts: %w", err)
	}
	p := newProcess(s, [3]*os.File{slave, slave, slave})
	p.devpts = devpts
	return ids.owned(p)
}

// choosePID decides which pid namespace the container has.
func (a *Agent) choosePID(c *ctr, sb *sandbox, r *api.CreateContainerRequest) error {
	switch r.PidMode {
	case api.NamespaceMode_CONTAINER:
		c.ownPID = true
		return nil
	case api.NamespaceMode_POD:
		if sb.pidMode == api.NamespaceMode_POD {
			return nil
		}
		return preconditionf("the container shares the pod's pid namespace, but the sandbox was made with pid mode %v", sb.pidMode)
	case api.NamespaceMode_NODE:
		if sb.pidMode != api.NamespaceMode_POD {
			return nil
		}
		return preconditionf("the container wants the guest's pid namespace, but the sandbox was made with pid mode %v", sb.pidMode)
	case api.NamespaceMode_TARGET:
		// T27
		t, err := a.process(r.PidTarget, "")
		if err != nil {
			return fmt.Errorf("pid namespace: %w", err)
		}
		if !t.hasStarted() || t.hasExited() {
			return preconditionf("pid namespace: container %q is not running", r.PidTarget)
		}
		c.target = t
		return nil
	}
	return invalidf("pid mode %v", r.PidMode)
}

// resolveMounts turns the sources that only the guest can find into paths.
func (a *Agent) resolveMounts(c *ctr) error {
	for i := range c.spec.Mounts {
		m := &c.spec.Mounts[i]
		target := filepath.Join(c.dir, "m"+strconv.Itoa(i))
		var err error
		switch {
		case strings.HasPrefix(m.Source, api.VolumeScheme):
			if err = a.pinVolume(strings.TrimPrefix(m.Source, api.VolumeScheme), target); err == nil {
				c.volumes = append(c.volumes, target)
				name, _, _ := strings.Cut(strings.TrimPrefix(m.Source, api.VolumeScheme), "/")
				c.shared = append(c.shared, filepath.Join(a.paths.volumes, name))
			}
		case strings.HasPrefix(m.Source, api.AgentScheme):
			switch name := strings.TrimPrefix(m.Source, api.AgentScheme); name {
			case "resolv.conf", "hosts", "hostname", "shm":
				m.Source = filepath.Join(a.paths.run, "pod", name)
				m.Type = "bind"
				continue
			default:
				err = invalidf("the agent has no %q", name)
			}
		case m.Type == api.ImageMount:
			err = a.mountImage(c, m, target)
		case m.Type == api.EmptyDirMount:
			err = a.mountEmptyDir(m, target)
		case m.Type == "bind" || hasBindOption(m.Options):
			err = invalidf("source %q is neither %s nor %s", m.Source, api.VolumeScheme, api.AgentScheme)
		default:
			continue
		}
		if err != nil {
			return fmt.Errorf("mount %q at %q: %w", m.Source, m.Destination, err)
		}
		c.mounts = append(c.mounts, target)
		m.Source, m.Type = target, "bind"
		if !hasBindOption(m.Options) {
			m.Options = append(m.Options, "rbind")
		}
	}
	return nil
}

func hasBindOption(options []string) bool {
	for _, o := range options {
		if o == "bind" || o == "rbind" {
			return true
		}
	}
	return false
}

// pinVolume mounts NAME[/sub] of the volumes share at target. Containers can
// write below NAME, so sub must not lead out of it; NAME is the host's.
func (a *Agent) pinVolume(source, target string) error {
	a.bootMu.Lock()
	err := a.missing["volumes"]
	a.bootMu.Unlock()
	if err != nil {
		return unavailablef("the guest has no volumes: %w", err)
	}
	name, sub, _ := strings.Cut(source, "/")
	if name == "" || name == "." || name == ".." {
		return invalidf("volume name %q", name)
	}
	base := a.paths.volumes
	if sub != "" {
		base = filepath.Join(base, name)
	} else {
		sub = name
	}
	_, err = pinBelow(base, sub, target)
	return err
}

// syncTimeout bounds the write-back of volumes after a container's end.
const syncTimeout = 2 * time.Second

// syncVolumes writes back what shared mappings have left in the guest's memory,
// so that the host sees all that the container wrote when it learns of the end
// (T35).
func (c *ctr) syncVolumes() error {
	if len(c.volumes) == 0 {
		return nil
	}
	done := make(chan error, 1)
	go func() {
		var errs []error
		for _, v := range c.volumes {
			f, err := os.OpenFile(v, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			if err := unix.Syncfs(int(f.Fd())); err != nil {
				errs = append(errs, fmt.Errorf("sync %s: %w", v, err))
			}
			f.Close()
		}
		done <- errors.Join(errs...)
	}()
	t := time.NewTimer(syncTimeout)
	defer t.Stop()
	select {
	case err := <-done:
		return err
	case <-t.C:
		return fmt.Errorf("the volumes are not written back after %v: the host may not see the container's last writes", syncTimeout)
	}
}

// mountImage mounts an image volume; see [api.ImageLayer].
func (a *Agent) mountImage(c *ctr, m *specs.Mount, target string) error {
	var names, rest []string
	sub := ""
	for _, o := range m.Options {
		if v, ok := strings.CutPrefix(o, api.ImageLayer); ok {
			names = append(names, v)
		} else if v, ok := strings.CutPrefix(o, api.ImageSubpath); ok {
			sub = v
		} else {
			rest = append(rest, o)
		}
	}
	layers, err := a.layers.acquire(names)
	if err != nil {
		return err
	}
	c.layers = append(c.layers, layers...)
	m.Options = append(rest, "ro")
	whole := target
	if sub != "" {
		whole += "i"
	}
	if err := os.Mkdir(whole, 0o755); err != nil {
		return err
	}
	if err := a.layers.mountLayers(layers, whole); err != nil {
		return err
	}
	if sub == "" {
		return nil
	}
	c.mounts = append(c.mounts, whole)
	if _, err = pinBelow(whole, sub, target); err != nil {
		return fmt.Errorf("%q in the image: %w", sub, err)
	}
	return nil
}

// resolveUser looks the user up in the container's files.
func (c *ctr) resolveUser(u *api.User) error {
	want := container.User{Name: u.GetName()}
	if u != nil {
		for _, id := range []struct {
			from *int64
			to   **uint32
		}{{u.Uid, &want.UID}, {u.Gid, &want.GID}} {
			if id.from == nil {
				continue
			}
			if *id.from < 0 || *id.from > math.MaxInt32 {
				return invalidf("user or group id %d is not within 0..%d", *id.from, math.MaxInt32)
			}
			v := uint32(*id.from)
			*id.to = &v
		}
		want.AdditionalGIDs = u.SupplementalGroups
		if u.StrictGroups {
			want.SupplementalGroupsPolicy = container.GroupsStrict
		}
	}
	id, err := container.ResolveUser(c.spec.Root.Path, want)
	if err != nil {
		return invalidf("user: %w", err)
	}
	c.user = &api.ResolvedUser{Uid: id.UID, Gid: id.GID, SupplementalGroups: id.Groups}
	return nil
}

// runAs is the resolved user as container-init and exec-init take it.
func (c *ctr) runAs() *container.User {
	uid, gid := c.user.Uid, c.user.Gid
	return &container.User{
		UID: &uid, GID: &gid,
		AdditionalGIDs:           c.user.SupplementalGroups,
		SupplementalGroupsPolicy: container.GroupsStrict,
	}
}

// destroy kills and releases all that c has, as far as create came. It may be
// called again after an error.
func (a *Agent) destroy(c *ctr) error {
	var errs []error
	if c.cgroup != "" {
		if err := c.cgroup.remove(); err != nil {
			errs = append(errs, err)
		}
	}
	c.mu.Lock()
	if c.init != nil {
		c.init.discard()
	}
	for _, p := range c.execs {
		p.discard()
	}
	c.mu.Unlock()
	for i := len(c.mounts) - 1; i >= 0; i-- {
		if err := unmount(c.mounts[i]); err != nil {
			errs = append(errs, err)
		}
	}
	c.mounts = nil
	if err := c.forgetVolumes(); err != nil {
		errs = append(errs, err)
	}
	if err := a.layers.release(c.layers); err != nil {
		errs = append(errs, err)
	}
	c.layers = nil
	if c.writable != nil {
		if err := c.writable.remove(); err != nil {
			errs = append(errs, fmt.Errorf("remove the writable layer: %w", err))
		}
	}
	if c.dir != "" && len(errs) == 0 {
		// Mount points only: whatever were still mounted must not be emptied.
		errs = append(errs, removeMountPoints(c.dir))
	}
	return errors.Join(errs...)
}

// forgetVolumes makes the guest's kernel let go of what it knows of the container's
// volumes: for each file and directory that it remembers, virtiofsd keeps a
// descriptor, and with it the host's file system busy (T34).
func (c *ctr) forgetVolumes() error {
	if len(c.shared) == 0 {
		return nil
	}
	var errs []error
	for _, v := range c.shared {
		// The automount that a file system of its own is in the share. Names are
		// one container's: nobody else uses it.
		errs = append(errs, unmount(v))
	}
	if os.Getpid() == 1 { // in a guest: there is no call to forget one tree only
		errs = append(errs, os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0))
	}
	c.shared = nil
	return errors.Join(errs...)
}

// removeMountPoints removes a directory of empty files and directories.
func removeMountPoints(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return os.Remove(dir)
}
