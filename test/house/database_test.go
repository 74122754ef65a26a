package house

import (
	"go/ast"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

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
