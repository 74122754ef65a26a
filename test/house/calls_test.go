package house

import (
	"go/ast"
	"go/token"
	"strings"
	"testing"
)

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
