package command

import (
	"fmt"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	"github.com/cri-vz/cri-vz/guest/image"
)

func newGuest() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "guest",
		Short: "Build, show and verify the kernel and initramfs that pods boot",
	}
	cmd.PersistentFlags().StringVar(&dir, "dir", "", "where they are kept (default: $CRI_VZ_CACHE or the user's cache)")
	cmd.PersistentPreRunE = func(*cobra.Command, []string) error {
		var err error
		if dir == "" {
			dir, err = image.DefaultDir()
		}
		return err
	}
	cmd.AddCommand(newGuestBuild(&dir), newGuestInfo(&dir), newGuestVerify(&dir))
	return cmd
}

func newGuestBuild(dir *string) *cobra.Command {
	var o image.Options
	cmd := &cobra.Command{
		Use:   "build --agent FILE",
		Short: "Fetch the distribution's kernel and build the initramfs around the agent",
		Long: `Fetch the distribution's kernel package, verified by its signature, and build the
initramfs around the agent. The same input gives the same bytes on every host.
On a machine without apt, give a kernel (arm64 "Image", amd64 bzImage or
vmlinux) or a Debian kernel package with --kernel.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			began := time.Now()
			shown := newProgress(cmd.ErrOrStderr()).follow("fetching and building the guest for " + o.Arch)
			o.Dir = *dir
			built, err := image.BuildAll(cmd.Context(), o)
			shown()
			if err != nil {
				return err
			}
			for _, g := range built {
				fmt.Fprintf(cmd.OutOrStdout(), "guest %s: %s kernel %s (%s), initramfs %s, agent %s, in %.1f s\n", g.Arch, g.KernelKind,
					g.KernelVersion, humanBytes(g.Kernel.Size), humanBytes(g.Initrd.Size), humanBytes(g.Agent.Size), time.Since(began).Seconds())
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&o.Arch, "arch", runtime.GOARCH, "the guest's architecture: amd64 or arm64")
	cmd.Flags().StringVar(&o.Agent, "agent", "", "the agent's binary, a `FILE` that \"make agent\" makes")
	cmd.Flags().StringVar(&o.Kernel, "kernel", "", "a kernel file or a linux-image package instead of the distribution's current one")
	cmd.Flags().BoolVar(&o.Refresh, "refresh", false, "fetch the distribution's current kernel also if there is one already")
	_ = cmd.MarkFlagRequired("agent")
	return cmd
}

func newGuestInfo(dir *string) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "info",
		Short: "Show versions, sizes and digests; the first line of an architecture is what boots",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			guests, err := image.List(*dir)
			if err != nil {
				return err
			}
			rows := [][]string{}
			guests = append([]image.Guest{}, guests...) // [] and not null
			for _, g := range guests {
				rows = append(rows,
					[]string{g.Arch, string(g.KernelKind), "kernel " + g.KernelVersion, humanBytes(g.Kernel.Size), short(g.Kernel.SHA256), g.KernelPath},
					[]string{"", "", "initramfs", humanBytes(g.Initrd.Size), short(g.Initrd.SHA256), g.InitrdPath},
					[]string{"", "", "agent " + g.AgentVersion, humanBytes(g.Agent.Size), short(g.Agent.SHA256), "(in the initramfs)"})
			}
			return out.print(cmd.OutOrStdout(), guests, "ARCH\tKIND\tPART\tSIZE\tSHA256\tFILE", rows)
		},
	}
	out.flag(cmd)
	return cmd
}

func short(digest string) string { return digest[:min(len(digest), 16)] }

func newGuestVerify(dir *string) *cobra.Command {
	return &cobra.Command{
		Use:   "verify",
		Short: "Check the files against the digests they were built with",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			guests, err := image.List(*dir)
			if err != nil {
				return err
			}
			if len(guests) == 0 {
				return fmt.Errorf("no guest in %s: build one with `cri-vz guest build`", *dir)
			}
			for _, g := range guests {
				if err := g.Verify(); err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "guest %s (%s kernel %s): as it was built\n", g.Arch, g.KernelKind, g.KernelVersion)
			}
			return nil
		},
	}
}
