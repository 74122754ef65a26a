package ledger

import (
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
)

// TestArchived removes the first segments of a journal, with and without saying
// that they are in an archive.
func TestArchived(t *testing.T) {
	t.Parallel()
	p := newPristine(t)
	dir := copyDir(t, p.dir)
	first := p.firsts[2]
	head, err := HeadAt(dir, first)
	if err != nil || head.Size != first {
		t.Fatalf("head %v, %v", head, err)
	}
	for size := range p.head.Size + 1 {
		h, err := HeadAt(p.dir, size)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Verify(t.Context(), p.dir, h); err != nil {
			t.Errorf("head of %d records: %v", size, err)
		}
	}
	if _, err := HeadAt(p.dir, p.head.Size+1); !errors.Is(err, ErrMissing) {
		t.Errorf("a head that is not there: %v", err)
	}
	if err := SetArchived(dir, head); err != nil {
		t.Fatal(err)
	}
	if r, err := Verify(t.Context(), dir); err != nil || r.First != 0 { // before anything is removed
		t.Fatalf("%+v, %v", r, err)
	}
	for _, gone := range p.firsts[:2] {
		if err := os.Remove(filepath.Join(dir, segmentName(gone))); err != nil {
			t.Fatal(err)
		}
	}
	r, err := Verify(t.Context(), dir, p.head, head)
	if err != nil || r.First != first || r.Head != p.head || r.Segments != len(p.firsts)-2 {
		t.Errorf("verify: %+v, %v", r, err)
	}
	if got, err := scanIDs(dir, first); err != nil || len(got) != len(p.want)-int(first) {
		t.Errorf("scan: %v, %v", got, err)
	}
	if _, err := scanIDs(dir, first-1); !errors.Is(err, ErrArchived) {
		t.Errorf("scan of what was archived: %v", err)
	}
	if h, err := HeadAt(dir, first); err != nil || h != head {
		t.Errorf("head of what was archived: %v, %v", h, err)
	}
	if _, err := HeadAt(dir, first-1); !errors.Is(err, ErrArchived) {
		t.Errorf("head before what was archived: %v", err)
	}
	earlier, err := HeadAt(p.dir, first-1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(t.Context(), dir, earlier); !errors.Is(err, ErrArchived) {
		t.Errorf("a head from before: %v", err)
	}
	j := openTest(t, dir, Options{SegmentBytes: 4 << 10})
	appendTest(t, j, "more")
	if err := follow(t.Context(), j, 0, func(Entry) error { return nil }); !errors.Is(err, ErrArchived) {
		t.Errorf("follow: %v", err)
	}
	if _, err := Verify(t.Context(), dir); err != nil {
		t.Error(err)
	}

	for name, tamper := range map[string]func(t *testing.T, dir string){
		"no word of an archive": func(t *testing.T, dir string) { remove(t, dir, archivedName) },
		"one segment too many":  func(t *testing.T, dir string) { remove(t, dir, segmentName(first)) },
		"another past": func(t *testing.T, dir string) {
			other := head
			other.Link[0] ^= 1
			if err := SetArchived(dir, other); err != nil {
				t.Fatal(err)
			}
		},
		"not a head": func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, archivedName), []byte("12\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := copyDir(t, dir)
			tamper(t, dir)
			if r, err := Verify(t.Context(), dir); r.Damage == nil {
				t.Errorf("found nothing: %v", err)
			}
		})
	}
}

func remove(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

// TestVerifierVisits checks that each record is visited once, and in order within
// a range, and that a visitor's error ends verification there.
func TestVerifierVisits(t *testing.T) {
	t.Parallel()
	p := newPristine(t)
	seen := make([]atomic.Int32, len(p.want))
	ranges := atomic.Int32{}
	v := Verifier{Visit: func() func(uint64, [32]byte) error {
		ranges.Add(1)
		last := -1
		return func(index uint64, _ [32]byte) error {
			if last >= 0 && int(index) != last+1 {
				t.Errorf("record %d behind %d", index, last)
			}
			last = int(index)
			seen[index].Add(1)
			return nil
		}
	}}
	if _, err := v.Verify(t.Context(), p.dir); err != nil {
		t.Fatal(err)
	}
	for i := range seen {
		if n := seen[i].Load(); n != 1 {
			t.Errorf("record %d was visited %d times", i, n)
		}
	}
	if int(ranges.Load()) != len(p.firsts) {
		t.Errorf("%d ranges", ranges.Load())
	}
	stop := errors.New("stop")
	bad := p.firsts[1] + 1
	v.Visit = func() func(uint64, [32]byte) error {
		return func(index uint64, _ [32]byte) error {
			if index >= bad {
				return stop
			}
			return nil
		}
	}
	if r, err := v.Verify(t.Context(), p.dir); !errors.Is(err, stop) || r.Head.Size != bad {
		t.Errorf("head %v, %v", r.Head, err)
	}
}
