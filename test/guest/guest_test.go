//go:build linux

package guest_test

import (
	"testing"
	"time"

	"github.com/cri-vz/cri-vz/guest/api"
)

// TestPod takes a pod through its life on both architectures.
func TestPod(t *testing.T) {
	for _, arch := range []string{"amd64", "arm64"} {
		t.Run(arch, func(t *testing.T) { testPod(t, arch) })
	}
}

func testPod(t *testing.T, arch string) {
	v := boot(t, options{arch: arch})
	layers := v.probeImage(arch)
	v.sandbox(api.NamespaceMode_CONTAINER)
	hello, err := v.agent.Hello(v.ctx(), &api.HelloRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range hello.Boot {
		t.Logf("boot: %s %v", s.Name, time.Duration(s.Nanos))
	}
	t.Logf("features: %v, memory %d", hello.Features, hello.MemoryBytes)

	start := time.Now()
	c, err := v.create(&api.CreateContainerRequest{
		Id: "one", Layers: layers, PidMode: api.NamespaceMode_CONTAINER, User: &api.User{Name: "alice"},
	}, spec("serve", "3000"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("create: %v, user %v", time.Since(start), c.User)
	if c.User.Uid != 1000 {
		t.Errorf("user is %v, want 1000", c.User)
	}
	out := v.output(api.Stdout, "one", "")
	start = time.Now()
	if _, err := v.agent.StartContainer(v.ctx(), &api.StartContainerRequest{Id: "one"}); err != nil {
		t.Fatal(err)
	}
	t.Logf("start: %v", time.Since(start))
	start = time.Now()
	got, code := v.exec("one", "e1", "/probe", "id")
	t.Logf("exec: %v: %s", time.Since(start), got)
	if code != 0 {
		t.Errorf("exec ended with %d", code)
	}
	wantContains(t, "id", got, "uid 1000 gid 1000", "50", "host pod-one")
	if _, err := v.agent.Signal(v.ctx(), &api.SignalRequest{Id: "one", Signal: 9}); err != nil {
		t.Fatal(err)
	}
	w, err := v.agent.Wait(v.ctx(), &api.WaitRequest{Id: "one"})
	if err != nil {
		t.Fatal(err)
	}
	if w.ExitCode != 137 {
		t.Errorf("exit code %d, want 137", w.ExitCode)
	}
	wantContains(t, "stdout", out(), "listening")
	if _, err := v.agent.RemoveContainer(v.ctx(), &api.RemoveContainerRequest{Id: "one"}); err != nil {
		t.Fatal(err)
	}
	start = time.Now()
	_, _ = v.agent.Shutdown(v.ctx(), &api.ShutdownRequest{})
	select {
	case <-v.gone:
		t.Logf("shutdown: %v", time.Since(start))
	case <-time.After(10 * time.Second):
		t.Error("the VM is still there 10s after Shutdown")
	}
}
