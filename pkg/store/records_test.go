package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/protobuf/types/known/timestamppb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
)

const (
	testIdentity = "spiffe://example.org/shop/orders"
	testNode     = "spiffe://example.org/meshid/node/join_token/"
)

// issued is a record of an issuance; n names its certificate.
func issued(at time.Time, n int, id, node string, change ...func(*ledgerv1.Record)) *ledgerv1.Record {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(n))
	key := sha256.Sum256(b[:])
	sum := sha256.Sum256(key[:])
	r := &ledgerv1.Record{
		Version: 1, Time: timestamppb.New(at), Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
		TrustDomain: "example.org", SpiffeId: id, Kind: ledgerv1.Kind_KIND_FIRST, VerifiedBy: "agent",
		Certificate: &ledgerv1.Certificate{
			Serial: key[:16], Sha256: sum[:], SpkiSha256: key[:], KeyAlgorithm: "EC-P256",
			NotBefore: timestamppb.New(at.Add(-5 * time.Minute)), NotAfter: timestamppb.New(at.Add(time.Hour)),
		},
		Instance: "docker:" + fmt.Sprint(n),
		Workload: &attributesv1.Workload{Docker: &attributesv1.Docker{
			ContainerId: fmt.Sprint(n), Name: "orders", ImageDigest: "sha256:aa", Labels: map[string]string{"app": "orders"},
		}},
		Node:      &ledgerv1.NodeRef{Id: testNode + node, Attributes: &attributesv1.Node{Method: "join_token", Id: node}},
		Entry:     &ledgerv1.EntryRef{Name: "shop", Revision: 1},
		Authority: &ledgerv1.Authority{Id: "0a1b", Role: "intermediate"}, RequestId: fmt.Sprintf("r%d", n),
	}
	for _, c := range change {
		c(r)
	}
	return r
}

// serial is that of issued's certificate n.
func serial(n int) []byte { return issued(time.Time{}, n, "", "").GetCertificate().GetSerial() }

