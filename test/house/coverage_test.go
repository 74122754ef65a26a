package house

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

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
