package vz

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What a Mac user is given besides the program, as far as it can be looked at here.

func hack(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../hack", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// plist is a property list's entries, "a/b" for what is in a dictionary of its own, as
// text; an array's are joined by spaces.
func plist(t *testing.T, name string) map[string]string {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(hack(t, name)))
	entries, path, key := map[string]string{}, []string{}, ""
	add := func(value string) {
		k := strings.Join(append(path[1:len(path):len(path)], key), "/")
		entries[k] = strings.TrimSpace(entries[k] + " " + value)
	}
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return entries
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		switch e := token.(type) {
		case xml.StartElement:
			var text string
			switch e.Name.Local {
			case "dict":
				path = append(path, key)
				continue
			case "true", "false":
				text = e.Name.Local
				err = d.Skip()
			case "key", "string":
				err = d.DecodeElement(&text, &e)
			case "plist", "array":
				continue
			default:
				t.Fatalf("%s has a <%s>", name, e.Name.Local)
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if e.Name.Local == "key" {
				key = text
			} else {
				add(text)
			}
		case xml.EndElement:
			if e.Name.Local == "dict" {
				path = path[:len(path)-1]
			}
		}
	}
}

// T49
func TestLaunchAgent(t *testing.T) {
	got := plist(t, "dev.cri-vz.plist")
	for key, want := range map[string]string{
		"Label": "dev.cri-vz", "ProgramArguments": "@BIN@ serve", "RunAtLoad": "true", "KeepAlive/SuccessfulExit": "false",
		"ProcessType": "Interactive", "AbandonProcessGroup": "true",
		"StandardOutPath": "@HOME@/Library/Logs/cri-vz.log", "StandardErrorPath": "@HOME@/Library/Logs/cri-vz.log",
	} {
		if got[key] != want {
			t.Errorf("%s is %q, want %q", key, got[key], want)
		}
	}
	// What the file tells to put in is all that has to be.
	if text := hack(t, "dev.cri-vz.plist"); !strings.Contains(text, `-e "s|@BIN@|`) || !strings.Contains(text, `-e "s|@HOME@|`) {
		t.Error("it doesn't say how to fill it in")
	}
}

func TestEntitlements(t *testing.T) {
	got := plist(t, "vz.entitlements")
	if len(got) != 1 || got["com.apple.security.virtualization"] != "true" {
		t.Errorf("%v", got)
	}
}

