//go:build linux

package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A daemon that is killed takes nothing along: the next one finds pods,
// containers, exit codes and logs as they were, and no line is lost.
func TestDaemonIsKilled(t *testing.T) {
	p := sharedPodOf(t)
	done := p.start(t, "done-before", command("/bin/exit", "5"))
	p.waitExit(t, done, 10*time.Second)
	counts := p.start(t, "counts", command("/bin/count", "300", "10ms"))
	during := p.start(t, "ends-meanwhile", command("/bin/sleep", "1.5"))
	waitForLog(t, p.container(t, counts).GetLogPath(), "line 20\n")
	pod, first, idle := p.sandbox(t, p.id), p.container(t, done), p.container(t, p.idle)

	suite.node.kill()
	time.Sleep(2 * time.Second) // lines are written and a container ends without a daemon
	began := time.Now()
	if err := suite.node.start(); err != nil {
		t.Fatal(err)
	}
	t.Logf("ready again after %v", time.Since(began))

	if now := p.sandbox(t, p.id); !proto.Equal(now, pod) {
		t.Errorf("pod %v, was %v", now, pod)
	}
	if now := p.container(t, done); !proto.Equal(now, first) {
		t.Errorf("container that had ended %v, was %v", now, first)
	}
	if now := p.container(t, p.idle); !proto.Equal(now, idle) {
		t.Errorf("running container %v, was %v", now, idle)
	}
	if st := p.container(t, during); st.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || st.GetExitCode() != 0 || st.GetReason() != "Completed" {
		t.Errorf("the container that ended meanwhile: %v", st)
	} else if at := time.Unix(0, st.GetFinishedAt()); at.After(began) {
		t.Errorf("it ended at %v, before the daemon's start at %v", at, began)
	}
	if got := p.output(t, p.idle, "/bin/echo", "still", "here"); got != "still here\n" {
		t.Errorf("exec: %q", got)
	}
	p.waitExit(t, counts, 20*time.Second)
	wantCount(t, readLog(t, p.container(t, counts).GetLogPath()).stdout, 300)
}

// T6: a service manager that kills the daemon's cgroup, and not just its process,
// takes no pod along. T13, T10: a shim that dies while no daemon looks is found
// dead.
func TestDaemonsCgroupIsKilled(t *testing.T) {
	cgroup := ownCgroup(t)
	if err := suite.node.stop(); err != nil {
		t.Fatal(err)
	}
	cmd := suite.node.command()
	cmd.Path, cmd.Args = "/bin/sh", append([]string{"sh", "-c", `echo $$ > "$0/cgroup.procs" && exec "$@"`, cgroup}, cmd.Args...)
	if err := suite.node.startCommand(cmd); err != nil {
		t.Fatal(err)
	}
	p := newPod(t, podConfig(suite.node, "orphan"))
	ctr := p.start(t, "loses", command("/bin/sleep", "infinity"))
	killCgroup(t, cgroup)
	if !suite.node.daemon.Ended() {
		t.Fatal("the daemon was not in its cgroup")
	}
	if err := suite.node.start(); err != nil {
		t.Fatal(err)
	}
	if got := p.output(t, ctr, "/bin/echo", "still here"); got != "still here\n" {
		t.Errorf("exec after the daemon's cgroup was killed: %q", got)
	}

	suite.node.kill()
	began := time.Now()
	killShim(t, p, ctr)
	if err := suite.node.start(); err != nil {
		t.Fatal(err)
	}
	wantGone(t, p, ctr, 255, began, 10*time.Second)
}

// ownCgroup makes a cgroup for the test's length, in the first hierarchy that
// pods have theirs in.
func ownCgroup(t *testing.T) string {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids"} {
		dir := filepath.Join(root, "cri-vz-e2e-daemon")
		if err := os.Mkdir(dir, 0o755); err != nil {
			continue
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil {
			return dir
		}
	}
	t.Fatal("no cgroup can be made below /sys/fs/cgroup: mount one (cgroup2, or memory or pids of v1)")
	return ""
}

// killCgroup kills all that is in a cgroup.
func killCgroup(t *testing.T, dir string) {
	t.Helper()
	eventually(t, 5*time.Second, "the daemon's cgroup to be empty", func() error {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			t.Fatal(err)
		}
		pids := strings.Fields(string(b))
		for _, f := range pids {
			if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		if len(pids) > 0 {
			return fmt.Errorf("processes %v are in it", pids)
		}
		return nil
	})
	<-time.After(100 * time.Millisecond) // the daemon is reaped by who started it
}

