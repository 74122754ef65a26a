package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
)

// appendBatch appends n records at once.
func appendBatch(t testing.TB, j *Journal, prefix string, n int) {
	t.Helper()
	drafts := make([]*Draft, n)
	for i, id := range ids(prefix, n) {
		drafts[i] = testDraft(id)
	}
	if _, err := j.Append(t.Context(), drafts...); err != nil {
		t.Error(err) // also called outside the test's goroutine
	}
}

// takeTail has a tail give n batches, and checks that they follow one another.
func takeTail(t testing.TB, tail *Tail, n int) []Entry {
	t.Helper()
	var all []Entry
	for range n {
		batch, err := tail.Next(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, batch...)
	}
	return all
}

// sameEntry is quicker than cmp.Diff, with thousands.
func sameEntry(a, b Entry) bool {
	return a.Index == b.Index && a.Hash == b.Hash && a.Link == b.Link && a.Place == b.Place &&
		bytes.Equal(a.Raw, b.Raw) && proto.Equal(a.Record, b.Record)
}

// What tails return is what is on the disk, whether they keep up, are always
// behind, or now the one and now the other, across segments and records as large
// as there are.
func TestTailIsWhatIsOnTheDisk(t *testing.T) {
	for _, segmentBytes := range []int64{64 << 10, 1 << 20} {
		t.Run(fmt.Sprint(segmentBytes), func(t *testing.T) {
			t.Parallel()
			tailIsWhatIsOnTheDisk(t, segmentBytes)
		})
	}
}

func tailIsWhatIsOnTheDisk(t *testing.T, segmentBytes int64) {
	t.Helper()
	dir := t.TempDir()
	j := openTest(t, dir, Options{SegmentBytes: segmentBytes})
	appendBatch(t, j, "before", 10)
	tails := map[string]*Tail{"fast": j.Tail(3), "slow": j.Tail(0), "changing": j.Tail(7)}
	got := map[string][]Entry{}
	take := func(name string, n int) { got[name] = append(got[name], takeTail(t, tails[name], n)...) }
	take("fast", 1)
	for i := range 8 {
		appendBatch(t, j, fmt.Sprint(i), 700)
		take("fast", 1)
		if i%4 == 3 {
			for int(tails["changing"].next) < int(j.Size()) {
				take("changing", 1)
			}
			appendBatch(t, j, fmt.Sprint("few ", i), 3)
			take("changing", 1)
			take("fast", 1)
		}
	}
	large, chain := testRecord("large")
	large.Detail = string(make([]byte, 60_000))
	for range 40 { // more than the memory for recent ones
		if _, err := j.Append(t.Context(), NewDraft(large, chain)); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	var want []Entry
	for e, err := range Scan(dir, 0) {
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, e)
	}
	for name, from := range map[string]uint64{"fast": 3, "slow": 0, "changing": 7} {
		for {
			batch, err := tails[name].Next(t.Context(), time.Hour) // which is over, since the journal is closed
			if errors.Is(err, ErrClosed) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(batch) == 0 || len(batch) > batchRecords {
				t.Fatalf("a batch of %d", len(batch))
			}
			got[name] = append(got[name], batch...)
		}
		if !slices.EqualFunc(want[from:], got[name], sameEntry) {
			t.Errorf("%s: not the %d records that are on the disk", name, len(want[from:]))
		}
		tails[name].Close()
	}
}

// Memory holds what a tail has not taken, up to a bound, and nothing without
// tails.
func TestTailMemory(t *testing.T) {
	t.Parallel()
	j := openTest(t, t.TempDir(), Options{})
	appendBatch(t, j, "nobody", 100)
	if n := len(j.recent.entries); n != 0 {
		t.Errorf("%d records in memory without a tail", n)
	}
	one, other := j.Tail(100), j.Tail(100)
	appendBatch(t, j, "both", 100)
	takeTail(t, one, 1)
	if n := len(j.recent.entries); n != 100 {
		t.Errorf("%d records in memory, of which one tail has 100", n)
	}
	takeTail(t, other, 1)
	if n, b := len(j.recent.entries), j.recent.bytes; n != 0 || b != 0 {
		t.Errorf("%d records, %d bytes in memory that both have", n, b)
	}
	for i := range 5 {
		appendBatch(t, j, fmt.Sprint(i), 1000)
	}
	if n, b := len(j.recent.entries), j.recent.bytes; n == 0 || n > recentRecords || b > recentBytes {
		t.Errorf("%d records, %d bytes in memory", n, b)
	}
	takeTail(t, one, 5)
	other.Close()
	if n, b := len(j.recent.entries), j.recent.bytes; n != 0 || b != 0 {
		t.Errorf("%d records, %d bytes in memory when the tail that was behind is closed", n, b)
	}
	one.Close()
}

// A tail that lingers returns early with a full batch.
func TestTailLingers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		j := openTest(t, dir, Options{})
		tail := j.Tail(0)
		defer tail.Close()
		for i, c := range []struct {
			records, want int
			waits         time.Duration
		}{{1, 1, time.Minute}, {batchRecords, batchRecords, 0}, {batchRecords + 1, batchRecords, 0}, {2, 3, time.Minute}} {
			began := time.Now()
			go appendBatch(t, j, fmt.Sprint(i), c.records)
			batch, err := tail.Next(context.Background(), time.Minute)
			if err != nil || len(batch) != c.want || time.Since(began) != c.waits {
				t.Errorf("%d: %d records after %v, %v; want %d after %v", i, len(batch), time.Since(began), err, c.want, c.waits)
			}
			synctest.Wait()
		}
	})
}
