package registry

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"

	"github.com/meshid/meshid/pkg/identity"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func compile(t testing.TB, name, nodes string, revision uint64) *identity.Entry {
	t.Helper()
	e, err := identity.Compile(td, &entryv1.Entry{
		Name: name, SpiffeId: "spiffe://example.org/" + name, Nodes: nodes, Revision: revision,
		Workloads: `docker.labels["app"] == "x" && docker.image == "registry.internal/x"`,
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func facts(zone string) *identity.Facts {
	return identity.NewFacts(&attributesv1.Node{Method: "join_token", Id: "n", Labels: map[string]string{"zone": zone}}, nil)
}

func zone(z string) string { return fmt.Sprintf("node.labels[%q] == %q", "zone", z) }

func names(entries []*identity.Entry) []string {
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func TestDelta(t *testing.T) {
	r := New("epoch", 10, identity.NewSet(compile(t, "old", "", 3)), nil, nil)
	apply := func(rev uint64, upserts []*identity.Entry, removed ...string) { r.Apply(rev, upserts, removed) }
	apply(11, []*identity.Entry{compile(t, "a", zone("1"), 11), compile(t, "b", zone("2"), 11)})
	if !r.Advance(13) || r.Advance(13) || r.Advance(12) {
		t.Error("revisions without a change are noted once, and never go back")
	}
	apply(14, []*identity.Entry{compile(t, "a", zone("2"), 14)}, "old")
	apply(15, []*identity.Entry{compile(t, "c", "", 15)})
	apply(16, nil, "c")
	for _, tt := range []struct {
		from    uint64
		zone    string
		upserts []string
		removed []string
		ok      bool
	}{
		{from: 9, zone: "1"},
		{from: 17, zone: "1"},
		{10, "1", nil, []string{"old"}, true}, // a came and went
		{11, "1", nil, []string{"a", "old"}, true},
		{13, "1", nil, []string{"a", "old"}, true},
		{14, "1", nil, nil, true}, // c came and went
		{15, "1", nil, []string{"c"}, true},
		{16, "1", nil, nil, true},
		{10, "2", []string{"a", "b"}, []string{"old"}, true},
		{11, "2", []string{"a"}, []string{"old"}, true},
		{10, "3", nil, []string{"old"}, true}, // a and b are none of its business
	} {
		upserts, removed, ok := r.Entries().Delta(tt.from, facts(tt.zone))
		if diff := cmp.Diff([]any{tt.upserts, tt.removed, tt.ok}, []any{names(upserts), removed, ok}); diff != "" {
			t.Errorf("from %d in zone %s (-want +got):\n%s", tt.from, tt.zone, diff)
		}
	}
}

// Whatever changes, a node that applies the delta from any revision that is
// still in the history has what a snapshot would give it, and no name that it
// has no right to is told.
func TestDeltaIsSnapshot(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	r := New("epoch", 1, identity.NewSet(), nil, nil)
	type view map[string]uint64
	seen := map[string]map[uint64]view{"1": {}, "2": {}}
	snapshot := func(z string) view {
		v := make(view)
		for _, e := range r.Entries().Set.MatchNode(facts(z)) {
			v[e.Name()] = e.Revision()
		}
		return v
	}
	nodes := []string{"", zone("1"), zone("2"), zone("3")}
	for rev := uint64(2); rev < 120; rev++ {
		var upserts []*identity.Entry
		var removed []string
		for i := range 8 {
			name := fmt.Sprintf("e%d", i)
			_, exists := r.Entries().Set.Get(name)
			switch random.IntN(6) {
			case 0:
				upserts = append(upserts, compile(t, name, nodes[random.IntN(4)], rev))
			case 1:
				if exists {
					removed = append(removed, name)
				}
			}
		}
		r.Apply(rev, upserts, removed)
		for z, views := range seen {
			views[rev] = snapshot(z)
			for _, from := range []uint64{rev - 1, max(2, rev/2), 2} {
				had := views[from]
				ups, gone, ok := r.Entries().Delta(from, facts(z))
				if !ok {
					t.Fatalf("no delta from %d to %d", from, rev)
				}
				got := make(view)
				maps.Copy(got, had)
				for _, name := range gone {
					if _, ok := had[name]; !ok {
						t.Fatalf("told of %s", name)
					}
					delete(got, name)
				}
				for _, e := range ups {
					got[e.Name()] = e.Revision()
				}
				if diff := cmp.Diff(views[rev], got); diff != "" {
					t.Fatalf("from %d to %d in zone %s:\n%s", from, rev, z, diff)
				}
			}
		}
	}
}

func TestHistoryIsBounded(t *testing.T) {
	r := New("epoch", 0, identity.NewSet(), nil, nil)
	e := compile(t, "a", "", 1)
	for rev := uint64(1); rev <= maxChanges+10; rev++ {
		r.Apply(rev, []*identity.Entry{e}, nil)
	}
	if n := len(r.Entries().changes); n != maxChanges {
		t.Errorf("%d changes are kept", n)
	}
	if _, _, ok := r.Entries().Delta(9, facts("1")); ok {
		t.Error("a delta over what was forgotten")
	}
	if _, _, ok := r.Entries().Delta(10, facts("1")); !ok {
		t.Error("no delta from the oldest revision that is known")
	}
	// One change of very many entries empties it.
	var removed []string
	for i := range maxChangedNames + 1 {
		removed = append(removed, fmt.Sprint(i))
	}
	r.Apply(5000, nil, removed)
	if _, _, ok := r.Entries().Delta(4999, facts("1")); ok || len(r.Entries().changes) != 0 {
		t.Error("a change beyond the bound is kept")
	}
	if _, _, ok := r.Entries().Delta(5000, facts("1")); !ok {
		t.Error("no delta from the current revision")
	}
}

func TestAdminAndBroken(t *testing.T) {
	admin, err := identity.Compile(td, &entryv1.Entry{Name: "ops", SpiffeId: "spiffe://example.org/ops", Workloads: `unix.uid == 1000 && unix.path == "/x"`, Admin: true})
	if err != nil {
		t.Fatal(err)
	}
	broken := map[string]*entryv1.Entry{"old": {Name: "old"}}
	r := New("epoch", 1, identity.NewSet(compile(t, "a", "", 1)), broken, nil)
	if _, ok := r.Entries().Admin("spiffe://example.org/a"); ok {
		t.Error("an entry that is not marked makes admins")
	}
	r.Apply(2, []*identity.Entry{admin}, nil)
	for id, want := range map[string]bool{"spiffe://example.org/ops": true, "spiffe://example.org/Ops": false, "spiffe://example.org/ops/": false, "spiffe://example.org/op": false} {
		if _, ok := r.Entries().Admin(id); ok != want {
			t.Errorf("%s is an admin: %v", id, ok)
		}
	}
	if got := r.Entries().Names(); !slices.Equal(got, []string{"a", "old", "ops"}) {
		t.Errorf("names are %v", got)
	}
	r.Apply(3, nil, []string{"ops", "old"})
	if _, ok := r.Entries().Admin("spiffe://example.org/ops"); ok || len(r.Entries().Broken) != 0 || len(broken) != 1 {
		t.Error("what was deleted is still there, or an older revision was changed")
	}
}

func TestAuthenticate(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	node := &Node{
		ID: "n", State: Active, Attributes: &attributesv1.Node{}, Serial: []byte{2}, Previous: []byte{1},
		PreviousUntil: now.Add(time.Hour), LastSeen: now,
	}
	evicted := *node
	evicted.ID, evicted.State = "gone", Evicted
	r := New("epoch", 1, identity.NewSet(), nil, []*Node{node, &evicted})
	for _, tt := range []struct {
		id     string
		serial []byte
		after  time.Duration
		want   Verdict
	}{
		{"n", []byte{1}, 50 * time.Minute, Accepted}, // nobody has used the new one
		{"n", []byte{3}, 0, Superseded},
		{"n", nil, 0, Superseded},
		{"n", []byte{2}, time.Minute, Accepted}, // used: the overlap begins
		{"n", []byte{1}, time.Minute + Overlap - 1, Accepted},
		{"n", []byte{1}, time.Minute + Overlap, Superseded},
		{"n", []byte{2}, 100 * time.Hour, Accepted}, // its life is the certificate's business
		{"gone", []byte{2}, 0, Inactive},
		{"x", []byte{2}, 0, Unknown},
	} {
		if _, got := r.Authenticate(tt.id, tt.serial, now.Add(tt.after)); got != tt.want {
			t.Errorf("%s with %x after %v: %v, want %v", tt.id, tt.serial, tt.after, got, tt.want)
		}
	}
	touched := r.TakeTouched()
	want := []Touch{{ID: "n", Serial: []byte{2}, Confirmed: true, PreviousUntil: now.Add(time.Minute + Overlap), LastSeen: now.Add(100 * time.Hour)}}
	if diff := cmp.Diff(want, touched); diff != "" {
		t.Error(diff)
	}
	if touched := r.TakeTouched(); len(touched) != 0 {
		t.Errorf("touched twice: %v", touched)
	}
}

func TestEpochOfNode(t *testing.T) {
	a := &Node{Attributes: &attributesv1.Node{Id: "n", Labels: map[string]string{"a": "1", "b": "2", "c": "3"}}}
	b := &Node{Attributes: &attributesv1.Node{Id: "n", Labels: map[string]string{"c": "3", "b": "2", "a": "1"}}}
	c := &Node{Attributes: &attributesv1.Node{Id: "n", Labels: map[string]string{"a": "1", "b": "2"}}}
	if a.Epoch("e") != b.Epoch("e") || a.Epoch("e") == c.Epoch("e") || a.Epoch("e") == a.Epoch("f") {
		t.Errorf("epochs are %s, %s, %s, %s", a.Epoch("e"), b.Epoch("e"), c.Epoch("e"), a.Epoch("f"))
	}
}

func TestConcurrentUse(t *testing.T) {
	r := New("epoch", 1, identity.NewSet(), nil, nil)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 100 {
				id := fmt.Sprint(j % 10)
				switch i % 4 {
				case 0:
					r.PutNode(&Node{ID: id, State: Active, Serial: []byte{byte(j)}, Attributes: &attributesv1.Node{}})
				case 1:
					r.Authenticate(id, []byte{byte(j)}, time.Now())
				case 2:
					r.TakeTouched()
					r.Nodes()
				case 3:
					r.Advance(uint64(i*1000 + j))
					r.Entries().Delta(1, facts("1"))
				}
			}
		})
	}
	wg.Wait()
	if r.CountNodes() != 10 {
		t.Errorf("%d nodes", r.CountNodes())
	}
}
