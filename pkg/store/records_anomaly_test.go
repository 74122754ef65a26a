package store

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/ledger/search"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

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
