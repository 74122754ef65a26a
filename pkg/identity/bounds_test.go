package identity

import (
	"strings"
	"testing"
)

// TestV_I9_PatternsAreBounded: patterns are RE2, literal, and short.
func TestV_I9_PatternsAreBounded(t *testing.T) {
	for name, r := range map[string]string{
		"back-reference":         `unix.uid == 1 && unix.path.matches("(a)\\1")`,
		"look-ahead":             `unix.uid == 1 && unix.path.matches("a(?=b)")`,
		"chosen by the workload": `unix.uid == 1 && unix.path.matches(docker.labels["pattern"])`,
		"longer than a rule":     `unix.uid == 1 && unix.path.matches("` + strings.Repeat("a?", maxExpression) + `")`,
		"large repetition":       `unix.uid == 1 && unix.path.matches("(a{1000}){1000}")`,
	} {
		if err := compileRule(r, false); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	// What kills a backtracking engine is linear here.
	e := rule(t, `unix.path.matches("^(a+)+$")`)
	w := shopWorkload()
	w.Unix.Path = strings.Repeat("a", 30_000) + "!"
	if e.MatchWorkload(NewFacts(shopNode(), w)) {
		t.Error("matched")
	}
}

// TestV_I10_NestingIsBounded: what is nested deeply is refused, without the
// stack growing with it.
func TestV_I10_NestingIsBounded(t *testing.T) {
	const deep = 1500 // longer ones are refused for their length
	for name, r := range map[string]string{
		"parentheses": strings.Repeat("(", deep) + "unix.uid == 1" + strings.Repeat(")", deep),
		"lists":       "unix.uid in " + strings.Repeat("[", deep) + "1" + strings.Repeat("]", deep),
		"choices":     strings.Repeat("true ? ", deep/3) + "unix.uid == 1" + strings.Repeat(" : false", deep/3),
		"too long":    strings.Repeat("(", 1_000_000) + "1" + strings.Repeat(")", 1_000_000),
	} {
		if err := compileRule(r, true); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := Compile(exampleOrg, &entry{
		Name: "e", SpiffeId: "spiffe://example.org/" + strings.Repeat("{", 10_000) + strings.Repeat("}", 10_000), Workloads: "unix.uid == 1",
	}); err == nil {
		t.Error("a template of braces: accepted")
	}
}
