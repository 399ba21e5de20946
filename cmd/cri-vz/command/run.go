package command

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
	"github.com/cri-vz/cri-vz/sandbox"
)

// runNamespace is the pod namespace of what `cri-vz run` makes.
const runNamespace = "cri-vz"

// publishTimeout is how long a published port may take to answer before `run`
// says so; it keeps trying for every connection afterwards.
const publishTimeout = 30 * time.Second

// abandonTimeout bounds how long Ctrl-C waits for the daemon to undo a start.
const abandonTimeout = 15 * time.Second

type runOptions struct {
	image   string
	command []string
	name    string
	publish []string
	env     []string
	grace   int64
}

func newRun(c *client) *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:   "run IMAGE|FILE [-p HOST:POD] [-- COMMAND [ARG...]]",
		Short: "Run an image or an image archive in a new pod until Ctrl-C",
		Long: `Run an image in a pod of its own: load or pull it, boot the VM, start the
container, publish its ports on localhost, and show its output. Ctrl-C, or the
end of the container, stops and removes the pod; a second Ctrl-C does so at once.
The exit status is the container's; 127 if its command is not there, 126 if that may
not be executed.`,
		Example: `  docker save app:1 | gzip > app.tar.gz
  cri-vz run app.tar.gz -p 3000:3000
  cri-vz run docker.io/library/busybox -- echo hello`,
		Args:    cobra.MinimumNArgs(1),
		PreRunE: c.connect,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.image, o.command = args[0], args[1:]
			return c.run(cmd, o)
		},
	}
	cmd.Flags().StringVar(&o.name, "name", "", "name of the pod (default: made from the image's name)")
	cmd.Flags().StringArrayVarP(&o.publish, "publish", "p", nil, "publish a port of the pod on localhost, HOST:POD or PORT (repeat)")
	cmd.Flags().StringArrayVarP(&o.env, "env", "e", nil, "set an environment variable, NAME=VALUE (repeat)")
	cmd.Flags().Int64VarP(&o.grace, "time", "t", 10, "seconds that the container gets to end by itself")
	return cmd
}

func (c *client) run(cmd *cobra.Command, o runOptions) (err error) {
	ctx, out := cmd.Context(), cmd.ErrOrStderr()
	env, err := parseEnv(o.env)
	if err != nil {
		return err
	}
	// Ports first: one that is in use must fail before anything is started.
	ports, err := listenAll(o.publish)
	if err != nil {
		return err
	}
	defer ports.close()

	began := time.Now()
	image, err := c.ensureImage(ctx, cmd, o.image)
	if err != nil {
		return err
	}
	printStep(out, "image", time.Since(began), image.name)

	pod, err := c.podConfig(ctx, o.name, image.name)
	if err != nil {
		return err
	}
	id, err := c.startPod(ctx, out, pod)
	if err != nil {
		return err
	}
	defer func() {
		// ctx has ended when Ctrl-C brought us here; another one ends the patience.
		hurry, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		began := time.Now()
		sandbox := &runtimeapi.PodSandbox{Id: id, Metadata: pod.GetMetadata()}
		shown := newProgress(out).follow("stopping; Ctrl-C ends the wait for the container")
		rerr := c.removePod(context.WithoutCancel(ctx), hurry, sandbox, o.grace)
		shown()
		if rerr != nil {
			err = errors.Join(err, fmt.Errorf("remove pod %s: %s", shortID(id), message(rerr)))
			return
		}
		printStep(out, "stop and remove", time.Since(began), "")
	}()

	began = time.Now()
	ct, err := c.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  id,
		SandboxConfig: pod,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: pod.GetMetadata().GetName()},
			Image:    &runtimeapi.ImageSpec{Image: image.id, UserSpecifiedImage: image.name},
			Args:     o.command,
			Envs:     env,
			LogPath:  "container.log",
			Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: confined()},
		},
	})
	if err != nil {
		return err
	}
	printStep(out, "create container", time.Since(began), "")
	began = time.Now()
	if _, err := c.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: ct.GetContainerId()}); err != nil {
		return startError(err)
	}
	printStep(out, "start container", time.Since(began), shortID(ct.GetContainerId()))

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, p := range ports {
		go p.serve(ctx, c, id, out)
	}
	log := filepath.Join(pod.GetLogDirectory(), "container.log")
	err = followLog(ctx, log, logOptions{follow: true, done: c.ended(ct.GetContainerId())}, cmd.OutOrStdout(), out)
	if err != nil && ctx.Err() == nil {
		return err
	}
	if ctx.Err() != nil {
		return nil // Ctrl-C is how a run ends
	}
	st, err := c.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: ct.GetContainerId()})
	if err != nil {
		return err
	}
	if s := st.GetStatus(); s.GetExitCode() != 0 {
		text := fmt.Sprintf("the container ended with exit status %d (%s)", s.GetExitCode(), s.GetReason())
		if m := s.GetMessage(); m != "" {
			text += ": " + m
		}
		fmt.Fprintln(out, printable(text))
		return exitCode(s.GetExitCode())
	}
	return nil
}

