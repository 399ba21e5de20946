package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
)

const (
	builtinName   = "cri-vz"
	builtinBridge = "crivz0"

	capPortMappings = "portMappings"
	// capAnnotations is containerd's name for the pod's annotations.
	capAnnotations = "io.kubernetes.cri.pod-annotations"

	// maxPluginOutput bounds a plugin's stdout and stderr, each; results have a
	// few kilobytes.
	maxPluginOutput = 1 << 20
)

// network is a parsed configuration and where it came from.
type network struct {
	list    *libcni.NetworkConfigList
	source  string // for error messages
	builtin bool
	// masquerade are the subnets whose packets into the world get the node's address.
	masquerade []netip.Prefix
}

// configuration returns the user's network or else the built-in one.
func (n *Network) configuration() (*network, error) {
	files, err := libcni.ConfFiles(n.cfg.ConfDir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return nil, fmt.Errorf("CNI configuration: %w", err)
	}
	if len(files) == 0 {
		return n.builtin()
	}
	slices.Sort(files)
	list, err := loadConf(files[0])
	if err == nil {
		err = checkList(list)
	}
	if err != nil {
		// Errors of the library's parser don't say which file.
		return nil, fmt.Errorf("CNI configuration %s: %w (correct it, or remove it to use the built-in network): %w", files[0], err, errdefs.ErrInvalidArgument)
	}
	return &network{list: list, source: files[0]}, nil
}

