package store

import (
	"database/sql"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/pkg/ledger/search"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

func TestFind(t *testing.T) {
	dir := t.TempDir()
	j := testJournal(t, filepath.Join(dir, "ledger"), history(epoch)...)
	r := testRecords(t, filepath.Join(dir, "records.db"), j, 3)
	four := issued(epoch, 4, "", "").GetCertificate()
	for _, tc := range []struct {
		name string
		q    search.Query
		want []uint64
	}{
		{"all, the newest first", search.Query{}, []uint64{7, 6, 5, 4, 3, 2, 1, 0}},
		{"the oldest first", search.Query{Oldest: true}, []uint64{0, 1, 2, 3, 4, 5, 6, 7}},
		{"identity", search.Query{SPIFFEID: testIdentity}, []uint64{4, 3, 2, 1}},
		{"identity on a node", search.Query{SPIFFEID: testIdentity, Node: testNode + "a"}, []uint64{4, 3, 1}},
		{"node between two times", search.Query{Node: testNode + "a", Since: epoch.Add(3 * time.Minute), Until: epoch.Add(31 * time.Minute)}, []uint64{4, 3}},
		{"entry", search.Query{Entry: "shop", Event: ledgerv1.Event_EVENT_ENTRY_APPLIED}, []uint64{0}},
		{"entry at a revision", search.Query{Entry: "shop", Revision: 2}, nil},
		{"refusals", search.Query{Outcome: ledgerv1.Outcome_OUTCOME_REFUSED}, []uint64{3}},
		{"successes of an event", search.Query{Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS, Event: ledgerv1.Event_EVENT_ISSUE}, []uint64{5, 4, 2, 1}},
		{"reason", search.Query{Reason: "rule_not_matched"}, []uint64{3}},
		{"actor", search.Query{Actor: "uid:0"}, []uint64{6, 0}},
		{"request", search.Query{RequestID: "r2"}, []uint64{2}},
		{"serial", search.Query{Serial: four.GetSerial()}, []uint64{4}},
		{"certificate", search.Query{SHA256: four.GetSha256()}, []uint64{4}},
		{"key", search.Query{SPKI: four.GetSpkiSha256()}, []uint64{4}},
		{"key on another node", search.Query{SPKI: four.GetSpkiSha256(), Node: testNode + "b"}, nil},
		{"authority", search.Query{Authority: "0a1b", Node: testNode + "b"}, []uint64{2}},
		{"anomaly", search.Query{Anomaly: "new_identity_on_node"}, []uint64{5, 2, 1}},
		{"a name that nobody has", search.Query{Node: "nobody"}, nil},
		{"a rule that is none", search.Query{Anomaly: "full_moon"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			found, next, err := r.Find(t.Context(), tc.q)
			if err != nil || next.Valid {
				t.Fatal(err, next)
			}
			if d := cmp.Diff(tc.want, indexes(found), cmp.Transformer("empty", func(l []uint64) []uint64 { return append([]uint64{}, l...) })); d != "" {
				t.Error(d)
			}
			// The same page by page.
			var paged []uint64
			for q := tc.q; ; {
				q.Limit = 1
				found, next, err := r.Find(t.Context(), q)
				if err != nil {
					t.Fatal(err)
				}
				if paged = append(paged, indexes(found)...); !next.Valid {
					break
				}
				q.After = next
			}
			if !slices.Equal(paged, tc.want) {
				t.Errorf("page by page %v, want %v", paged, tc.want)
			}
		})
	}
}

// Whatever is in a filter is a value, and finds what has this value: nothing.
func TestV_L4_FiltersAreValues(t *testing.T) {
	dir := t.TempDir()
	j := testJournal(t, filepath.Join(dir, "ledger"), history(epoch)...)
	r := testRecords(t, filepath.Join(dir, "records.db"), j, 3)
	for _, evil := range []string{"' OR 1=1 --", `"; DROP TABLE records; --`, "%", "*", "a\x00b", "?1", "\u202e", strings.Repeat("'", 4000)} {
		for i, q := range []search.Query{
			{SPIFFEID: evil},
			{Node: evil},
			{Entry: evil},
			{Authority: evil},
			{Reason: evil},
			{Actor: evil},
			{RequestID: evil},
			{Serial: []byte(evil)},
			{SHA256: []byte(evil)},
			{SPKI: []byte(evil)},
			{Anomaly: evil},
		} {
			found, _, err := r.Find(t.Context(), q)
			if err != nil || len(found) > 0 {
				t.Errorf("query %d with %q: %d records, %v", i, evil, len(found), err)
			}
		}
		for _, q := range []search.Holders{{SPIFFEID: evil, At: epoch}, {Node: evil, At: epoch}, {Entry: evil, At: epoch}, {Authorities: []string{evil}, At: epoch}, {Authorities: []string{evil, "0a1b"}, SPIFFEID: evil, At: epoch}} {
			if found, _, err := r.Who(t.Context(), q); err != nil || len(found) > 0 {
				t.Errorf("who %+v: %d, %v", q, len(found), err)
			}
		}
		if found, _, err := r.FirstSeen(t.Context(), epoch, evil, 10, search.Position{}); err != nil || len(found) > 0 {
			t.Errorf("first seen on %q: %d, %v", evil, len(found), err)
		}
		if names, err := r.Names(t.Context(), evil, evil, 0); err != nil || len(names) > 0 {
			t.Errorf("names of %q: %q, %v", evil, names, err)
		}
	}
	if found, _, err := r.Find(t.Context(), search.Query{}); err != nil || len(found) != 8 {
		t.Errorf("%d records afterwards, %v", len(found), err)
	}
}

func TestWho(t *testing.T) {
	dir := t.TempDir()
	j := testJournal(t, filepath.Join(dir, "ledger"), history(epoch)...)
	r := testRecords(t, filepath.Join(dir, "records.db"), j, 100)
	type holder struct {
		Record uint64
		State  string
	}
	for _, tc := range []struct {
		name string
		q    search.Holders
		want []holder
	}{
		{"identity", search.Holders{SPIFFEID: testIdentity, At: epoch.Add(40 * time.Minute)}, []holder{{1, "replaced"}, {2, "withdrawn"}, {4, "current"}}},
		{"in use", search.Holders{SPIFFEID: testIdentity, At: epoch.Add(40 * time.Minute), Current: true}, []holder{{4, "current"}}},
		{"in use earlier", search.Holders{SPIFFEID: testIdentity, At: epoch.Add(20 * time.Minute), Current: true}, []holder{{1, "replaced"}, {2, "withdrawn"}}},
		{"node", search.Holders{Node: testNode + "a", At: epoch.Add(40 * time.Minute)}, []holder{{1, "replaced"}, {4, "current"}, {5, "dropped"}}},
		{"authority", search.Holders{Authorities: []string{"0a1b"}, At: epoch.Add(90 * time.Minute)}, []holder{{5, "dropped"}}},
		{"several authorities", search.Holders{Authorities: []string{"ffff", "0a1b", "0a1b"}, At: epoch.Add(40 * time.Minute)}, []holder{{1, "replaced"}, {2, "withdrawn"}, {4, "current"}, {5, "dropped"}}},
		{"authorities of an identity", search.Holders{SPIFFEID: testIdentity, Authorities: []string{"ffff", "0a1b"}, At: epoch.Add(40 * time.Minute), Current: true}, []holder{{4, "current"}}},
		{"authorities that nobody has", search.Holders{Authorities: []string{"ffff", "eeee"}, At: epoch.Add(40 * time.Minute)}, nil},
		{"entry and node", search.Holders{Entry: "shop", Node: testNode + "b", At: epoch.Add(40 * time.Minute)}, []holder{{2, "withdrawn"}}},
		{"before", search.Holders{SPIFFEID: testIdentity, At: epoch.Add(-time.Hour)}, nil},
		{"after", search.Holders{SPIFFEID: testIdentity, At: epoch.Add(24 * time.Hour)}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []holder
			for q := tc.q; ; {
				q.Limit = 1
				found, next, err := r.Who(t.Context(), q)
				if err != nil {
					t.Fatal(err)
				}
				for _, f := range found {
					got = append(got, holder{f.Index, f.State.String()})
				}
				if !next.Valid {
					break
				}
				q.After = next
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("%v, want %v", got, tc.want)
			}
		})
	}
}

