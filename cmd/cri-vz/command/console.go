package command

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
)

func newConsole(c *client) *cobra.Command {
	return &cobra.Command{
		Use:   "console POD",
		Short: "Print what a pod's guest wrote to its console (kernel, agent)",
		Long: `Print what a pod's guest wrote to its console: the kernel's messages and the
agent's. A pod that failed to start quotes the last lines in its error.`,
		Args:    cobra.ExactArgs(1),
		PreRunE: c.connect,
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := c.node.Console(cmd.Context(), &nodeapi.ConsoleRequest{PodSandboxId: args[0]})
			if err != nil {
				return err
			}
			for {
				m, err := s.Recv()
				switch {
				case errors.Is(err, io.EOF):
					return nil
				case err != nil:
					return err
				}
				if _, err := cmd.OutOrStdout().Write(escapeControl(m.GetData())); err != nil {
					return err
				}
			}
		},
	}
}

// escapeControl keeps a guest from driving the reader's terminal. Terminals take
// U+0080 to U+009F for control characters, too, so that only ASCII is left as it
// is: a chunk may end within a character.
func escapeControl(b []byte) []byte {
	out := make([]byte, 0, len(b))
	for _, c := range b {
		switch {
		case c == '\r':
		case c < ' ' && c != '\n' && c != '\t', c == 0x7f:
			out = append(out, '^', c^0x40)
		case c >= 0x80:
			out = fmt.Appendf(out, "\\x%02x", c)
		default:
			out = append(out, c)
		}
	}
	return out
}
