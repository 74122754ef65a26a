package server

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

// What an agent says about its proxies is bounded, and what is refused changes
// nothing.
func TestAcksAreBounded(t *testing.T) {
	f := inForce{streams: 7}
	long := strings.Repeat("x", maxLaggardName+1)
	for _, m := range []*nodev1.BundleAcks{
		{Laggards: make([]*nodev1.Laggard, maxNodeLaggards+1)},
		{Held: make([]*nodev1.Held, maxHeldRoots+1)},
		{Laggards: []*nodev1.Laggard{{Name: long}}},
		{Held: []*nodev1.Held{{Root: long}}},
	} {
		if err := f.acks(m); err == nil || f.streams != 7 || f.reported {
			t.Errorf("%.80v: %v, %+v", m, err, f)
		}
	}
	if err := f.acks(&nodev1.BundleAcks{Streams: 2, Acknowledged: 1, Sequence: 3, Counted: true, Held: []*nodev1.Held{{Root: "r", Svids: 4}}}); err != nil {
		t.Fatal(err)
	}
	if !f.reported || !f.counted || f.streams != 2 || f.ackSequence != 3 || f.held["r"] != 4 {
		t.Errorf("%+v", f)
	}
}

// A tainted root that signs, one that is retiring, and one that was never used are told
// apart, by operators and in the ledger.
func TestTaintedApart(t *testing.T) {
	h := newHouse(t)
	admin, ctx := h.admin()
	order := func(verb, root string) {
		t.Helper()
		if _, err := admin.ChangeRotation(ctx, &adminv1.ChangeRotationRequest{Verb: verb, Root: root}); err != nil {
			t.Fatal(verb, err)
		}
	}
	roots := func() (all []string) {
		t.Helper()
		answer, err := admin.GetRotation(ctx, &adminv1.GetRotationRequest{})
		if err != nil {
			t.Fatal(err)
		}
		list, err := admin.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range answer.GetRotation().GetRoots() {
			all = append(all, fmt.Sprint(r.GetState(), " ", r.GetTainted()))
			if !slices.ContainsFunc(list.GetAuthorities(), func(a *adminv1.Authority) bool {
				return a.GetId() == r.GetId() && a.GetState() == r.GetState() && a.GetTainted() == r.GetTainted()
			}) {
				t.Errorf("the list says something else: %v, not %v", list.GetAuthorities(), r)
			}
		}
		return all
	}
	is := func(want ...string) {
		t.Helper()
		if !h.eventually(func() bool { return slices.Equal(roots(), want) }) {
			t.Errorf("the roots are %q, want %q", roots(), want)
		}
	}
	recorded := func(state string) {
		t.Helper()
		if !slices.ContainsFunc(h.records(ledgerv1.Event_EVENT_AUTHORITY), func(r *ledgerv1.Record) bool {
			return r.GetAuthority().GetTainted() && r.GetAuthority().GetState() == state
		}) {
			t.Errorf("no record says that a root is %s and tainted", state)
		}
	}
	is("active false")
	order("pause", "") // so that nothing goes on by itself
	order("taint", "")
	is("active true", "prepared false")
	recorded("active")
	// A successor that is tainted leaves at once: nothing chains to it.
	answer, err := admin.GetRotation(ctx, &adminv1.GetRotationRequest{})
	if err != nil {
		t.Fatal(err)
	}
	order("taint", answer.GetRotation().GetRoots()[1].GetId())
	is("active true")
	recorded("gone")
	order("taint", "") // which makes another one
	order("activate", "")
	is("retiring true", "active false")
	recorded("retiring")
}
