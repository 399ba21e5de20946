//go:build linux

package conformance_test

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	cri "github.com/cri-vz/cri-vz/test/criclient"
)

// A runtime that is killed, or stopped and started, knows every object as it was,
// and each can go on from the state that it is in. Only for a daemon that these
// tests have started.
func TestRestart(t *testing.T) {
	d := suite.daemon
	if d == nil {
		t.Skip("the runtime at CRI_SOCKET is not ours to restart")
	}
	p := sharedPodOf(t)
	stopped := newPod(t, podConfig("stopped"))
	inStopped := stopped.Start(t, "ended-with-its-pod", cri.Command("/bin/sleep", "infinity"))
	if _, err := stopped.StopPodSandbox(cri.Timeout(t, cri.CallTimeout), &runtimeapi.StopPodSandboxRequest{PodSandboxId: stopped.ID}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		how string
		end func() error
	}{
		{"killed", func() error { d.Kill(); return nil }},
		{"stopped", d.Stop},
	} {
		t.Run(c.how, func(t *testing.T) {
			made := p.Create(t, "made", cri.FreshLog, cri.Command("/bin/echo", "started later"))
			runs := p.Start(t, "runs", cri.FreshLog, cri.Command("/bin/sleep", "infinity"))
			ended := p.Start(t, "ended", cri.FreshLog, cri.Command("/bin/exit", "7"))
			p.WaitExit(t, ended, 15*time.Second)
			ends := p.Start(t, "ends-meanwhile", cri.FreshLog, cri.Command("/bin/sleep", "1"))

			var before []proto.Message
			state := func() (now []proto.Message) {
				for _, id := range []string{p.ID, stopped.ID} {
					now = append(now, p.Sandbox(t, id))
				}
				for _, id := range []string{made, runs, ended, inStopped} {
					now = append(now, p.Container(t, id))
				}
				return append(now, imageStatus(t, p.Image))
			}
			before = state()
			if err := c.end(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(1200 * time.Millisecond) // a container ends meanwhile
			began := time.Now()
			if err := d.Start(); err != nil {
				t.Fatal(err)
			}
			if err := suite.Redial(); err != nil {
				t.Fatal(err)
			}
			for i, now := range state() {
				if !proto.Equal(now, before[i]) {
					t.Errorf("%v, was %v", now, before[i])
				}
			}
			if st := p.WaitExit(t, ends, 5*time.Second); st.GetExitCode() != 0 || st.GetReason() != "Completed" || time.Unix(0, st.GetFinishedAt()).After(began) {
				t.Errorf("the container that ended meanwhile: %v", st)
			}
			p.StartByID(t, made)
			if st := p.WaitExit(t, made, 15*time.Second); st.GetExitCode() != 0 || cri.ReadLog(t, st.GetLogPath()).Stdout != "started later\n" {
				t.Errorf("the created container: %v", st)
			}
			if got := p.Output(t, runs, "/bin/echo", "still here"); got != "still here\n" {
				t.Errorf("exec: %q", got)
			}
			p.StopByID(t, runs, 5)
			p.RemoveByID(t, ended)
		})
	}
}
