package house

import (
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// secretName is what a secret that somebody else presents is called in this
// repository.
var secretName = regexp.MustCompile(`(?i)^(.*secret|.*password|.*passphrase|.*cookie|nonce|.*mac|bearer|(join|id|access)?token)$`)

// A secret that is compared byte by byte tells, by the time that takes, how much of a
// guess is right. Secrets are looked up by their hash, or compared in constant time:
// nothing called as one is an operand of ==, != or the like.
func TestV_J9_NothingComparesSecrets(t *testing.T) {
	for _, f := range parse(t) {
		if f.Test() || f.Generated() || f.Package() == "pkg/sds" { // whose nonces number answers, and are no secrets
			continue
		}
		for _, c := range comparisons(f.File) {
			t.Errorf("%s: %s is compared: look it up by its hash, or use crypto/subtle", f.Position(c.Pos()), secretOf(c))
		}
	}
	for source, compares := range map[string]bool{
		`a.Secret == b`: true, `strings.Compare(token, x)`: true, `bytes.Equal(mac, got)`: true, `"x" != q.Cookie`: false, `string(idToken) == x`: true,
		`secret == ""`: false, `len(token) == 3`: false, `cookie != nil`: false, `tokens == n`: false, `subtle.ConstantTimeCompare(nonce, n) != 1`: false,
		`switch password { case y: }`: true, `switch token { case "a": }`: false, `id.Nonce != p.Nonce`: true, `slices.Equal(secret, y)`: true,
	} {
		file, err := parser.ParseFile(token.NewFileSet(), "x.go", "package x\nfunc f() {\n_ = 0\n"+statement(source)+"\n}", 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := len(comparisons(file)) > 0; got != compares {
			t.Errorf("%s: compares is %v", source, got)
		}
	}
}

func statement(source string) string {
	if strings.HasPrefix(source, "switch") {
		return source
	}
	return "_ = " + source
}

// equalities are functions that compare and stop at the first difference.
var equalities = map[string]bool{
	"bytes.Equal": true, "bytes.Compare": true, "bytes.HasPrefix": true, "slices.Equal": true, "slices.Compare": true, "slices.Contains": true,
	"strings.Compare": true, "strings.EqualFold": true, "strings.HasPrefix": true, "reflect.DeepEqual": true, "cmp.Compare": true,
}

// comparisons are the nodes that compare a secret with something that is no constant.
func comparisons(file *ast.File) []ast.Node {
	var all []ast.Node
	add := func(n ast.Node, operands ...ast.Expr) {
		if slices.ContainsFunc(operands, constant) {
			return
		}
		if slices.ContainsFunc(operands, func(e ast.Expr) bool { return secretName.MatchString(nameOf(e)) }) {
			all = append(all, n)
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.BinaryExpr:
			if n.Op == token.EQL || n.Op == token.NEQ {
				add(n, n.X, n.Y)
			}
		case *ast.CallExpr:
			if s, ok := n.Fun.(*ast.SelectorExpr); ok && equalities[nameOf(s.X)+"."+s.Sel.Name] {
				add(n, n.Args...)
			}
		case *ast.SwitchStmt:
			for _, c := range n.Body.List {
				for _, e := range c.(*ast.CaseClause).List {
					if n.Tag != nil {
						add(n, n.Tag, e)
					}
				}
			}
		}
		return true
	})
	return all
}

// constant says whether the program's text says what e is; a name that stands for one
// is not seen through.
func constant(e ast.Expr) bool {
	switch e := e.(type) {
	case *ast.BasicLit:
		return true
	case *ast.Ident:
		return e.Name == "nil" || e.Name == "true" || e.Name == "false"
	default:
		return false
	}
}

// nameOf is the last name of an expression: that of the field, of the variable, or of
// what is converted.
func nameOf(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return e.Sel.Name
	case *ast.ParenExpr:
		return nameOf(e.X)
	case *ast.StarExpr:
		return nameOf(e.X)
	case *ast.SliceExpr:
		return nameOf(e.X)
	case *ast.CallExpr:
		switch f := e.Fun.(type) {
		case *ast.Ident:
			if f.Name == "string" && len(e.Args) == 1 {
				return nameOf(e.Args[0])
			}
		case *ast.ArrayType:
			return nameOf(e.Args[0])
		case *ast.SelectorExpr:
			return strings.TrimPrefix(f.Sel.Name, "Get") // a field of a message
		}
	}
	return ""
}

func secretOf(n ast.Node) string {
	var b strings.Builder
	_ = printer.Fprint(&b, token.NewFileSet(), n)
	line, _, _ := strings.Cut(b.String(), "\n")
	return line
}
