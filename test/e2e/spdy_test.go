//go:build linux

package e2e_test

import (
	"testing"

	"github.com/cri-vz/cri-vz/test/criclient"
)

// terminal is the client's end of an exec or attach session.
type terminal struct{ *criclient.Terminal }

func openTerminal(t *testing.T, url string, stdin, tty bool) *terminal {
	t.Helper()
	return &terminal{criclient.OpenTerminal(t, url, criclient.Streams{Stdin: stdin, Stdout: true, Stderr: !tty, TTY: tty})}
}

func (p *pod) forward(t *testing.T) *criclient.Forwarder { t.Helper(); return p.cri.Forward(t) }