// Homebrew itself is not at hand: what the formula names has to be there.
func TestFormula(t *testing.T) {
	formula := hack(t, "cri-vz.rb")
	installs := regexp.MustCompile(`"(hack/[^"]+)"`).FindAllStringSubmatch(formula, -1)
	if len(installs) == 0 {
		t.Error("it installs nothing of hack")
	}
	for _, m := range installs {
		if _, err := os.Stat(filepath.Join("../..", m[1])); err != nil {
			t.Error(err)
		}
	}
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	targets := regexp.MustCompile(`system "make"((?:, "[a-z]+")+)`).FindStringSubmatch(formula)
	if targets == nil {
		t.Fatal("it makes nothing")
	}
	for _, target := range regexp.MustCompile(`[a-z]+`).FindAllString(targets[1], -1) {
		if !regexp.MustCompile(`(?m)^` + target + `:`).Match(makefile) {
			t.Errorf("there is no `make %s`", target)
		}
	}
	for _, want := range []string{`depends_on macos: :ventura`, `run [opt_bin/"cri-vz", "serve"]`, "keep_alive successful_exit: false", "process_type :interactive", "vz.entitlements", "brew tap-new"} {
		if !strings.Contains(formula, want) {
			t.Errorf("it has no %q", want)
		}
	}
	ruby, err := exec.LookPath("ruby")
	if err != nil {
		t.Log("there is no ruby on PATH: it counts words instead")
		begin := regexp.MustCompile(`(?m)^\s*(class|def|service|test|if|unless)\b`).FindAllString(formula, -1)
		if end := regexp.MustCompile(`(?m)^\s*end$`).FindAllString(formula, -1); len(begin) != len(end) {
			t.Errorf("%d blocks begin and %d end", len(begin), len(end))
		}
		return
	}
	if out, err := exec.Command(ruby, "-c", "../../hack/cri-vz.rb").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// `make build` on what seems to be a Mac: with cgo, and signed with the entitlement.
func TestMakeBuildOnAMac(t *testing.T) {
	path := t.TempDir()
	if err := os.WriteFile(filepath.Join(path, "uname"), []byte("#!/bin/sh\necho Darwin\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "make", "--no-print-directory", "--dry-run", "build")
	cmd.Dir = "../.."
	// The tests may be make's own; what it tells its children is not for this one.
	cmd.Env = append(os.Environ(), "PATH="+path+":"+os.Getenv("PATH"), "MAKEFLAGS=", "MAKELEVEL=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	want := regexp.MustCompile(`(?s)^CGO_ENABLED=1 go build .* -o bin/cri-vz \./cmd/cri-vz\ncodesign --force --sign - --entitlements hack/vz\.entitlements bin/cri-vz\n$`)
	if !want.Match(out) {
		t.Errorf("%s", out)
	}
}

// hack/mac-first-run on what seems to be a Mac: verdicts, figures, exit status, log.
func TestFirstRunScript(t *testing.T) {
	for _, test := range []struct {
		name, sixth string
		exit        int
	}{{"all well", `echo "    x.go:1: FIGURE: 7 ms"`, 0}, {"one fails", `echo "--- FAIL: broken"; exit 1`, 1}, {"not run", `echo "--- SKIP"; echo "NOT RUN: nobody here"`, 0}} {
		t.Run(test.name, func(t *testing.T) {
			top := t.TempDir()
			script := func(path, text string) {
				path = filepath.Join(top, path)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755)); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.MkdirAll(filepath.Join(top, "sandbox/vz"), 0o755); err != nil {
				t.Fatal(err)
			}
			script("hack/mac-first-run", "")
			if err := os.WriteFile(filepath.Join(top, "hack/mac-first-run"), []byte(hack(t, "mac-first-run")), 0o755); err != nil {
				t.Fatal(err)
			}
			script("path/uname", "echo Darwin")
			script("path/sw_vers", "echo 15.1")
			script("path/sysctl", "echo 17179869184")
			script("path/git", "echo v1")
			script("path/codesign", `[ "$4" = --entitlements ] && [ "$5" = hack/vz.entitlements ] && echo signed >"$6.signed"`)
			// The tests that a Mac would run: it is asked for each by its name.
			script("tests", `for last; do :; done
case $last in
  "^TestFirstRun6Sleep\$") `+test.sixth+` ;;
  *) echo "    x.go:1: FIGURE: 42 for $last" ;;
esac`)
			script("path/make", `mkdir -p bin && cp tests bin/cri-vz`)
			script("hack/two-pods", `[ -x "$1" ] && echo "FIGURE: two pods of ${1##*/}"`)
			script("path/go", `while [ "$1" != -o ]; do shift; done; cp tests "$2"`)
			cmd := exec.CommandContext(t.Context(), "bash", filepath.Join(top, "hack/mac-first-run"))
			cmd.Env = append(os.Environ(), "PATH="+filepath.Join(top, "path")+":"+os.Getenv("PATH"))
			b, err := cmd.CombinedOutput()
			out := string(b)
			if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) || cmd.ProcessState.ExitCode() != test.exit {
				t.Errorf("%v, want exit status %d", err, test.exit)
			}
			verdict := map[string]string{"all well": "pass", "one fails": "FAIL", "not run": "not run"}[test.name]
			for _, want := range []string{"macOS     15.1", "16 GiB", "pass      1 ", "42 for ^TestFirstRun1Boot$", "pass        two pods", "    two pods of cri-vz", "pass      5 ", verdict + strings.Repeat(" ", 10-len(verdict)) + "6 ", "42 for ^TestConformance$"} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in %s", want, out)
				}
			}
			if _, err := os.Stat(filepath.Join(top, "bin/mac-first-run.test.signed")); err != nil {
				t.Errorf("the tests are not signed: %v", err)
			}
			if log, err := os.ReadFile(filepath.Join(top, "bin/mac-first-run.log")); err != nil || !strings.Contains(string(log), verdict) {
				t.Errorf("log: %v: %s", err, log)
			}
		})
	}
	// Each experiment is a test that there is.
	source, err := os.ReadFile("firstrun_test.go")
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`(?m)^experiment "[^"]+" (TestFirstRun\w+)$`).FindAllStringSubmatch(hack(t, "mac-first-run"), -1)
	if len(names) != 6 {
		t.Errorf("%d experiments, want 6", len(names))
	}
	for _, name := range names {
		if !strings.Contains(string(source), "func "+name[1]+"(") {
			t.Errorf("there is no %s", name[1])
		}
	}
}
