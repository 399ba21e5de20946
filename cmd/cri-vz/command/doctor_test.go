package command

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cri-vz/cri-vz/cmd/cri-vz/config"
)

// doctor runs the command and returns its exit status, its error and its output.
func doctor(t *testing.T, args ...string) (int, []finding) {
	t.Helper()
	t.Setenv("CRI_VZ_CACHE", filepath.Join(t.TempDir(), "guests"))
	var out bytes.Buffer
	root := newRoot(&out)
	root.SetArgs(append([]string{"doctor", "-o", "json"}, args...))
	err := root.ExecuteContext(t.Context())
	var code exitCode
	if err != nil && !errors.As(err, &code) {
		t.Fatal(err)
	}
	var findings []finding
	if err := json.Unmarshal(out.Bytes(), &findings); err != nil {
		t.Fatalf("%v: %s", err, out.Bytes())
	}
	return int(code), findings
}

func TestDoctorWithoutGuest(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	code, findings := doctor(t, "--root", root, "--run", filepath.Join(t.TempDir(), "run"))
	if code != 1 {
		t.Errorf("exit status %d without a guest image, want 1", code)
	}
	names := map[string]finding{}
	for _, f := range findings {
		names[f.Name] = f
		if f.Result != resultOK && f.Detail == "" {
			t.Errorf("%+v says not what is wrong", f)
		}
		t.Logf("%+v", f)
	}
	if g := names["guest image"]; g.Result != resultFailed || !strings.Contains(g.Mend, "make guest") {
		t.Errorf("guest image: %+v", g)
	}
	for _, name := range []string{"configuration", "disk space", "socket"} {
		if names[name].Result == "" {
			t.Errorf("no check of the %s", name)
		}
	}
	if _, err := os.Stat(root); !os.IsNotExist(err) {
		t.Errorf("doctor made %s: %v", root, err)
	}
}

func TestExamineExitStatus(t *testing.T) {
	for _, test := range []struct {
		finding finding
		want    int
	}{{ok("fine"), 0}, {warning("so so", "do something"), 0}, {failed("no\x1b[31m", "do this"), 1}} {
		var out bytes.Buffer
		cmd := newDoctor()
		cmd.SetOut(&out)
		err := examine(t.Context(), cmd, "table", &config.Config{}, []check{
			{"first", func(context.Context, *config.Config) finding { return test.finding }},
			{"second", func(context.Context, *config.Config) finding { return ok("also") }},
		})
		var code exitCode
		errors.As(err, &code)
		if int(code) != test.want {
			t.Errorf("%s: exit status %d, want %d", test.finding.Result, code, test.want)
		}
		if s := out.String(); !strings.Contains(s, test.finding.Mend) || !strings.Contains(s, "second") || strings.Contains(s, "\x1b") {
			t.Errorf("output %q", s)
		}
	}
}

func TestDoctorSocket(t *testing.T) {
	dir := t.TempDir()
	c := &config.Config{Listen: "unix://" + filepath.Join(dir, "s")}
	look := func(want, text string) {
		t.Helper()
		if f := checkSocket(t.Context(), c); f.Result != want || !strings.Contains(f.Detail, text) {
			t.Errorf("%+v, want %s with %q", f, want, text)
		}
	}
	look(resultOK, "no daemon runs")
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	look(resultOK, "a daemon answers")
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	look(resultOK, "is gone")
	c.Listen = "unix://" + filepath.Join(dir, "file")
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	look(resultFailed, "is no socket")
}

func TestDoctorDiskSpace(t *testing.T) {
	f := checkDiskSpace(t.Context(), &config.Config{Root: filepath.Join(t.TempDir(), "not", "there", "yet")})
	if f.Detail == "" || !strings.Contains(f.Detail, " free at /") {
		t.Errorf("%+v", f)
	}
	for _, test := range []struct {
		free   int64
		result string
	}{{diskEnough, resultOK}, {diskEnough - 1, resultWarning}, {diskLeast, resultWarning}, {diskLeast - 1, resultFailed}} {
		if f := enoughSpace("/data", test.free); f.Result != test.result || (f.Mend == "") != (f.Result == resultOK) {
			t.Errorf("%d bytes: %+v, want %s", test.free, f, test.result)
		}
	}
}
