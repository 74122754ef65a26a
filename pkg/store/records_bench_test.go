package store

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
)

// BenchmarkRecords takes a journal of RECORDS records (100,000 by default) of 200
// nodes and 500 identities, and asks each question of it.
func BenchmarkRecords(b *testing.B) {
	n := 100_000
	if s := os.Getenv("RECORDS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			b.Fatal(err)
		}
	}
	dir := b.TempDir()
	j, err := ledger.Open(filepath.Join(dir, "ledger"), ledger.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { j.Close() })
	end := time.Now()
	appendTo(b, j, fleet(rand.New(rand.NewPCG(1, 2)), end.Add(-24*time.Hour), n, 200, 500)...)
	r, err := OpenRecords(b.Context(), filepath.Join(dir, "records.db"), j, RecordsOptions{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { r.Close() })

	start := time.Now()
	take(b, r, j, 1000)
	took := time.Since(start)
	b.Run("put", func(b *testing.B) {
		for b.Loop() { // it was measured above: records are taken once
		}
		b.ReportMetric(float64(n)/took.Seconds(), "records/s")
		b.ReportMetric(0, "ns/op")
		if st, err := os.Stat(filepath.Join(dir, "records.db")); err == nil {
			b.ReportMetric(float64(st.Size())/float64(n), "B/record")
		}
	})
	ctx := b.Context()
	id, node := "spiffe://example.org/i/7", testNode+"42"
	serial := serial(n / 2)
	for _, q := range []struct {
		name string
		ask  func() ([]search.Found, search.Position, error)
	}{
		{"who/identity", func() ([]search.Found, search.Position, error) {
			return r.Who(ctx, search.Holders{SPIFFEID: id, At: end, Limit: 100})
		}},
		{"who/node", func() ([]search.Found, search.Position, error) {
			return r.Who(ctx, search.Holders{Node: node, At: end, Limit: 100})
		}},
		{"who/authority", func() ([]search.Found, search.Position, error) {
			return r.Who(ctx, search.Holders{Authorities: []string{"0a1b"}, At: end, Limit: 100})
		}},
		{"who/root of 50 authorities", func() ([]search.Found, search.Position, error) {
			authorities := []string{"0a1b"}
			for i := range 49 {
				authorities = append(authorities, fmt.Sprintf("ff%02d", i))
			}
			return r.Who(ctx, search.Holders{Authorities: authorities, At: end, Limit: 100})
		}},
		{"who/identity on node", func() ([]search.Found, search.Position, error) {
			return r.Who(ctx, search.Holders{SPIFFEID: id, Node: node, At: end, Limit: 100})
		}},
		{"find/newest", func() ([]search.Found, search.Position, error) { return r.Find(ctx, search.Query{Limit: 100}) }},
		{"find/node between times", func() ([]search.Found, search.Position, error) {
			return r.Find(ctx, search.Query{Node: node, Since: end.Add(-12 * time.Hour), Until: end.Add(-11 * time.Hour)})
		}},
		{"find/serial", func() ([]search.Found, search.Position, error) { return r.Find(ctx, search.Query{Serial: serial}) }},
		{"find/request", func() ([]search.Found, search.Position, error) {
			return r.Find(ctx, search.Query{RequestID: fmt.Sprintf("r%d", n/2)})
		}},
		{"find/refused", func() ([]search.Found, search.Position, error) {
			return r.Find(ctx, search.Query{Outcome: ledgerv1.Outcome_OUTCOME_REFUSED, Limit: 100})
		}},
		{"find/identity refused on node", func() ([]search.Found, search.Position, error) {
			return r.Find(ctx, search.Query{SPIFFEID: id, Node: node, Outcome: ledgerv1.Outcome_OUTCOME_REFUSED, Limit: 100})
		}},
		{"find/anomaly", func() ([]search.Found, search.Position, error) {
			return r.Find(ctx, search.Query{Anomaly: "new_identity_on_node", Limit: 100})
		}},
		{"find/nothing in all of an entry", func() ([]search.Found, search.Position, error) {
			return r.Find(ctx, search.Query{Entry: "shop", Revision: 9, Limit: 100})
		}},
		{"first seen", func() ([]search.Found, search.Position, error) {
			return r.FirstSeen(ctx, end.Add(-7*24*time.Hour), "", 100, search.Position{})
		}},
		{"overdue", func() ([]search.Found, search.Position, error) {
			return r.Overdue(ctx, end, time.Time{}, 100, search.Position{})
		}},
		{"inventory", func() ([]search.Found, search.Position, error) {
			_, err := r.Inventory(ctx, end)
			return nil, search.Position{}, err
		}},
		{"before", func() ([]search.Found, search.Position, error) {
			_, err := r.Before(ctx, end.Add(-24*time.Hour))
			return nil, search.Position{}, err
		}},
	} {
		b.Run(q.name, func(b *testing.B) {
			found := 0
			for b.Loop() {
				list, _, err := q.ask()
				if err != nil {
					b.Fatal(err)
				}
				found = len(list)
			}
			b.ReportMetric(float64(found), "found")
		})
	}
}
