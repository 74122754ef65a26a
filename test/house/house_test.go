package house

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"
)

const root = "../.."

func parse(t *testing.T) []*File {
	t.Helper()
	files, err := Parse(root)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// arrows says which of our packages each of our packages may import, as in
// docs/architecture.md; the first pattern that matches a package counts. A "*"
// stands for one folder, "**" at the end for all that is below. Tests may import
// what they need.
var arrows = []struct {
	from string
	to   []string
}{
	// Level 0: nothing of ours.
	{"proto/**", []string{"proto/**"}},
	{"pkg/config", nil},
	{"pkg/health", nil},
	{"pkg/attest/peer", nil},
	{"pkg/sds/envoycheck", nil},
	{"internal/cli", []string{"internal/*", "pkg/health"}}, // what both commands share: logs, metrics and health over HTTP
	{"internal/**", []string{"internal/*"}},
	// Level 1.
	{"pkg/identity", []string{"proto/attributes/v1", "proto/entry/v1", "internal/*"}},
	{"pkg/ledger/tree", []string{"pkg/ledger", "internal/*"}},
	{"pkg/ledger", []string{"proto/ledger/v1", "proto/attributes/v1", "proto/entry/v1", "internal/*"}},
	{"pkg/ledger/**", []string{"pkg/ledger", "pkg/ledger/**", "pkg/config", "proto/**", "internal/*"}},
	// Level 2.
	{"pkg/attest", []string{"pkg/identity", "pkg/attest/peer", "proto/attributes/v1", "proto/node/v1"}},
	{"pkg/ca", []string{"pkg/ledger", "pkg/ca/keys", "pkg/ca/rotation", "pkg/ca/upstream", "proto/ledger/v1", "internal/*"}},
	{"pkg/agent/cache", []string{"pkg/identity", "proto/**"}},
	{"pkg/sds", []string{"pkg/identity", "pkg/attest/peer", "internal/weakmap"}},
	{"pkg/workloadapi", []string{"pkg/identity", "pkg/attest/peer", "internal/weakmap"}},
	{"pkg/csi", []string{"pkg/attest/peer", "proto/csi/v1", "proto/kubelet/v1", "internal/*"}},
	// Level 3.
	{"pkg/audit", []string{"pkg/identity", "pkg/ledger", "proto/**"}},
	{"pkg/attest/attesttest", []string{"pkg/attest", "pkg/attest/peer", "pkg/identity", "proto/**"}},
	{"pkg/attest/node/*", []string{"pkg/attest", "pkg/attest/peer", "pkg/identity", "pkg/config", "proto/attributes/v1", "internal/*"}},
	{"pkg/attest/workload/**", []string{"pkg/attest", "pkg/attest/peer", "pkg/attest/workload/**", "pkg/identity", "pkg/config", "proto/attributes/v1", "internal/*"}},
	{"pkg/ca/keys", []string{"pkg/config", "internal/*"}},
	{"pkg/ca/rotation", nil},
	{"pkg/ca/upstream", []string{"internal/*"}},
	{"pkg/ca/upstream/*", []string{"pkg/ca/upstream", "pkg/config", "proto/plugin/v1", "proto/node/v1", "proto/downstream/v1", "internal/*"}},
	{"pkg/store/**", []string{"pkg/store/**", "pkg/identity", "pkg/ca", "pkg/ledger", "pkg/ledger/search", "pkg/attest", "pkg/attest/node/jointoken", "pkg/server", "pkg/server/**", "proto/**", "internal/*"}},
	{"pkg/server/**", []string{"pkg/server/**", "pkg/ca", "pkg/ca/rotation", "pkg/attest", "pkg/attest/peer", "pkg/identity", "pkg/ledger", "pkg/ledger/search", "pkg/health", "proto/**", "internal/*"}},
	{"pkg/istio", []string{"pkg/kubernetes", "pkg/server", "pkg/identity", "pkg/health", "proto/**", "internal/*"}},
	{"pkg/placement", []string{"pkg/server", "proto/attributes/v1", "internal/*"}},
	{"pkg/kubernetes", []string{"pkg/server", "pkg/placement", "pkg/identity", "proto/attributes/v1", "proto/entry/v1", "proto/node/v1", "internal/*"}},
	{"pkg/console", []string{"pkg/ledger", "pkg/ledger/search", "proto/**", "internal/*"}},
	{"pkg/agent", []string{"pkg/agent/cache", "pkg/attest", "pkg/attest/peer", "pkg/identity", "pkg/health", "proto/**", "internal/*"}},
	// Level 4.
	{"cmd/*", []string{"pkg/**", "proto/**", "internal/*"}},
	// What is not part of the product.
	{"test/house/**", []string{"test/house"}},
	{"test/identitytest", []string{"pkg/identity", "pkg/attest/peer"}},
	{"test/shop", nil},
	{"test/shop/engine", nil},
	{"test/shop/image", nil},
	{"test/shop/mesh", []string{"test/shop/engine", "test/shop/image", "proto/**"}},
	{"test/**", []string{"test/**", "proto/**", "pkg/**", "internal/*"}},
	{"deploy/grafana", nil},
	{"deploy/demo", []string{"test/shop/**", "proto/admin/v1"}},
	{"deploy/plugin/*", []string{"proto/plugin/v1"}},
	{"scripts/*", []string{"test/shop/engine", "test/shop/image"}},
}

func allowed(from, to string) (known, ok bool) {
	for _, a := range arrows {
		if matches(a.from, from) {
			return true, slices.ContainsFunc(a.to, func(p string) bool { return matches(p, to) })
		}
	}
	return false, false
}

func matches(pattern, pkg string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "/**"); ok {
		return pkg == prefix || strings.HasPrefix(pkg, prefix+"/")
	}
	ok, err := path.Match(pattern, pkg)
	return err == nil && ok
}

