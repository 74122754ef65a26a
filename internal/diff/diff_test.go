package diff

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestLines(t *testing.T) {
	for _, tc := range []struct{ name, before, after, want string }{
		{"equal", "a\nb\n", "a\nb\n", ""},
		{"created", "", "a\nb\n", "+a\n+b\n"},
		{"deleted", "a\n", "", "-a\n"},
		{"changed", "a\nb\nc\n", "a\nx\nc\nd\n", " a\n-b\n+x\n c\n+d\n"},
	} {
		if d := cmp.Diff(tc.want, Lines(tc.before, tc.after)); d != "" {
			t.Errorf("%s: %s", tc.name, d)
		}
	}
	long := strings.Repeat("x\n", maxLines+1)
	if got := Lines(long, "y\n"); strings.Count(got, "\n") != maxLines+2 {
		t.Errorf("a long text has %d lines", strings.Count(got, "\n"))
	}
}
