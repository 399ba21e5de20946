//go:build linux && (amd64 || arm64)

package agent

import "testing"

func TestParseMeminfo(t *testing.T) {
	got := parseMeminfo("MemTotal:  2048 kB\nMemFree:     100 kB\nMemAvailable:\t 300 kB\nHugePages_Total:  0\nodd\nMemFree: many kB\n")
	if got.FreeBytes != 100<<10 || got.AvailableBytes != 300<<10 {
		t.Errorf("%v", got)
	}
}
