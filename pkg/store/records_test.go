package store

import (
	"context"
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

	"github.com/meshid/meshid/pkg/ledger/search"
)

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
