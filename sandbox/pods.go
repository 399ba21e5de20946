package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/sandbox/shim"
)

// shortID is how much of a pod's id its run directory's name has (T14).
const shortID = 12

// CheckRun reports whether Options.Run is short enough for the sockets of pods (T14).
func CheckRun(run string) error {
	// The driver's own sockets lie one directory deeper.
	return shim.CheckRunDir(filepath.Join(run, strings.Repeat("0", shortID), "vm"))
}

// Pods is a node's pod sandboxes. Its methods may be called concurrently.
type Pods struct {
	o     Options
	lock  *os.File
	boots chan struct{}

	// closing is closed by Close: what ends then is not the pods' own end.
	closing chan struct{}
	tasks   sync.WaitGroup
	events  events

	mu         sync.Mutex
	closed     bool
	pods       map[string]*Pod
	containers map[string]*Container
	names      map[string]string // podKey -> id
	ctrNames   map[string]string // containerKey -> id
	progress   map[string]*progress
	booting    int64 // bytes of memory promised to VMs that don't have it yet
}

// Open takes a root for this process and recovers its pods: it connects to the
// shims that live, undoes what a daemon that was killed had half made, and
// marks as gone what died meanwhile. A root that another process has open is
// errdefs.ErrFailedPrecondition.
func Open(ctx context.Context, o Options) (*Pods, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	for _, dir := range []string{o.Root, o.Run, filepath.Join(o.Root, "pods")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("open pods: %w", err)
		}
	}
	lock, err := lockRoot(o.Root)
	if err != nil {
		return nil, err
	}
	p := &Pods{
		o: o, lock: lock,
		boots:      make(chan struct{}, o.Boots),
		closing:    make(chan struct{}),
		pods:       make(map[string]*Pod),
		containers: make(map[string]*Container),
		names:      make(map[string]string),
		ctrNames:   make(map[string]string),
		progress:   make(map[string]*progress),
	}
	if err := p.recover(ctx); err != nil {
		p.Close()
		return nil, err
	}
	if k, ok := o.Network.(keeper); ok {
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		p.tasks.Go(func() { <-p.closing; cancel() })
		p.tasks.Go(func() { k.Keep(ctx) })
	}
	return p, nil
}

func (o *Options) check() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{errdefs.ErrInvalidArgument}, args...)...))
	}
	for name, p := range map[string]string{"Root": o.Root, "Run": o.Run} {
		if !filepath.IsAbs(p) {
			bad("Options.%s %q is not an absolute path", name, p)
		}
	}
	if o.Scratch == nil || o.Network == nil {
		bad("Options.Scratch and Network are required")
	}
	if o.Boots < 0 {
		bad("Options.Boots is %d", o.Boots)
	}
	if err := CheckRun(o.Run); err != nil {
		errs = append(errs, err)
	}
	if o.Boots == 0 {
		o.Boots = runtime.NumCPU()
	}
	if o.CgroupRoot == "" {
		o.CgroupRoot = "cri-vz"
	}
	if o.Charge == "" {
		o.Charge = ChargeAuto
	}
	if _, ok := o.Classes[""]; !ok {
		classes := map[string]Class{"": {}}
		for k, v := range o.Classes {
			classes[k] = v
		}
		o.Classes = classes
	}
	for name, c := range o.Classes {
		if c.Guest == nil && o.Guest == nil {
			bad("Options.Guest is required, for class %q", name)
		}
	}
	if len(o.ShimCommand) == 0 {
		self, err := os.Executable()
		if err != nil {
			errs = append(errs, fmt.Errorf("find this program: %w", err))
		}
		o.ShimCommand = []string{self, "shim"}
	}
	return errors.Join(errs...)
}

// Close lets go of the pods, which run on, and of the root.
func (p *Pods) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	close(p.closing)
	var clients []*client
	for _, pod := range p.pods {
		pod.mu.Lock()
		if pod.client != nil {
			clients = append(clients, pod.client)
		}
		pod.mu.Unlock()
	}
	p.mu.Unlock()
	for _, c := range clients {
		c.close()
	}
	p.tasks.Wait()
	return p.lock.Close()
}

// Get finds a pod by its id or a prefix of it: errdefs.ErrNotFound, and
// ErrInvalidArgument for a prefix of several.
func (p *Pods) Get(idOrPrefix string) (*Pod, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return lookUp("pod sandbox", idOrPrefix, p.pods)
}

// Container finds a container as Get does a pod.
func (p *Pods) Container(idOrPrefix string) (*Container, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return lookUp("container", idOrPrefix, p.containers)
}