// confined is what a kubelet would ask for: the CRI leaves the choice to its
// client, and nothing is confined that was not asked for.
func confined() *runtimeapi.LinuxContainerSecurityContext {
	return &runtimeapi.LinuxContainerSecurityContext{
		Seccomp: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
		MaskedPaths: []string{
			"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
			"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
		},
		ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
	}
}

func printStep(w io.Writer, name string, took time.Duration, note string) {
	line := fmt.Sprintf("  ✓ %-28s %7.0f ms  %s", printable(name), float64(took.Microseconds())/1000, printable(note))
	fmt.Fprintln(w, strings.TrimRight(line, " "))
}

type runImage struct{ id, name string }

// ensureImage loads a file, or finds or pulls an image.
func (c *client) ensureImage(ctx context.Context, cmd *cobra.Command, ref string) (runImage, error) {
	if fi, err := os.Stat(ref); err == nil && !fi.IsDir() {
		imgs, err := c.load(ctx, cmd, ref)
		if err != nil {
			return runImage{}, fmt.Errorf("load %s: %s", ref, message(err))
		}
		if len(imgs) != 1 {
			return runImage{}, fmt.Errorf("%s holds %d images: `cri-vz image load` it and run one by name", ref, len(imgs))
		}
		name := filepath.Base(ref)
		if tags := imgs[0].GetRepoTags(); len(tags) > 0 {
			name = tags[0]
		}
		return runImage{imgs[0].GetId(), name}, nil
	}
	st, err := c.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if st.GetImage() == nil && looksLikeFile(ref) {
		return runImage{}, fmt.Errorf("%s: there is no such file, nor an image of that name", ref)
	}
	if err != nil {
		return runImage{}, err
	}
	if st.GetImage() != nil {
		return runImage{st.GetImage().GetId(), ref}, nil
	}
	id, err := c.pull(ctx, cmd, ref)
	if err != nil {
		return runImage{}, fmt.Errorf("%s is neither a file nor a loaded image, and can't be pulled: %s", ref, message(err))
	}
	return runImage{id, ref}, nil
}

// looksLikeFile tells what can't be the name of an image, or was hardly meant as one.
func looksLikeFile(ref string) bool {
	if strings.HasPrefix(ref, ".") || strings.HasPrefix(ref, "/") {
		return true
	}
	for _, suffix := range []string{".tar", ".tgz", ".tar.gz", ".tar.zst"} {
		if strings.HasSuffix(ref, suffix) {
			return true
		}
	}
	return false
}

var notInNames = regexp.MustCompile(`[^a-z0-9-]+`)

// podName makes a pod's name out of an image's.
func podName(image string) string {
	name := strings.ToLower(filepath.Base(image))
	name, _, _ = strings.Cut(name, "@")
	name, _, _ = strings.Cut(name, ":")
	for _, suffix := range []string{".gz", ".zst", ".tgz", ".tar"} {
		name = strings.TrimSuffix(name, suffix)
	}
	name = strings.Trim(notInNames.ReplaceAllString(name, "-"), "-")
	if name == "" {
		return "pod"
	}
	return name[:min(len(name), 60)]
}

func (c *client) podConfig(ctx context.Context, name, image string) (*runtimeapi.PodSandboxConfig, error) {
	if name == "" {
		name = podName(image)
	}
	if notInNames.MatchString(name) || len(name) > 63 {
		return nil, fmt.Errorf("--name %q: use at most 63 of a-z, 0-9 and -", name)
	}
	var b [8]byte
	rand.Read(b[:]) // never fails since Go 1.24
	m := &runtimeapi.PodSandboxMetadata{Name: name, Namespace: runNamespace, Uid: hex.EncodeToString(b[:])}
	dir, err := c.logDir(ctx, m)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PodSandboxConfig{
		Metadata:     m,
		Hostname:     name,
		LogDirectory: dir,
		Linux:        &runtimeapi.LinuxPodSandboxConfig{},
	}, nil
}

