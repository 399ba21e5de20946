//go:build linux

package node_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const nodeName = "node"

// kubeletRoot is the kubelet's directory below the test's.
const kubeletRoot = "kubelet/root"

// kubelet runs with the defaults of its release; what differs is a deviation,
// which names the machine's reason.
type kubelet struct {
	dir     string
	program *program
}

type deviation struct{ setting, reason string }

func startKubelet() (func() error, error) {
	k := &kubelet{dir: filepath.Join(suite.base, "kubelet")}
	suite.kubelet = k
	if err := os.Mkdir(k.dir, 0o755); err != nil {
		return nil, err
	}
	if err := k.start(); err != nil {
		return nil, err
	}
	return k.stop, nil
}

// start starts the kubelet with gates, and waits until its node is ready.
func (k *kubelet) start(gates ...string) error {
	deviations := k.deviations()
	once.Do(func() {
		for _, d := range deviations {
			fmt.Printf("node: not the kubelet's default: %s: %s\n", d.setting, d.reason)
		}
	})
	c := suite.cluster
	config := []string{
		"apiVersion: kubelet.config.k8s.io/v1beta1",
		"kind: KubeletConfiguration",
		"containerRuntimeEndpoint: unix://" + suite.runtime.socket,
		fmt.Sprintf("authentication: {x509: {clientCAFile: %q}}", c.path("ca.crt")),
		fmt.Sprintf("tlsCertFile: %q", c.path("kubelet.crt")),
		fmt.Sprintf("tlsPrivateKeyFile: %q", c.path("kubelet.key")),
	}
	args := []string{"--kubeconfig=" + c.kubeconfig("kubelet"), "--config=" + filepath.Join(k.dir, "config.yaml")}
	for _, d := range deviations {
		if strings.HasPrefix(d.setting, "--") {
			args = append(args, d.setting)
			continue
		}
		config = append(config, d.setting)
	}
	if len(gates) > 0 {
		config = append(config, "featureGates: {"+strings.Join(gates, ", ")+"}")
	}
	if err := os.WriteFile(filepath.Join(k.dir, "config.yaml"), []byte(strings.Join(config, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	began := time.Now().UTC().Add(-time.Second).Format(time.RFC3339)
	var err error
	k.program, err = startProgram("kubelet", filepath.Join(suite.bin, "kubelet"), args, 2*time.Minute, func() error {
		out, err := kubectl("get", "node", nodeName, "-o", `jsonpath={range .status.conditions[?(@.type=="Ready")]}{.status} {.lastHeartbeatTime} {.message}{end}`)
		if err != nil {
			return err
		}
		// A heartbeat of the previous kubelet's says nothing about this one.
		if f := strings.Fields(out); len(f) < 2 || f[0] != "True" || f[1] < began {
			return fmt.Errorf("the node's condition Ready: %s", out)
		}
		return nil
	})
	return err
}

func (k *kubelet) stop() error { return k.program.stop() }

var once sync.Once

// deviations are the settings of this machine and of this test.
func (k *kubelet) deviations() []deviation {
	all := []deviation{
		{"--root-dir=" + filepath.Join(suite.base, kubeletRoot), "/var/lib/kubelet is the machine's"},
		{"--cert-dir=" + filepath.Join(k.dir, "pki"), "as --root-dir"},
		{fmt.Sprintf("podLogsDir: %q", filepath.Join(k.dir, "logs")), "/var/log/pods is the machine's"},
		{fmt.Sprintf("volumePluginDir: %q", filepath.Join(k.dir, "plugins")), "/usr/libexec is the machine's"},
		{"--node-ip=" + address, "the node is a network namespace without a default route, where the kubelet finds no address"},
		{"--hostname-override=" + nodeName, "the machine's name is of no use in a certificate"},
	}
	var fs unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &fs); err == nil && fs.Type != unix.CGROUP2_SUPER_MAGIC {
		all = append(all, deviation{"failCgroupV1: false", "/sys/fs/cgroup is not cgroup v2 here"})
	}
	if b, err := os.ReadFile("/proc/swaps"); err == nil && strings.Count(strings.TrimSpace(string(b)), "\n") > 0 {
		all = append(all, deviation{"failSwapOn: false", "this machine swaps"})
	}
	if err := unix.Statfs(suite.base, &fs); err == nil && fs.Bavail*100 < fs.Blocks*20 {
		all = append(all, deviation{
			"evictionHard: {memory.available: 100Mi, nodefs.available: 1Gi, imagefs.available: 1Gi}",
			fmt.Sprintf("of the disk of %s only %d %% are free; the kubelet evicts pods below 15 %%", suite.base, fs.Bavail*100/fs.Blocks),
		}, deviation{"imageGCHighThresholdPercent: 100", "as evictionHard"})
	}
	return all
}