func lookUp[T any](what, id string, all map[string]T) (found T, err error) {
	if v, ok := all[id]; ok {
		return v, nil
	}
	if id == "" {
		return found, fmt.Errorf("%s: no id: %w", what, errdefs.ErrInvalidArgument)
	}
	n := 0
	for k, v := range all {
		if strings.HasPrefix(k, id) {
			found = v
			n++
		}
	}
	var none T
	switch n {
	case 0:
		return none, fmt.Errorf("%s %q: %w", what, id, errdefs.ErrNotFound)
	case 1:
		return found, nil
	}
	return none, fmt.Errorf("%s %q: %d ids begin so, give more of it: %w", what, id, n, errdefs.ErrInvalidArgument)
}

// List returns all pods, the oldest first. One whose Run hasn't returned is not
// among them.
func (p *Pods) List() []*Pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]*Pod, 0, len(p.pods))
	for _, pod := range p.pods {
		list = append(list, pod)
	}
	slices.SortFunc(list, func(a, b *Pod) int {
		if a.createdAt != b.createdAt {
			return int(min(max(a.createdAt-b.createdAt, -1), 1))
		}
		return strings.Compare(a.id, b.id)
	})
	return list
}

// Containers returns all containers, the oldest first.
func (p *Pods) Containers() []*Container {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]*Container, 0, len(p.containers))
	for _, c := range p.containers {
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b *Container) int {
		if a.rec.CreatedAt != b.rec.CreatedAt {
			return int(min(max(a.rec.CreatedAt-b.rec.CreatedAt, -1), 1))
		}
		return strings.Compare(a.id, b.id)
	})
	return list
}

// WatchSteps follows the start of the pod with that metadata, also before Run
// is called. The channel is closed after the last step or when ctx ends.
func (p *Pods) WatchSteps(ctx context.Context, meta *runtimeapi.PodSandboxMetadata) (<-chan Step, error) {
	if meta.GetName() == "" {
		return nil, fmt.Errorf("watch steps: no pod name: %w", errdefs.ErrInvalidArgument)
	}
	key := podKey(meta)
	ch := make(chan Step)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errClosed
	}
	ctx, cancel := context.WithCancel(ctx)
	p.tasks.Go(func() {
		select {
		case <-p.closing:
			cancel()
		case <-ctx.Done():
		}
	})
	pr := p.progress[key]
	if pod := p.pods[p.names[key]]; pod != nil {
		pr = newProgress()
		pr.steps = pod.doneSteps()
		pr.running = true // not in p.progress, so not to be taken out of it
	} else if pr == nil {
		pr = newProgress()
		p.progress[key] = pr
	}
	pr.watchers++
	p.tasks.Go(func() {
		defer cancel()
		defer close(ch)
		pr.follow(ctx, ch)
		p.mu.Lock()
		defer p.mu.Unlock()
		if pr.watchers--; pr.watchers == 0 && !pr.running && p.progress[key] == pr {
			delete(p.progress, key)
		}
	})
	return ch, nil
}

var errClosed = fmt.Errorf("the daemon is shutting down: %w", errdefs.ErrUnavailable)

// reserve takes a pod's name and an id, or says who has the name.
func (p *Pods) reserve(meta *runtimeapi.PodSandboxMetadata) (id string, pr *progress, err error) {
	key := podKey(meta)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return "", nil, errClosed
	}
	if holder, ok := p.names[key]; ok {
		return "", nil, fmt.Errorf("pod sandbox name %s (namespace %s, uid %s, attempt %d) is reserved by pod %s: %w",
			meta.GetName(), meta.GetNamespace(), meta.GetUid(), meta.GetAttempt(), holder, errdefs.ErrAlreadyExists)
	}
	id = newID(func(id string) bool { return p.shortTaken(id[:shortID]) })
	p.names[key] = id
	pr = p.progress[key]
	if pr == nil {
		pr = newProgress()
		p.progress[key] = pr
	}
	pr.running = true
	return id, pr, nil
}

// shortTaken reports, with mu held, whether a pod's run directory has that name.
func (p *Pods) shortTaken(short string) bool {
	for _, id := range p.names {
		if strings.HasPrefix(id, short) {
			return true
		}
	}
	return false
}

// unreserve gives a pod's name free.
func (p *Pods) unreserve(meta *runtimeapi.PodSandboxMetadata) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.names, podKey(meta))
}

// endProgress closes the books of a start.
func (p *Pods) endProgress(meta *runtimeapi.PodSandboxMetadata, pr *progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pr.running = false
	// Watchers have pr itself; the next start of that name begins anew.
	if key := podKey(meta); p.progress[key] == pr {
		delete(p.progress, key)
	}
}

func newID(taken func(string) bool) string {
	for {
		var b [32]byte
		_, _ = rand.Read(b[:]) // never fails
		if id := hex.EncodeToString(b[:]); !taken(id) {
			return id
		}
	}
}

func (p *Pods) podDir(id string) string { return filepath.Join(p.o.Root, "pods", id) }
func (p *Pods) runDir(id string) string { return filepath.Join(p.o.Run, id[:shortID]) }