func loadConf(path string) (*libcni.NetworkConfigList, error) {
	if filepath.Ext(path) == ".conflist" {
		return libcni.NetworkConfFromFile(path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	single, err := libcni.NetworkPluginConfFromBytes(b)
	if err != nil {
		return nil, err
	}
	return &libcni.NetworkConfigList{
		Name: single.Network.Name, CNIVersion: single.Network.CNIVersion, Plugins: []*libcni.PluginConfig{single}, Bytes: b,
	}, nil
}

func checkList(list *libcni.NetworkConfigList) error {
	// utils' error is a *types.Error: a nil one must not become an error.
	if err := utils.ValidateNetworkName(list.Name); err != nil {
		return err
	}
	if list.CNIVersion == "" {
		return nil // 0.1.0, says the specification
	}
	newer, err := version.GreaterThan(list.CNIVersion, version.Current())
	if err != nil {
		return err
	}
	if newer {
		return fmt.Errorf("cniVersion %s is newer than %s, the newest known here", list.CNIVersion, version.Current())
	}
	return nil
}

// builtin is a bridge with host-local addresses and host ports; see masquerade for the
// rest. Its leases lie in StateDir: /var/lib/cni belongs to other runtimes.
func (n *Network) builtin() (*network, error) {
	type dict = map[string]any
	var ranges [][]dict
	var routes []dict
	for _, s := range n.cfg.Subnets {
		ranges = append(ranges, []dict{{"subnet": s.Masked().String()}})
		dst := "0.0.0.0/0"
		if s.Addr().Is6() {
			dst = "::/0"
		}
		routes = append(routes, dict{"dst": dst})
	}
	b, err := json.Marshal(dict{
		"cniVersion": "1.0.0",
		"name":       builtinName,
		"plugins": []dict{{
			"type": "bridge", "bridge": builtinBridge,
			"isGateway": true, "hairpinMode": true,
			"ipam": dict{"type": "host-local", "dataDir": filepath.Join(n.cfg.StateDir, "ipam"), "ranges": ranges, "routes": routes},
		}, {
			"type": "portmap", "capabilities": dict{capPortMappings: true},
		}},
	})
	if err != nil {
		return nil, fmt.Errorf("built-in network: %w", err)
	}
	list, err := libcni.NetworkConfFromBytes(b)
	if err != nil {
		return nil, fmt.Errorf("built-in network: %w", err)
	}
	w := &network{list: list, source: "the built-in network", builtin: true}
	for _, s := range n.cfg.Subnets {
		w.masquerade = append(w.masquerade, s.Masked())
	}
	return w, nil
}

// supports tells whether a plugin of the list takes a capability argument.
func (w *network) supports(capability string) bool {
	return slices.ContainsFunc(w.list.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Capabilities[capability] })
}

// installed checks that the list's plugins, and iptables where the built-in
// network needs it, are there, before anything is made.
func (n *Network) installed(w *network) error {
	for _, p := range w.list.Plugins {
		for _, name := range []string{p.Network.Type, p.Network.IPAM.Type} {
			if name == "" {
				continue
			}
			if _, err := findPlugin(name, n.cfg.BinDirs); err != nil {
				return fmt.Errorf("%w (asked for by %s)", err, w.source)
			}
		}
	}
	for _, subnet := range w.masquerade {
		tool := iptablesOf(subnet)
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("the built-in network masquerades with %s: %w: install the package iptables: %w", tool, err, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// referencePlugins are in the package containernetworking-plugins, by their
// folder in the upstream repository.
var referencePlugins = map[string]string{
	"bridge": "main", "host-device": "main", "ipvlan": "main", "loopback": "main", "macvlan": "main", "ptp": "main", "vlan": "main",
	"dhcp": "ipam", "host-local": "ipam", "static": "ipam",
	"bandwidth": "meta", "firewall": "meta", "portmap": "meta", "sbr": "meta", "tuning": "meta", "vrf": "meta",
}

func findPlugin(name string, dirs []string) (string, error) {
	path, err := invoke.FindInPath(name, dirs)
	if err == nil {
		return path, nil
	}
	advice := "install the network add-on that brings it, or set the directory it lies in"
	if dir, ok := referencePlugins[name]; ok {
		advice = fmt.Sprintf("install the package containernetworking-plugins (Debian puts it in /usr/lib/cni), or GOBIN=%s go install github.com/containernetworking/plugins/plugins/%s/%s@latest", dirs[0], dir, name)
	}
	return "", fmt.Errorf("CNI plugin %q is in none of %s: %s: %w", name, strings.Join(dirs, ", "), advice, errdefs.ErrFailedPrecondition)
}

// cni returns libcni with its cache in StateDir and plugins run in NodeNetns.
func (n *Network) cni() *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(n.cfg.BinDirs, filepath.Join(n.cfg.StateDir, "cni"), &pluginExec{nodeNetns: n.cfg.NodeNetns, firewall: n.firewall})
}

func runtimeConf(pod Pod, netns string) *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{
		ContainerID: pod.ID,
		NetNS:       netns,
		IfName:      InterfaceName,
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", pod.Namespace},
			{"K8S_POD_NAME", pod.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", pod.ID},
			{"K8S_POD_UID", pod.UID},
		},
		CapabilityArgs: map[string]any{},
	}
	if len(pod.PortMappings) > 0 {
		rt.CapabilityArgs[capPortMappings] = pod.PortMappings
	}
	if len(pod.Annotations) > 0 {
		rt.CapabilityArgs[capAnnotations] = pod.Annotations
	}
	return rt
}

// addressesOf reads a result of any CNI version.
func addressesOf(result cnitypes.Result) ([]netip.Prefix, cnitypes.DNS, error) {
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, cnitypes.DNS{}, fmt.Errorf("CNI result of version %s: %w", result.Version(), err)
	}
	var addrs []netip.Prefix
	for _, ip := range r.IPs {
		// Addresses may also be of the host's side, or of further interfaces.
		if i := ip.Interface; i != nil && *i >= 0 && *i < len(r.Interfaces) {
			if dev := r.Interfaces[*i]; dev.Sandbox == "" || dev.Name != InterfaceName {
				continue
			}
		}
		p, err := prefixOf(ip.Address)
		if err != nil {
			return nil, cnitypes.DNS{}, fmt.Errorf("CNI result: %w", err)
		}
		addrs = append(addrs, p)
	}
	return addrs, r.DNS, nil
}

// pluginExec runs plugins in the node's namespace, in process groups of their
// own: a plugin runs others (IPAM) that must not outlive the bound either.
type pluginExec struct {
	version.PluginDecoder
	nodeNetns string
	// firewall lets one ADD of the portmap plugin run at a time: two that
	// find its top-level chains missing both create them, and the later fails
	// ("CHAIN_USER_ADD failed (File exists)", plugins 1.1.1).
	firewall func(context.Context) (done func(), err error)
}

var _ invoke.Exec = (*pluginExec)(nil)

func (e *pluginExec) FindInPath(name string, dirs []string) (string, error) {
	return findPlugin(name, dirs)
}

func (e *pluginExec) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	if filepath.Base(path) == "portmap" && slices.Contains(environ, "CNI_COMMAND=ADD") {
		done, err := e.firewall(ctx)
		if err != nil {
			return nil, fmt.Errorf("CNI plugin %s: %w", path, err)
		}
		defer done()
	}
	var stdout, stderr cappedBuffer
	err := inNetns(e.nodeNetns, func() error {
		cmd := exec.CommandContext(ctx, path)
		cmd.Env = environ
		cmd.Stdin = bytes.NewReader(stdin)
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
		// A descendant that left the group may still hold the pipes.
		cmd.WaitDelay = time.Second
		return cmd.Run()
	})
	if err == nil && (stdout.full || stderr.full) {
		err = fmt.Errorf("output is larger than %d bytes", maxPluginOutput)
	}
	if err == nil {
		return stdout.buf.Bytes(), nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return nil, fmt.Errorf("CNI plugin %s was killed: %w", path, cause)
	}
	// A plugin reports its error as JSON on stdout (CNI spec, "Error").
	var perr cnitypes.Error
	if json.Unmarshal(stdout.buf.Bytes(), &perr) == nil && perr.Msg != "" {
		return nil, fmt.Errorf("CNI plugin %s: %w", path, &perr)
	}
	return nil, fmt.Errorf("CNI plugin %s: %w, stdout %q, stderr %q", path, err, excerpt(stdout.buf.Bytes()), excerpt(stderr.buf.Bytes()))
}

