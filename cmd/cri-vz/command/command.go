// Package command is the cri-vz command line: one file per command, parsed by
// cobra. The daemon's clients speak gRPC to its socket and keep no state.
package command

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/cri-vz/cri-vz/sandbox/network/frameswitch"
	"github.com/cri-vz/cri-vz/sandbox/shim"
)

// Version is set by the linker (-X); a build without it reports the module's.
var Version = ""

func version() string {
	if Version != "" {
		return Version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "devel"
}

// exitCode is an error that is only an exit status: a command in a container
// has said itself what was wrong.
type exitCode int

func (e exitCode) Error() string { return "exit status " + strconv.Itoa(int(e)) }

// notRun is why a command in a container could not be run, with the exit status that
// a shell has for it.
type notRun struct {
	status int
	reason string
}

func (e *notRun) Error() string { return e.reason }

// startError tells from what the daemon says of a start, in a container that is there,
// whether the command was not found (127) or may not be executed (126).
func startError(err error) error {
	switch status.Code(err) {
	case codes.NotFound:
		return &notRun{127, message(err)}
	case codes.PermissionDenied:
		return &notRun{126, message(err)}
	}
	return err
}

// Main runs the command line and returns the process's exit status.
func Main(args []string) int {
	// These have no command line of their own to parse, and the shim must start fast.
	if len(args) > 0 {
		switch args[0] {
		case "shim":
			return shim.Main(args[1:])
		case "switch":
			return frameswitch.Main(args[1:])
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	root := newRoot(os.Stdout)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var code exitCode
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	}
	fmt.Fprintln(os.Stderr, "cri-vz:", printableLines(message(err)))
	var unstarted *notRun
	switch {
	case errors.As(err, &unstarted):
		return unstarted.status
	case ctx.Err() != nil:
		return 130 // as a shell has it for what Ctrl-C ended
	}
	return 1
}

func newRoot(out io.Writer) *cobra.Command {
	root := &cobra.Command{
		Use:   "cri-vz",
		Short: "A Kubernetes container runtime whose pods are virtual machines",
		Long: `cri-vz runs Kubernetes pods as virtual machines and answers the interface that
the kubelet and crictl speak (CRI v1).

Start the daemon, then run an image as "docker save" writes it:

  cri-vz guest build --agent FILE          # once: kernel and initramfs of the VMs
  cri-vz serve &
  cri-vz run app.tar.gz -p 3000:3000       # Ctrl-C stops and removes it

or use any CRI client:

  crictl --runtime-endpoint unix:///run/cri-vz/cri-vz.sock pods`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetOut(out)
	c := &client{}
	root.PersistentFlags().StringVar(&c.endpoint, "connect", defaultEndpoint(), "the daemon's socket (or $CRI_VZ_SOCKET)")
	root.AddGroup(&cobra.Group{ID: "node", Title: "The node:"}, &cobra.Group{ID: "pods", Title: "Pods and images:"})
	for _, cmd := range []*cobra.Command{newServe(), newGuest(), newConfig(), newDoctor()} {
		cmd.GroupID = "node"
		root.AddCommand(cmd)
	}
	for _, cmd := range []*cobra.Command{newRun(c), newPs(c), newExec(c), newLogs(c), newConsole(c), newStop(c), newImage(c)} {
		cmd.GroupID = "pods"
		root.AddCommand(cmd)
	}
	root.AddCommand(newVersion(c))
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usageError(cmd, err) })
	explainArguments(root)
	return root
}

// explainArguments makes the error of a command that has too few or too many
// arguments say which it takes. A command that only has others below it takes none: a
// mistyped one must not pass for a wish for help.
func explainArguments(cmd *cobra.Command) {
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Args = cobra.NoArgs
		cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	}
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usageError(cmd, err)
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		explainArguments(sub)
	}
}

func usageError(cmd *cobra.Command, err error) error {
	line := cmd.UseLine()
	if cmd.HasSubCommands() {
		line = cmd.CommandPath() + " COMMAND"
	}
	return fmt.Errorf("%w\nusage: %s\n`%s --help` says more", err, line, cmd.CommandPath())
}

// setVerbosity gives klog the -v that a log level means; errorsOnly leaves
// everything below errors out.
func setVerbosity(v int, errorsOnly bool) error {
	fs := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(fs)
	if errorsOnly {
		// Standard error by severity, instead of all of it; the files that klog
		// would write then are none.
		klog.SetOutput(io.Discard)
		if err := errors.Join(fs.Set("logtostderr", "false"), fs.Set("stderrthreshold", "ERROR")); err != nil {
			return err
		}
	}
	return fs.Set("v", strconv.Itoa(v))
}
