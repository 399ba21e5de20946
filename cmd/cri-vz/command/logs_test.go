package command

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLogLines(t *testing.T) {
	const at = "2026-11-23T22:34:53.123456789Z"
	for _, tc := range []struct {
		name, log, stdout, stderr, err string
		timestamps                     bool
	}{
		{name: "streams", log: at + " stdout F one\n" + at + " stderr F two\n", stdout: "one\n", stderr: "two\n"},
		{name: "partial line", log: at + " stdout P on\n" + at + " stdout F e\n", stdout: "one\n"},
		{name: "empty line and spaces", log: at + " stdout F \n" + at + " stdout F  a  b \n", stdout: "\n a  b \n"},
		{name: "timestamps", log: at + " stdout F one\n", stdout: at + " one\n", timestamps: true},
		{name: "line without an end yet", log: at + " stdout F one\n" + at + " std", stdout: "one\n"},
		{name: "foreign file", log: "hello\n", err: "not in the CRI's format"},
		{name: "endless line", log: strings.Repeat("x", 3*maxLogLine), err: "line of more than"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "log")
			if err := os.WriteFile(path, []byte(tc.log), 0o600); err != nil {
				t.Fatal(err)
			}
			var out, errOut bytes.Buffer
			err := followLog(context.Background(), path, logOptions{timestamps: tc.timestamps}, &out, &errOut)
			if out.String() != tc.stdout || errOut.String() != tc.stderr {
				t.Errorf("stdout %q, stderr %q", out.String(), errOut.String())
			}
			if (err == nil) != (tc.err == "") || (err != nil && !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("error %v, want %q", err, tc.err)
			}
		})
	}
}

// What a container wrote just before its end is printed, and a rotated log is
// followed under its name.
func TestFollowSeesTheLastLineAndRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	write := func(text string) {
		if err := os.WriteFile(path, []byte("t stdout F "+text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("first")
	polls := 0
	done := func(context.Context) bool {
		polls++
		if polls == 1 {
			if err := os.Rename(path, path+".1"); err != nil {
				t.Fatal(err)
			}
			write("last")
			return true
		}
		return true
	}
	var out bytes.Buffer
	if err := followLog(context.Background(), path, logOptions{follow: true, done: done}, &out, &out); err != nil {
		t.Fatal(err)
	}
	if out.String() != "first\nlast\n" {
		t.Errorf("printed %q", out.String())
	}
}

func TestPodNamesComeFromImageNames(t *testing.T) {
	for image, want := range map[string]string{
		"demo.tar.gz":                        "demo",
		"docker.io/library/busybox:1.36":     "busybox",
		"localhost:5000/Some_App@sha256:abc": "some-app",
		"...":                                "pod",
	} {
		if got := podName(image); got != want {
			t.Errorf("podName(%q) = %q, want %q", image, got, want)
		}
	}
}

func TestBadPublish(t *testing.T) {
	for _, spec := range []string{"", "x", "0:1", "1:0", "70000:80", "1:2:3", "-1:80"} {
		if ports, err := listenAll([]string{spec}); err == nil {
			ports.close()
			t.Errorf("--publish %q was taken", spec)
		}
	}
}

func TestControlBytesNeverReachTheTerminal(t *testing.T) {
	if got := string(escapeControl([]byte("a\x1b[31mb\r\n\tc\x7f"))); got != "a^[[31mb\n\tc^?" {
		t.Errorf("escapeControl: %q", got)
	}
	if got := printable("a\x1b]0;x\x07\u009bb"); got != "a·]0;x··b" {
		t.Errorf("printable: %q", got)
	}
}