func TestArrows(t *testing.T) {
	for _, f := range parse(t) {
		if f.Test() {
			continue
		}
		for _, i := range f.File.Imports {
			to, ours := strings.CutPrefix(strings.Trim(i.Path.Value, `"`), Module+"/")
			if !ours {
				continue
			}
			switch known, ok := allowed(f.Package(), to); {
			case !known:
				t.Errorf("%s: package %s is not in the table of arrows: add it to docs/architecture.md and here", f.Position(i.Pos()), f.Package())
			case !ok:
				t.Errorf("%s: %s may not import %s", f.Position(i.Pos()), f.Package(), to)
			}
		}
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		pattern, pkg string
		want         bool
	}{
		{"pkg/ca", "pkg/ca", true},
		{"pkg/ca", "pkg/ca/keys", false},
		{"internal/*", "internal/durable", true},
		{"proto/**", "proto/node/v1", true},
		{"proto/**", "protos", false},
		{"pkg/*", "pkg/attest/node", false},
	} {
		if got := matches(c.pattern, c.pkg); got != c.want {
			t.Errorf("matches(%q, %q) = %v", c.pattern, c.pkg, got)
		}
	}
}

func TestPackageComments(t *testing.T) {
	comments := map[string][]string{}
	for _, f := range parse(t) {
		if f.Test() {
			continue
		}
		if _, ok := comments[f.Package()]; !ok {
			comments[f.Package()] = nil
		}
		if f.Doc != nil && strings.TrimSpace(f.Doc.Text()) != "" {
			comments[f.Package()] = append(comments[f.Package()], f.Path)
		}
	}
	for pkg, files := range comments {
		if strings.HasPrefix(pkg, "proto/") {
			continue // the comment is in the .proto file
		}
		if len(files) != 1 {
			t.Errorf("package %s has %d package comments %v: want one, which says which question it answers and what it does not know", pkg, len(files), files)
		}
	}
}

func TestNoInit(t *testing.T) {
	for _, f := range parse(t) {
		if f.Generated() {
			continue
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				t.Errorf("%s: func init: say it in main, where it is seen", f.Position(fn.Pos()))
			}
		}
	}
}

func TestTestingOnlyInTests(t *testing.T) {
	for _, f := range parse(t) {
		if f.Test() || f.Package() == "pkg/attest/attesttest" || f.Package() == "pkg/ca/upstream/upstreamtest" || strings.HasPrefix(f.Path, "test/") {
			continue
		}
		if f.Imports("testing") {
			t.Errorf("%s: imports testing outside of tests", f.Path)
		}
	}
}

