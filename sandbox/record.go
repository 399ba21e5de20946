package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-vz/cri-vz/sandbox/network"
	"github.com/cri-vz/cri-vz/sandbox/shim"
)

const (
	podFile       = "pod.json"
	containerFile = "container.json"
	// recordSchema is the version of both records' form.
	recordSchema = 1
	// maxRecord bounds a record: a CRI message has at most 16 MiB.
	maxRecord = 32 << 20
)

// phase is where a pod is in its life, on record.
type phase string

const (
	// creating: a daemon that starts and finds it undoes the pod (T10).
	creating phase = "creating"
	ready    phase = "ready"
	// stopped: nothing of it runs, its network is gone.
	stopped phase = "stopped"
	// removing: a daemon that starts and finds it goes on removing.
	removing phase = "removing"
)

// podRecord is a pod's file: what a daemon that starts must know.
type podRecord struct {
	Schema    int             `json:"schema"`
	ID        string          `json:"id"`
	Phase     phase           `json:"phase"`
	Config    json.RawMessage `json:"config"` // protojson of the CRI's PodSandboxConfig
	Handler   string          `json:"handler,omitempty"`
	CreatedAt int64           `json:"createdAt"`
	Steps     []Step          `json:"steps,omitempty"`
	// CgroupParent is what the pod's VM is charged to; empty: our own root.
	CgroupParent string `json:"cgroupParent,omitempty"`
	// What the steps made, each written before the step acts or, where the step
	// decides it, right after.
	Network *network.Result `json:"network,omitempty"`
	Cgroups []string        `json:"cgroups,omitempty"`
	Shim    process         `json:"shim,omitzero"`
	Reason  string          `json:"reason,omitempty"`
	// Size is the VM's; what Run decided.
	Size Size `json:"size,omitzero"`
	// Resources and Overhead are what was updated since.
	Resources json.RawMessage `json:"resources,omitempty"`
	Overhead  json.RawMessage `json:"overhead,omitempty"`

	config              *runtimeapi.PodSandboxConfig
	resources, overhead *runtimeapi.LinuxContainerResources
}

// containerRecord is a container's file.
type containerRecord struct {
	Schema    int             `json:"schema"`
	ID        string          `json:"id"`
	Creating  bool            `json:"creating,omitempty"`
	Config    json.RawMessage `json:"config"`
	ImageID   string          `json:"imageID"`
	ImageRef  string          `json:"imageRef"`
	LogPath   string          `json:"logPath,omitempty"`
	CreatedAt int64           `json:"createdAt"`
	Signal    uint32          `json:"stopSignal,omitempty"`
	// Resources are the limits in force where they were updated.
	Resources json.RawMessage `json:"resources,omitempty"`

	config    *runtimeapi.ContainerConfig
	resources *runtimeapi.LinuxContainerResources
}

func (r *podRecord) write(dir string) error {
	r.Schema = recordSchema
	if err := errors.Join(marshalResources(&r.Resources, r.resources), marshalResources(&r.Overhead, r.overhead)); err != nil {
		return fmt.Errorf("record of pod %s: %w", r.ID, err)
	}
	return writeRecord(filepath.Join(dir, podFile), r, &r.Config, r.config)
}

func (r *containerRecord) write(dir string) error {
	r.Schema = recordSchema
	if err := marshalResources(&r.Resources, r.resources); err != nil {
		return fmt.Errorf("record of container %s: %w", r.ID, err)
	}
	return writeRecord(filepath.Join(dir, containerFile), r, &r.Config, r.config)
}

func writeRecord(path string, r any, raw *json.RawMessage, config proto.Message) error {
	if *raw == nil {
		b, err := protojson.Marshal(config)
		if err != nil {
			return fmt.Errorf("record %s: %w", path, err)
		}
		*raw = b
	}
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("record %s: %w", path, err)
	}
	if err := shim.WriteFile(path, b); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

func readPodRecord(dir string) (*podRecord, error) {
	b, err := readRecord(filepath.Join(dir, podFile))
	if err != nil {
		return nil, err
	}
	r, err := parsePodRecord(b)
	if err != nil {
		return nil, fmt.Errorf("record %s: %w", filepath.Join(dir, podFile), err)
	}
	if r.ID != filepath.Base(dir) {
		return nil, fmt.Errorf("record %s is of pod %q", filepath.Join(dir, podFile), r.ID)
	}
	return r, nil
}

func readContainerRecord(dir string) (*containerRecord, error) {
	b, err := readRecord(filepath.Join(dir, containerFile))
	if err != nil {
		return nil, err
	}
	r, err := parseContainerRecord(b)
	if err != nil {
		return nil, fmt.Errorf("record %s: %w", filepath.Join(dir, containerFile), err)
	}
	if r.ID != filepath.Base(dir) {
		return nil, fmt.Errorf("record %s is of container %q", filepath.Join(dir, containerFile), r.ID)
	}
	return r, nil
}

func parsePodRecord(b []byte) (*podRecord, error) {
	r := &podRecord{config: &runtimeapi.PodSandboxConfig{}}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, err
	}
	if err := checkSchema(r.Schema); err != nil {
		return nil, err
	}
	switch r.Phase {
	case creating, ready, stopped, removing:
	default:
		return nil, fmt.Errorf("phase %q", r.Phase)
	}
	if err := parseConfig(r.Config, r.config); err != nil {
		return nil, err
	}
	if r.config.GetMetadata() == nil {
		return nil, fmt.Errorf("no metadata: %w", errdefs.ErrInvalidArgument)
	}
	var err error
	if r.resources, err = parseResources(r.Resources); err != nil {
		return nil, err
	}
	r.overhead, err = parseResources(r.Overhead)
	return r, err
}

func parseContainerRecord(b []byte) (*containerRecord, error) {
	r := &containerRecord{config: &runtimeapi.ContainerConfig{}}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, err
	}
	if err := checkSchema(r.Schema); err != nil {
		return nil, err
	}
	if err := parseConfig(r.Config, r.config); err != nil {
		return nil, err
	}
	if r.config.GetMetadata() == nil {
		return nil, fmt.Errorf("no metadata: %w", errdefs.ErrInvalidArgument)
	}
	var err error
	r.resources, err = parseResources(r.Resources)
	return r, err
}

func checkSchema(n int) error {
	if n != recordSchema {
		return fmt.Errorf("schema %d, this build knows %d: %w", n, recordSchema, errdefs.ErrInvalidArgument)
	}
	return nil
}

// parseConfig leaves out what a later build may have known.
func parseConfig(raw json.RawMessage, config proto.Message) error {
	return protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(raw, config)
}

func readRecord(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err == nil && len(b) > maxRecord {
		err = fmt.Errorf("record %s is longer than %d bytes", path, maxRecord)
	}
	return b, err
}
