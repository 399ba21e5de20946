package cri

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// answers are the codes that a bad request may get. Internal and Unknown are
// not among them: the one is a panic, the other an error without a class.
var answers = []codes.Code{
	codes.OK, codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.FailedPrecondition,
	codes.ResourceExhausted, codes.Unavailable, codes.DeadlineExceeded,
}

// T39: random, half-filled and absurd requests get an answer with a code that
// fits; nothing panics, nothing leaks, and what was there is there afterwards.
func TestBadInput(t *testing.T) {
	s := newTestServer(t)
	g := newGenerator(t, s)
	want := s.objects(t)
	fds := openFiles(t)
	goroutines := runtime.NumGoroutine()

	const rounds = 40 // each is one call of every kind
	seen := map[string]map[codes.Code]int{}
	for round := range rounds {
		for _, service := range []protoreflect.Name{"RuntimeService", "ImageService"} {
			for _, call := range calls(service) {
				seed := uint64(round)<<32 | uint64(len(call.Name()))<<16 | uint64(call.Index())
				g.Rand = rand.New(rand.NewPCG(seed, 39))
				req := g.request(call)
				resp, err := s.call(t, call, req)
				code := status.Code(err)
				if seen[string(call.Name())] == nil {
					seen[string(call.Name())] = map[codes.Code]int{}
				}
				seen[string(call.Name())][code]++
				if code == codes.Unimplemented && !implemented(call.Name()) {
					continue
				}
				if !slices.Contains(answers, code) {
					t.Errorf("seed %#x: %s answers %v to %s", seed, call.Name(), err, short(req))
				}
				if err == nil {
					s.undo(t, resp)
				}
				if got := s.objects(t); got != want {
					t.Fatalf("seed %#x: after %s (%v) of %s there is %s, was %s", seed, call.Name(), err, short(req), got, want)
				}
			}
		}
	}
	t.Log(seen) // what the seeds are worth
	// Idle connections and the ends of watches take a moment.
	deadline := time.Now().Add(10 * time.Second)
	for runtime.NumGoroutine() > goroutines+10 || openFiles(t) > fds+5 {
		if time.Now().After(deadline) {
			b := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, there were %d; %d files, there were %d\n%s", runtime.NumGoroutine(), goroutines, openFiles(t), fds, b[:runtime.Stack(b, true)])
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// What fits into a message to the daemon and not into one to the shim is refused,
// too.
func TestLargeConfigs(t *testing.T) {
	s := newTestServer(t)
	g := newGenerator(t, s)
	want := s.objects(t)
	for _, mib := range []int{1, 5, 15} {
		req := proto.Clone(g.good["CreateContainer"]).(*runtimeapi.CreateContainerRequest)
		req.Config.Envs = []*runtimeapi.KeyValue{{Key: "LARGE", Value: bytes.Repeat([]byte("x"), mib<<20)}}
		resp := &runtimeapi.CreateContainerResponse{}
		err := s.conn.Invoke(t.Context(), runtimeapi.RuntimeService_CreateContainer_FullMethodName, req, resp)
		if code := status.Code(err); !slices.Contains(answers, code) {
			t.Errorf("%d MiB of environment: %v", mib, err)
		}
		if err == nil {
			s.undo(t, resp)
		}
		if got := s.objects(t); got != want {
			t.Errorf("%d MiB of environment: there is %s, was %s", mib, got, want)
		}
	}
}

// call makes a call by its descriptor. Of a stream it takes all there is to read
// in a moment.
func (s *testServer) call(t *testing.T, d protoreflect.MethodDescriptor, req proto.Message) (proto.Message, error) {
	t.Helper()
	out, err := protoregistry.GlobalTypes.FindMessageByName(d.Output().FullName())
	if err != nil {
		t.Fatal(err)
	}
	method := fmt.Sprintf("/%s/%s", d.Parent().FullName(), d.Name())
	resp := out.New().Interface()
	if !d.IsStreamingServer() {
		patience := 10 * time.Second
		if d.Name() == "PullImage" {
			patience = time.Second // no registry answers, and it is asked again
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return resp, s.conn.Invoke(ctx, method, req, resp)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	stream, err := s.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		return nil, err
	}
	if err := stream.SendMsg(req); err != nil && err != io.EOF {
		return nil, err
	}
	if err := stream.CloseSend(); err != nil {
		return nil, err
	}
	for {
		if err := stream.RecvMsg(resp); err == io.EOF {
			return resp, nil
		} else if err != nil {
			return nil, err
		}
	}
}

// undo removes what a request made that was good enough.
func (s *testServer) undo(t *testing.T, resp proto.Message) {
	t.Helper()
	switch r := resp.(type) {
	case *runtimeapi.RunPodSandboxResponse:
		pod, err := s.Pods.Get(r.GetPodSandboxId())
		if err == nil {
			err = pod.Remove(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
	case *runtimeapi.CreateContainerResponse:
		c, err := s.Pods.Container(r.GetContainerId())
		if err == nil {
			err = c.Remove(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// objects are the lists that a client sees.
func (s *testServer) objects(t *testing.T) string {
	t.Helper()
	pods, err := s.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	containers, err := s.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	imgs, err := s.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(containers.Containers, func(a, b *runtimeapi.Container) int { return strings.Compare(a.Id, b.Id) })
	b, err := json.Marshal([]any{pods.GetItems(), containers.GetContainers(), imgs.GetImages()})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func short(m proto.Message) string {
	s := fmt.Sprint(m)
	if len(s) > 2000 {
		s = s[:2000] + "..."
	}
	return s
}

// generator makes requests: from those that would work, changed in a few
// places, to those that are random all over.
type generator struct {
	*rand.Rand
	dir            string
	pod, container string
	long           bool // in a long list
	good           map[protoreflect.Name]proto.Message
}

// newGenerator makes a pod with a running container for requests to be about.
func newGenerator(t *testing.T, s *testServer) *generator {
	t.Helper()
	g := &generator{dir: s.dir}
	podConfig := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "n", Uid: "u"}, Hostname: "p",
		LogDirectory: filepath.Join(s.dir, "logs"), DnsConfig: &runtimeapi.DNSConfig{Servers: []string{"192.0.2.53"}},
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{}}},
	}
	pod, err := s.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig})
	if err != nil {
		t.Fatal(err)
	}
	containerConfig := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, Image: &runtimeapi.ImageSpec{Image: testImageRef}, Command: []string{"/app", "sleep"}, LogPath: "c.log",
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources:       &runtimeapi.LinuxContainerResources{CpuShares: 100},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{}, Capabilities: &runtimeapi.Capability{}},
		},
		Mounts: []*runtimeapi.Mount{{ContainerPath: "/data", HostPath: s.dir}},
	}
	c, err := s.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod.GetPodSandboxId(), Config: containerConfig, SandboxConfig: podConfig})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.GetContainerId()}); err != nil {
		t.Fatal(err)
	}
	g.pod, g.container = pod.GetPodSandboxId(), c.GetContainerId()
	another, second := proto.CloneOf(podConfig), proto.CloneOf(containerConfig)
	another.Metadata.Uid, second.Metadata.Name = "another", "another"
	g.good = map[protoreflect.Name]proto.Message{
		"RunPodSandbox":             &runtimeapi.RunPodSandboxRequest{Config: another},
		"CreateContainer":           &runtimeapi.CreateContainerRequest{PodSandboxId: g.pod, Config: second, SandboxConfig: podConfig},
		"UpdateContainerResources":  &runtimeapi.UpdateContainerResourcesRequest{ContainerId: g.container, Linux: containerConfig.Linux.Resources},
		"UpdatePodSandboxResources": &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: g.pod, Resources: &runtimeapi.LinuxContainerResources{}},
		"ExecSync":                  &runtimeapi.ExecSyncRequest{ContainerId: g.container, Cmd: []string{"/app", "exit", "0"}, Timeout: 1},
	}
	return g
}

