package command

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cri-vz/cri-vz/cmd/cri-vz/config"
	"github.com/cri-vz/cri-vz/guest/image"
	"github.com/cri-vz/cri-vz/sandbox"
)

// Results of a check. A warning is something that works less well than it could.
const (
	resultOK      = "ok"
	resultWarning = "warning"
	resultFailed  = "failed"
)

const (
	// A pod's writable disk and a few images fit in the first, and in the second
	// hardly anything.
	diskEnough = 10 << 30
	diskLeast  = 1 << 30
	// doctorTimeout bounds all checks together; the longest boots a guest.
	doctorTimeout = time.Minute
)

// finding is what one check found.
type finding struct {
	Name   string `json:"name"`
	Result string `json:"result"`
	Detail string `json:"detail"`
	// Mend is what to do about it.
	Mend string `json:"mend,omitempty"`
}

func ok(detail string) finding { return finding{Result: resultOK, Detail: detail} }

func warning(detail, mend string) finding {
	return finding{Result: resultWarning, Detail: detail, Mend: mend}
}

func failed(detail, mend string) finding {
	return finding{Result: resultFailed, Detail: detail, Mend: mend}
}

// check looks at one thing and changes nothing.
type check struct {
	name string
	run  func(ctx context.Context, c *config.Config) finding
}

func newDoctor() *cobra.Command {
	var file string
	var flags config.Flags
	var out output
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what would keep pods from running, and say how to mend it",
		Long: `Look for what would keep pods from running on this machine, and say how to mend
it. Nothing is changed, but the verdict on KVM, for which a guest may be booted, is
kept. Run it as the user that runs the daemon, with the same configuration. The exit
status is 1 if a check failed, and 0 if all went well or with warnings.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(file, flags)
			if err != nil {
				return err
			}
			// What is found is in the table.
			if err := setVerbosity(0, true); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), doctorTimeout)
			defer cancel()
			checks := append([]check{
				{"configuration", func(context.Context, *config.Config) finding {
					if file == "" {
						return ok("defaults")
					}
					return ok(file)
				}},
			}, platformChecks...)
			return examine(ctx, cmd, out, c, append(checks, commonChecks...))
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "the daemon's configuration file")
	cmd.Flags().StringVar(&flags.Root, "root", "", "where images and pods are kept")
	cmd.Flags().StringVar(&flags.Run, "run", "", "where sockets are kept")
	cmd.Flags().StringVar(&flags.Listen, "listen", "", "the CRI socket, unix://PATH")
	out.flag(cmd)
	return cmd
}

// examine runs the checks and prints what they found.
func examine(ctx context.Context, cmd *cobra.Command, out output, c *config.Config, checks []check) error {
	var findings []finding
	var rows [][]string
	code := exitCode(0)
	for _, ch := range checks {
		f := ch.run(ctx, c)
		f.Name = ch.name
		findings = append(findings, f)
		detail := f.Detail
		if f.Mend != "" {
			detail += "; " + f.Mend
		}
		rows = append(rows, []string{f.Result, f.Name, detail})
		if f.Result == resultFailed {
			code = 1
		}
	}
	if err := out.print(cmd.OutOrStdout(), findings, "RESULT\tCHECK\tFOUND", rows); err != nil {
		return err
	}
	if code != 0 {
		return code
	}
	return nil
}

// commonChecks come last: what they need may be what a check before has missed.
var commonChecks = []check{
	{"guest image", checkGuest},
	{"disk space", checkDiskSpace},
	{"socket", checkSocket},
}

func checkGuest(_ context.Context, c *config.Config) finding {
	dir := c.Guest.Dir
	var err error
	if dir == "" {
		if dir, err = image.DefaultDir(); err != nil {
			return failed(err.Error(), "set guest.dir in the configuration")
		}
	}
	g, err := image.Locate(dir, runtime.GOARCH)
	if c.VM.Default.Kernel != "" {
		g, err = image.LocateKind(dir, runtime.GOARCH, image.Kind(c.VM.Default.Kernel))
	}
	if err != nil {
		return failed(err.Error(), mendGuest)
	}
	if err := g.Verify(); err != nil {
		return failed(err.Error(), mendGuest)
	}
	return ok(fmt.Sprintf("%s kernel %s (%s) in %s", g.KernelKind, g.KernelVersion, g.KernelFormat, dir))
}

func checkDiskSpace(_ context.Context, c *config.Config) finding {
	dir, st, err := statfs(c.Root)
	if err != nil {
		return failed(err.Error(), "choose another `root`")
	}
	return enoughSpace(dir, int64(st.Bavail)*int64(st.Bsize))
}

func enoughSpace(dir string, free int64) finding {
	detail := fmt.Sprintf("%s free at %s", humanBytes(free), dir)
	const mend = "remove images (`cri-vz image remove`), or choose a `root` on a larger disk"
	switch {
	case free < diskLeast:
		return failed(detail, mend)
	case free < diskEnough:
		return warning(detail, mend)
	}
	return ok(detail)
}

// statfs asks about the file system that path is on, or will be.
func statfs(path string) (string, unix.Statfs_t, error) {
	for dir := path; ; dir = filepath.Dir(dir) {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if err == nil || !errors.Is(err, unix.ENOENT) || dir == filepath.Dir(dir) {
			if err != nil {
				err = &os.PathError{Op: "statfs", Path: dir, Err: err}
			}
			return dir, st, err
		}
	}
}

func checkSocket(ctx context.Context, c *config.Config) finding {
	if err := sandbox.CheckRun(c.Run); err != nil { // T14
		return failed(err.Error(), "choose a shorter `run`")
	}
	path := strings.TrimPrefix(c.Listen, "unix://")
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return ok(path + ": no daemon runs")
	case err != nil:
		return failed(err.Error(), "choose another `listen`, or run as the daemon's user")
	case st.Mode().Type() != os.ModeSocket:
		return failed(path+" is no socket", "remove it, or choose another `listen`")
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if errors.Is(err, unix.EACCES) {
		return warning(path+" is another user's", "run as the daemon's user")
	}
	if err != nil {
		return ok(path + " is what a daemon left that is gone; the next one replaces it")
	}
	_ = conn.Close()
	return ok(path + ": a daemon answers")
}
