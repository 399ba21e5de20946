package shim

import (
	"bytes"
	"context"
	"path/filepath"
	"testing"

	"github.com/containerd/log"
)

// What a guest says amiss is no line of a log that grows without a bound: standard
// error is a file of the host.
func TestGuestsMessagesAreNotLogged(t *testing.T) {
	var stderr bytes.Buffer
	level, out := log.L.Logger.Level, log.L.Logger.Out
	defer func() { log.L.Logger.SetLevel(level); log.L.Logger.SetOutput(out) }()
	log.L.Logger.SetOutput(&stderr)
	log.G(context.Background()).Error("heard")
	if stderr.Len() == 0 {
		t.Fatal("this is not what ttrpc logs with")
	}
	stderr.Reset()
	defer openLog(filepath.Join(t.TempDir(), LogFile))()
	log.G(context.Background()).WithField("stream", 0).Error("ttrpc: received message on inactive stream")
	if stderr.Len() > 0 {
		t.Errorf("%q", stderr.String())
	}
}
