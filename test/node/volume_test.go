//go:build linux

package node_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Volumes of every kind that needs no driver of its own are in the pod, and a
// changed ConfigMap and Secret show up there (T31).
func TestVolumes(t *testing.T) {
	n := newNamespace(t)
	dir := filepath.Join(suite.base, "host-path")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("of the node\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	n.ready("volumes", strings.ReplaceAll(`
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {color: blue, shape: round}
---
apiVersion: v1
kind: Secret
metadata: {name: secrets}
stringData: {password: swordfish}
---
apiVersion: v1
kind: Pod
metadata: {name: volumes, labels: {app: volumes}, annotations: {note: remember}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    resources: {limits: {memory: 64Mi}}
    volumeMounts:
    - {name: disk, mountPath: /disk}
    - {name: memory, mountPath: /memory}
    - {name: settings, mountPath: /settings}
    - {name: settings, mountPath: /shape, subPath: shape}
    - {name: secrets, mountPath: /secrets, readOnly: true}
    - {name: pod, mountPath: /pod}
    - {name: all, mountPath: /all}
    - {name: node, mountPath: /node}
    - {name: node-file, mountPath: /node-file, readOnly: true}
    - {name: disk, mountPath: /sub, subPath: a/b}
  - name: second
    image: IMAGE
    volumeMounts:
    - {name: disk, mountPath: /disk, readOnly: true}
    - {name: memory, mountPath: /memory}
  volumes:
  - {name: disk, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory, sizeLimit: 16Mi}}
  - {name: settings, configMap: {name: settings}}
  - {name: secrets, secret: {secretName: secrets, defaultMode: 0400}}
  - name: pod
    downwardAPI:
      items:
      - {path: labels, fieldRef: {fieldPath: metadata.labels}}
      - {path: limit, resourceFieldRef: {containerName: main, resource: limits.memory}}
  - name: all
    projected:
      sources:
      - configMap: {name: settings, items: [{key: color, path: from/settings}]}
      - secret: {name: secrets, items: [{key: password, path: from/secrets}]}
      - downwardAPI: {items: [{path: from/pod, fieldRef: {fieldPath: metadata.annotations}}]}
      - serviceAccountToken: {path: token, audience: test, expirationSeconds: 600}
  - {name: node, hostPath: {path: HOSTPATH, type: Directory}}
  - {name: node-file, hostPath: {path: HOSTPATH/file, type: File}}
`, "HOSTPATH", dir))
	for path, want := range map[string]string{
		"/settings/color": "blue", "/shape": "round", "/secrets/password": "swordfish",
		"/pod/labels": `app="volumes"`, "/pod/limit": "67108864",
		"/all/from/settings": "blue", "/all/from/secrets": "swordfish",
		"/node/file": "of the node", "/node-file": "of the node",
	} {
		n.want(path, n.exec("volumes", "cat", path), want)
	}
	n.want("mode of the secret", n.exec("volumes", "stat", "-L", "-c", "%a %u:%g", "/secrets/password"), "400 0:0")
	n.want("audience of the token", strings.Join(n.token("volumes", "/all/token").Audiences, " "), "test")
	if note := n.exec("volumes", "cat", "/all/from/pod"); !strings.Contains(note, `note="remember"`) {
		t.Errorf("annotations: got %q", note)
	}

	// What one container writes the other one and the node see.
	n.exec("volumes", "sh", "-c", "echo shared > /disk/file; echo volatile > /memory/file; echo deep > /sub/file; echo of the pod > /node/answer")
	n.want("emptyDir in the second container", n.run("exec", "volumes", "-c", "second", "--", "cat", "/disk/file"), "shared\n")
	n.want("memory in the second container", n.run("exec", "volumes", "-c", "second", "--", "cat", "/memory/file"), "volatile\n")
	n.want("subPath", n.exec("volumes", "cat", "/disk/a/b/file"), "deep")
	answer, err := os.ReadFile(filepath.Join(dir, "answer"))
	n.want("hostPath on the node", fmt.Sprint(string(answer), err), "of the pod\n<nil>")
	for what, command := range map[string]string{
		"a read-only mount": "touch /node-file", "the secret": "touch /secrets/new", "the configMap": "touch /settings/new",
	} {
		if out, err := kubectl("-n", n.name, "exec", "volumes", "--", "sh", "-c", command); err == nil {
			t.Errorf("writing to %s succeeded: %s", what, out)
		}
	}
	if out, err := kubectl("-n", n.name, "exec", "volumes", "--", "dd", "if=/dev/zero", "of=/memory/big", "bs=1M", "count=20"); err == nil {
		t.Errorf("20 MiB fit into a memory volume of 16 MiB: %s", out)
	}
	n.exec("volumes", "rm", "-f", "/memory/big")

	// The kubelet looks at its ConfigMaps every minute.
	n.run("patch", "configmap", "settings", "-p", `{"data":{"color":"green","size":"big"}}`)
	n.run("patch", "secret", "secrets", "-p", `{"stringData":{"password":"tuna"}}`)
	n.run("label", "pod", "volumes", "app=changed", "--overwrite")
	for path, want := range map[string]string{
		"/settings/color": "green", "/settings/size": "big", "/secrets/password": "tuna",
		"/all/from/settings": "green", "/all/from/secrets": "tuna", "/pod/labels": `app="changed"`,
	} {
		n.eventually(150*time.Second, "the update of "+path, func() error {
			got, err := kubectl("-n", n.name, "exec", "volumes", "-c", "main", "--", "cat", path)
			if err == nil && strings.TrimSpace(got) != want {
				err = fmt.Errorf("got %q, want %q", got, want)
			}
			return err
		})
	}
	// A single file keeps its inode, as under every runtime (T30).
	n.want("subPath after the update", n.exec("volumes", "cat", "/shape"), "round")
}

// An image is a volume, whole and by a folder of it.
func TestImageVolume(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.ready("artifact", `
apiVersion: v1
kind: Pod
metadata: {name: artifact}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    volumeMounts:
    - {name: image, mountPath: /image}
    - {name: image, mountPath: /folder, subPath: data}
  volumes:
  - {name: image, image: {reference: IMAGE}}
`)
	n.want("file", n.exec("artifact", "cat", "/image/data/from-image"), "of the image")
	n.want("file of the folder", n.exec("artifact", "cat", "/folder/from-image"), "of the image")
	if out, err := kubectl("-n", n.name, "exec", "artifact", "--", "touch", "/image/new"); err == nil {
		t.Errorf("an image volume was written to: %s", out)
	}
}

// A pod that may not run as root shares a volume by its group (T32).
func TestFSGroup(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.ready("group", `
apiVersion: v1
kind: Pod
metadata: {name: group}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, runAsUser: 1000, runAsGroup: 1000, fsGroup: 2000, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: main
    image: IMAGE
    securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
    volumeMounts:
    - {name: disk, mountPath: /disk}
    - {name: memory, mountPath: /memory}
  volumes:
  - {name: disk, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory}}
`)
	n.want("user", n.exec("group", "id", "-u"), "1000")
	n.want("groups", n.exec("group", "id", "-G"), "1000 2000")
	// A tmpfs is sticky, and stays so.
	for dir, mode := range map[string]string{"/disk": "2777", "/memory": "3777"} {
		n.want(dir, n.exec("group", "stat", "-c", "%a %u:%g", dir), mode+" 0:2000")
		n.exec("group", "touch", dir+"/file")
		n.want(dir+"/file", n.exec("group", "stat", "-c", "%u:%g", dir+"/file"), "1000:2000")
	}
	if out, err := kubectl("-n", n.name, "exec", "group", "--", "touch", "/tmp/file"); err == nil {
		t.Errorf("a read-only root was written to: %s", out)
	}

	// The image's user is root, which the kubelet refuses before the runtime is asked.
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: root}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true}
  containers: [{name: main, image: IMAGE}]
`)
	n.becomes(2*time.Minute, "pod/root", "{.status.containerStatuses[0].state.waiting.reason}", "CreateContainerConfigError")
}

