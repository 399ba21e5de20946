package sandbox

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// maxCPU is the highest number of a CPU that is accepted: what the kernel's
// cpu_set_t holds.
const maxCPU = 1023

// parseCPUs reads the kernel's list format (cpuset(7)): "0-2,7". The numbers are
// sorted, each there once. Empty text is none.
func parseCPUs(list string) ([]uint32, error) {
	bad := func() ([]uint32, error) {
		return nil, fmt.Errorf("%.64q is not a list of CPUs such as 0-2,7, with numbers up to %d: %w", list, maxCPU, errdefs.ErrInvalidArgument)
	}
	if list = strings.TrimSpace(list); list == "" {
		return nil, nil
	}
	var cpus []uint32
	for part := range strings.SplitSeq(list, ",") {
		from, to, isRange := strings.Cut(part, "-")
		first, err := strconv.ParseUint(from, 10, 16)
		last := first
		if err == nil && isRange {
			last, err = strconv.ParseUint(to, 10, 16)
		}
		if err != nil || last > maxCPU || first > last || len(cpus) > 4*maxCPU {
			return bad()
		}
		for ; first <= last; first++ {
			cpus = append(cpus, uint32(first))
		}
	}
	slices.Sort(cpus)
	return slices.Compact(cpus), nil
}

// onlineCPUs names the host's CPUs that run (Documentation/admin-guide/cputopology.rst).
const onlineCPUs = "/sys/devices/system/cpu/online"

// hostCPUs reads a cpuset_cpus, whose numbers are the host's (T28): one that the
// host doesn't have is errdefs.ErrInvalidArgument.
func hostCPUs(list string) ([]uint32, error) {
	cpus, err := parseCPUs(list)
	if err != nil || len(cpus) == 0 {
		return nil, err
	}
	b, err := os.ReadFile(onlineCPUs)
	if err != nil {
		return nil, fmt.Errorf("this host doesn't number its CPUs: %w: %w", err, errdefs.ErrNotImplemented)
	}
	online, err := parseCPUs(string(b))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", onlineCPUs, err)
	}
	for _, n := range cpus {
		if !slices.Contains(online, n) {
			return nil, fmt.Errorf("the host has no CPU %d, it has %s: %w", n, strings.TrimSpace(string(b)), errdefs.ErrInvalidArgument)
		}
	}
	return cpus, nil
}
