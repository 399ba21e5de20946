// Command typecheck type-checks packages and their tests for macOS, as a build with
// cgo there would compile them, on any machine: import "C" is faked, so that neither a C
// compiler nor Apple's headers are needed. Objective-C, linking and entitlements
// are beyond it.
//
//	typecheck [-same DIR=IMPORTPATH] PACKAGE...
//
// With -same, every exported name that the package in DIR declares must be in the
// package IMPORTPATH with the same signature: a stand-in stays a stand-in.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

func main() {
	same := flag.String("same", "", "`DIR=IMPORTPATH`: compare the exported names of a stand-in with the real package")
	flag.Parse()
	ok := true
	for _, arch := range []string{"arm64", "amd64"} {
		p := program{goos: "darwin", goarch: arch}
		problems, err := p.check(flag.Args())
		// Apple silicon has all that Intel has, and Rosetta.
		if dir, real, is := strings.Cut(*same, "="); is && err == nil && arch == "arm64" {
			var more []string
			more, err = p.compare(dir, real)
			problems = append(problems, more...)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "typecheck:", err)
			os.Exit(2)
		}
		for _, problem := range problems {
			fmt.Println(problem)
		}
		fmt.Printf("typecheck darwin/%s: %d packages, %d problems\n", arch, len(p.packages), len(problems))
		ok = ok && len(problems) == 0
	}
	if !ok {
		os.Exit(1)
	}
}

// program is a set of packages with all they import.
type program struct {
	goos, goarch string
	// overlay replaces the content of files, by absolute path.
	overlay map[string][]byte

	fset     *token.FileSet
	packages map[string]*types.Package
	named    []listed // by the patterns, after what they import
	// uses, if not nil, gets what the identifiers of checked packages mean.
	uses map[*ast.Ident]types.Object
}

// listed is what is used of `go list -json`.
type listed struct {
	Dir, ImportPath   string
	GoFiles, CgoFiles []string
	ImportMap         map[string]string
	DepOnly, Standard bool
	Module            *struct{ GoVersion string }
	Error             *struct{ Err string }
}

// check returns the errors in the packages that the patterns name.
func (p *program) check(patterns []string) (problems []string, err error) {
	p.fset, p.packages = token.NewFileSet(), map[string]*types.Package{"unsafe": types.Unsafe}
	cmd := exec.Command("go", append([]string{
		"list", "-e", "-deps", "-test", "-json=Dir,ImportPath,GoFiles,CgoFiles,ImportMap,DepOnly,Standard,Module,Error",
	}, patterns...)...)
	cmd.Env = append(os.Environ(), "GOOS="+p.goos, "GOARCH="+p.goarch, "CGO_ENABLED=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w: %s", err, stderr.String())
	}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var l listed
		if err := dec.Decode(&l); errors.Is(err, io.EOF) {
			return problems, nil
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		// A test's main package is made by the go command.
		if l.ImportPath == "unsafe" || strings.HasSuffix(l.ImportPath, ".test") {
			continue
		}
		if !l.DepOnly {
			p.named = append(p.named, l)
		}
		problems = append(problems, p.checkPackage(l)...)
	}
}

// checkPackage needs the packages that l imports to be checked already.
func (p *program) checkPackage(l listed) (problems []string) {
	if l.Error != nil {
		problems = append(problems, l.ImportPath+": "+l.Error.Err)
	}
	var names []string
	for _, f := range append(l.GoFiles, l.CgoFiles...) {
		names = append(names, filepath.Join(l.Dir, f))
	}
	files, err := p.parse(names)
	if err != nil {
		problems = append(problems, err.Error())
	}
	conf := types.Config{
		Importer:    imports{p, l.ImportMap},
		Sizes:       types.SizesFor("gc", p.goarch),
		FakeImportC: len(l.CgoFiles) > 0,
		// What others wrote compiles: only its declarations matter.
		IgnoreFuncBodies: l.DepOnly,
		Error: func(err error) {
			// A faked C may leave noise in the declarations of dependencies; an
			// import that doesn't exist shows in whoever uses it.
			if !l.DepOnly {
				problems = append(problems, err.Error())
			}
		},
	}
	if l.Module != nil && l.Module.GoVersion != "" {
		conf.GoVersion = "go" + l.Module.GoVersion
	}
	p.packages[l.ImportPath], _ = conf.Check(l.ImportPath, p.fset, files, &types.Info{Uses: p.uses})
	return problems
}

