package house

import (
	"bytes"
	"go/ast"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
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

// An agent is on every machine. What would make it larger by a fiftieth or more for
// little has no way into it.
func TestAgentHasNothingHeavy(t *testing.T) {
	heavy := map[string]string{
		"cel.dev/cel-go/ext":              "formats numbers for every language of the world: pkg/identity has what rules use of it",
		"golang.org/x/text/message":       "has every language of the world",
		"html/template":                   "calls methods by name, so that the linker keeps every method of every type",
		"net/http/pprof":                  "is a door, and a profiler",
		"k8s.io/client-go/rest":           "is for who asks the API server: an agent asks its kubelet",
		"k8s.io/apimachinery/pkg/runtime": "is for who asks the API server: an agent asks its kubelet",
		"github.com/docker/docker/client": "is a hundred types where two are asked for",
	}
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-tags=grpcnotrace,nethttpomithttp2", "./cmd/node-agent")
	cmd.Dir = root
	deps, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for name := range strings.FieldsSeq(string(deps)) {
		n++
		if why, ok := heavy[name]; ok {
			t.Errorf("the agent imports %s, which %s", name, why)
		}
	}
	if n < 100 {
		t.Errorf("only %d packages were looked at", n)
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

// TestLength: a file that needs a table of contents is two files.
func TestLength(t *testing.T) {
	const most = 800
	for _, f := range parse(t) {
		if n := f.Set.Position(f.FileEnd).Line; n > most && !f.Generated() {
			t.Errorf("%s has %d lines, more than %d: split it by what it answers, or shows", f.Path, n, most)
		}
	}
}
