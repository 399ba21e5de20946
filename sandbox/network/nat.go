package network

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/cri-vz/cri-vz/sandbox/network/frameswitch"
)

// NAT connects pods behind the host's own NAT, as macOS's Virtualization framework has
// it: a pod gets its address in the guest, from the NAT's DHCP server.
//
// What the NAT gives out are MAC addresses, of a fixed pool of its own. That server's
// leases last a day and its addresses are some 250: with a new MAC for each pod, pods
// that last a minute would soon have used them all. The one that was free for longest
// is taken, and none while a lease of the pod before it may live: the pod gave it back
// when it ended, or its time is waited out (T48).
//
// That NAT keeps its machines apart. A second NIC joins each pod to the others by a
// frame switch.
type NAT struct {
	path     string // the record of who has what
	now      func() time.Time
	switched frameswitch.Process

	mu sync.Mutex // taken for a small file's reading and writing
}

// natRecord is the file.
type natRecord struct {
	Schema int `json:"schema"`
	// Pool are three bytes in the middle of all MACs of this NAT's pods, as hex: two
	// daemons on one host have two pools.
	Pool string            `json:"pool"`
	Pods map[string]natPod `json:"pods"`
	// Free are MACs that were used, in the order in which they became free, the
	// latest last.
	Free []natFree `json:"free,omitempty"`
}

type natPod struct {
	Number byte `json:"number"` // of the MAC in the pool
	// Address and Seconds are its lease, once it is known.
	Address  netip.Addr `json:"address,omitzero"`
	Seconds  uint32     `json:"seconds,omitempty"`
	Released bool       `json:"released,omitempty"` // there is no lease any more
}

type natFree struct {
	Number byte      `json:"number"`
	Until  time.Time `json:"until,omitzero"` // when the last lease is over
}

const (
	natSchema = 2
	natMTU    = 1500
	// natPool is half of what macOS's DHCP server has, which other machines use, too.
	natPool = 128
	// natLease is how long a lease lives of which nothing is known: that server's.
	natLease = 24 * time.Hour
	// natRecordLimit is some hundred times what a full pool takes.
	natRecordLimit = 1 << 20
)

// NewNAT keeps its record in stateDir, and the frame switch's socket in runDir. It
// makes both. switchCommand is [frameswitch.Process.Command]; none is this program with
// the argument "switch".
func NewNAT(stateDir, runDir string, switchCommand ...string) (*NAT, error) {
	for _, dir := range []string{stateDir, runDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("network: %w", err)
		}
	}
	if len(switchCommand) == 0 {
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("network: find this program, which is the frame switch, too: %w", err)
		}
		switchCommand = []string{self, "switch"}
	}
	return &NAT{
		path: filepath.Join(stateDir, "nat.json"), now: time.Now,
		switched: frameswitch.Process{Command: switchCommand, Socket: filepath.Join(runDir, SwitchSocket), StateDir: stateDir},
	}, nil
}

// SwitchSocket is the frame switch's socket in the daemon's run directory.
const SwitchSocket = "switch.sock"

// keepEvery is how soon a switch that was killed is replaced: ports join again by
// themselves.
const keepEvery = time.Second

// Keep starts the frame switch anew when it has ended although there are pods, until
// ctx ends. The switch lives on then, as the pods do.
func (n *NAT) Keep(ctx context.Context) {
	tick := time.NewTicker(keepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		pods, err := n.Pods()
		if err == nil && len(pods) > 0 {
			err = n.switched.Ensure()
		}
		if err != nil {
			klog.ErrorS(err, "Keeping the frame switch")
		}
	}
}

func (n *NAT) read() (natRecord, error) {
	r := natRecord{Schema: natSchema}
	b, err := os.ReadFile(n.path)
	if errors.Is(err, fs.ErrNotExist) {
		pool := make([]byte, 3)
		_, _ = rand.Read(pool) // never fails
		r.Pool, r.Pods = hex.EncodeToString(pool), map[string]natPod{}
		return r, nil
	}
	if err == nil && len(b) > natRecordLimit {
		err = fmt.Errorf("it has %d bytes", len(b))
	}
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err == nil && r.Schema != natSchema {
		err = fmt.Errorf("it has schema %d, this build knows %d", r.Schema, natSchema)
	}
	if pool, perr := hex.DecodeString(r.Pool); err == nil && (perr != nil || len(pool) != 3) {
		err = fmt.Errorf("its pool is %q", r.Pool)
	}
	if err != nil {
		return r, fmt.Errorf("network record %s: %w; remove it when no pod is there", n.path, err)
	}
	if r.Pods == nil {
		r.Pods = map[string]natPod{}
	}
	return r, nil
}

func (n *NAT) write(r natRecord) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(n.path), ".nat-*")
	if err != nil {
		return fmt.Errorf("network record: %w", err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(fmt.Errorf("network record: %w", err), os.Remove(f.Name()))
	}
	return os.Rename(f.Name(), n.path)
}

// mac is a locally administered address: of the NIC behind the NAT, or of another.
func (r *natRecord) mac(nic, number byte) net.HardwareAddr {
	pool, _ := hex.DecodeString(r.Pool) // read has looked at it
	return append(append(net.HardwareAddr{0x0a, nic}, pool...), number)
}

// What the MAC of a NIC has after 0a: behind the NAT, and on the frame switch.
const natNIC, switchNIC = 0x76, 0x77

