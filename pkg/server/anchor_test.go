package server

import (
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/types/known/timestamppb"

	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/store"
)

// The CA is killed between the steps of a change, or comes from a version that had
// no anchor: what was recorded and committed is in force, what was not committed is
// not, and nobody cries wolf.
func TestFault_F16_KilledBetweenTheSteps(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "store.anchor")
	anchored := func(c *Config) {
		db, ok := c.Store.(*store.DB)
		if !ok {
			t.Fatalf("the store is a %T", c.Store)
		}
		a, err := OpenAnchor(t.Context(), path, c.Ledger, db, c.Version)
		if err != nil {
			t.Fatal(err)
		}
		c.Anchor = a
	}
	entry := func(name, id string) *entryv1.Entry {
		return &entryv1.Entry{Name: name, SpiffeId: "spiffe://" + td.Name() + id, Workloads: `unix.uid == 1000`}
	}
	h := newHouse(t, anchored)
	inForce := func(when string, want ...string) {
		t.Helper()
		if got := h.server.registry.Entries(); got.Set.Len() != len(want) || len(got.Broken) != 0 {
			t.Errorf("%s: %v are in force, %v are broken", when, got.Names(), got.Broken)
		}
		for _, c := range h.health.Conditions() {
			if c.Name == conditionUnrecorded && c.Severity != health.OK {
				t.Errorf("%s: %s", when, c.Message)
			}
		}
	}
	h.apply(entry("a", "/a"))
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h.apply(entry("a", "/changed"), entry("b", "/b"))
	h.stop()

	// Killed before the change was noted.
	if err := os.WriteFile(path, before, 0o600); err != nil {
		t.Fatal(err)
	}
	h.start(anchored)
	inForce("not noted", "a", "b")
	if e, _ := h.server.registry.Entries().Proto("a"); e.GetSpiffeId() != "spiffe://"+td.Name()+"/changed" {
		t.Errorf("the entry is %v", e)
	}

	// Killed before the change was committed.
	next := entry("a", "/never")
	revision := h.server.registry.Entries().Revision + 1
	if _, err := h.journal.Append(t.Context(), ledger.NewDraft(&ledgerv1.Record{
		Version: recordVersion, Time: timestamppb.Now(), Event: ledgerv1.Event_EVENT_ENTRY_APPLIED, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
		Entry: &ledgerv1.EntryRef{Name: "a", Revision: revision}, Definition: next,
	}, nil)); err != nil {
		t.Fatal(err)
	}
	h.stop()
	h.start(anchored)
	inForce("not committed", "a", "b")
	h.stop()

	// The same without an anchor.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	h.start(anchored)
	inForce("without an anchor", "a", "b")
}

// A damaged anchor is said, not guessed at.
func TestAnchorDamaged(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "store.anchor")
	if err := os.WriteFile(path, []byte(`{"epoch": 7}`), 0o600); err != nil {
		t.Fatal(err)
	}
	h := newHouse(t)
	if a, err := OpenAnchor(t.Context(), path, h.journal, h.store, "v0"); err == nil {
		t.Fatalf("%v", a)
	}
}
