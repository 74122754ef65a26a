package store

import (
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
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
