package sandbox

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestParseCPUs(t *testing.T) {
	for _, tt := range []struct {
		list string
		want []uint32
	}{
		{"", nil}, {"\n", nil}, {"0", []uint32{0}}, {"3,1-2,2", []uint32{1, 2, 3}}, {"1023", []uint32{1023}},
	} {
		if got, err := parseCPUs(tt.list); !slices.Equal(got, tt.want) || err != nil {
			t.Errorf("%q: %v, %v", tt.list, got, err)
		}
	}
	for _, bad := range []string{"a", "1-", "-1", "3-1", "1024", "0-99999999", "1,,2", "0,", strings.Repeat("0-1023,", 100) + "0", "1 2", "+1"} {
		if got, err := parseCPUs(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.20q: %v, %v", bad, got, err)
		}
	}
}

func FuzzParseCPUs(f *testing.F) {
	f.Add("0-3,7")
	f.Fuzz(func(t *testing.T, s string) {
		cpus, err := parseCPUs(s)
		if err == nil && (len(cpus) > maxCPU+1 || !slices.IsSorted(cpus)) {
			t.Errorf("%q: %d CPUs", s, len(cpus))
		}
	})
}

// T28: a cpuset's numbers are the host's, and the VM runs on all of its
// containers' together; its score is that of the container that is worth most.
func TestHostShare(t *testing.T) {
	b, err := os.ReadFile(onlineCPUs)
	if err != nil {
		t.Fatal(err)
	}
	online, err := parseCPUs(string(b))
	if err != nil {
		t.Fatal(err)
	}

	h := newHostShare()
	ask := func(id, cpus string, adj int64) {
		h.asked[id] = &runtimeapi.LinuxContainerResources{CpusetCpus: cpus, OomScoreAdj: adj}
	}
	ask("free", "", 900)
	if r := h.machine(); len(r.GetCpus()) != 0 || r.GetOomScoreAdj() != 900 {
		t.Errorf("%v", r)
	}
	ask("pinned", strconv.Itoa(int(online[0])), -500)
	if r := h.machine(); !slices.Equal(r.GetCpus(), online[:1]) || r.GetOomScoreAdj() != -500 {
		t.Errorf("%v", r)
	}
	ask("all", strings.TrimSpace(string(b)), 0)
	if r := h.machine(); !slices.Equal(r.GetCpus(), online) {
		t.Errorf("%v", r)
	}
	if _, err := hostCPUs("1023"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a CPU that the host doesn't have: %v", err)
	}
}