func TestOverdue(t *testing.T) {
	dir := t.TempDir()
	j := testJournal(t, filepath.Join(dir, "ledger"), history(epoch)...)
	r := testRecords(t, filepath.Join(dir, "records.db"), j, 100)
	for _, tc := range []struct {
		at, expired time.Duration
		want        []uint64
	}{
		{74 * time.Minute, 0, nil},
		{76 * time.Minute, 0, []uint64{4}}, // three quarters of an hour after minute 30; the others were replaced or ended
		{91 * time.Minute, 0, nil},
		{100 * time.Minute, 60 * time.Minute, []uint64{4}},
	} {
		var expired time.Time
		if tc.expired != 0 {
			expired = epoch.Add(tc.expired)
		}
		found, _, err := r.Overdue(t.Context(), epoch.Add(tc.at), expired, 0, search.Position{})
		if err != nil || !slices.Equal(indexes(found), tc.want) {
			t.Errorf("after %v: %v, %v, want %v", tc.at, indexes(found), err, tc.want)
		}
		if len(found) > 0 && !found[0].Since.Equal(epoch.Add(75*time.Minute)) {
			t.Errorf("overdue since %v", found[0].Since)
		}
	}
	i, err := r.Inventory(t.Context(), epoch.Add(80*time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	want := Inventory{Active: 1, Overdue: 1, Expiring: []uint64{1, 1, 1, 1, 1}}
	if d := cmp.Diff(want, i); d != "" {
		t.Error(d)
	}
	if i, err = r.Inventory(t.Context(), epoch.Add(35*time.Minute)); err != nil || i.Active != 1 || i.Overdue != 0 || !slices.Equal(i.Expiring, []uint64{0, 0, 1, 1, 1}) {
		t.Errorf("%+v, %v", i, err)
	}
}

func TestFirstSeen(t *testing.T) {
	dir := t.TempDir()
	j := testJournal(t, filepath.Join(dir, "ledger"), history(epoch)...)
	r := testRecords(t, filepath.Join(dir, "records.db"), j, 100)
	found, next, err := r.FirstSeen(t.Context(), epoch.Add(2*time.Minute), "", 1, search.Position{})
	if err != nil || !next.Valid || !slices.Equal(indexes(found), []uint64{5}) || !found[0].Fresh {
		t.Errorf("%v, %v, %v", indexes(found), next, err)
	}
	found, next, err = r.FirstSeen(t.Context(), epoch.Add(2*time.Minute), "", 1, next)
	if err != nil || next.Valid || !slices.Equal(indexes(found), []uint64{2}) || found[0].Fresh {
		t.Errorf("%v, %v, %v", indexes(found), next, err)
	}
	for node, want := range map[string][]uint64{testNode + "a": {5, 1}, testNode + "b": {2}, testNode + "c": nil} {
		found, next, err := r.FirstSeen(t.Context(), epoch, node, 10, search.Position{})
		if err != nil || next.Valid || !slices.Equal(indexes(found), want) {
			t.Errorf("%s: %v, %v, %v", node, indexes(found), next, err)
		}
	}
}

// Lists of several authorities are one list, in the order of expiry, whatever the
// length of its pages.
func TestWhoUnderSeveralAuthorities(t *testing.T) {
	dir := t.TempDir()
	var records []*ledgerv1.Record
	for i := range 30 {
		records = append(records, issued(epoch.Add(time.Duration(i*7%30)*time.Minute), i+1, testIdentity, "a", func(r *ledgerv1.Record) {
			r.Instance, r.Authority = fmt.Sprint("docker:", i), &ledgerv1.Authority{Id: fmt.Sprintf("%02x", i%4)}
		}))
	}
	j := testJournal(t, filepath.Join(dir, "ledger"), records...)
	r := testRecords(t, filepath.Join(dir, "records.db"), j, 100)
	ask := func(limit int) (serials []string) {
		for q := (search.Holders{Authorities: []string{"00", "01", "03"}, At: epoch.Add(31 * time.Minute), Limit: limit}); ; {
			found, next, err := r.Who(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range found {
				serials = append(serials, fmt.Sprintf("%d %x", f.Record.GetCertificate().GetNotAfter().GetSeconds(), f.Record.GetCertificate().GetSerial()))
			}
			if q.After = next; !next.Valid {
				return serials
			}
		}
	}
	all := ask(100)
	if len(all) != 23 || !slices.IsSorted(all) {
		t.Errorf("%d certificates: %q", len(all), all)
	}
	for _, limit := range []int{1, 2, 5, 22} {
		if got := ask(limit); !slices.Equal(got, all) {
			t.Errorf("in pages of %d: %q", limit, got)
		}
	}
}

// Every question is answered through an index.
func TestQueryPlans(t *testing.T) {
	dir := t.TempDir()
	j := testJournal(t, filepath.Join(dir, "ledger"), history(epoch)...)
	r := testRecords(t, filepath.Join(dir, "records.db"), j, 100)
	for _, tc := range []struct {
		q    search.Query
		want string
	}{
		{search.Query{}, "records_time"},
		{search.Query{SPIFFEID: testIdentity, Node: testNode + "a", Outcome: ledgerv1.Outcome_OUTCOME_REFUSED, Since: epoch}, "records_identity"},
		{search.Query{Node: testNode + "a", Since: epoch, Until: epoch.Add(time.Hour)}, "records_node (node=? AND time>? AND time<?)"},
		{search.Query{Entry: "shop", Event: ledgerv1.Event_EVENT_ISSUE, Revision: 1, Since: epoch}, "records_entry"},
		{search.Query{Authority: "0a1b"}, "records_authority"},
		{search.Query{Outcome: ledgerv1.Outcome_OUTCOME_REFUSED}, "records_failure"},
		{search.Query{Reason: "rule_not_matched"}, "records_reason"},
		{search.Query{RequestID: "r1"}, "records_request"},
		{search.Query{Serial: []byte{1}}, "certificates_serial"},
		{search.Query{SHA256: []byte{1}}, "certificates_sha256"},
		{search.Query{SPKI: []byte{1}}, "certificates_spki"},
		{search.Query{Anomaly: "key_reuse"}, "records_anomalies"},
		{search.Query{Event: ledgerv1.Event_EVENT_BAN, After: search.Position{Key: 1, Record: 1, Valid: true}}, "records_event"},
	} {
		query, args, ok, err := r.findQuery(t.Context(), tc.q)
		if err != nil || !ok {
			t.Fatal(err, ok)
		}
		plan := explain(t, r, query, args)
		sorted := strings.Contains(plan, "TEMP B-TREE") && tc.q.RequestID == "" && tc.q.Serial == nil && tc.q.SHA256 == nil && tc.q.SPKI == nil
		if !strings.Contains(plan, tc.want) || sorted {
			t.Errorf("%+v:\n%s\nwant %s, and nothing sorted", tc.q, plan, tc.want)
		}
	}
}

func explain(t *testing.T, r *Records, query string, args []any) string {
	t.Helper()
	var plan []string
	if err := scanRows(t.Context(), r.db.reader, "EXPLAIN QUERY PLAN "+query, args, func(rows *sql.Rows) error {
		var a, b, c int
		var detail string
		if err := rows.Scan(&a, &b, &c, &detail); err != nil {
			return err
		}
		plan = append(plan, detail)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return strings.Join(plan, "\n")
}