// A claim's volume outlives the pod that wrote to it.
func TestPersistentVolume(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	dir := filepath.Join(suite.base, "claim")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = kubectl("delete", "pv", n.name, "--wait=false") })
	n.apply(strings.NewReplacer("NAME", n.name, "DIR", dir).Replace(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: NAME}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: ""
  local: {path: DIR}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [` + nodeName + `]}]}]}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec: {accessModes: [ReadWriteOnce], storageClassName: "", volumeName: NAME, resources: {requests: {storage: 1Gi}}}
`))
	for i := range 2 {
		pod := fmt.Sprintf("writer-%d", i)
		n.ready(pod, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {fsGroup: 2000}
  containers: [{name: main, image: IMAGE, volumeMounts: [{name: data, mountPath: /data}]}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
`, pod))
		n.exec(pod, "sh", "-c", "echo $HOSTNAME >> /data/file")
		n.want("group of the volume", n.exec(pod, "stat", "-c", "%g", "/data"), "2000")
		if i == 1 {
			n.want("what both wrote", n.exec(pod, "cat", "/data/file"), "writer-0\nwriter-1")
		}
		n.run("delete", "pod", pod)
	}
}

// Root of a pod with a user namespace is nobody special outside of it, and its
// volumes are as usual (T33).
func TestUserNamespace(t *testing.T) {
	t.Parallel()
	n := newNamespace(t)
	n.ready("mapped", `
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {color: blue}
---
apiVersion: v1
kind: Pod
metadata: {name: mapped}
spec:
  hostUsers: false
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  securityContext: {fsGroup: 2000}
  containers:
  - name: main
    image: IMAGE
    command: [sh, -c, "while [ ! -e /disk/end ]; do sleep 0.2; done; echo bye > /dev/termination-log"]
    volumeMounts:
    - {name: disk, mountPath: /disk}
    - {name: settings, mountPath: /settings}
  volumes:
  - {name: disk, emptyDir: {}}
  - {name: settings, configMap: {name: settings}}
`)
	ids := strings.Fields(n.exec("mapped", "cat", "/proc/self/uid_map"))
	if len(ids) != 3 || ids[0] != "0" || ids[1] == "0" || ids[2] != "65536" {
		t.Errorf("uid_map: got %v, want 65536 ids from 0 on that are others outside", ids)
	}
	if hosts := n.exec("mapped", "cat", "/etc/hosts"); !strings.Contains(hosts, n.get("pod/mapped", "{.status.podIP}")) {
		t.Errorf("/etc/hosts does not have the pod's address:\n%s", hosts)
	}
	n.want("configMap", n.exec("mapped", "cat", "/settings/color"), "blue")
	n.exec("mapped", "touch", "/disk/file", "/tmp/file")
	n.want("owner in the volume", n.exec("mapped", "stat", "-c", "%u:%g", "/disk/file"), "0:2000")
	n.want("owner in the root file system", n.exec("mapped", "stat", "-c", "%u:%g", "/tmp/file"), "0:0")
	n.exec("mapped", "touch", "/disk/end")
	n.becomes(2*time.Minute, "pod/mapped", "{.status.phase} {.status.containerStatuses[0].state.terminated.message}", "Succeeded bye")
}

// claims are those of a service account's token that tests look at.
type claims struct {
	Audiences []string `json:"aud"`
	Issued    int64    `json:"iat"`
	Expires   int64    `json:"exp"`
}

// token reads a token that a pod has.
func (n *namespace) token(pod, path string) claims {
	n.Helper()
	parts := strings.Split(n.exec(pod, "cat", path), ".")
	if len(parts) != 3 {
		n.Fatalf("%s of pod %s is no token: %q", path, pod, parts)
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		n.Fatal(err)
	}
	var c claims
	if err := json.Unmarshal(b, &c); err != nil {
		n.Fatal(err)
	}
	return c
}