// Words that say nothing of what a thing is.
var (
	emptyWords     = []string{"Impl", "Manager", "Util", "Utils", "Common", "Helper", "Helpers"}
	emptyTypeWords = []string{"Data", "Info"}
	emptyPackages  = []string{"impl", "manager", "util", "utils", "common", "helper", "helpers", "misc", "base", "types"}
)

// othersNames are those of interfaces that we satisfy: gRPC's and testing's.
var othersNames = []string{"AuthInfo", "Helper"}

func TestNames(t *testing.T) {
	for _, f := range parse(t) {
		if f.Generated() {
			continue
		}
		if slices.Contains(emptyPackages, strings.TrimSuffix(f.Name.Name, "_test")) {
			t.Errorf("%s: package %s: name it after what it is", f.Path, f.Name.Name)
		}
		for _, d := range f.Decls {
			for _, n := range declared(d) {
				if !n.name.IsExported() || slices.Contains(othersNames, n.name.Name) {
					continue
				}
				for _, word := range words(n.name.Name) {
					if slices.Contains(emptyWords, word) || n.isType && slices.Contains(emptyTypeWords, word) {
						t.Errorf("%s: %s: the word %s says nothing of what it is", f.Position(n.name.Pos()), n.name.Name, word)
					}
				}
			}
		}
	}
}

type declaration struct {
	name   *ast.Ident
	isType bool
}

func declared(d ast.Decl) []declaration {
	var out []declaration
	switch d := d.(type) {
	case *ast.FuncDecl:
		out = append(out, declaration{name: d.Name})
	case *ast.GenDecl:
		for _, s := range d.Specs {
			switch s := s.(type) {
			case *ast.TypeSpec:
				out = append(out, declaration{s.Name, true})
			case *ast.ValueSpec:
				for _, n := range s.Names {
					out = append(out, declaration{name: n})
				}
			}
		}
	}
	return out
}

func words(name string) []string {
	var out []string
	start := 0
	runes := []rune(name)
	for i := 1; i <= len(runes); i++ {
		if i == len(runes) || unicode.IsUpper(runes[i]) && unicode.IsLower(runes[i-1]) || runes[i] == '_' {
			out = append(out, strings.Trim(string(runes[start:i]), "_"))
			start = i
		}
	}
	return out
}

// In a bubble of testing/synctest, Sleep is how time passes; elsewhere it is a
// guess about a machine's speed.
func TestNoSleepInTests(t *testing.T) {
	for _, f := range parse(t) {
		if !f.Test() && !strings.HasPrefix(f.Path, "test/") || f.Imports("testing/synctest") {
			continue
		}
		for _, s := range selectors(f, "time", "Sleep") {
			t.Errorf("%s: time.Sleep in a test: wait for the event", f.Position(s.Pos()))
		}
	}
}

// verifiesOtherwise are the files that may switch off the standard verification
// of a TLS peer, and why.
var verifiesOtherwise = map[string]string{
	"test/shop/intruder.go":            "an intruder does not care who answers",
	"pkg/agent/verify.go":              "the CA is verified by its root or its root's hash, and by its SPIFFE ID",
	"pkg/ca/upstream/stepca/stepca.go": "what is fetched is a root, which is compared with its configured hash",
}

// Kuma CVE-2026-50166: a peer that is not verified because nothing was
// configured. There is no way to ask for it, and no place where it happens.
func TestV_T6_NoInsecureSkipVerify(t *testing.T) {
	for _, f := range parse(t) {
		if f.Test() || verifiesOtherwise[f.Path] != "" {
			continue
		}
		ast.Inspect(f.File, func(n ast.Node) bool {
			if id, ok := n.(*ast.Ident); ok && id.Name == "InsecureSkipVerify" {
				t.Errorf("%s: InsecureSkipVerify", f.Position(id.Pos()))
			}
			return true
		})
	}
}

// SPIRE CVE-2021-27099: a path that is joined is cleaned, and what is cleaned is
// another identity. Nothing that makes identities imports package path.
func TestV_A1_NoPathJoin(t *testing.T) {
	for _, f := range parse(t) {
		if !f.Test() && strings.HasPrefix(f.Path, "pkg/") && f.Imports("path") {
			t.Errorf("%s: imports path", f.Path)
		}
		if strings.HasPrefix(f.Path, "pkg/identity/") && !f.Test() && f.Imports("path/filepath") {
			t.Errorf("%s: imports path/filepath", f.Path)
		}
	}
}