// destroys are calls that must not be about what is there.
var destroys = []protoreflect.Name{"StopPodSandbox", "RemovePodSandbox", "StopContainer", "RemoveContainer", "RemoveImage", "CheckpointContainer", "CheckpointPod", "RestorePod"}

func (g *generator) request(call protoreflect.MethodDescriptor) proto.Message {
	typ, err := protoregistry.GlobalTypes.FindMessageByName(call.Input().FullName())
	if err != nil {
		panic(err) // it is a call of the API
	}
	m := typ.New()
	if good := g.good[call.Name()]; good != nil && g.IntN(4) > 0 {
		m = proto.Clone(good).ProtoReflect()
		for range 1 + g.IntN(3) {
			g.mutate(m, 0)
		}
	} else {
		g.fill(m, 0)
	}
	if slices.Contains(destroys, call.Name()) {
		fields := m.Descriptor().Fields()
		for i := range fields.Len() {
			if f := fields.Get(i); strings.HasSuffix(string(f.Name()), "_id") {
				m.Set(f, protoreflect.ValueOfString(pick(g.Rand, "", "no-such-id", "\x00", strings.Repeat("z", 1<<12))))
			} else if f.Name() == "image" {
				m.Clear(f)
			}
		}
	}
	return m.Interface()
}

