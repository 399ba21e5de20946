package shim

import (
	"context"
	"fmt"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// run is the shim's life. macOS has neither cgroups nor mount namespaces, and the
// framework ends the machine when this process ends.
func run(c Config, driver func(Config) (vmm.Driver, error)) error {
	v := newVolumes(c)
	if err := v.prepare(); err != nil {
		return fmt.Errorf("pod %s: volumes share: %w", c.ID, err)
	}
	d, err := driver(c)
	if err != nil {
		return fmt.Errorf("pod %s: %w", c.ID, err)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer cancel()
	// The terminal of whoever started the daemon is none of a pod's business.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
	return serve(ctx, c, d, nil, v)
}
