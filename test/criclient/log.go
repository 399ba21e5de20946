package criclient

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
)

var logLine = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(Z|[+-]\d\d:\d\d) (stdout|stderr) ([PF]) (.*)$`)

// ReadLog reads a log in the CRI's format.
func ReadLog(t *testing.T, path string) Result {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out, errs strings.Builder
	for line := range strings.Lines(string(b)) {
		if !strings.HasSuffix(line, "\n") {
			break // it is being written
		}
		m := logLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			t.Fatalf("%s: not a line of the CRI's log format: %.100q", path, line)
		}
		var w io.StringWriter = &out
		if m[2] == "stderr" {
			w = &errs
		}
		end := "\n"
		if m[3] == "P" {
			end = ""
		}
		_, _ = w.WriteString(m[4] + end)
	}
	return Result{Stdout: out.String(), Stderr: errs.String()}
}

// WaitForLog waits for text in a container's log.
func WaitForLog(t *testing.T, path, text string) {
	t.Helper()
	Eventually(t, 15*time.Second, fmt.Sprintf("%q in %s", text, path), func() error {
		if log := ReadLog(t, path); !strings.Contains(log.Stdout+log.Stderr, text) {
			return fmt.Errorf("it has %.200q", log)
		}
		return nil
	})
}

// WantCount checks that every line of the test image's `count N` came once and
// in order.
func WantCount(t *testing.T, got string, n int) {
	t.Helper()
	var want strings.Builder
	for i := range n {
		fmt.Fprintf(&want, "line %d\n", i+1)
	}
	if got != want.String() {
		g, w := strings.Split(got, "\n"), strings.Split(want.String(), "\n")
		for i := range min(len(g), len(w)) {
			if g[i] != w[i] {
				t.Errorf("line %d of %d is %q, want %q", i+1, len(g)-1, g[i], w[i])
				return
			}
		}
		t.Errorf("%d lines, want %d", len(g)-1, n)
	}
}