// mutate changes one field of m, or of a message in it.
func (g *generator) mutate(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	if fields.Len() == 0 {
		return
	}
	f := fields.Get(g.IntN(fields.Len()))
	if f.Message() != nil && !f.IsList() && !f.IsMap() && g.IntN(8) > 0 && depth < 8 {
		g.mutate(m.Mutable(f).Message(), depth+1)
		return
	}
	g.set(m, f, depth)
}

// fill sets about half of the fields.
func (g *generator) fill(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		if g.IntN(2) == 0 {
			g.set(m, fields.Get(i), depth)
		}
	}
}

func (g *generator) set(m protoreflect.Message, f protoreflect.FieldDescriptor, depth int) {
	switch {
	case depth > 6 || g.IntN(8) == 0:
		m.Clear(f)
	case f.IsMap():
		for range g.IntN(4) {
			m.Mutable(f).Map().Set(g.scalar(f.MapKey()).MapKey(), g.scalar(f.MapValue()))
		}
	case f.IsList():
		list := m.Mutable(f).List()
		n := g.IntN(4)
		if g.IntN(16) == 0 && !g.long {
			n, g.long = 2000, true // once: lists of lists would be without end
			defer func() { g.long = false }()
		}
		for range n {
			if f.Message() == nil {
				list.Append(g.scalar(f))
				continue
			}
			e := list.NewElement()
			g.fill(e.Message(), depth+1)
			list.Append(e)
		}
	case f.Message() != nil:
		g.fill(m.Mutable(f).Message(), depth+1)
	default:
		m.Set(f, g.scalar(f))
	}
}

func (g *generator) scalar(f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(g.IntN(2) == 0)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(pick(g.Rand, 0, 1, 2, 3, 77, -1, math.MaxInt32)))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(pick[int32](g.Rand, 0, 1, -1, 80, 65535, 65536, math.MaxInt32, math.MinInt32))
	case protoreflect.Int64Kind:
		if f.Name() == "timeout" { // the call's patience is what it would test
			return protoreflect.ValueOfInt64(pick[int64](g.Rand, 0, 1, -1, math.MinInt64))
		}
		return protoreflect.ValueOfInt64(pick[int64](g.Rand, 0, 1, -1, 1000, 1<<20, 1<<40, math.MaxInt64, math.MinInt64))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(pick[uint32](g.Rand, 0, 1, math.MaxUint32))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(pick[uint64](g.Rand, 0, 1, math.MaxUint64))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes(pick(g.Rand, nil, []byte("x"), []byte{0}, []byte{0xff, 0xfe}))
	}
	return protoreflect.ValueOfString(g.text(string(f.Name())))
}

// text is a value for a field of that name. Paths on the host stay within the
// test's own directory, or name nothing.
func (g *generator) text(field string) string {
	missing, dir := filepath.Join(g.dir, "missing"), filepath.Join(g.dir, "made")
	switch field {
	case "log_directory":
		return pick(g.Rand, "", dir, "relative", filepath.Join(g.dir, "image.tar", "x"))
	case "log_path":
		return pick(g.Rand, "", "x.log", "d/x.log", "../x.log", "/x.log", "\x00", ".")
	case "host_path", "localhost_ref", "location", "output_path", "checkpoint_path":
		return pick(g.Rand, "", g.dir, missing, "relative", "/dev/null", "/dev/fuse", filepath.Join(g.dir, "image.tar"), g.dir+"\x00", g.dir+"/../"+filepath.Base(g.dir))
	case "cgroup_parent":
		return pick(g.Rand, "", "../x", "/a/../b", "a\n", "\x00", strings.Repeat("x", 1<<12))
	case "pod_sandbox_id":
		return pick(g.Rand, g.pod, g.pod[:8], "", "no-such-pod")
	case "container_id", "target_id":
		return pick(g.Rand, g.container, g.container[:8], "", "no-such-container")
	case "image":
		return pick(g.Rand, testImageRef, "", "no such image", "127.0.0.1:1/x:y", "@", strings.Repeat("a/", 1000), "sha256:"+strings.Repeat("0", 64))
	case "cmd", "command", "args":
		return pick(g.Rand, "echo", "exit", "", "\x00", "x")
	case "runtime_handler":
		return pick(g.Rand, "", "other", "none", "\n")
	}
	return pick(g.Rand, "", "x", "a b", "\x00", "\n", "..", "/", "/x", "ALL", "2MB", "0-1", "9999", "-1", "net.ipv4.ip_forward", "é\u202e", strings.Repeat("x", 1<<16))
}

func pick[T any](r *rand.Rand, values ...T) T { return values[r.IntN(len(values))] }
