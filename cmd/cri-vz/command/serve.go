package command

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/cri-vz/cri-vz/cmd/cri-vz/config"
	"github.com/cri-vz/cri-vz/cri"
	"github.com/cri-vz/cri-vz/guest/image"
	"github.com/cri-vz/cri-vz/imageservice"
	"github.com/cri-vz/cri-vz/sandbox"
	"github.com/cri-vz/cri-vz/sandbox/scratch"
	"github.com/cri-vz/cri-vz/sandbox/shim"
	"github.com/cri-vz/cri-vz/sandbox/vz"
)

func newServe() *cobra.Command {
	var file string
	var flags config.Flags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon: the CRI on a unix socket",
		Long: `Run the daemon. Pods live in processes of their own: they go on when the daemon
stops or dies, and the next daemon finds them.

The daemon says "ready" on standard error, and to systemd if that started it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(file, flags)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), c)
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration `FILE` (TOML; \"cri-vz config default\" prints one)")
	cmd.Flags().StringVar(&flags.Root, "root", "", "where images and pods are kept")
	cmd.Flags().StringVar(&flags.Run, "run", "", "where sockets are kept")
	cmd.Flags().StringVar(&flags.Listen, "listen", "", "the CRI socket, unix://PATH")
	cmd.Flags().StringVar(&flags.LogLevel, "log-level", "", "error, info, debug or trace")
	return cmd
}

func serve(ctx context.Context, c *config.Config) (err error) {
	level, err := c.Verbosity()
	if err != nil {
		return err
	}
	if err := setVerbosity(level, c.LogLevel == "error"); err != nil {
		return err
	}
	defer klog.Flush()

	guestDir := c.Guest.Dir
	if guestDir == "" {
		if guestDir, err = image.DefaultDir(); err != nil {
			return err
		}
	}
	// A node that can boot nothing must say so now, not at the first pod.
	if _, err := locateGuest(guestDir, runtime.GOARCH, c.VM.Default); err != nil {
		return fmt.Errorf("vm.default: %w", err)
	}
	for name, cl := range c.VM.Class {
		if _, err := locateGuest(guestDir, runtime.GOARCH, cl); err != nil {
			return fmt.Errorf("vm.class.%s: %w", name, err)
		}
	}
	for _, dir := range []string{c.Root, c.Run} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("create %s: %w", dir, err)
		}
	}
	// First the lock on the root: a second daemon must touch nothing.
	images, err := imageservice.Open(imageservice.Config{
		Root: filepath.Join(c.Root, "images"), RegistryConfigDir: c.Images.RegistryConfigDir, Arch: runtime.GOARCH,
		Translated: translated(c.VM.Driver, vz.Features),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, images.Close()) }()
	spool := filepath.Join(c.Root, "spool")
	if err := os.MkdirAll(spool, 0o700); err != nil {
		return fmt.Errorf("create %s: %w", spool, err)
	}

	subnet, err := netip.ParsePrefix(c.Network.BuiltinSubnet)
	if err != nil {
		return fmt.Errorf("network.builtin_subnet: %w", err)
	}
	pods, net, err := openPods(ctx, c, guestDir, subnet)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pods.Close()) }()

	handlers := make([]string, 0, len(c.VM.Class))
	for name := range c.VM.Class {
		handlers = append(handlers, name)
	}
	slices.Sort(handlers)
	noUserNamespaces := shim.ProbeIDMaps(c.Root)
	if noUserNamespaces != nil {
		klog.InfoS("User namespaces are not offered", "reason", noUserNamespaces)
	}
	server, err := cri.New(cri.Options{
		Pods:             pods,
		Images:           images,
		NetworkStatus:    net.Status,
		ImageRoot:        filepath.Join(c.Root, "images"),
		Spool:            spool,
		Handlers:         handlers,
		Version:          version(),
		StreamAddress:    c.Streaming.Address,
		NoUserNamespaces: noUserNamespaces,
		LogRoot:          filepath.Join(c.Root, "logs"),
		SystemdCgroups:   systemdCgroups(c.Kubelet.CgroupDriver),
	})
	if err != nil {
		return err
	}
	l, err := listenSocket(c.Socket())
	if err != nil {
		return err
	}
	klog.InfoS("cri-vz is ready", "version", version(), "listen", c.Listen, "root", c.Root, "guests", guestDir)
	notifySystemd("READY=1")
	err = server.Serve(ctx, l)
	notifySystemd("STOPPING=1")
	klog.InfoS("cri-vz stops; pods go on", "pods", len(pods.List()))
	return err
}

// translated is the architecture whose programs the driver's guests run besides their
// own; empty if there is none.
func translated(driver string, features func() ([]vz.Feature, error)) string {
	if driver != shim.DriverVZ {
		return ""
	}
	found, err := features()
	if err != nil {
		klog.ErrorS(err, "Asking for Rosetta failed: images for amd64 alone are refused")
	}
	for _, f := range found {
		if f.Name == vz.FeatureRosetta && f.Available {
			return "amd64"
		}
	}
	return ""
}

func openPods(ctx context.Context, c *config.Config, guestDir string, subnet netip.Prefix) (*sandbox.Pods, podNetwork, error) {
	nw, err := openNetwork(c, subnet)
	if err != nil {
		return nil, nil, err
	}
	classes := map[string]sandbox.Class{"": class(guestDir, c.VM.Default)}
	for name, cl := range c.VM.Class {
		classes[name] = class(guestDir, cl)
	}
	pods, err := sandbox.Open(ctx, sandbox.Options{
		Root: c.Root,
		Run:  c.Run,
		Driver: shim.Driver{
			Name: c.VM.Driver, Accel: c.VM.Accel, CacheDir: filepath.Join(c.Root, "driver"), UID: c.VM.UID, GID: c.VM.GID,
		},
		Scratch: scratch.CreateScratch,
		Network: nw,
		Boots:   c.VM.Boots,
		Classes: classes,
		Charge:  sandbox.Charge(c.Kubelet.SandboxCgroup),
	})
	return pods, nw, err
}

func class(guestDir string, c config.Class) sandbox.Class {
	return sandbox.Class{
		CPUs: c.CPUs, MemoryBytes: c.MemoryMiB << 20, HugepageBytes: c.HugepagesMiB << 20, PidsMax: c.PidsMax,
		Guest: func(arch string) (sandbox.Guest, error) { return locateGuest(guestDir, arch, c) },
	}
}

// locateGuest finds what the VMs of a class boot.
func locateGuest(dir, arch string, c config.Class) (sandbox.Guest, error) {
	locate := image.Locate
	if c.Kernel != "" {
		locate = func(dir, arch string) (image.Guest, error) { return image.LocateKind(dir, arch, image.Kind(c.Kernel)) }
	}
	g, err := locate(dir, arch)
	return sandbox.Guest{Arch: g.Arch, Kernel: g.KernelPath, Initrd: g.InitrdPath, Cmdline: g.Cmdline}, err
}

// systemdCgroups is the answer of RuntimeConfig (T5).
func systemdCgroups(driver string) bool {
	if driver != "auto" {
		return driver == "systemd"
	}
	_, err := os.Stat("/run/systemd/system")
	return err == nil
}

// notifySystemd tells the service manager, if there is one (sd_notify(3)).
func notifySystemd(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	conn, err := net.Dial("unixgram", path) // which takes a leading "@" for an abstract name, too
	if err != nil {
		klog.ErrorS(err, "Notify the service manager")
		return
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(state)); err != nil {
		klog.ErrorS(err, "Notify the service manager")
	}
}
