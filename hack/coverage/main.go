// Command coverage reads a profile that `go test -coverprofile` wrote of one package,
// and fails if fewer of its statements ran than they should, or if one that did not run
// is in no list of those of which somebody has said why.
//
//	coverage -least PERCENT -list FILE PROFILE
//
// The list stands in the package's directory. A line of it is FILE:FUNCTION and the
// reason, or FILE and the reason for a whole file that was not compiled. A line whose
// function or file is no more is an error, too.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	least := flag.Float64("least", 0, "how many `percent` of the statements have to run")
	list := flag.String("list", "", "`FILE` with what does not run and why, in the package's directory")
	flag.Parse()
	if *list == "" || flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	problems, err := check(os.Stdout, *list, flag.Arg(0), *least)
	if err != nil {
		fmt.Fprintln(os.Stderr, "coverage:", err)
		os.Exit(2)
	}
	for _, p := range problems {
		fmt.Fprintln(os.Stderr, "coverage:", p)
	}
	if len(problems) > 0 {
		os.Exit(1)
	}
}

// count is of statements.
type count struct{ all, ran int }

func check(out io.Writer, list, profile string, least float64) (problems []string, err error) {
	reasons, err := readList(list)
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(list)
	functions, err := parseFunctions(dir)
	if err != nil {
		return nil, err
	}
	counts, err := readProfile(profile, functions)
	if err != nil {
		return nil, err
	}
	var total count
	compiled := map[string]bool{}
	for name, c := range counts {
		total.all, total.ran = total.all+c.all, total.ran+c.ran
		file, _, _ := strings.Cut(name, ":")
		compiled[file] = true
	}
	if total.all == 0 {
		return nil, fmt.Errorf("%s has no statements of %s", profile, dir)
	}
	percent := 100 * float64(total.ran) / float64(total.all)
	fmt.Fprintf(out, "%s: %d of %d statements ran, %.1f %%; these did not:\n", dir, total.ran, total.all, percent)
	if percent < least {
		problems = append(problems, fmt.Sprintf("%s: %.1f %% of the statements ran, %g %% have to", dir, percent, least))
	}
	known := map[string]bool{}
	report := func(name, what string) {
		known[name] = true
		if what == "" {
			return
		}
		fmt.Fprintf(out, "  %-32s %-10s %s\n", name, what, reasons[name])
		if reasons[name] == "" {
			problems = append(problems, fmt.Sprintf("%s: say why it does not run in %s, or test it", name, list))
		}
	}
	for _, f := range functions {
		switch c := counts[f.name()]; {
		case !compiled[f.file] && !known[f.file]:
			report(f.file, "all")
		case c.ran < c.all:
			report(f.name(), fmt.Sprintf("%d of %d", c.all-c.ran, c.all))
		default:
			report(f.name(), "")
		}
	}
	for name := range reasons {
		if !known[name] {
			problems = append(problems, fmt.Sprintf("%s: there is no %s any more", list, name))
		}
	}
	slices.Sort(problems)
	return problems, nil
}

func readList(path string) (map[string]string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	reasons := map[string]string{}
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		name, reason, _ := strings.Cut(line, " ")
		if reason = strings.TrimSpace(reason); reason == "" || reasons[name] != "" {
			return nil, fmt.Errorf("%s: %q: want FILE[:FUNCTION] REASON, once", path, line)
		}
		reasons[name] = reason
	}
	return reasons, nil
}

// function is the place of one with a body.
type function struct {
	file, function string
	first, last    int
}

func (f function) name() string { return f.file + ":" + f.function }

func parseFunctions(dir string) (all []function, err error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	fset := token.NewFileSet()
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		for _, d := range f.Decls {
			// What a variable is initialized with is the variable's.
			at := function{file: filepath.Base(name), first: fset.Position(d.Pos()).Line, last: fset.Position(d.End()).Line}
			switch d := d.(type) {
			case *ast.FuncDecl:
				at.function = d.Name.Name
			case *ast.GenDecl:
				if v, ok := d.Specs[0].(*ast.ValueSpec); ok && d.Tok == token.VAR {
					at.function = v.Names[0].Name
				}
			}
			if at.function != "" {
				all = append(all, at)
			}
		}
	}
	return all, nil
}

// readProfile counts statements by function. A block that is there twice ran if one of
// them did.
func readProfile(path string, functions []function) (map[string]count, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	type block struct {
		function   string
		statements int
		ran        bool
	}
	blocks := map[string]block{}
	for s := bufio.NewScanner(f); s.Scan(); {
		line := s.Text()
		if strings.HasPrefix(line, "mode:") {
			continue
		}
		// PATH:FIRST.COLUMN,LAST.COLUMN STATEMENTS COUNT
		at := strings.LastIndex(line, ":")
		var first, c1, last, c2, statements, n int
		if _, err := fmt.Sscanf(line[at+1:], "%d.%d,%d.%d %d %d", &first, &c1, &last, &c2, &statements, &n); at < 0 || err != nil {
			return nil, fmt.Errorf("%s: %q is no line of a profile", path, line)
		}
		file := line[strings.LastIndex(line[:at], "/")+1 : at]
		i := slices.IndexFunc(functions, func(f function) bool { return f.file == file && f.first <= first && last <= f.last })
		if i < 0 {
			return nil, fmt.Errorf("%s: %q is in no function: is the profile of another version?", path, line)
		}
		key := line[:strings.LastIndex(line, " ")]
		blocks[key] = block{functions[i].name(), statements, n > 0 || blocks[key].ran}
	}
	counts := map[string]count{}
	for _, b := range blocks {
		c := counts[b.function]
		c.all += b.statements
		if b.ran {
			c.ran += b.statements
		}
		counts[b.function] = c
	}
	return counts, nil
}
