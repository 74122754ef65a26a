package ledger

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
)

const importPath = "github.com/meshid/meshid/pkg/ledger"

// exports returns an importer that reads what the go command has compiled for
// this package's tests, this package included.
func exports(t *testing.T, fset *token.FileSet) types.Importer {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-export", "-deps", "-json=ImportPath,Export", ".")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			ImportPath string `json:"ImportPath"`
			Export     string `json:"Export"`
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		files[p.ImportPath] = p.Export
	}
	return importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(files[path]) })
}

// checkPackage type-checks the package's own files, without tests.
func checkPackage(t *testing.T, fset *token.FileSet, imports types.Importer) (*types.Package, []*ast.File, *types.Info) {
	t.Helper()
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var files []*ast.File
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, e.Name(), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}, Selections: map[*ast.SelectorExpr]*types.Selection{}, Types: map[ast.Expr]types.TypeAndValue{}}
	p, err := (&types.Config{Importer: imports}).Check(importPath, fset, files, info)
	if err != nil {
		t.Fatal(err)
	}
	return p, files, info
}

// TestV_J5_ChainOnlyFromDurable type-checks the package and holds that the chain
// in a draft reaches other packages through Append and Durable.Chain only: where
// the fields are used at all, and what the exported names can return.
func TestV_J5_ChainOnlyFromDurable(t *testing.T) {
	t.Parallel()
	fset := token.NewFileSet()
	p, files, info := checkPackage(t, fset, exports(t, fset))

	// The functions that may touch the chain, and that may make a Durable.
	touches := map[string]string{
		"NewDraft":       "Draft.chain",                            // puts it in and compares its hash
		"Journal.Append": "Draft.chain Durable.chain make Durable", // when submit has returned nil
		"Durable.Chain":  "Durable.chain",
	}
	fields := map[types.Object]string{}
	for _, name := range []string{"Draft", "Durable"} {
		s := p.Scope().Lookup(name).Type().Underlying().(*types.Struct)
		for f := range s.Fields() {
			if f.Exported() || f.Embedded() {
				t.Errorf("%s.%s is exported", name, f.Name())
			}
			if f.Name() == "chain" {
				fields[f] = name + ".chain"
			}
		}
	}
	if len(fields) != 2 {
		t.Fatal("the fields have other names")
	}
	durable := p.Scope().Lookup("Durable").Type()
	for _, file := range files {
		for _, decl := range file.Decls {
			ast.Inspect(decl, func(n ast.Node) bool {
				use := ""
				switch n := n.(type) {
				case *ast.Ident:
					use = fields[info.Uses[n]]
				case *ast.CompositeLit:
					if types.Identical(info.Types[n].Type, durable) {
						use = "make Durable"
					}
				}
				if in := declared(decl); use != "" && !strings.Contains(touches[in], use) {
					t.Errorf("%s: %s in %s", fset.Position(n.Pos()), use, in)
				}
				return true
			})
		}
	}
	for name, result := range results(p) {
		if holdsChain(result, map[types.Type]bool{}) && name != "Durable.Chain" {
			t.Errorf("%s gives out %s, which could be a chain", name, result)
		}
	}
	orderInAppend(t, files)
}

// declared names a declaration: "Func", "Type.Method", or "" for others.
func declared(d ast.Decl) string {
	f, ok := d.(*ast.FuncDecl)
	if !ok {
		return ""
	}
	if f.Recv == nil {
		return f.Name.Name
	}
	typ := f.Recv.List[0].Type
	if star, ok := typ.(*ast.StarExpr); ok {
		typ = star.X
	}
	return fmt.Sprintf("%v.%s", typ, f.Name.Name)
}

// results returns the types that the package's exported API gives out: results of
// functions and methods, fields, variables, and parameters of callbacks.
func results(p *types.Package) map[string]types.Type {
	all := map[string]types.Type{}
	add := func(name string, sig *types.Signature) {
		all[name] = sig.Results()
		for i := range sig.Params().Len() {
			if callback, ok := sig.Params().At(i).Type().Underlying().(*types.Signature); ok {
				all[fmt.Sprintf("%s's callback %d", name, i)] = callback.Params()
			}
		}
	}
	for _, name := range p.Scope().Names() {
		o := p.Scope().Lookup(name)
		if !o.Exported() {
			continue
		}
		switch o := o.(type) {
		case *types.Func:
			add(name, o.Signature())
		case *types.Var:
			all[name] = o.Type()
		case *types.TypeName:
			for m := range types.NewMethodSet(types.NewPointer(o.Type())).Methods() {
				if m.Obj().Exported() {
					add(name+"."+m.Obj().Name(), m.Obj().(*types.Func).Signature())
				}
			}
			if s, ok := o.Type().Underlying().(*types.Struct); ok {
				for f := range s.Fields() {
					if f.Exported() {
						all[name+"'s field "+f.Name()] = f.Type()
					}
				}
			}
		}
	}
	return all
}