// testJournal is a journal with these records.
func testJournal(t testing.TB, dir string, records ...*ledgerv1.Record) *ledger.Journal {
	t.Helper()
	j, err := ledger.Open(dir, ledger.Options{SegmentBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	appendTo(t, j, records...)
	return j
}

func appendTo(t testing.TB, j *ledger.Journal, records ...*ledgerv1.Record) {
	t.Helper()
	for chunk := range slices.Chunk(records, 500) {
		var drafts []*ledger.Draft
		for _, r := range chunk {
			drafts = append(drafts, ledger.NewDraft(r, nil))
		}
		if _, err := j.Append(t.Context(), drafts...); err != nil {
			t.Fatal(err)
		}
	}
}

// testRecords is the projection of j, with all its records in batches of n.
func testRecords(t testing.TB, path string, j *ledger.Journal, n int) *Records {
	t.Helper()
	r, err := OpenRecords(t.Context(), path, j, RecordsOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	take(t, r, j, n)
	return r
}

// take puts the records of j that r does not have.
func take(t testing.TB, r *Records, j *ledger.Journal, n int) {
	t.Helper()
	next, err := r.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for batch := range batches(t, j, next, n) {
		if err := r.Put(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
}

func batches(t testing.TB, j *ledger.Journal, from uint64, n int) func(yield func([]ledger.Entry) bool) {
	return func(yield func([]ledger.Entry) bool) {
		var batch []ledger.Entry
		if from >= j.Size() {
			return
		}
		for e, err := range ledger.Scan(j.Dir(), from) {
			if err != nil {
				t.Fatal(err)
			}
			if batch = append(batch, e); len(batch) == n {
				if !yield(batch) {
					return
				}
				batch = nil
			}
		}
		if len(batch) > 0 {
			yield(batch)
		}
	}
}

// indexes are those of found records.
func indexes(found []search.Found) []uint64 {
	list := make([]uint64, len(found))
	for i, f := range found {
		list[i] = f.Index
	}
	return list
}

// history is a small story: orders runs on two nodes, is renewed, is refused, and
// a node is banned.
func history(at time.Time) []*ledgerv1.Record {
	refused := issued(at.Add(3*time.Minute), 3, testIdentity, "a", func(r *ledgerv1.Record) {
		r.Outcome, r.Reason, r.Certificate = ledgerv1.Outcome_OUTCOME_REFUSED, "rule_not_matched", nil
	})
	return []*ledgerv1.Record{
		{Event: ledgerv1.Event_EVENT_ENTRY_APPLIED, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS, Time: timestamppb.New(at), Entry: &ledgerv1.EntryRef{Name: "shop", Revision: 1}, Actor: "uid:0"},
		issued(at.Add(time.Minute), 1, testIdentity, "a"),
		issued(at.Add(2*time.Minute), 2, testIdentity, "b"),
		refused,
		issued(at.Add(30*time.Minute), 4, testIdentity, "a", func(r *ledgerv1.Record) {
			r.Kind, r.PreviousSerial, r.Instance = ledgerv1.Kind_KIND_RENEWAL, serial(1), "docker:1"
		}),
		issued(at.Add(31*time.Minute), 5, "spiffe://example.org/shop/web", "a"),
		{Event: ledgerv1.Event_EVENT_BAN, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS, Time: timestamppb.New(at.Add(32 * time.Minute)), Node: &ledgerv1.NodeRef{Id: testNode + "b"}, Actor: "uid:0"},
		{Event: ledgerv1.Event_EVENT_INSTANCE_ENDED, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS, Time: timestamppb.New(at.Add(33 * time.Minute)), Node: &ledgerv1.NodeRef{Id: testNode + "a"}, Instance: "docker:5"},
	}
}

var epoch = time.Date(2026, 11, 23, 14, 0, 0, 0, time.UTC)

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

// Who waits for the index waits for what was in the ledger when the waiting began,
// and for nothing else; what cannot be found is counted.
func TestCatchUp(t *testing.T) {
	dir := t.TempDir()
	j := testJournal(t, filepath.Join(dir, "ledger"), history(epoch)...)
	path := filepath.Join(dir, "records.db")
	r, err := OpenRecords(t.Context(), path, j, RecordsOptions{})
	if err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if n := r.CatchUp(over); n != 8 {
		t.Errorf("%d records behind, want 8", n)
	}
	behind := make(chan uint64)
	go func() { behind <- r.CatchUp(t.Context()) }()
	for batch := range batches(t, j, 0, 3) {
		select {
		case n := <-behind:
			t.Fatalf("over before record %d is taken, with %d", batch[0].Index, n)
		default:
		}
		if err := r.Put(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
	if n := <-behind; n != 0 {
		t.Errorf("%d records behind", n)
	}
	// What was taken is known after a restart, and taking it again changes nothing.
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r = testRecords(t, path, j, 3)
	for batch := range batches(t, j, 0, 5) {
		if err := r.Put(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
		if n := r.CatchUp(over); n != 0 {
			t.Errorf("%d records behind", n)
		}
	}
	appendTo(t, j, history(epoch.Add(time.Hour))[:2]...)
	if n := r.CatchUp(over); n != 2 {
		t.Errorf("%d records behind, want 2", n)
	}
}

// Each rule marks what it is about, and nothing else.
func TestAnomalies(t *testing.T) {
	at := epoch
	renewal := func(previous int, digest string) func(*ledgerv1.Record) {
		return func(r *ledgerv1.Record) {
			r.Kind, r.PreviousSerial, r.Workload.Docker.ImageDigest = ledgerv1.Kind_KIND_RENEWAL, serial(previous), digest
		}
	}
	key := func(n int) func(*ledgerv1.Record) {
		return func(r *ledgerv1.Record) {
			r.Certificate.SpkiSha256 = issued(at, n, "", "").GetCertificate().GetSpkiSha256()
		}
	}
	records := []*ledgerv1.Record{
		issued(at, 0, testIdentity, "a"),                          // new
		issued(at, 1, testIdentity, "a", renewal(0, "sha256:aa")), // nothing
		issued(at, 2, testIdentity, "a", renewal(1, "sha256:bb")), // image
		issued(at, 3, testIdentity, "b", renewal(2, "sha256:cc")), // new; the serial is not that node's
		issued(at, 4, "spiffe://example.org/other", "a", key(1)),  // new, key
		issued(at, 5, testIdentity, "a", key(1)),                  // key: other has it too
		issued(at, 6, "spiffe://example.org/third", "a", key(6)),  // new
		{Event: ledgerv1.Event_EVENT_RENEW_AGENT, Outcome: ledgerv1.Outcome_OUTCOME_REFUSED, Reason: "cloned_agent", Time: timestamppb.New(at), Node: &ledgerv1.NodeRef{Id: testNode + "a"}},
	}
	for n := range 12 { // six nodes of two identities, then one of many
		records = append(records, issued(at, 100+n, fmt.Sprintf("spiffe://example.org/i/%d", n%2), fmt.Sprintf("peer-%d", n/2)))
	}
	for n := range 12 {
		records = append(records, issued(at, 200+n, fmt.Sprintf("spiffe://example.org/many/%d", n), "wide"))
	}
	dir := t.TempDir()
	j := testJournal(t, filepath.Join(dir, "ledger"))
	r := testRecords(t, filepath.Join(dir, "records.db"), j, 1)
	appendTo(t, j, records...)
	take(t, r, j, 5)
	want := map[string][]uint64{
		"identity_fan_out":    {31, 30}, // the eleventh and the twelfth
		"key_reuse":           {5, 4},
		"image_digest_change": {2},
		"agent_clone":         {7},
	}
	counts := `# HELP meshid_ca_anomalies_total Records of the ledger that are unusual by a rule, since the search index was begun; it outlives restarts.
# TYPE meshid_ca_anomalies_total counter
`
	for rule, name := range search.Anomalies {
		found, _, err := r.Find(t.Context(), search.Query{Anomaly: name})
		if err != nil {
			t.Fatal(err)
		}
		if w, ok := want[name]; ok && !slices.Equal(indexes(found), w) {
			t.Errorf("%s: %v, want %v", name, indexes(found), w)
		}
		if name == "new_identity_on_node" && len(found) != 4+12+12 {
			t.Errorf("%s: %v", name, indexes(found))
		}
		if n := r.counts[rule].Load(); n != uint64(len(found)) {
			t.Errorf("%s is counted %d times, and found %d times", name, n, len(found))
		}
		counts += fmt.Sprintf("meshid_ca_anomalies_total{rule=%q} %d\n", name, len(found))
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	// They outlive a restart.
	reg := prometheus.NewRegistry()
	r, err := OpenRecords(t.Context(), filepath.Join(dir, "records.db"), j, RecordsOptions{Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(counts), "\n")
	slices.Sort(lines[2:])
	if err := testutil.GatherAndCompare(reg, strings.NewReader(strings.Join(lines, "\n")+"\n"), "meshid_ca_anomalies_total"); err != nil {
		t.Error(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	// An index that is made anew finds the same, and raises no alarm for what was.
	if err := removeDatabase(filepath.Join(dir, "records.db")); err != nil {
		t.Fatal(err)
	}
	r = testRecords(t, filepath.Join(dir, "records.db"), j, 7)
	appendTo(t, j, issued(at, 900, testIdentity, "late"))
	take(t, r, j, 7)
	found, _, err := r.Find(t.Context(), search.Query{Anomaly: "image_digest_change"})
	if err != nil || len(found) != 1 || r.counts[search.ImageDigestChange].Load() != 0 || r.counts[search.NewIdentityOnNode].Load() != 1 {
		t.Errorf("found %d, counted %d and %d, %v", len(found), r.counts[search.ImageDigestChange].Load(), r.counts[search.NewIdentityOnNode].Load(), err)
	}
}

// dump is all that is in the tables.
func dump(t *testing.T, r *Records) map[string][]string {
	t.Helper()
	all := make(map[string][]string)
	for table, query := range map[string]string{
		"records":       `SELECT idx || '|' || time || '|' || event || '|' || coalesce(anomalies, 0) || '|' || coalesce(identity, 0) FROM records ORDER BY 1`,
		"certificates":  `SELECT record || '|' || hex(serial) || '|' || state || '|' || state_at || '|' || coalesce(replaced_by, 0) || '|' || coalesce(overdue_at, 0) FROM certificates ORDER BY 1`,
		"sightings":     `SELECT record || '|' || identity || '|' || node || '|' || fresh FROM sightings ORDER BY 1`,
		"fan_out":       `SELECT node || '|' || identities FROM fan_out ORDER BY 1`,
		"anomalies":     `SELECT rule || '|' || total FROM anomaly_counts ORDER BY 1`,
		"tallies":       `SELECT minute || '|' || event || '|' || outcome || '|' || reason || '|' || total FROM tallies ORDER BY 1`,
		"entry_tallies": `SELECT hour || '|' || entry || '|' || outcome || '|' || total || '|' || last FROM entry_tallies ORDER BY 1`,
		"entry_changes": `SELECT record || '|' || entry || '|' || revision FROM entry_changes ORDER BY 1`,
		"names":         `SELECT id || '|' || kind || '|' || name FROM names ORDER BY 1`,
		"cursor":        `SELECT next || '|' || segment || '|' || position || '|' || hex(hash) FROM cursor`,
	} {
		if err := scanRows(t.Context(), r.db.reader, query, nil, func(rows *sql.Rows) error {
			var line string
			if err := rows.Scan(&line); err != nil {
				return err
			}
			all[table] = append(all[table], line)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// fleet is a story of n records: instances come, are renewed, and go.
func fleet(rng *rand.Rand, at time.Time, n, nodes, identities int) []*ledgerv1.Record {
	type instance struct {
		serial   []byte
		instance string
		id       string
		node     string
	}
	var live []instance
	records := make([]*ledgerv1.Record, 0, n)
	step := 24 * time.Hour / time.Duration(n)
	for i := range n {
		at = at.Add(step)
		switch {
		case rng.IntN(50) == 0 && len(live) > 0: // ends
			k := rng.IntN(len(live))
			records = append(records, &ledgerv1.Record{
				Event: ledgerv1.Event_EVENT_INSTANCE_ENDED, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS, Time: timestamppb.New(at),
				Node: &ledgerv1.NodeRef{Id: testNode + live[k].node}, Instance: live[k].instance,
				Dropped: []*ledgerv1.Certificate{{Serial: live[k].serial}},
			})
			live = slices.Delete(live, k, k+1)
		case rng.IntN(3) > 0 && len(live) > 0: // is renewed
			l := &live[rng.IntN(len(live))]
			r := issued(at, i, l.id, l.node, func(r *ledgerv1.Record) {
				r.Instance, r.PreviousSerial, r.Kind = l.instance, l.serial, ledgerv1.Kind_KIND_RENEWAL
			})
			l.serial = r.GetCertificate().GetSerial()
			records = append(records, r)
		case rng.IntN(20) == 0: // is refused
			records = append(records, issued(at, i, fmt.Sprintf("spiffe://example.org/i/%d", rng.IntN(identities)), fmt.Sprint(rng.IntN(nodes)), func(r *ledgerv1.Record) {
				r.Outcome, r.Reason, r.Certificate = ledgerv1.Outcome_OUTCOME_REFUSED, "rule_not_matched", nil
			}))
		default: // comes
			l := instance{id: fmt.Sprintf("spiffe://example.org/i/%d", rng.IntN(identities)), node: fmt.Sprint(rng.IntN(nodes)), instance: fmt.Sprintf("docker:%d", i)}
			r := issued(at, i, l.id, l.node)
			l.serial = r.GetCertificate().GetSerial()
			live = append(live, l)
			records = append(records, r)
		}
	}
	return records
}

// However records are divided, repeated and interrupted, the tables are the same.
func TestRecordsExactlyOnce(t *testing.T) {
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(1, 2))
	j := testJournal(t, filepath.Join(dir, "ledger"))
	once := testRecords(t, filepath.Join(dir, "once.db"), j, 1000)
	appendTo(t, j, fleet(rng, epoch, 1500, 7, 12)...)
	take(t, once, j, 1000)
	want := dump(t, once)
	if len(want["certificates"]) == 0 || len(want["sightings"]) == 0 {
		t.Fatal("the story is empty")
	}
	all := slices.Concat(slices.Collect(batches(t, j, 0, 1000))...)
	for round := range 3 {
		path := filepath.Join(dir, fmt.Sprintf("again-%d.db", round))
		empty := testJournal(t, filepath.Join(dir, fmt.Sprintf("empty-%d", round)))
		if r, err := OpenRecords(t.Context(), path, empty, RecordsOptions{}); err != nil { // so that all raise alarms
			t.Fatal(err)
		} else if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r, err := OpenRecords(t.Context(), path, j, RecordsOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for {
			next, err := r.Next(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if next == uint64(len(all)) {
				break
			}
			batch := all[next:min(next+1+uint64(rng.IntN(400)), uint64(len(all)))]
			switch rng.IntN(4) {
			case 0: // interrupted anywhere
				ctx, cancel := context.WithCancel(t.Context())
				stop := time.AfterFunc(time.Duration(rng.IntN(5000))*time.Microsecond, cancel)
				err := r.Put(ctx, batch)
				stop.Stop()
				cancel()
				if err != nil && ctx.Err() == nil {
					t.Fatal(err)
				}
			case 1: // a restart, without anything in memory
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				if r, err = OpenRecords(t.Context(), path, j, RecordsOptions{}); err != nil {
					t.Fatal(err)
				}
			case 2: // twice
				if err := errors.Join(r.Put(t.Context(), batch), r.Put(t.Context(), batch)); err != nil {
					t.Fatal(err)
				}
			default: // with what was taken before in front
				from := next - min(next, uint64(rng.IntN(50)))
				if err := r.Put(t.Context(), all[from:next+uint64(len(batch))]); err != nil {
					t.Fatal(err)
				}
			}
		}
		got := dump(t, r)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("round %d (-once +again):\n%.2000s", round, d)
		}
		for rule := range search.Anomaly(search.Rules) {
			if a, b := once.counts[rule].Load(), r.counts[rule].Load(); a != b {
				t.Errorf("%v is counted %d times, want %d", rule, b, a)
			}
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// An index of another journal, of a newer copy of this one, or that is no database
// is made anew.
func TestRecordsRebuild(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "records.db")
	j := testJournal(t, filepath.Join(dir, "ledger"), history(epoch)...)
	for name, spoil := range map[string]func(t *testing.T){
		"nothing": func(*testing.T) {},
		"another journal": func(t *testing.T) {
			other := testJournal(t, filepath.Join(dir, "other"), fleet(rand.New(rand.NewPCG(1, 2)), epoch, 8, 2, 2)...)
			if err := testRecords(t, path, other, 100).Close(); err != nil {
				t.Fatal(err)
			}
		},
		"a longer journal": func(t *testing.T) {
			other := testJournal(t, filepath.Join(dir, "longer"), fleet(rand.New(rand.NewPCG(1, 2)), epoch, 100, 2, 2)...)
			if err := testRecords(t, path, other, 100).Close(); err != nil {
				t.Fatal(err)
			}
		},
		"no database": func(t *testing.T) {
			if err := os.WriteFile(path, []byte(strings.Repeat("this is no database\n", 1000)), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := removeDatabase(path); err != nil {
				t.Fatal(err)
			}
			spoil(t)
			r := testRecords(t, path, j, 100)
			defer r.Close()
			found, _, err := r.Find(t.Context(), search.Query{SPIFFEID: testIdentity})
			if err != nil || len(found) != 4 {
				t.Errorf("%d records, %v", len(found), err)
			}
		})
	}
}

// Archived records leave the index; what was first seen when stays known.
func TestForget(t *testing.T) {
	dir := t.TempDir()
	j := testJournal(t, filepath.Join(dir, "ledger"), fleet(rand.New(rand.NewPCG(1, 2)), epoch, 5000, 7, 12)...)
	r := testRecords(t, filepath.Join(dir, "records.db"), j, 1000)
	limit, err := r.Before(t.Context(), epoch.Add(20*time.Hour))
	if err != nil || limit < 4000 || limit > 4300 {
		t.Fatalf("before: %d, %v", limit, err)
	}
	report, err := j.Archive(t.Context(), filepath.Join(dir, "archive"), limit, nil, nil)
	if err != nil || report.Segments < 2 {
		t.Fatalf("%+v, %v", report, err)
	}
	// What is gone already is left out.
	if found, _, err := r.Find(t.Context(), search.Query{Oldest: true}); err != nil || len(found) > 0 && found[0].Index < report.Head.Size {
		t.Errorf("%d records, %v", len(found), err)
	}
	if err := r.Forget(t.Context(), report.Head.Size); err != nil {
		t.Fatal(err)
	}
	found, _, err := r.Find(t.Context(), search.Query{Oldest: true, Limit: 1})
	if err != nil || len(found) != 1 || found[0].Index != report.Head.Size {
		t.Errorf("the first record is %v, %v, want %d", indexes(found), err, report.Head.Size)
	}
	before := r.counts[search.NewIdentityOnNode].Load()
	appendTo(t, j, issued(epoch.Add(25*time.Hour), 1, "spiffe://example.org/i/1", "1"))
	take(t, r, j, 10)
	if r.counts[search.NewIdentityOnNode].Load() != before {
		t.Error("an identity is new again after its records were archived")
	}
	if limit, err = r.Before(t.Context(), epoch.Add(1000*time.Hour)); err != nil || limit != j.Size() {
		t.Errorf("before the future: %d, %v", limit, err)
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
