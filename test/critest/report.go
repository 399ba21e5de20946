package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"
)

// spec is one entry of Ginkgo's JSON report.
type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeType            string
	LeafNodeText            string
	State                   string
	RunTime                 time.Duration
	Failure                 *struct{ Message string }
}

func (s spec) name() string {
	return strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " ")
}

// group is critest's own heading, such as "Image Manager".
func (s spec) group() string {
	if len(s.ContainerHierarchyTexts) == 0 {
		return ""
	}
	return strings.TrimPrefix(s.ContainerHierarchyTexts[0], "[k8s.io] ")
}

// readReport reads a report; several runs' specs are added up.
func readReport(path string) ([]spec, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("critest left no report: %w", err)
	}
	var runs []struct{ SpecReports []spec }
	if err := json.Unmarshal(b, &runs); err != nil {
		return nil, fmt.Errorf("report %s: %w", path, err)
	}
	var specs []spec
	for _, r := range runs {
		specs = append(specs, r.SpecReports...)
	}
	return specs, nil
}

// verdict is what a report means.
type verdict struct {
	groups   []string // in the report's order
	passed   map[string]int
	excluded map[string]int // by what an exclusion leaves out
	failed   []string
	// skipped by critest's own decision, with its reason: that is not green,
	// because such a spec proves nothing.
	skipped []string
}

func judge(specs []spec) verdict {
	v := verdict{passed: map[string]int{}, excluded: map[string]int{}}
	seen := map[string]bool{}
	for _, s := range specs {
		name := s.name()
		if s.LeafNodeType == "It" && strings.Contains(name, benchmarks) {
			continue
		}
		if g := s.group(); s.LeafNodeType == "It" && !seen[g] {
			seen[g] = true
			v.groups = append(v.groups, g)
		}
		var text string
		if s.Failure != nil {
			text, _, _ = strings.Cut(s.Failure.Message, "\n")
		}
		switch s.State {
		case "passed":
			if s.LeafNodeType == "It" {
				v.passed[s.group()]++
			}
		case "skipped", "pending":
			if x := excludes(name); x != "" {
				v.excluded[x]++
			} else {
				v.skipped = append(v.skipped, name+": "+text)
			}
		default: // failed, panicked, interrupted, aborted, timedout, of a spec or of what surrounds the suite
			v.failed = append(v.failed, fmt.Sprintf("%s (%s): %s", name, s.State, text))
		}
	}
	return v
}

func excludes(name string) string {
	for _, x := range exclusions {
		if regexp.MustCompile(x.pattern).MatchString(name) {
			return x.what
		}
	}
	return ""
}

func (v verdict) total() (n int) {
	for _, p := range v.passed {
		n += p
	}
	return n
}

// err is nil for a green run: at least so many passes, no failure, and no skip
// but the named ones.
func (v verdict) err(least int) error {
	if n := v.total(); n < least || len(v.failed) > 0 || len(v.skipped) > 0 {
		return fmt.Errorf("%d passed, at least %d are wanted; %d failed and %d skipped, none is wanted", n, least, len(v.failed), len(v.skipped))
	}
	return nil
}

func (v verdict) print(w io.Writer, took time.Duration) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "group\tpassed\n")
	for _, g := range v.groups {
		fmt.Fprintf(t, "%s\t%d\n", g, v.passed[g])
	}
	fmt.Fprintf(t, "all\t%d\n\nleft out by name\tspecs\treason\n", v.total())
	left := 0
	for _, x := range exclusions {
		left += v.excluded[x.what]
		fmt.Fprintf(t, "%s\t%d\t%s\n", x.what, v.excluded[x.what], x.reason)
	}
	_ = t.Flush() // as the writes below
	for _, part := range []struct {
		head  string
		lines []string
	}{{"failed", v.failed}, {"skipped by critest", v.skipped}} {
		if len(part.lines) > 0 {
			fmt.Fprintf(w, "\n%s:\n  %s\n", part.head, strings.Join(part.lines, "\n  "))
		}
	}
	fmt.Fprintf(w, "\ncritest: %d passed, %d failed, %d skipped, %d left out by name, %.1f s\n", v.total(), len(v.failed), len(v.skipped), left, took.Seconds())
}
