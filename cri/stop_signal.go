package cri

import (
	"fmt"
	"strconv"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// linuxSignals are the guest's signal numbers, which are not the host's on a Mac.
var linuxSignals = map[string]uint32{
	"HUP": 1, "INT": 2, "QUIT": 3, "ILL": 4, "TRAP": 5, "ABRT": 6, "IOT": 6, "BUS": 7, "FPE": 8, "KILL": 9,
	"USR1": 10, "SEGV": 11, "USR2": 12, "PIPE": 13, "ALRM": 14, "TERM": 15, "STKFLT": 16, "CHLD": 17, "CLD": 17,
	"CONT": 18, "STOP": 19, "TSTP": 20, "TTIN": 21, "TTOU": 22, "URG": 23, "XCPU": 24, "XFSZ": 25, "VTALRM": 26,
	"PROF": 27, "WINCH": 28, "IO": 29, "POLL": 29, "PWR": 30, "SYS": 31, "RTMIN": 34, "RTMAX": 64,
}

// signal picks what StopContainer sends first: the request's signal, else the
// image's, else SIGTERM.
func (t *translation) signal(c *runtimeapi.ContainerConfig, img *v1.ConfigFile) error {
	name, at := img.Config.StopSignal, "the image's StopSignal"
	if s := c.GetStopSignal(); s != runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
		name, at = strings.TrimPrefix(s.String(), "SIGNAL_"), "config.stop_signal"
	}
	n, ok := parseSignal(name)
	if !ok {
		return refuse(at, fmt.Sprintf("%q is no signal of Linux", name))
	}
	t.stopSignal = n
	return nil
}

// parseSignal reads "SIGTERM", "TERM", "15", "SIGRTMIN+3", "SIGRTMINPLUS3", and
// "" as SIGTERM.
func parseSignal(s string) (uint32, bool) {
	if s == "" {
		return 15, true
	}
	if n, err := strconv.ParseUint(s, 10, 8); err == nil {
		return uint32(n), n >= 1 && n <= 64
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	name = strings.NewReplacer("PLUS", "+", "MINUS", "-").Replace(name)
	base, rest := name, ""
	if i := strings.IndexAny(name, "+-"); i >= 0 {
		base, rest = name[:i], name[i:]
	}
	n, ok := linuxSignals[base]
	if !ok {
		return 0, false
	}
	if rest == "" {
		return n, true
	}
	off, err := strconv.ParseInt(rest, 10, 8)
	total := int64(n) + off
	if err != nil || n < 34 || total < 34 || total > 64 {
		return 0, false
	}
	return uint32(total), true
}