// holdsChain reports whether a value of type t could carry a [][]byte that
// another package can reach.
func holdsChain(t types.Type, seen map[types.Type]bool) bool {
	if seen[t] {
		return false
	}
	seen[t] = true
	switch u := t.Underlying().(type) {
	case *types.Slice:
		inner, ok := u.Elem().Underlying().(*types.Slice)
		if ok && types.Identical(inner.Elem(), types.Typ[types.Byte]) {
			return true
		}
		return holdsChain(u.Elem(), seen)
	case *types.Pointer:
		return holdsChain(u.Elem(), seen)
	case *types.Array:
		return holdsChain(u.Elem(), seen)
	case *types.Chan:
		return holdsChain(u.Elem(), seen)
	case *types.Map:
		return holdsChain(u.Key(), seen) || holdsChain(u.Elem(), seen)
	case *types.Tuple:
		for v := range u.Variables() {
			if holdsChain(v.Type(), seen) {
				return true
			}
		}
	case *types.Struct:
		for f := range u.Fields() {
			if f.Exported() && holdsChain(f.Type(), seen) {
				return true
			}
		}
	case *types.Signature:
		return holdsChain(u.Results(), seen) || holdsChain(u.Params(), seen)
	}
	return false
}

// orderInAppend holds that Append makes Durables behind the check of submit's
// error, at the level of the function: nothing else leads there.
func orderInAppend(t *testing.T, files []*ast.File) {
	t.Helper()
	for _, file := range files {
		for _, decl := range file.Decls {
			if declared(decl) != "Journal.Append" {
				continue
			}
			submitted := false
			for _, statement := range decl.(*ast.FuncDecl).Body.List {
				if check, ok := statement.(*ast.IfStmt); ok && mentions(check.Init, "submit") {
					_, returns := check.Body.List[len(check.Body.List)-1].(*ast.ReturnStmt)
					submitted = returns
				}
				if mentions(statement, "chain") && !submitted {
					t.Error("Append uses a chain before submit has succeeded")
				}
			}
			if !submitted {
				t.Error("Append does not return where submit fails")
			}
			return
		}
	}
	t.Error("no Append")
}

// mentions reports whether an identifier occurs in n.
func mentions(n ast.Node, name string) bool {
	found := false
	if n == nil {
		return false
	}
	ast.Inspect(n, func(n ast.Node) bool {
		id, ok := n.(*ast.Ident)
		found = found || ok && id.Name == name
		return true
	})
	return found
}

// TestV_J5_OtherPackagesCannot compiles what somebody in another package might
// write.
func TestV_J5_OtherPackagesCannot(t *testing.T) {
	t.Parallel()
	fset := token.NewFileSet()
	imports := exports(t, fset)
	for body, compiles := range map[string]bool{
		"func f(d *ledger.Durable) [][]byte { return d.Chain() }":                                        true,
		"func f(d *ledger.Durable) { d = new(ledger.Durable); _ = d.Chain() }":                           true, // and is empty
		"func f(d *ledger.Draft) [][]byte { return d.Chain() }":                                          false,
		"func f(d *ledger.Draft) [][]byte { return d.chain }":                                            false,
		"func f(d *ledger.Durable) [][]byte { return d.chain }":                                          false,
		"func f(d *ledger.Draft) *ledger.Durable { return (*ledger.Durable)(d) }":                        false,
		"func f(c [][]byte) ledger.Durable { return ledger.Durable{chain: c} }":                          false,
		"type t struct{ c [][]byte }; func f(d *ledger.Draft) *t { return (*t)(d) }":                     false,
		"func f(d *ledger.Draft) [][]byte { var i interface{ Chain() [][]byte } = d; return i.Chain() }": false,
	} {
		source := "package other\nimport \"" + importPath + "\"\n" + body
		f, err := parser.ParseFile(fset, "other.go", source, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		_, err = (&types.Config{Importer: imports}).Check("other", fset, []*ast.File{f}, nil)
		if (err == nil) != compiles {
			t.Errorf("%s: %v", body, err)
		}
	}
}
