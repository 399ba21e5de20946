package command

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func newLogs(c *client) *cobra.Command {
	var o logOptions
	cmd := &cobra.Command{
		Use:     "logs [-f] CONTAINER",
		Short:   "Print a container's output",
		Args:    cobra.ExactArgs(1),
		PreRunE: c.connect,
		RunE: func(cmd *cobra.Command, args []string) error {
			ct, err := c.findContainer(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			st, err := c.ContainerStatus(cmd.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: ct.GetId()})
			if err != nil {
				return err
			}
			path := st.GetStatus().GetLogPath()
			if path == "" {
				return fmt.Errorf("container %s was made without a log", shortID(ct.GetId()))
			}
			o.done = c.ended(ct.GetId())
			err = followLog(cmd.Context(), path, o, cmd.OutOrStdout(), cmd.ErrOrStderr())
			if cmd.Context().Err() != nil {
				return nil // Ctrl-C is how following ends
			}
			return err
		},
	}
	cmd.Flags().BoolVarP(&o.follow, "follow", "f", false, "go on until the container ends")
	cmd.Flags().BoolVar(&o.timestamps, "timestamps", false, "print each line's time")
	return cmd
}

type logOptions struct {
	follow     bool
	timestamps bool
	// done tells whether the container has ended: nothing more will come.
	done func(context.Context) bool
}

// maxLogLine bounds a line of a log: 16 KiB of content and what the format adds.
const maxLogLine = 32 << 10

// logPoll is how often a followed log is looked at.
const logPoll = 100 * time.Millisecond

// followLog prints the log at path, in the CRI's format: time, stream, tag (P
// for a part of a line, F for its end), content. A log that was rotated away is
// picked up under its name again.
func followLog(ctx context.Context, path string, o logOptions, stdout, stderr io.Writer) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	defer func() { f.Close() }()
	r := bufio.NewReaderSize(f, maxLogLine)
	var pending []byte // the beginning of a line that the writer has not ended
	ended := false
	for {
		line, err := r.ReadSlice('\n')
		switch {
		case err == nil:
			if perr := printLogLine(append(pending, line...), o, stdout, stderr); perr != nil {
				return perr
			}
			pending = nil
			continue
		case errors.Is(err, bufio.ErrBufferFull):
			return fmt.Errorf("log %s has a line of more than %d bytes: it is not in the CRI's format", path, maxLogLine)
		case !errors.Is(err, io.EOF):
			return fmt.Errorf("log %s: %w", path, err)
		}
		if pending = append(pending, line...); len(pending) > maxLogLine {
			return fmt.Errorf("log %s has a line of more than %d bytes: it is not in the CRI's format", path, maxLogLine)
		}
		if next := rotated(f, path); next != nil {
			f.Close()
			f, pending = next, nil
			r.Reset(f)
			continue
		}
		if !o.follow || ended {
			return nil
		}
		// Look at the state first and read once more after it: what was written
		// before the end must be printed.
		if ended = o.done(ctx); ended {
			continue
		}
		select {
		case <-time.After(logPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// rotated opens path if another file than f has that name now.
func rotated(f *os.File, path string) *os.File {
	now, err := os.Stat(path)
	if err != nil {
		return nil
	}
	if old, err := f.Stat(); err != nil || os.SameFile(old, now) {
		return nil
	}
	next, err := os.Open(path)
	if err != nil {
		return nil
	}
	return next
}

func printLogLine(line []byte, o logOptions, stdout, stderr io.Writer) error {
	fields := bytes.SplitN(line, []byte(" "), 4)
	if len(fields) != 4 {
		return fmt.Errorf("log line %.40q is not in the CRI's format", line)
	}
	at, stream, tag, content := fields[0], string(fields[1]), fields[2], fields[3]
	w := stdout
	if stream == "stderr" {
		w = stderr
	}
	if bytes.HasPrefix(tag, []byte("P")) {
		content = bytes.TrimSuffix(content, []byte("\n"))
	}
	if o.timestamps {
		content = append(append(bytes.Clone(at), ' '), content...)
	}
	_, err := w.Write(content)
	return err
}
