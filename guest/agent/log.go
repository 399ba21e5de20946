//go:build linux && (amd64 || arm64)

package agent

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// logger writes lines to the guest's console, which the host keeps per pod.
type logger struct {
	debug bool

	mu sync.Mutex // keeps lines whole
	w  io.Writer
}

// Printf writes one line. What comes from containers must be quoted (%q).
func (l *logger) Printf(format string, args ...any) {
	line := strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", "; ")
	l.mu.Lock()
	defer l.mu.Unlock()
	// \r: a console is a terminal, and nobody has made it add them.
	fmt.Fprintf(l.w, "%s cri-vz-agent: %s\r\n", time.Now().UTC().Format("15:04:05.000"), line)
}

// Debugf is Printf if the kernel's command line carries crivz.debug.
func (l *logger) Debugf(format string, args ...any) {
	if l.debug {
		l.Printf(format, args...)
	}
}