// A clean stop leaves pods running; a second daemon on the same root is refused
// and harms nothing.
func TestDaemonStopsAndSecondDaemon(t *testing.T) {
	p := sharedPodOf(t)
	second := newNode("second", `listen = "unix://`+filepath.Join(suite.base, "second.sock")+`"`)
	config, err := os.ReadFile(suite.node.config)
	if err != nil {
		t.Fatal(err)
	}
	config = append([]byte(`listen = "unix://`+filepath.Join(suite.base, "second.sock")+"\"\n"), config...)
	if err := os.WriteFile(second.config, config, 0o644); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, second, nil, suite.node.root, "another")
	if got := p.output(t, p.idle, "/bin/echo", "unharmed"); got != "unharmed\n" {
		t.Errorf("exec: %q", got)
	}

	if err := suite.node.stop(); err != nil {
		t.Error(err)
	}
	if _, err := shimOf(p.id); err != nil {
		t.Errorf("after the daemon's stop: %v", err)
	}
	if _, err := os.Stat(suite.node.socket); err == nil {
		t.Error("the stopped daemon left its socket")
	}
	if err := suite.node.start(); err != nil {
		t.Fatal(err)
	}
	if got := p.output(t, p.idle, "/bin/echo", "back"); got != "back\n" {
		t.Errorf("exec: %q", got)
	}
}

// Of two daemons that start at once, over the socket that a killed one left, one
// serves and the other says why not and harms nothing: be it the socket that both
// want, or the root.
func TestDaemonsRace(t *testing.T) {
	socket := `listen = "unix://` + filepath.Join(suite.base, "race.sock") + `"`
	one := newNodeApart(t, "race-1", socket, `vm: accel = "tcg"`)
	two := newNodeApart(t, "race-2", socket, `vm: accel = "tcg"`)
	for _, c := range []struct {
		name  string
		nodes [2]*node
		words []string
	}{
		{"one socket", [2]*node{one, two}, []string{"race.sock", "another daemon"}},
		{"one root", [2]*node{one, one}, []string{one.root, "another"}},
	} {
		for round := range 8 {
			type daemon struct {
				cmd *exec.Cmd
				out *recorded
			}
			var daemons []daemon
			for _, n := range c.nodes {
				cmd := n.command()
				daemons = append(daemons, daemon{cmd, startRecorded(t, cmd)})
			}
			ready := func(d daemon) bool { return strings.Contains(d.out.String(), "cri-vz is ready") }
			eventually(t, 30*time.Second, "one daemon to serve and the other to end", func() error {
				if ready(daemons[1]) {
					daemons[0], daemons[1] = daemons[1], daemons[0]
				}
				if ready(daemons[0]) && len(daemons[1].out.done) > 0 {
					return nil
				}
				return fmt.Errorf("%s, round %d:\n%s\n%s", c.name, round, daemons[0].out.String(), daemons[1].out.String())
			})
			winner, loser := daemons[0], daemons[1]
			if err := loser.out.wait(time.Second); err == nil {
				t.Errorf("%s, round %d: the refused daemon's exit status is 0", c.name, round)
			}
			for _, w := range c.words {
				if !strings.Contains(loser.out.String(), w) {
					t.Errorf("%s, round %d: the error does not say %q: %s", c.name, round, w, loser.out.String())
				}
			}
			ps := one.cli("ps")
			ps.Env = append(ps.Env, "CRI_VZ_SOCKET=unix://"+filepath.Join(suite.base, "race.sock"))
			if out, err := ps.CombinedOutput(); err != nil {
				t.Errorf("%s, round %d: the daemon that serves: %v: %s", c.name, round, err, out)
			}
			_ = winner.cmd.Process.Kill() // its socket stays
			_ = winner.out.wait(10 * time.Second)
		}
	}
}

// T11: after a reboot nothing lives and the run directory is empty; pods are
// NotReady, and Stop and Remove succeed without their network namespaces.
func TestReboot(t *testing.T) {
	n := suite.node
	p := newPod(t, podConfig(n, "reboot"))
	ctr := p.start(t, "loses", command("/bin/sleep", "infinity"))
	began := time.Now()
	n.kill()
	shim, err := shimOf(p.id)
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range append(descendants(shim.PID), shim) {
		_ = unix.Kill(q.PID, unix.SIGKILL)
	}
	// The shared pod goes on: what is its own stays.
	for _, dir := range []string{filepath.Join(n.run, p.id[:12]), filepath.Join(n.run, "network", "netns", p.id)} {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	wantGone(t, p, ctr, 255, began, 20*time.Second)
	ctx := timeout(t, callTimeout)
	if _, err := n.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Error(err)
	}
	if _, err := n.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Error(err)
	}
	_, err = n.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	wantError(t, err, codes.NotFound, p.id)
}
