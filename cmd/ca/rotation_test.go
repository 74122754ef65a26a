package main

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

// rotationOf returns one whose roots are written as "id state" or "id state, tainted".
func rotationOf(roots ...string) *adminv1.Rotation {
	r := &adminv1.Rotation{BundleSequence: 2}
	for _, text := range roots {
		id, state, _ := strings.Cut(text, " ")
		state, tainted := strings.CutSuffix(state, ", tainted")
		r.Roots = append(r.Roots, &adminv1.Root{Id: id, State: state, Tainted: tainted, LiveUntil: timestamppb.New(time.Unix(1000, 0))})
	}
	return r
}

func TestActiveRoot(t *testing.T) {
	for want, r := range map[string]*adminv1.Rotation{
		"":  rotationOf(),
		"a": rotationOf("b retiring", "a active", "c tainted"),
		"b": rotationOf("r retiring", "b active, tainted", "c retiring, tainted", "d prepared"),
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
		{[]string{"a active, tainted", "b distributed"}, false},
		{[]string{"a retiring", "b active"}, false},
		{[]string{"b active"}, false},
		{[]string{"a active"}, true},
		{[]string{"a active", "b retiring"}, true},
		{[]string{"a active, tainted"}, true},
	} {
		if got := (&rotationProgress{old: "a"}).undone(rotationOf(tc.roots...)); got != tc.want {
			t.Errorf("%v: undone is %v", tc.roots, got)
		}
	}
}

func TestRotationProgress_Paused(t *testing.T) {
	var out strings.Builder
	p := &rotationProgress{changes: changes{w: &out}, old: "a"}
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

// A CA below that is late is named in each phase, with what it waits for.
func TestRotationProgress_Below(t *testing.T) {
	const id = "spiffe://example.org/ca/below"
	var out strings.Builder
	p := &rotationProgress{changes: changes{w: &out}, old: "a"}
	r := rotationOf("a active", "b prepared")
	r.Nodes, r.NodesWaiting = 1, 1
	show := func(want bool) string {
		t.Helper()
		out.Reset()
		if over, err := p.show(time.Now(), r); over != want || err != nil {
			t.Fatal(over, err)
		}
		return out.String()
	}
	r.Laggards = []*adminv1.Laggard{{NodeId: id, Below: true, Connected: true, WaitsFor: "2 nodes: n1, n2"}}
	if got, want := show(false), "  waiting for "+id+" (a CA below): it waits for 2 nodes: n1, n2\n"; !strings.HasSuffix(got, want) || strings.Contains(got, "#") {
		t.Errorf("%q, want %q at its end and nothing done", got, want)
	}
	r.Laggards[0].WaitsFor = "1 nodes: n2"
	if got := show(false); !strings.Contains(got, "1 nodes: n2") {
		t.Errorf("%q, want what is waited for now", got)
	}
	if got := show(false); got != "" {
		t.Errorf("%q, which is no news", got)
	}
	r = rotationOf("a retiring", "b active")
	until := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	r.Roots[0].Svids = 1
	r.Roots[0].Holders = []*adminv1.RootHolder{
		{NodeId: id, Below: true, Connected: true, Counted: true, Svids: 1, Until: timestamppb.New(until)}, {NodeId: "n3", Connected: true, Counted: true, Svids: 7},
	}
	if got := show(false); !strings.Contains(got, "waiting for "+id+" (a CA below): its intermediate chains to root a; ") || !strings.Contains(got, "until 2030-01-02T03:04:05Z at most") || strings.Contains(got, "n3") {
		t.Errorf("%q", got)
	}
	// It is away: nobody knows what it has, and it is named at the end.
	r.Roots[0].Svids = 0
	r.Roots[0].Holders[0] = &adminv1.RootHolder{NodeId: id, Below: true, Until: timestamppb.New(until)}
	if got := show(true); !strings.Contains(got, "not yet: "+id+" (a CA below): not connected") {
		t.Errorf("%q", got)
	}
}