// Prepare gives a pod its MAC address. Ports of the host are for TCP; others are
// errdefs.ErrFailedPrecondition.
func (n *NAT) Prepare(_ context.Context, pod Pod) (*NIC, error) {
	var ports []PortMapping
	for _, p := range pod.PortMappings {
		switch {
		case p.HostPort == 0:
		case p.Protocol != "" && p.Protocol != "tcp":
			return nil, fmt.Errorf("pod %s: host port %d/%s: on macOS a host port is a proxy for TCP connections; reach the pod at its address: %w", pod.ID, p.HostPort, p.Protocol, errdefs.ErrFailedPrecondition)
		default:
			ports = append(ports, p)
		}
	}
	if pod.ID == "" {
		return nil, fmt.Errorf("network: a pod without an id: %w", errdefs.ErrInvalidArgument)
	}
	if err := n.switched.Ensure(); err != nil {
		return nil, fmt.Errorf("pod %s: %w", pod.ID, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.read()
	if err != nil {
		return nil, err
	}
	if _, ok := r.Pods[pod.ID]; ok {
		return nil, fmt.Errorf("pod %s has a network: %w", pod.ID, errdefs.ErrAlreadyExists)
	}
	number, err := r.take(n.now())
	if err != nil {
		return nil, fmt.Errorf("pod %s: %w", pod.ID, err)
	}
	r.Pods[pod.ID] = natPod{Number: number}
	if err := n.write(r); err != nil {
		return nil, err
	}
	return &NIC{
		MAC: r.mac(natNIC, number).String(), MTU: natMTU, HostPorts: ports,
		Switch: &Switch{Socket: n.switched.Socket, MAC: r.mac(switchNIC, number).String()},
	}, nil
}

// SetUp says that the guest gets what it needs by DHCP, see [NAT.Leased].
func (n *NAT) SetUp(_ context.Context, podID string) (*Result, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.read()
	if err != nil {
		return nil, err
	}
	p, ok := r.Pods[podID]
	if !ok {
		return nil, fmt.Errorf("pod %s: its network was not prepared: %w", podID, errdefs.ErrNotFound)
	}
	return &Result{Interface: InterfaceName, MAC: r.mac(natNIC, p.Number).String(), MTU: natMTU, DHCP: true}, nil
}

// take returns a number that no pod ever had, or else the one that was free for
// longest of those without a lease.
func (r *natRecord) take(now time.Time) (byte, error) {
	var used [natPool]bool
	for _, p := range r.Pods {
		used[p.Number%natPool] = true
	}
	for _, f := range r.Free {
		used[f.Number%natPool] = true
	}
	for number, u := range used {
		if !u {
			return byte(number), nil
		}
	}
	var soonest time.Time
	for i, f := range r.Free {
		if !f.Until.After(now) {
			r.Free = slices.Delete(r.Free, i, i+1)
			return f.Number, nil
		}
		if soonest.IsZero() || f.Until.Before(soonest) {
			soonest = f.Until
		}
	}
	if soonest.IsZero() {
		return 0, fmt.Errorf("all %d MAC addresses are in use: remove pods: %w", natPool, errdefs.ErrResourceExhausted)
	}
	return 0, fmt.Errorf("of %d MAC addresses %d are in use, and the others' DHCP leases were not given back: remove pods, or wait until %s: %w",
		natPool, len(r.Pods), soonest.Format(time.RFC3339), errdefs.ErrResourceExhausted)
}

// Leased records which address a pod's guest says that it got, and for how long. An
// address that another pod has is errdefs.ErrFailedPrecondition.
func (n *NAT) Leased(id string, a netip.Addr, seconds uint32) error {
	return n.change(id, func(r *natRecord, p *natPod) error {
		for other, o := range r.Pods {
			if other != id && o.Address == a {
				return fmt.Errorf("pod %s: the DHCP server gave it %v, which is pod %s's: %w", id, a, other, errdefs.ErrFailedPrecondition)
			}
		}
		p.Address, p.Seconds, p.Released = a, seconds, false
		return nil
	})
}

// Released records that no lease of the pod's lives. A pod without a network is no
// error.
func (n *NAT) Released(id string) error {
	return n.change(id, func(_ *natRecord, p *natPod) error {
		p.Released = true
		return nil
	})
}

func (n *NAT) change(id string, f func(*natRecord, *natPod) error) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.read()
	if err != nil {
		return err
	}
	p, ok := r.Pods[id]
	if !ok {
		return nil
	}
	if err := f(&r, &p); err != nil {
		return err
	}
	r.Pods[id] = p
	return n.write(r)
}

// OpenTap returns nil: the VMM has the NAT.
func (n *NAT) OpenTap(string) (*os.File, error) { return nil, nil }

// TearDown takes the MAC address back. It is idempotent.
func (n *NAT) TearDown(_ context.Context, id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.read()
	if err != nil {
		return err
	}
	p, ok := r.Pods[id]
	if !ok {
		return nil
	}
	delete(r.Pods, id)
	free := natFree{Number: p.Number}
	if !p.Released {
		life := natLease
		if p.Seconds != 0 {
			life = time.Duration(p.Seconds) * time.Second
		}
		// The last renewal was now, at the latest.
		free.Until = n.now().Add(life).UTC()
	}
	r.Free = append(r.Free, free)
	return n.write(r)
}

// Pods returns who has a MAC address, sorted.
func (n *NAT) Pods() ([]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.read()
	if err != nil {
		return nil, err
	}
	return slices.Sorted(maps.Keys(r.Pods)), nil
}