// excerpt is the end of a plugin's output, which says most.
func excerpt(b []byte) []byte {
	const enough = 1024
	b = bytes.TrimSpace(b)
	return b[max(0, len(b)-enough):]
}

// cappedBuffer takes everything, so that the writer never blocks, and keeps
// the first maxPluginOutput bytes. It must not embed the bytes.Buffer, whose
// ReadFrom io.Copy would prefer to Write.
type cappedBuffer struct {
	buf  bytes.Buffer
	full bool
}

func (b *cappedBuffer) Write(p []byte) (int, error) {
	keep := min(len(p), maxPluginOutput-b.buf.Len())
	b.full = b.full || keep < len(p)
	b.buf.Write(p[:keep])
	return len(p), nil
}

// record is a pod's network as the disk knows it, written before the first
// step: it holds all that CNI DEL needs, whatever became of the user's
// configuration meanwhile.
type record struct {
	Schema     int               `json:"schema"`
	Pod        Pod               `json:"pod"`
	Network    string            `json:"network"`
	Source     string            `json:"source,omitempty"` // for error messages
	CNIVersion string            `json:"cniVersion"`
	Plugins    []json.RawMessage `json:"plugins"`
	Masquerade []netip.Prefix    `json:"masquerade,omitempty"`
}

const recordSchema = 1

func newRecord(pod Pod, w *network) *record {
	r := &record{Schema: recordSchema, Pod: pod, Network: w.list.Name, Source: w.source, CNIVersion: w.list.CNIVersion, Masquerade: w.masquerade}
	for _, p := range w.list.Plugins {
		r.Plugins = append(r.Plugins, p.Bytes)
	}
	return r
}

// list rebuilds the configuration of the ADD.
func (r *record) list() (*libcni.NetworkConfigList, error) {
	list := &libcni.NetworkConfigList{Name: r.Network, CNIVersion: r.CNIVersion}
	for _, b := range r.Plugins {
		p, err := libcni.NetworkPluginConfFromBytes(b)
		if err != nil {
			return nil, err
		}
		list.Plugins = append(list.Plugins, p)
	}
	return list, nil
}

// write makes the record durable: it is there whole or not at all, also after
// a power failure.
func (r *record) write(path string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write network record of pod %s: %w", r.Pod.ID, err)
		}
	}()
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func readRecord(path string) (*record, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("network record %s: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("network record: %w", err)
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("network record %s: %w", path, err)
	}
	if r.Schema != recordSchema {
		return nil, fmt.Errorf("network record %s has schema %d, this version knows %d: %w", path, r.Schema, recordSchema, errdefs.ErrFailedPrecondition)
	}
	return &r, nil
}
