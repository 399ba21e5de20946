//go:build linux

package conformance_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

// atOnce calls f n times at the same time and returns the errors.
func atOnce(n int, f func(i int) error) []error {
	errs := make([]error, n)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-start
			errs[i] = f(i)
		})
	}
	close(start)
	wg.Wait()
	return errs
}

// wantOne checks that one of several calls succeeded, and that the others have a
// code that says why they did not.
func wantOne(t *testing.T, errs []error, want ...codes.Code) {
	t.Helper()
	succeeded := 0
	for _, err := range errs {
		code := status.Code(err)
		ok := code == codes.OK
		if ok {
			succeeded++
		}
		for _, w := range want {
			ok = ok || code == w
		}
		if !ok {
			t.Errorf("code %v, want one of %v: %v", code, want, err)
		}
	}
	if succeeded != 1 {
		t.Errorf("%d of %d calls succeeded", succeeded, len(errs))
	}
}

func wantAll(t *testing.T, errs []error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
}

func TestCallsAtOnce(t *testing.T) {
	p := sharedPodOf(t)
	ctx := cri.Timeout(t, cri.CallTimeout)
	t.Run("CreateContainer of one name: one succeeds", func(t *testing.T) {
		ids := make([]string, 4)
		errs := atOnce(len(ids), func(i int) (err error) {
			ids[i], err = p.CreateContext(ctx, "at-once", cri.Command("/bin/sleep", "infinity"))
			return err
		})
		wantOne(t, errs, codes.AlreadyExists)
		for i, err := range errs {
			if err == nil {
				p.RemoveByID(t, ids[i])
			}
		}
	})
	t.Run("StartContainer: one succeeds", func(t *testing.T) {
		id := p.Create(t, "starts-at-once", cri.Command("/bin/sleep", "infinity"))
		wantOne(t, atOnce(4, func(int) error {
			_, err := p.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
			return err
		}), codes.FailedPrecondition)
	})
	t.Run("ExecSync: each gets its own output", func(t *testing.T) {
		wantAll(t, atOnce(16, func(i int) error {
			want := fmt.Sprintf("output %d\n", i)
			r, err := p.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: p.Idle, Cmd: []string{"/bin/echo", strings.TrimSpace(want)}, Timeout: 60})
			if err == nil && string(r.GetStdout()) != want {
				err = fmt.Errorf("%q, want %q", r.GetStdout(), want)
			}
			return err
		}))
	})
	t.Run("StopContainer and RemoveContainer: all succeed", func(t *testing.T) {
		id := p.Start(t, "ends-at-once", cri.Command("/bin/sleep", "infinity"))
		wantAll(t, atOnce(4, func(int) error {
			_, err := p.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 5})
			return err
		}))
		wantAll(t, atOnce(4, func(int) error {
			_, err := p.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
			return err
		}))
	})
	t.Run("a longer StopContainer does not delay a shorter one", func(t *testing.T) {
		id := p.Start(t, "stops-twice", cri.Command("/bin/trap-term"))
		cri.WaitForLog(t, p.Container(t, id).GetLogPath(), "trapping SIGTERM")
		began := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _ = p.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 30})
		})
		time.Sleep(100 * time.Millisecond)
		p.StopByID(t, id, 1)
		wg.Wait() // ends with the container
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("took %v", took)
		}
	})
	t.Run("RunPodSandbox, StopPodSandbox, RemovePodSandbox of one pod", func(t *testing.T) {
		cfg := podConfig("pods-at-once")
		ran := make([]*cri.Pod, 3)
		wantOne(t, atOnce(len(ran), func(i int) (err error) {
			ran[i], err = runPod(ctx, cfg)
			return err
		}), codes.AlreadyExists)
		for _, p := range ran {
			if p == nil {
				continue
			}
			wantAll(t, atOnce(4, func(int) error {
				_, err := p.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID})
				return err
			}))
			wantAll(t, atOnce(4, func(int) error {
				_, err := p.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.ID})
				return err
			}))
		}
	})
}

// A client that gives a call up leaves nothing half-done: what it asked for is
// there or is not, and can be asked for again.
func TestCancelledCalls(t *testing.T) {
	p := sharedPodOf(t)
	cut := func(t *testing.T, after time.Duration) context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		t.Cleanup(cancel)
		return ctx
	}
	t.Run("RunPodSandbox", func(t *testing.T) {
		cfg := podConfig("given-up")
		r, err := suite.RunPodSandbox(cut(t, 300*time.Millisecond), &runtimeapi.RunPodSandboxRequest{Config: cfg})
		if err == nil { // it was faster
			(&cri.Pod{Client: suite.Client, ID: r.GetPodSandboxId(), Config: cfg}).Remove(t)
		}
		var again *cri.Pod
		cri.Eventually(t, 30*time.Second, "the name of the pod that was given up", func() (err error) {
			again, err = runPod(t.Context(), cfg)
			return err
		})
		defer again.Remove(t)
		l, err := suite.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"pod": "given-up"}}})
		if err != nil || len(l.GetItems()) != 1 {
			t.Errorf("%v, %v", l, err)
		}
	})
	t.Run("CreateContainer", func(t *testing.T) {
		for _, after := range []time.Duration{time.Millisecond, 5 * time.Millisecond, 20 * time.Millisecond} {
			if id, err := p.CreateContext(cut(t, after), "given-up"); err == nil {
				p.RemoveByID(t, id)
			}
		}
		cri.Eventually(t, 10*time.Second, "the name of the container that was given up", func() error {
			id, err := p.CreateContext(t.Context(), "given-up")
			if err == nil {
				p.RemoveByID(t, id)
			}
			return err
		})
	})
	t.Run("StartContainer", func(t *testing.T) {
		id := p.Create(t, "start-given-up", cri.Command("/bin/sleep", "infinity"))
		_, _ = p.StartContainer(cut(t, 5*time.Millisecond), &runtimeapi.StartContainerRequest{ContainerId: id})
		p.StopByID(t, id, 0)
		if st := p.Container(t, id); st.GetState() == running {
			t.Errorf("it runs after StopContainer: %v", st)
		}
	})
	t.Run("ExecSync: the command ends with the call", func(t *testing.T) {
		_, err := p.ExecSync(cut(t, 500*time.Millisecond), &runtimeapi.ExecSyncRequest{ContainerId: p.Idle, Cmd: []string{"/bin/sleep", "5772"}})
		if err == nil {
			t.Error("no error")
		}
		ends(t, p, "5772")
	})
	t.Run("StopContainer: the next one ends it", func(t *testing.T) {
		id := p.Start(t, "stop-given-up", cri.Command("/bin/trap-term"))
		cri.WaitForLog(t, p.Container(t, id).GetLogPath(), "trapping SIGTERM")
		if _, err := p.StopContainer(cut(t, 300*time.Millisecond), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 60}); err == nil {
			t.Error("no error")
		}
		began := time.Now()
		p.StopByID(t, id, 1)
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("took %v", took)
		}
	})
}