func (p *program) parse(names []string) (files []*ast.File, err error) {
	for _, name := range names {
		var src any
		if b, ok := p.overlay[name]; ok {
			src = b
		}
		f, perr := parser.ParseFile(p.fset, name, src, parser.SkipObjectResolution)
		if f != nil {
			files = append(files, f)
		}
		err = errors.Join(err, perr)
	}
	return files, err
}

// imports resolves what one package imports.
type imports struct {
	*program
	remap map[string]string
}

func (i imports) Import(path string) (*types.Package, error) {
	if r, ok := i.remap[path]; ok {
		path = r
	}
	if t := i.packages[path]; t != nil {
		return t, nil
	}
	return nil, fmt.Errorf("package %s is not loaded", path)
}

// compare returns where the stand-in in dir differs from the real package, which
// has been checked. What it doesn't export and what it has for tests alone, in files
// whose names begin with "test", is its own business.
func (p *program) compare(dir, path string) (problems []string, err error) {
	real := p.packages[path]
	if real == nil {
		return nil, fmt.Errorf("no package imports %s", path)
	}
	fake, err := p.standIn(dir, path)
	if err != nil {
		return nil, err
	}
	sig := func(o types.Object) string { return types.TypeString(o.Type(), (*types.Package).Name) }
	differ := func(name string, f, r types.Object) {
		switch {
		case r == nil:
			problems = append(problems, fmt.Sprintf("%s: %s is not in %s", p.fset.Position(f.Pos()), name, path))
		case sig(f) != sig(r):
			problems = append(problems, fmt.Sprintf("%s: %s is %s, the real one %s", p.fset.Position(f.Pos()), name, sig(f), sig(r)))
		default:
			fc, fok := f.(*types.Const)
			rc, rok := r.(*types.Const)
			if fok && rok && fc.Val().ExactString() != rc.Val().ExactString() {
				problems = append(problems, fmt.Sprintf("%s: %s is %s, the real one %s", p.fset.Position(f.Pos()), name, fc.Val(), rc.Val()))
			}
		}
	}
	for _, name := range fake.Scope().Names() {
		f := fake.Scope().Lookup(name)
		if !f.Exported() {
			continue
		}
		r := real.Scope().Lookup(name)
		t, isType := f.(*types.TypeName)
		if !isType || r == nil {
			differ(name, f, r)
			continue
		}
		fu, ru := t.Type().Underlying(), r.Type().Underlying()
		fields, isStruct := fu.(*types.Struct)
		if _, is := fu.(*types.Basic); is && !types.Identical(fu, ru) {
			problems = append(problems, fmt.Sprintf("%s: %s is %s, the real one %s", p.fset.Position(f.Pos()), name, fu, ru))
		}
		for i := 0; isStruct && i < fields.NumFields(); i++ {
			if v := fields.Field(i); v.Exported() {
				have, _, _ := types.LookupFieldOrMethod(r.Type(), true, real, v.Name())
				differ(name+"."+v.Name(), v, have)
			}
		}
		methods := types.NewMethodSet(types.NewPointer(t.Type()))
		if types.IsInterface(t.Type()) {
			methods = types.NewMethodSet(t.Type())
		}
		for i := range methods.Len() {
			if m := methods.At(i).Obj(); m.Exported() {
				have, _, _ := types.LookupFieldOrMethod(r.Type(), true, real, m.Name())
				differ(name+"."+m.Name(), m, have)
			}
		}
	}
	return problems, nil
}

// standIn is the package in dir, as if its import path were path. What it doesn't
// export may need the system that it is for, where it is built and vetted.
func (p *program) standIn(dir, path string) (*types.Package, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(names) == 0 {
		return nil, fmt.Errorf("no Go files in %s: %w", dir, err)
	}
	var kept []string
	for _, n := range names {
		if !strings.HasSuffix(n, "_test.go") && !strings.HasPrefix(filepath.Base(n), "test") {
			kept = append(kept, n)
		}
	}
	files, err := p.parse(kept)
	if err != nil {
		return nil, err
	}
	// An exported name that has an error is not like the real one.
	conf := types.Config{Importer: lenient{p}, IgnoreFuncBodies: true, Error: func(error) {}}
	fake, _ := conf.Check(path, p.fset, files, nil)
	return fake, nil
}

// lenient gives an empty package for one that the real program doesn't import.
type lenient struct{ *program }

func (l lenient) Import(path string) (*types.Package, error) {
	if t := l.packages[path]; t != nil {
		return t, nil
	}
	t := types.NewPackage(path, path[strings.LastIndex(path, "/")+1:])
	t.MarkComplete()
	return t, nil
}
