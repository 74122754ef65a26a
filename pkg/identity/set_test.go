package identity

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func names(entries []*Entry) []string {
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// linear is what a Set must agree with.
type linear map[string]*Entry

func (l linear) match(holds func(*Entry) bool) []string {
	var out []string
	for name, e := range l {
		if holds(e) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func TestSetEqualsLinearScan(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	newEntry := func(name string) *Entry {
		for {
			p := &entry{Name: name, SpiffeId: "spiffe://example.org/x", Workloads: randomRule(rng, 2), AcceptWeak: true}
			switch rng.IntN(4) {
			case 0:
				p.Nodes = fmt.Sprintf(`node.method == "%s"`, pick(rng, "m", "n"))
			case 1:
				p.Nodes = fmt.Sprintf(`node.labels["k1"] == "%s" && node.id != "%s"`, pick(rng, "a", "b"), pick(rng, "a", "b"))
			case 2:
				p.Nodes = `node.id == "a" || node.id.startsWith("b") || node.method in ["m", "o"]`
			}
			if e, err := Compile(exampleOrg, p); err == nil {
				return e
			}
		}
	}
	check := func(set *Set, want linear) {
		t.Helper()
		if set.Len() != len(want) {
			t.Fatalf("Len = %d, want %d", set.Len(), len(want))
		}
		all := slices.Collect(set.All())
		if !slices.IsSortedFunc(all, byName) || len(all) != len(want) {
			t.Fatalf("All = %v", names(all))
		}
		for range 8 {
			f := NewFacts(randomNode(rng), randomWorkload(rng))
			if diff := cmp.Diff(want.match(func(e *Entry) bool { return e.MatchWorkload(f) }), names(set.MatchWorkload(f))); diff != "" {
				t.Fatalf("MatchWorkload -linear +set:\n%s\n%v", diff, f.workload)
			}
			if diff := cmp.Diff(want.match(func(e *Entry) bool { return e.MatchNode(f) }), names(set.MatchNode(f))); diff != "" {
				t.Fatalf("MatchNode -linear +set:\n%s\n%v", diff, f.node)
			}
		}
	}
	for range 2 {
		want := linear{}
		var first []*Entry
		for i := range 100 {
			e := newEntry(fmt.Sprintf("e%d", i))
			want[e.Name()] = e
			first = append(first, e)
		}
		set := NewSet(first...)
		check(set, want)
		for step := range 12 {
			before, beforeWant := set, maps.Clone(want)
			var upserts []*Entry
			var removed []string
			for range 1 + rng.IntN(6) {
				name := fmt.Sprintf("e%d", rng.IntN(115))
				if rng.IntN(3) == 0 {
					removed = append(removed, name)
				} else {
					upserts = append(upserts, newEntry(name))
				}
			}
			if step == 6 {
				for i := range 30 { // enough to be built anew
					upserts = append(upserts, newEntry(fmt.Sprintf("f%d", i)))
				}
			}
			for _, name := range removed {
				delete(want, name)
			}
			for _, e := range upserts {
				want[e.Name()] = e
			}
			set = set.With(upserts, removed)
			check(set, want)
			check(before, beforeWant) // immutable
		}
	}
}

func TestSet(t *testing.T) {
	a, b := rule(t, "unix.uid == 1"), rule(t, "unix.uid == 2") // both are named e
	set := NewSet(a, b)
	if got, ok := set.Get("e"); !ok || got != b || set.Len() != 1 {
		t.Errorf("Get = %v, %v", got, ok)
	}
	if _, ok := set.Get("x"); ok {
		t.Error("there is an x")
	}
	set = set.With([]*Entry{a}, []string{"e"}) // in both: added
	if got, _ := set.Get("e"); got != a {
		t.Errorf("Get = %v", got)
	}
	set = set.With(nil, []string{"e", "never"})
	if set.Len() != 0 || set.MatchWorkload(shopFacts()) != nil || set.MatchNode(shopFacts()) != nil {
		t.Error("not empty")
	}
	empty := NewSet()
	if empty.Len() != 0 || empty.MatchWorkload(nil) != nil || empty.MatchNode(nil) != nil || empty.With(nil, nil).Len() != 0 {
		t.Error("empty set")
	}
	given := []*Entry{mustCompile(t, shop()), a}
	NewSet(given...)
	if given[0].Name() != "shop" {
		t.Error("the caller's slice was sorted")
	}
}

func TestSetReserved(t *testing.T) {
	admin := mustCompile(t, &entry{Name: "ops", SpiffeId: "spiffe://example.org/ops", Workloads: "unix.uid == 0", Admin: true})
	below := mustCompile(t, &entry{Name: "ca", SpiffeId: "spiffe://example.org/ca", Workloads: "unix.uid == 0", Downstream: true})
	other := mustCompile(t, shop())
	set := NewSet(other, admin, below)
	for _, c := range []struct {
		id    string
		entry *Entry
		want  string
	}{
		{"spiffe://example.org/ops", other, "admin"},
		{"spiffe://example.org/ops", admin, ""},
		{"spiffe://example.org/ops", below, "admin"},
		{"spiffe://example.org/ca", other, "downstream"},
		{"spiffe://example.org/ca", admin, "downstream"},
		{"spiffe://example.org/ca", below, ""},
		{"spiffe://example.org/web", other, ""},
	} {
		id := spiffeid.RequireFromString(c.id)
		if got := set.Reserved(id, c.entry); got != c.want {
			t.Errorf("%s for entry %s: %q, want %q", c.id, c.entry.Name(), got, c.want)
		}
		if got := set.With(nil, []string{"ops", "ca"}).Reserved(id, other); got != "" {
			t.Errorf("%s is reserved for %s though its entry is gone", c.id, got)
		}
	}
}

func TestDownstream(t *testing.T) {
	e := &entry{Name: "ca", SpiffeId: "spiffe://example.org/ca", Workloads: "unix.uid == 0"}
	without := mustCompile(t, e).Digest()
	e.Downstream = true
	if compiled := mustCompile(t, e); !compiled.Downstream() || compiled.Digest() == without {
		t.Error("the mark means nothing")
	}
	if text := FormatYAML(e); !strings.Contains(text, "downstream: true\n") {
		t.Error(text)
	}
	for _, spoil := range []func(*entry){
		func(e *entry) { e.SpiffeId = `spiffe://example.org/ca/{docker.labels["x"]}` },
		func(e *entry) { e.AcceptWeak = true },
	} {
		bad := &entry{Name: "ca", SpiffeId: e.GetSpiffeId(), Workloads: e.GetWorkloads(), Downstream: true}
		spoil(bad)
		if _, err := Compile(exampleOrg, bad); err == nil || !strings.Contains(err.Error(), "downstream: true") {
			t.Errorf("%v", err)
		}
	}
}
