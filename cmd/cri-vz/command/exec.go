package command

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
)

func newExec(c *client) *cobra.Command {
	var tty, stdin bool
	cmd := &cobra.Command{
		Use:   "exec [-it] CONTAINER COMMAND [ARG...]",
		Short: "Run a command in a container; the exit status is the command's",
		Long: `Run a command in a container. CONTAINER is a container's id or the beginning of
one, or the name of a pod or container that runs once. The exit status is the
command's; 127 if it is not there, 126 if it may not be executed.`,
		Example: "  cri-vz exec demo /app/web env\n  cri-vz exec -it demo sh",
		Args:    cobra.MinimumNArgs(2),
		PreRunE: c.connect,
		RunE: func(cmd *cobra.Command, args []string) error {
			ct, err := c.findContainer(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return c.exec(cmd, ct.GetId(), args[1:], stdin, tty)
		},
	}
	cmd.Flags().BoolVarP(&stdin, "stdin", "i", false, "pass standard input on")
	cmd.Flags().BoolVarP(&tty, "tty", "t", false, "give the command a terminal")
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func (c *client) exec(cmd *cobra.Command, id string, args []string, stdin, tty bool) error {
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	first := &nodeapi.ExecRequest{ContainerId: id, Cmd: args, Tty: tty, Stdin: stdin}
	fd := int(os.Stdin.Fd())
	if tty && stdin {
		if !term.IsTerminal(fd) {
			return errors.New("exec -it: standard input is not a terminal; use -i alone")
		}
		old, err := term.MakeRaw(fd)
		if err != nil {
			return err
		}
		defer func() { _ = term.Restore(fd, old) }()
	}
	if tty {
		first.Width, first.Height = terminalSize()
	}
	s, err := c.node.ExecStream(ctx)
	if err != nil {
		return err
	}
	var mu sync.Mutex // gRPC allows one Send at a time
	send := func(m *nodeapi.ExecRequest) error {
		mu.Lock()
		defer mu.Unlock()
		return s.Send(m)
	}
	if err := send(first); err != nil {
		return err
	}
	if stdin {
		go func() {
			buf := make([]byte, 32<<10)
			for {
				n, err := cmd.InOrStdin().Read(buf)
				if n > 0 && send(&nodeapi.ExecRequest{Data: buf[:n]}) != nil {
					return
				}
				if err != nil {
					_ = send(&nodeapi.ExecRequest{Eof: true})
					return
				}
			}
		}()
	}
	if tty {
		go watchTerminal(ctx, func(w, h uint32) { _ = send(&nodeapi.ExecRequest{Width: w, Height: h}) })
	}
	for {
		m, err := s.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return errors.New("the daemon ended the exec without an exit status")
		case err != nil:
			return startError(err)
		case m.GetExited():
			if m.GetExitCode() != 0 {
				return exitCode(m.GetExitCode())
			}
			return nil
		}
		if _, err := cmd.OutOrStdout().Write(m.GetStdout()); err != nil {
			return err
		}
		if _, err := cmd.ErrOrStderr().Write(m.GetStderr()); err != nil {
			return err
		}
	}
}

func terminalSize() (width, height uint32) {
	w, h, err := term.GetSize(int(os.Stdout.Fd()))
	if err != nil || w <= 0 || h <= 0 || w > 1<<15 || h > 1<<15 {
		return 80, 24
	}
	return uint32(w), uint32(h)
}
