package main

import (
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

// rotationOf returns one whose roots are written as "id state", the first of which lives longest.
func rotationOf(roots ...string) *adminv1.Rotation {
	r := &adminv1.Rotation{BundleSequence: 2}
	for i, text := range roots {
		id, state, _ := strings.Cut(text, " ")
		r.Roots = append(r.Roots, &adminv1.Root{Id: id, State: state, LiveUntil: timestamppb.New(time.Unix(int64(1000-i), 0))})
	}
	return r
}

func TestActiveRoot(t *testing.T) {
	for want, r := range map[string]*adminv1.Rotation{
		"":  rotationOf(),
		"a": rotationOf("b retiring", "a active", "c tainted"),
		"b": rotationOf("r retiring", "b tainted", "c tainted", "d prepared"),
	} {
		if got := activeRoot(r); got != want {
			t.Errorf("%v: %q signs, want %q", r, got, want)
		}
	}
}

// Whoever waits for a rotation is told when somebody else undoes or pauses it.
func TestRotationUndone(t *testing.T) {
	for _, tc := range []struct {
		roots []string
		want  bool
	}{
		{[]string{"a active", "b prepared"}, false},
		{[]string{"a tainted", "b distributed"}, false},
		{[]string{"a retiring", "b active"}, false},
		{[]string{"b active"}, false},
		{[]string{"a active"}, true},
		{[]string{"a active", "b retiring"}, true},
		{[]string{"a tainted"}, true},
	} {
		if got := (&rotationProgress{w: io.Discard, old: "a"}).undone(rotationOf(tc.roots...)); got != tc.want {
			t.Errorf("%v: undone is %v", tc.roots, got)
		}
	}
}

func TestRotationProgress_Paused(t *testing.T) {
	var out strings.Builder
	p := &rotationProgress{w: &out, old: "a"}
	r := rotationOf("a active", "b prepared")
	for _, paused := range []bool{false, true, true} {
		r.Paused = paused
		if over, err := p.show(time.Now(), r); over || err != nil {
			t.Fatal(over, err)
		}
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 || strings.Contains(lines[0], "paused") || !strings.HasSuffix(lines[1], "paused (ca authority resume)") {
		t.Errorf("it says %q", lines)
	}
}