func selectors(f *File, pkg, name string) []*ast.SelectorExpr {
	var out []*ast.SelectorExpr
	ast.Inspect(f.File, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok && s.Sel.Name == name {
			if x, ok := s.X.(*ast.Ident); ok && x.Name == pkg {
				out = append(out, s)
			}
		}
		return true
	})
	return out
}

// Where packages come from is the business of the machine's configuration.
func TestNoRegistryNames(t *testing.T) {
	var names [][]byte
	for _, n := range []string{
		"pypi|.org", "pythonhosted|.org", "deb.debian|.org", "proxy.golang|.org", "sum.golang|.org", "registry-1.docker|.io",
		"hub.docker|.com", "ghcr|.io", "quay|.io", "gcr|.io", "registry.npmjs|.org", "repo1.maven|.org",
	} {
		names = append(names, []byte(strings.ReplaceAll(n, "|", ""))) // so that this file has none
	}
	err := Walk(root, func(path string) error {
		text, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			return err
		}
		for _, n := range names {
			if bytes.Contains(text, n) {
				t.Errorf("%s: names the registry %s", path, n)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestTopLevel(t *testing.T) {
	want := []string{
		".ci", ".git", ".gitignore", ".golangci.yml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
		"cmd", "deploy", "docs", "go.mod", "go.sum", "internal", "pkg", "proto", "scripts", "test", "tools",
	}
	made := []string{".cache", ".up", "bin"} // by make, and ignored by git
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if ext := path.Ext(e.Name()); ext == ".test" || ext == ".prof" {
			continue // of somebody who measures
		}
		if !slices.Contains(want, e.Name()) && !slices.Contains(made, e.Name()) {
			t.Errorf("%s at the top of the work tree has no place in the layout", e.Name())
		}
	}
	text, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(text, []byte("\n")); n >= 80 {
		t.Errorf("Makefile has %d lines: want less than 80", n)
	}
}

func TestCoverageIsCurrent(t *testing.T) {
	var want bytes.Buffer
	if err := WriteCoverage(&want, Cases(parse(t))); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(root, "docs", "coverage.md"))
	if err != nil {
		t.Fatalf("%v: run `make generate`", err)
	}
	if diff := cmp.Diff(want.String(), string(got)); diff != "" {
		t.Errorf("docs/coverage.md is old: run `make generate` (-want +got):\n%s", diff)
	}
}

func TestCompareRows(t *testing.T) {
	rows := []string{"B2", "A10", "A2", "T1", "S41", "B16"}
	slices.SortFunc(rows, compareRows)
	if diff := cmp.Diff([]string{"A2", "A10", "B2", "B16", "S41", "T1"}, rows); diff != "" {
		t.Errorf("order (-want +got):\n%s", diff)
	}
}

func TestWhat(t *testing.T) {
	for name, want := range map[string]string{
		"TestV_A1_TemplateInjection":    "template injection",
		"TestSpec_D01_HeaderTRUEIsBad":  "header TRUE is bad",
		"TestV_C1_C3_JoinTokenOnlyOnce": "join token only once",
		"TestSpec_S16_XFCC":             "XFCC",
	} {
		if got := (Case{Function: name}).what(); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

// TestV_D5_MountTablesAreNeverRead: whoever has a mount namespace of his own can
// bind what he likes, also a foreign cgroup. No part of attestation reads a mount
// table.
func TestV_D5_MountTablesAreNeverRead(t *testing.T) {
	for _, f := range parse(t) {
		if f.Test() || !strings.HasPrefix(f.Path, "pkg/") {
			continue
		}
		ast.Inspect(f.File, func(n ast.Node) bool {
			if l, ok := n.(*ast.BasicLit); ok && l.Kind == token.STRING {
				for _, table := range []string{"mountinfo", "mounts", "mountstats"} {
					if strings.Contains(l.Value, table) {
						t.Errorf("%s: names %s", f.Position(l.Pos()), table)
					}
				}
			}
			return true
		})
	}
}

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

// What a caller may do is decided by what is in memory, which a change is in before its
// answer is given. The store is asked for nodes, entries and quarantines at the start
// only, so that none of its connections, nor a replica, can answer with what was.
func TestV_L5_AuthorizationReadsMemory(t *testing.T) {
	allowed := []string{"load", "compare", "AcceptStore"}
	reads, elsewhere := 0, 0
	for _, f := range parse(t) {
		if f.Test() || !strings.HasPrefix(f.Path, "pkg/server/") {
			continue
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				sel, ok := call.Fun.(*ast.SelectorExpr)
				if !ok || len(call.Args) == 0 || !slices.Contains([]string{"Nodes", "Entries", "Quarantines"}, sel.Sel.Name) {
					return true // those of the registry, which is memory, take no context
				}
				if reads++; !slices.Contains(allowed, fn.Name.Name) {
					elsewhere++
					t.Errorf("%s: %s asks the store for %s", f.Position(call.Pos()), fn.Name.Name, sel.Sel.Name)
				}
				return true
			})
		}
	}
	if reads < 6 {
		t.Errorf("only %d reads of the store were found", reads)
	}
}

// A decision that asks two clocks can be at odds with itself: times come from the CA,
// as arguments, and no statement asks the database's clock.
func TestV_L6_TheDatabaseHasNoClock(t *testing.T) {
	clocks := regexp.MustCompile(`(?i)\b(now|date|time|datetime|julianday|unixepoch|strftime|clock_timestamp|statement_timestamp|transaction_timestamp|timeofday)\s*\(|\bcurrent_(timestamp|time|date)\b|\blocaltime(stamp)?\b`)
	statements := 0
	check := func(at, sql string) {
		if !regexp.MustCompile(`(?i)\b(select|insert|update|delete|create|alter|with)\b`).MatchString(sql) {
			return
		}
		statements++
		if m := clocks.FindString(sql); m != "" {
			t.Errorf("%s: the database's clock is asked: %s", at, m)
		}
	}
	for _, f := range parse(t) {
		if f.Test() || !strings.HasPrefix(f.Path, "pkg/store/") {
			continue
		}
		ast.Inspect(f.File, func(n ast.Node) bool {
			if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				check(f.Position(lit.Pos()), lit.Value)
			}
			return true
		})
	}
	err := Walk(root, func(path string) error {
		if !strings.HasSuffix(path, ".sql") {
			return nil
		}
		text, err := os.ReadFile(filepath.Join(root, path))
		if err == nil {
			check(path, regexp.MustCompile(`--.*`).ReplaceAllString(string(text), ""))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if statements < 40 {
		t.Errorf("only %d statements were looked at", statements)
	}
	for _, sql := range []string{"UPDATE a SET b = now()", "INSERT INTO a VALUES (CURRENT_TIMESTAMP)", "SELECT datetime('now')"} {
		if !clocks.MatchString(sql) {
			t.Errorf("%s is not seen", sql)
		}
	}
}

// TestArchitecture wants each package in a row of the layout, and each row of a package to
// have one.
func TestArchitecture(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs", "architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, layout, _ := strings.Cut(string(text), "\n## Layout\n")
	layout, _, _ = strings.Cut(layout, "\n## ")
	var rows []string
	for line := range strings.Lines(layout) {
		cells := strings.Split(line, "|")
		if len(cells) < 3 {
			continue
		}
		for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[1], -1) {
			rows = append(rows, strings.TrimSuffix(name[1], "/"))
		}
	}
	packages := map[string]bool{}
	for _, f := range parse(t) {
		if p := f.Package(); strings.HasPrefix(p, "cmd/") || strings.HasPrefix(p, "pkg/") || strings.HasPrefix(p, "internal/") {
			packages[p] = true
		}
	}
	for p := range packages {
		if !slices.ContainsFunc(rows, func(row string) bool { return matches(row, p) }) {
			t.Errorf("package %s is in no row of the layout in docs/architecture.md", p)
		}
	}
	for _, row := range rows {
		if _, err := os.Stat(filepath.Join(root, row)); err == nil {
			continue
		}
		if !slices.ContainsFunc(slices.Collect(maps.Keys(packages)), func(p string) bool { return matches(row, p) }) {
			t.Errorf("the layout in docs/architecture.md has %s, which is not there", row)
		}
	}
}
