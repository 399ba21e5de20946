package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
)

// NAT gives pods addresses behind the host's own NAT, as macOS's Virtualization
// framework has it: one network whose gateway is the host, and whose DHCP server
// hands out the lower addresses to whoever asks. Pods don't ask: their addresses come
// from the upper half, so that a pod has one before it boots (T42), that no lease runs
// out while the host sleeps, and that a pool of leases which last a day is not used up
// by pods that last a minute (T48).
//
// Each address has its MAC address, and the one that was free for longest is taken,
// so that nobody's neighbour table has it for another pod.
type NAT struct {
	path    string // the record of who has what
	subnet  netip.Prefix
	gateway netip.Addr

	mu sync.Mutex // taken for a small file's reading and writing
}

// natRecord is the file: pods by id, and addresses in the order in which they became
// free, the latest last.
type natRecord struct {
	Schema int                   `json:"schema"`
	Pods   map[string]netip.Addr `json:"pods"`
	Freed  []netip.Addr          `json:"freed,omitempty"`
}

const (
	natSchema = 1
	natMTU    = 1500
	// natRecordLimit is some hundred times what a full subnet takes.
	natRecordLimit = 1 << 20
)

// NewNAT keeps its record in dir, which it makes. The subnet and the gateway are what
// the host's NAT has.
func NewNAT(dir string, subnet netip.Prefix, gateway netip.Addr) (*NAT, error) {
	if !subnet.IsValid() || !subnet.Addr().Is4() || subnet.Bits() > 28 || subnet.Bits() < 16 || !subnet.Contains(gateway) {
		return nil, fmt.Errorf("network: the host's NAT has the subnet %s and the gateway %s, want an IPv4 subnet of /16 to /28: %w", subnet, gateway, errdefs.ErrFailedPrecondition)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	return &NAT{path: filepath.Join(dir, "nat.json"), subnet: subnet.Masked(), gateway: gateway}, nil
}

func (n *NAT) read() (natRecord, error) {
	r := natRecord{Schema: natSchema, Pods: map[string]netip.Addr{}}
	b, err := os.ReadFile(n.path)
	if errors.Is(err, fs.ErrNotExist) {
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
	if err != nil {
		return r, fmt.Errorf("network record %s: %w; remove it when no pod is there", n.path, err)
	}
	if r.Pods == nil {
		r.Pods = map[string]netip.Addr{}
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

// SetUp gives a pod its address. Ports of the host can't be published: that is
// errdefs.ErrFailedPrecondition.
func (n *NAT) SetUp(_ context.Context, pod Pod) (*Result, error) {
	for _, p := range pod.PortMappings {
		if p.HostPort != 0 {
			return nil, fmt.Errorf("pod %s: host port %d: this host has no port mappings, use port-forward: %w", pod.ID, p.HostPort, errdefs.ErrFailedPrecondition)
		}
	}
	if pod.ID == "" {
		return nil, fmt.Errorf("network: a pod without an id: %w", errdefs.ErrInvalidArgument)
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
	a, err := n.take(&r)
	if err != nil {
		return nil, fmt.Errorf("pod %s: %w", pod.ID, err)
	}
	r.Pods[pod.ID] = a
	if err := n.write(r); err != nil {
		return nil, err
	}
	return &Result{
		Interface: InterfaceName, MAC: natMAC(a).String(), MTU: natMTU,
		Addresses: []netip.Prefix{netip.PrefixFrom(a, n.subnet.Bits())},
		Routes: []Route{
			{Destination: n.subnet, Source: a},
			{Destination: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Gateway: n.gateway},
		},
	}, nil
}

// take returns an address of the upper half that nobody has: one that nobody ever
// had, or else the one that was free for longest.
func (n *NAT) take(r *natRecord) (netip.Addr, error) {
	used := map[netip.Addr]bool{n.gateway: true}
	for _, a := range r.Pods {
		used[a] = true
	}
	for _, a := range r.Freed {
		used[a] = true
	}
	first, last := n.upperHalf()
	for a := first; a.Less(last); a = a.Next() { // the last is the broadcast address
		if !used[a] {
			return a, nil
		}
	}
	if len(r.Freed) == 0 {
		return netip.Addr{}, fmt.Errorf("all addresses of %s to %s are in use: remove pods: %w", first, last, errdefs.ErrResourceExhausted)
	}
	a := r.Freed[0]
	r.Freed = r.Freed[1:]
	return a, nil
}

func (n *NAT) upperHalf() (first, last netip.Addr) {
	a := n.subnet.Addr().As4()
	base := uint32(a[0])<<24 | uint32(a[1])<<16 | uint32(a[2])<<8 | uint32(a[3])
	size := uint32(1) << (32 - n.subnet.Bits())
	at := func(v uint32) netip.Addr {
		return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
	}
	return at(base + size/2), at(base + size - 1)
}

// natMAC is the locally administered address of a pod's NIC.
func natMAC(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{0x0a, 0x76, b[0], b[1], b[2], b[3]}
}

// OpenTap returns nil: the VMM has the NAT.
func (n *NAT) OpenTap(string) (*os.File, error) { return nil, nil }

// TearDown takes the address back. It is idempotent.
func (n *NAT) TearDown(_ context.Context, id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.read()
	if err != nil {
		return err
	}
	a, ok := r.Pods[id]
	if !ok {
		return nil
	}
	delete(r.Pods, id)
	r.Freed = append(slices.DeleteFunc(r.Freed, func(f netip.Addr) bool { return f == a }), a)
	return n.write(r)
}

// Pods returns who has an address, sorted.
func (n *NAT) Pods() ([]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.read()
	if err != nil {
		return nil, err
	}
	ids := make([]string, 0, len(r.Pods))
	for id := range r.Pods {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids, nil
}
