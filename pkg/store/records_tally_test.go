package store

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ledger/search"
)

// TestTallies counts records of the recent past, since older ones are forgotten.
func TestTallies(t *testing.T) {
	dir := t.TempDir()
	at := time.Now().Add(-2 * time.Hour).Truncate(time.Hour)
	refused := func(count uint64) func(*ledgerv1.Record) {
		return func(r *ledgerv1.Record) {
			r.Outcome, r.Reason, r.Certificate = ledgerv1.Outcome_OUTCOME_REFUSED, "rule_not_matched", nil
			if count > 0 {
				r.Summary = &ledgerv1.Summary{Count: count}
			}
		}
	}
	j := testJournal(t, filepath.Join(dir, "ledger"),
		issued(at.Add(-2*search.TallyAge), 1, testIdentity, "a"), // too old to be counted
		issued(at, 2, testIdentity, "a"),
		issued(at.Add(time.Second), 3, testIdentity, "b"),
		issued(at.Add(90*time.Second), 4, testIdentity+"/2", "b"),
		issued(at.Add(91*time.Second), 5, testIdentity, "b", refused(0)),
		issued(at.Add(92*time.Second), 6, testIdentity, "b", refused(40)))
	r := testRecords(t, filepath.Join(dir, "records.db"), j, 2) // in several batches
	got, err := r.Tallies(t.Context(), at, at.Add(time.Hour), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	ok, no := ledgerv1.Outcome_OUTCOME_SUCCESS, ledgerv1.Outcome_OUTCOME_REFUSED
	want := []search.Tally{
		{Start: at, Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ok, Total: 2},
		{Start: at.Add(time.Minute), Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ok, Total: 1},
		{Start: at.Add(time.Minute), Event: ledgerv1.Event_EVENT_ISSUE, Outcome: no, Reason: "rule_not_matched", Total: 41},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tallies (-want +got):\n%s", diff)
	}
	if old, err := r.Tallies(t.Context(), at.Add(-3*search.TallyAge), at, time.Hour); err != nil || len(old) > 0 {
		t.Errorf("old tallies: %v, %v: want none", old, err)
	}
	entries, err := r.EntryTallies(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]search.EntryTally{{Entry: "shop", Issued: 3, Refused: 41, Last: at.Add(90 * time.Second)}}, entries); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}

	now := at.Add(50 * time.Minute) // they live for an hour, and are to be replaced after 45 minutes
	identities, err := r.Identities(t.Context(), now, "orders", "", 10)
	if err != nil {
		t.Fatal(err)
	}
	wantIDs := []search.Identity{
		{SPIFFEID: testIdentity, Certificates: 2, Nodes: 2, Overdue: 2, First: at.Add(time.Hour), Last: at.Add(time.Hour + time.Second)},
		{SPIFFEID: testIdentity + "/2", Certificates: 1, Nodes: 1, Overdue: 1, First: at.Add(61*time.Minute + 30*time.Second), Last: at.Add(61*time.Minute + 30*time.Second)},
	}
	if diff := cmp.Diff(wantIDs, identities); diff != "" {
		t.Errorf("identities (-want +got):\n%s", diff)
	}
	if rest, err := r.Identities(t.Context(), now, "", testIdentity, 10); err != nil || len(rest) != 1 {
		t.Errorf("identities behind the first: %v, %v: want one", rest, err)
	}
	if none, err := r.Identities(t.Context(), now, "%", "", 10); err != nil || len(none) != 0 {
		t.Errorf("identities with %%: %v, %v: want none", none, err)
	}
	h, err := r.Horizon(t.Context(), now, 10*time.Minute, 2)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(search.Horizon{Expiring: []uint64{0, 3}, Active: 3, Overdue: 3}, h); diff != "" {
		t.Errorf("horizon (-want +got):\n%s", diff)
	}
}

func TestRecord(t *testing.T) {
	dir := t.TempDir()
	j := testJournal(t, filepath.Join(dir, "ledger"), history(epoch)...)
	r := testRecords(t, filepath.Join(dir, "records.db"), j, 100)
	f, err := r.Record(t.Context(), 1)
	if err != nil || f.Index != 1 || f.Record.GetRequestId() != history(epoch)[1].GetRequestId() {
		t.Errorf("record 1: %v, %v", f, err)
	}
	for _, index := range []uint64{j.Size(), 1 << 63} {
		if _, err := r.Record(t.Context(), index); !errors.Is(err, search.ErrNoRecord) {
			t.Errorf("record %d: %v: want ErrNoRecord", index, err)
		}
	}
}
