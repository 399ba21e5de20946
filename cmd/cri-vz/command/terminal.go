package command

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// watchTerminal reports the terminal's size whenever it changes, until ctx ends.
func watchTerminal(ctx context.Context, report func(width, height uint32)) {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	defer signal.Stop(changed)
	for {
		select {
		case <-changed:
			report(terminalSize())
		case <-ctx.Done():
			return
		}
	}
}
