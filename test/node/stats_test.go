//go:build linux

package node_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// summary is the part of the kubelet's /stats/summary that this test looks at.
type summary struct {
	Node struct {
		Runtime struct {
			ImageFS struct{ UsedBytes, CapacityBytes uint64 }
		}
	}
	Pods []podStats
}

type podStats struct {
	PodRef       struct{ Name, Namespace string }
	CPU          struct{ UsageNanoCores, UsageCoreNanoSeconds uint64 }
	Memory       struct{ WorkingSetBytes, UsageBytes uint64 }
	Network      struct{ RxBytes, TxBytes uint64 }
	ProcessStats struct {
		ProcessCount uint64 `json:"process_count"`
	} `json:"process_stats"`
	EphemeralStorage struct{ UsedBytes uint64 } `json:"ephemeral-storage"`
	Volume           []struct {
		Name      string
		UsedBytes uint64
	}
	Containers []struct {
		Name   string
		CPU    struct{ UsageNanoCores, UsageCoreNanoSeconds uint64 }
		Memory struct{ WorkingSetBytes, UsageBytes uint64 }
		Rootfs struct{ UsedBytes, CapacityBytes uint64 }
		Logs   struct{ UsedBytes uint64 }
	}
}

// What a pod and its containers use is in the kubelet's summary, with its
// default (statistics of containers from the CRI, those of pods from cAdvisor)
// and with all of them from the CRI (T41, T45).
func TestStats(t *testing.T) {
	n := newNamespace(t)
	class := "null"
	if suite.runtime.bin != "" {
		// With overhead the VM is in the pod's cgroup, where cAdvisor sees it.
		class = n.runtimeClass()
	}
	n.ready("busy", strings.ReplaceAll(`
apiVersion: v1
kind: Pod
metadata: {name: busy}
spec:
  runtimeClassName: CLASS
  terminationGracePeriodSeconds: 1
  containers:
  - name: burns
    image: IMAGE
    command: [sh, -c, "dd if=/dev/zero of=/tmp/five bs=1M count=5; dd if=/dev/zero of=/disk/three bs=1M count=3; while :; do :; done"]
    resources: {limits: {cpu: 300m, memory: 64Mi}}
    volumeMounts: [{name: disk, mountPath: /disk}]
  - name: idle
    image: IMAGE
    command: [sh, -c, "while sleep 1; do echo idle; wget -q -O - http://127.0.0.1:1 ; done"]
  volumes: [{name: disk, emptyDir: {}}]
`, "CLASS", class))
	t.Run("default", func(t *testing.T) { n.in(t).stats(false) })
	if err := suite.kubelet.stop(); err != nil {
		t.Fatal(err)
	}
	if err := suite.kubelet.start("PodAndContainerStatsFromCRI: true"); err != nil {
		t.Fatal(err)
	}
	t.Run("PodAndContainerStatsFromCRI", func(t *testing.T) {
		n := n.in(t)
		n.stats(true)
		n.eventually(time.Minute, "the pod in /metrics/cadvisor", func() error {
			out, err := kubectl("get", "--raw", "/api/v1/nodes/"+nodeName+"/proxy/metrics/cadvisor")
			if err != nil {
				return err
			}
			for _, metric := range []string{"container_cpu_usage_seconds_total", "container_memory_working_set_bytes", "container_network_receive_bytes_total"} {
				if !hasSample(out, metric, `namespace="`+n.name+`"`) {
					return fmt.Errorf("it has no %s", metric)
				}
			}
			return nil
		})
	})
	if err := suite.kubelet.stop(); err != nil {
		t.Fatal(err)
	}
	if err := suite.kubelet.start(); err != nil {
		t.Fatal(err)
	}
}

func hasSample(metrics, name, label string) bool {
	for line := range strings.Lines(metrics) {
		if strings.HasPrefix(line, name+"{") && strings.Contains(line, label) {
			return true
		}
	}
	return false
}

// stats waits until the summary has the pod's figures. fromCRI tells whether
// they are the runtime's alone.
func (n *namespace) stats(fromCRI bool) {
	n.eventually(2*time.Minute, "the figures of the pod", func() error {
		out, err := kubectl("get", "--raw", "/api/v1/nodes/"+nodeName+"/proxy/stats/summary")
		if err != nil {
			return err
		}
		var s summary
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			return err
		}
		for _, p := range s.Pods {
			if p.PodRef.Name == "busy" && p.PodRef.Namespace == n.name {
				if err := p.check(fromCRI); err != nil {
					b, _ := json.Marshal(p)
					return fmt.Errorf("%w in %s", err, b)
				}
				if s.Node.Runtime.ImageFS.UsedBytes == 0 || s.Node.Runtime.ImageFS.CapacityBytes == 0 {
					return fmt.Errorf("image file system: %+v", s.Node.Runtime.ImageFS)
				}
				return nil
			}
		}
		return fmt.Errorf("the summary has no such pod: %s", out)
	})
}

func (p podStats) check(fromCRI bool) error {
	const mib = 1 << 20
	checks := map[string]bool{
		"two containers":          len(p.Containers) == 2,
		"storage of the pod":      p.EphemeralStorage.UsedBytes >= 8*mib,
		"CPU of the pod":          p.CPU.UsageCoreNanoSeconds > 0 && p.CPU.UsageNanoCores > 0,
		"memory of the pod":       p.Memory.WorkingSetBytes > 0 && p.Memory.UsageBytes > 0,
		"network of the pod":      !fromCRI || p.Network.RxBytes > 0 && p.Network.TxBytes > 0, // cAdvisor's needs a sandbox process
		"processes of the pod":    !fromCRI || p.ProcessStats.ProcessCount >= 2,
		"emptyDir among volumes":  false,
		"CPU is burnt":            false,
		"written into container":  false,
		"the idle one's log":      false,
		"memory of each":          true,
		"capacity of each rootfs": true,
	}
	for _, v := range p.Volume {
		if v.Name == "disk" && v.UsedBytes >= 3*mib {
			checks["emptyDir among volumes"] = true
		}
	}
	for _, c := range p.Containers {
		if c.Name == "burns" {
			// A core's 300 thousandths, less what an emulated CPU loses.
			checks["CPU is burnt"] = c.CPU.UsageNanoCores > 50e6 && c.CPU.UsageNanoCores < 450e6 && c.CPU.UsageCoreNanoSeconds > 0
			checks["written into container"] = c.Rootfs.UsedBytes >= 5*mib && c.Rootfs.UsedBytes < 64*mib
		} else {
			checks["the idle one's log"] = c.Logs.UsedBytes > 0
		}
		checks["memory of each"] = checks["memory of each"] && c.Memory.WorkingSetBytes > 0 && c.Memory.WorkingSetBytes < 256*mib
		checks["capacity of each rootfs"] = checks["capacity of each rootfs"] && c.Rootfs.CapacityBytes > 0
	}
	var failed []string
	for what, ok := range checks {
		if !ok {
			failed = append(failed, what)
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("wrong: %s", strings.Join(failed, ", "))
	}
	return nil
}