// logDir is where the logs of a pod that `run` made are kept: below the folder
// that the daemon names.
func (c *client) logDir(ctx context.Context, m *runtimeapi.PodSandboxMetadata) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r, err := c.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		return "", err
	}
	var info struct {
		LogRoot string `json:"logRoot"`
	}
	if err := json.Unmarshal([]byte(r.GetInfo()["config"]), &info); err != nil || !filepath.IsAbs(info.LogRoot) {
		return "", fmt.Errorf("the daemon at %s names no folder for logs: is it cri-vz?", c.endpoint)
	}
	dir := m.GetNamespace() + "_" + m.GetName() + "_" + m.GetUid()
	if !filepath.IsLocal(dir) || strings.ContainsRune(dir, '/') {
		return "", fmt.Errorf("pod name %q can't name a folder", m.GetName())
	}
	return filepath.Join(info.LogRoot, dir), nil
}

// startPod runs the pod sandbox and prints its steps as they happen.
func (c *client) startPod(ctx context.Context, out io.Writer, pod *runtimeapi.PodSandboxConfig) (string, error) {
	m := pod.GetMetadata()
	// Outlives Ctrl-C: the last step says that the daemon is done with the pod.
	wctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	steps, err := c.node.WatchSteps(wctx, &nodeapi.WatchStepsRequest{Name: m.GetName(), Namespace: m.GetNamespace(), Uid: m.GetUid(), Attempt: m.GetAttempt()})
	if err != nil {
		return "", err
	}
	printed := make(chan struct{})
	p := newProgress(out)
	shown := p.follow("starting the pod")
	defer shown()
	go func() {
		defer close(printed)
		for {
			s, err := steps.Recv()
			if err != nil {
				return // RunPodSandbox says what matters
			}
			// The guest's own parts are in the pod's verbose status.
			if s.GetError() == "" && s.GetName() != "" && !strings.HasPrefix(s.GetName(), "guest: ") {
				p.above(func() { printStep(out, s.GetName(), time.Duration(s.GetNanos()), "") })
			}
		}
	}()
	if err := ctx.Err(); err != nil {
		return "", err // nothing was asked for yet
	}
	r, err := c.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: pod})
	if err != nil {
		if ctx.Err() != nil {
			select {
			case <-printed:
			case <-time.After(abandonTimeout):
			}
		}
		return "", errors.Join(err, c.abandon(context.WithoutCancel(ctx), pod))
	}
	select {
	case <-printed:
	case <-time.After(time.Second): // the last step may still be on its way
	}
	return r.GetPodSandboxId(), nil
}

// abandon removes what a start left that failed or was given up. The daemon has
// undone it, unless the pod became ready just when its caller went away.
func (c *client) abandon(ctx context.Context, pod *runtimeapi.PodSandboxConfig) error {
	lctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r, err := c.ListPodSandbox(lctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("whether a pod was left is not known, `cri-vz ps -a` says so: %s", message(err))
	}
	for _, p := range r.GetItems() {
		if p.GetMetadata().GetUid() == pod.GetMetadata().GetUid() && p.GetMetadata().GetNamespace() == runNamespace {
			return c.removePod(ctx, ctx, p, 0)
		}
	}
	return os.RemoveAll(pod.GetLogDirectory())
}

// daemonPatience is how long a daemon that went away may take to be back: containers
// go on without it.
const daemonPatience = 30 * time.Second

// ended tells whether a container has ended, or can't be asked about any more.
func (c *client) ended(id string) func(context.Context) bool {
	answered := time.Now()
	return func(ctx context.Context) bool {
		st, err := c.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err == nil {
			answered = time.Now()
			return st.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_EXITED
		}
		return status.Code(err) != codes.Unavailable || time.Since(answered) > daemonPatience
	}
}

func parseEnv(list []string) ([]*runtimeapi.KeyValue, error) {
	var env []*runtimeapi.KeyValue
	for _, e := range list {
		k, v, ok := strings.Cut(e, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("--env %q is not NAME=VALUE", e)
		}
		env = append(env, &runtimeapi.KeyValue{Key: k, Value: []byte(v)})
	}
	return env, nil
}

// published is a port on localhost that leads to a port of a pod.
type published struct {
	listeners []net.Listener // 127.0.0.1, and ::1 where there is one
	host, pod uint16
}

type publishedPorts []published

func (ps publishedPorts) close() {
	for _, p := range ps {
		for _, l := range p.listeners {
			l.Close()
		}
	}
}

func listenAll(specs []string) (publishedPorts, error) {
	var ports publishedPorts
	for _, spec := range specs {
		p, err := listenPort(spec)
		if err != nil {
			ports.close()
			return nil, err
		}
		ports = append(ports, p)
	}
	return ports, nil
}

