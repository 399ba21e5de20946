package command

import (
	"context"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func newVersion(c *client) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the versions of this program and of a running daemon",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := struct {
				Client   string `json:"client"`
				Platform string `json:"platform"`
				Daemon   string `json:"daemon,omitempty"`
			}{Client: version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
			if err := c.connect(cmd, nil); err == nil {
				ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
				defer cancel()
				if r, err := c.Version(ctx, &runtimeapi.VersionRequest{}); err == nil {
					v.Daemon = r.GetRuntimeVersion()
				}
			}
			daemon := v.Daemon
			if daemon == "" {
				daemon = "not running"
			}
			return out.print(cmd.OutOrStdout(), v, fmt.Sprintf("cri-vz\t%s\t%s", v.Client, v.Platform), [][]string{{"daemon", daemon, ""}})
		},
	}
	out.flag(cmd)
	return cmd
}
