package store

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/meshid/meshid/pkg/server/registry"
)

func TestNodes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	a, b := node("a"), node("b")
	b.Previous, b.PreviousUntil, b.Confirmed = nil, time.Time{}, false
	for _, n := range []*registry.Node{b, a} {
		if err := d.PutNodes(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.TouchNodes(t.Context(), []registry.Touch{
		{ID: a.ID, Serial: []byte("other"), LastSeen: time.Unix(9, 0)},
		{ID: b.ID, Serial: b.Serial, Confirmed: true, PreviousUntil: time.Unix(7, 0), LastSeen: time.Unix(8, 0)},
	}); err != nil {
		t.Fatal(err)
	}
	b.Confirmed, b.PreviousUntil, b.LastSeen = true, time.Unix(7, 0), time.Unix(8, 0)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	got, err := d.Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]*registry.Node{a, b}, got, protocmp.Transform()); diff != "" {
		t.Errorf("nodes (-want +got):\n%s", diff)
	}
	banned := *a
	banned.State = registry.Banned
	if err := d.PutNodes(t.Context(), &banned); err != nil {
		t.Fatal(err)
	}
	if err := d.PruneNodes(t.Context(), a.NotAfter.Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if got, err = d.Nodes(t.Context()); err != nil || len(got) != 1 || got[0].State != registry.Banned {
		t.Errorf("after pruning: %v, %v: a banned node is never forgotten", got, err)
	}
	bad := node("c")
	bad.State = "sleeping"
	if err := d.PutNodes(t.Context(), bad); err == nil {
		t.Error("a node in an unknown state was stored")
	}
}
