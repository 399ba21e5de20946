package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestJudge(t *testing.T) {
	entry := func(group, text, state, message string) string {
		return fmt.Sprintf(`{"ContainerHierarchyTexts": ["[k8s.io] %s"], "LeafNodeType": "It", "LeafNodeText": %q, "State": %q, "Failure": {"Message": %q}}`, group, text, state, message)
	}
	pass := entry("Container", "starts", "passed", "")
	for _, c := range []struct {
		name    string
		entries []string
		least   int
		want    string // of the error, empty: green
	}{
		{"green", []string{pass, pass}, 2, ""},
		{"too few", []string{pass}, 2, "1 passed, at least 2"},
		{"a failure", []string{pass, entry("Container", "stops", "failed", "no\nway")}, 1, "1 failed and 0 skipped"},
		{"a panic", []string{pass, entry("Container", "stops", "panicked", "")}, 1, "1 failed"},
		{"left out by name", []string{pass, entry("Security Context", "runtime should support HostIpc is true", "skipped", "")}, 1, ""},
		{"skips itself", []string{pass, entry("Security Context", "user namespaces", "skipped", "no handler")}, 1, "0 failed and 1 skipped"},
		{"a benchmark", []string{pass, entry("Image", "benchmark about listing", "skipped", "")}, 1, ""},
		{"something around the suite", []string{pass, `{"LeafNodeType": "SynchronizedBeforeSuite", "State": "failed"}`}, 1, "1 failed"},
		{"something around the suite that passed", []string{`{"LeafNodeType": "ReportAfterSuite", "State": "passed"}`}, 1, "0 passed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "report.json")
			if err := os.WriteFile(path, []byte(`[{"SpecReports": [`+strings.Join(c.entries, ",")+`]}]`), 0o644); err != nil {
				t.Fatal(err)
			}
			specs, err := readReport(path)
			if err != nil {
				t.Fatal(err)
			}
			err = judge(specs).err(c.least)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestREADMEHasTheExclusions(t *testing.T) {
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range exclusions {
		if row := "| " + x.what + " | " + x.reason + " |"; !strings.Contains(string(b), row) {
			t.Errorf("README.md has no row %q", row)
		}
	}
}
