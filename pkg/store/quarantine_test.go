package store

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/pkg/server/registry"
)

// TestV_L2_WithdrawnStaysWithdrawn: neither time, nor pruning, nor a restart brings back
// what is quarantined or banned; only lifting does. A random history is held against a
// model of it.
func TestV_L2_WithdrawnStaysWithdrawn(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 2))
			path := filepath.Join(t.TempDir(), "ca.db")
			d := open(t, path)
			now := time.Unix(1_800_000_000, 0)
			quarantined, banned := make(map[string]bool), make(map[string]bool)
			some := func() *registry.Quarantine {
				n := byte(random.IntN(8))
				q := &registry.Quarantine{Reason: "r", CreatedBy: "uid:0", CreatedAt: now}
				switch random.IntN(3) {
				case 0:
					q.SPIFFEID = fmt.Sprint("spiffe://example.org/", n)
				case 1:
					q.Serial = []byte{1, n}
				default:
					q.KeySHA256 = slices.Repeat([]byte{n}, 32)
				}
				return q
			}
			for range 200 {
				now = now.Add(time.Duration(random.Int64N(int64(90 * 24 * time.Hour))))
				switch random.IntN(6) {
				case 0, 1:
					q := some()
					if err := d.PutQuarantines(t.Context(), q); err != nil {
						t.Fatal(err)
					}
					quarantined[q.Name()] = true
				case 2:
					q := some()
					if !quarantined[q.Name()] {
						continue
					}
					if err := d.DeleteQuarantines(t.Context(), func() error { return nil }, q); err != nil {
						t.Fatal(err)
					}
					delete(quarantined, q.Name())
				case 3:
					n := node(fmt.Sprint("n", random.IntN(8)))
					n.NotAfter = now.Add(time.Hour)
					if random.IntN(2) == 0 {
						n.State = registry.Banned
						banned[n.ID] = true
					} else {
						delete(banned, n.ID)
					}
					if err := d.PutNodes(t.Context(), n); err != nil {
						t.Fatal(err)
					}
				case 4:
					if err := d.PruneNodes(t.Context(), now); err != nil {
						t.Fatal(err)
					}
				default:
					if err := d.Close(); err != nil {
						t.Fatal(err)
					}
					d = open(t, path)
				}
				gotQuarantined, gotBanned := make(map[string]bool), make(map[string]bool)
				quarantines, err := d.Quarantines(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for _, q := range quarantines {
					gotQuarantined[q.Name()] = true
				}
				nodes, err := d.Nodes(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for _, n := range nodes {
					if n.State == registry.Banned {
						gotBanned[n.ID] = true
					}
				}
				if diff := cmp.Diff([]map[string]bool{quarantined, banned}, []map[string]bool{gotQuarantined, gotBanned}); diff != "" {
					t.Fatalf("quarantined and banned (-want +got)\n%s", diff)
				}
			}
			if len(quarantined) == 0 || len(banned) == 0 {
				t.Errorf("%d quarantined, %d banned at the end: the test does not test", len(quarantined), len(banned))
			}
		})
	}
}