func listenPort(spec string) (published, error) {
	host, pod, ok := strings.Cut(spec, ":")
	if !ok {
		pod = host
	}
	h, herr := strconv.ParseUint(host, 10, 16)
	g, gerr := strconv.ParseUint(pod, 10, 16)
	if herr != nil || gerr != nil || h == 0 || g == 0 {
		return published{}, fmt.Errorf("--publish %q is not HOST:POD with ports in 1 to 65535", spec)
	}
	p := published{host: uint16(h), pod: uint16(g)}
	l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", host))
	if err != nil {
		return published{}, fmt.Errorf("--publish %s: port %d of this machine is in use or not allowed: %w", spec, h, err)
	}
	p.listeners = append(p.listeners, l)
	// "localhost" may mean ::1 first; a machine without IPv6 has none.
	if l6, err := net.Listen("tcp6", net.JoinHostPort("::1", host)); err == nil {
		p.listeners = append(p.listeners, l6)
	}
	return p, nil
}

// serve accepts once the pod listens: until then a client waits in the backlog,
// so that the first connection works.
func (p published) serve(ctx context.Context, c *client, pod string, out io.Writer) {
	began := time.Now()
	for late := false; ; {
		conn, err := c.forward(ctx, pod, p.pod)
		if err == nil {
			conn.cancel()
			break
		}
		if ctx.Err() != nil {
			return
		}
		if !late && time.Since(began) > publishTimeout {
			fmt.Fprintf(out, "  … nothing answers on port %d of the pod yet: %s\n", p.pod, printable(message(err)))
			late = true
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return
		}
	}
	printStep(out, "port ready", time.Since(began), fmt.Sprintf("http://localhost:%d", p.host))
	socket := c.dataSocket(ctx, pod)
	for _, l := range p.listeners {
		go func() {
			for {
				local, err := l.Accept()
				if err != nil {
					return
				}
				go p.carry(ctx, c, pod, socket, local.(*net.TCPConn), out)
			}
		}()
	}
}

// dataSocket is where connections to the pod's ports can be handed over, "" if the
// daemon doesn't say.
func (c *client) dataSocket(ctx context.Context, pod string) string {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	st, err := c.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	var info struct {
		DataSocket string `json:"dataSocket"`
	}
	if err != nil || json.Unmarshal([]byte(st.GetInfo()["info"]), &info) != nil {
		return ""
	}
	return info.DataSocket
}

// carry forwards a connection. The pod's shim takes it over where its socket can be
// had; else, as where the daemon is in another mount namespace, it goes by way of
// the daemon.
func (p published) carry(ctx context.Context, c *client, pod, socket string, local *net.TCPConn, out io.Writer) {
	defer local.Close()
	var f *forwarding
	err := sandbox.HandOver(ctx, socket, p.pod, local)
	if err == nil {
		return
	}
	if errdefs.IsUnavailable(err) {
		f, err = c.forward(ctx, pod, p.pod)
	}
	if err != nil {
		_ = local.SetLinger(0) // a reset, not an empty answer
		if ctx.Err() == nil {
			fmt.Fprintf(out, "  ! connection to port %d: %s\n", p.host, printable(message(err)))
		}
		return
	}
	defer f.cancel()
	go func() {
		buf := make([]byte, 16<<10)
		for {
			n, err := local.Read(buf)
			if n > 0 && f.stream.Send(&nodeapi.ForwardRequest{Data: buf[:n]}) != nil {
				return
			}
			if errors.Is(err, io.EOF) {
				_ = f.stream.Send(&nodeapi.ForwardRequest{Eof: true})
				return
			}
			if err != nil {
				f.cancel()
				return
			}
			if n > len(buf)/2 && len(buf) < 256<<10 { // there is more than it holds
				buf = make([]byte, 256<<10)
			}
		}
	}()
	for {
		m, err := f.stream.Recv()
		if err != nil {
			_ = local.SetLinger(0)
			return
		}
		if _, err := local.Write(m.GetData()); err != nil || m.GetEof() {
			return
		}
	}
}

type forwarding struct {
	stream nodeapi.Node_ForwardClient
	cancel context.CancelFunc
}

// forward opens a connection to a port of a pod; the error says so if nothing
// listens.
func (c *client) forward(ctx context.Context, pod string, port uint16) (*forwarding, error) {
	ctx, cancel := context.WithCancel(ctx)
	s, err := c.node.Forward(ctx)
	if err == nil {
		err = s.Send(&nodeapi.ForwardRequest{PodSandboxId: pod, Port: uint32(port)})
	}
	if err == nil || errors.Is(err, io.EOF) {
		_, err = s.Recv()
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return &forwarding{s, cancel}, nil
}
