package command

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// pflag takes words in back quotes for the name of a flag's value, and a command
// to type came out as "--config cri-vz config default".
func TestHelpOfEveryCommand(t *testing.T) {
	var visit func(*cobra.Command)
	visit = func(cmd *cobra.Command) {
		t.Run(cmd.CommandPath(), func(t *testing.T) {
			if cmd.Short == "" {
				t.Error("no line says what it does")
			}
			cmd.Flags().VisitAll(func(f *pflag.Flag) {
				if value, _ := pflag.UnquoteUsage(f); strings.Contains(value, " ") {
					t.Errorf("--%s has a value that is called %q", f.Name, value)
				}
				if f.Usage == "" {
					t.Errorf("--%s has no description", f.Name)
				}
			})
		})
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
	}
	visit(newRoot(io.Discard))
}

// Who gives the wrong arguments is told the right ones.
func TestUsageErrors(t *testing.T) {
	for _, tc := range []struct{ args, want string }{
		{"run", "usage: cri-vz run IMAGE|FILE"},
		{"exec demo", "usage: cri-vz exec [-it] CONTAINER COMMAND"},
		{"ps demo", "usage: cri-vz ps"},
		{"image load", "usage: cri-vz image load FILE..."},
		{"ps --nosuch", "unknown flag: --nosuch\nusage: cri-vz ps"},
		{"frobnicate", "unknown command \"frobnicate\""},
		{"image lst", "unknown command \"lst\" for \"cri-vz image\""},
	} {
		root := newRoot(io.Discard)
		root.SetArgs(strings.Fields(tc.args))
		if err := root.Execute(); err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "--help") {
			t.Errorf("%s: error %v, want %q and where there is more", tc.args, err, tc.want)
		}
	}
}

// A command that can't be run has a shell's exit status, and the daemon's words.
func TestStartError(t *testing.T) {
	for code, want := range map[codes.Code]int{codes.NotFound: 127, codes.PermissionDenied: 126, codes.Unavailable: 0} {
		err := errors.Join(startError(status.Error(code, "the reason")), nil)
		var unstarted *notRun
		if got := errors.As(err, &unstarted); got != (want != 0) || got && (unstarted.status != want || message(unstarted) != "the reason") {
			t.Errorf("%v: %v, want exit status %d", code, err, want)
		}
	}
}

// What takes its time shows that on a terminal, and leaves nothing there.
func TestProgressOfSteps(t *testing.T) {
	var out bytes.Buffer
	p := &progress{w: &out, tty: true, start: time.Now().Add(-time.Minute)}
	stop := p.follow("booting")
	shown := func() string {
		p.mu.Lock()
		defer p.mu.Unlock()
		return out.String()
	}
	for end := time.Now().Add(5 * time.Second); !strings.Contains(shown(), "booting"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("nothing was shown: %q", shown())
		}
	}
	p.above(func() { out.WriteString("a step\n") })
	stop()
	stop()
	if text := out.String(); !strings.Contains(text, "\r\x1b[Ka step\n") || strings.HasSuffix(text, " s") {
		t.Errorf("%q", text)
	}
	var file bytes.Buffer
	newProgress(&file).follow("booting")()
	if file.Len() > 0 {
		t.Errorf("no terminal, and %q was written", file.String())
	}
}
