package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	const source = "package p\n\nfunc one() {\n\tprintln(1)\n}\n\nfunc two() {\n\tprintln(2)\n}\n"
	const ran = "mode: set\nexample.com/p/p.go:3.12,5.2 3 1\nexample.com/p/p.go:7.12,9.2 1 "
	for _, test := range []struct {
		name, list, profile string
		least               float64
		want                []string // in the problems, in this order
	}{
		{"all of it", "other.go a Mac's", ran + "1\n", 100, nil},
		{"twice, once without", "other.go a Mac's", ran + "1\nexample.com/p/p.go:7.12,9.2 1 0\n", 100, nil},
		{"with a reason", "# why\n\nother.go a Mac's\np.go:two needs the moon", ran + "0\n", 75, nil},
		{"too little", "other.go a Mac's\np.go:two needs the moon", ran + "0\n", 85, []string{"75.0 % of the statements ran, 85 % have to"}},
		{"without a reason", "other.go a Mac's", ran + "0\n", 75, []string{"p.go:two: say why"}},
		{"a file without a reason", "# none", ran + "1\n", 75, []string{"other.go: say why"}},
		{"a reason too many", "other.go a Mac's\np.go:three is gone", ran + "1\n", 75, []string{"there is no p.go:three any more"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, content := range map[string]string{
				"p.go": source, "p_test.go": "package p\n\nfunc three() {}\n", "other.go": "package p\n\nfunc four() {}\n",
				"list": test.list, "profile": test.profile,
			} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			problems, err := check(io.Discard, filepath.Join(dir, "list"), filepath.Join(dir, "profile"), test.least)
			if err != nil {
				t.Fatal(err)
			}
			if len(problems) != len(test.want) {
				t.Fatalf("problems %q, want %q", problems, test.want)
			}
			for i, p := range problems {
				if !strings.Contains(p, test.want[i]) {
					t.Errorf("problem %q, want %q", p, test.want[i])
				}
			}
		})
	}
}

func TestCheckOfNothing(t *testing.T) {
	for name, c := range map[string][2]string{
		"no profile":       {"", ""},
		"no statements":    {"p.go x", "mode: set\n"},
		"another version":  {"p.go x", "mode: set\nexample.com/p/p.go:30.1,31.2 1 1\n"},
		"no profile's":     {"p.go x", "hello\n"},
		"list of names":    {"p.go", "mode: set\n"},
		"list with a twin": {"p.go x\np.go y", "mode: set\n"},
	} {
		dir := t.TempDir()
		for f, content := range map[string]string{"p.go": "package p\n", "list": c[0], "profile": c[1]} {
			if err := os.WriteFile(filepath.Join(dir, f), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := check(io.Discard, filepath.Join(dir, "list"), filepath.Join(dir, "profile"), 0); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
