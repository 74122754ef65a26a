package ledger

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// segmentsIn lists the first records of the segments in dir.
func segmentsIn(t *testing.T, dir string) []uint64 {
	t.Helper()
	firsts, err := listSegments(dir)
	if err != nil {
		t.Fatal(err)
	}
	return firsts
}

// TestArchive archives a journal in two steps while it is written and followed, and
// reads the parts.
func TestArchive(t *testing.T) {
	dir, archive, second := t.TempDir(), filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
	j := openTest(t, dir, Options{SegmentBytes: minSegmentBytes})
	all := ids("r", 40)
	appendTest(t, j, all...)
	firsts := segmentsIn(t, dir)
	if len(firsts) < 6 {
		t.Fatalf("%d segments are too few for this test", len(firsts))
	}
	followed := make(chan error, 1)
	go func() {
		n := 0
		followed <- follow(t.Context(), j, firsts[3], func(Entry) error { n++; return nil })
	}()

	for _, limit := range []uint64{0, firsts[1] - 1} {
		if r, err := j.Archive(t.Context(), archive, limit, nil, nil); err != nil || r.Segments != 0 {
			t.Errorf("archive what is below %d: %+v, %v", limit, r, err)
		}
	}
	var told int
	r, err := j.Archive(t.Context(), archive, firsts[2]+1, func(done, n int) { told = done; _ = n }, nil)
	if err != nil {
		t.Fatal(err)
	}
	if r.Segments != 2 || r.Records != firsts[2] || r.Head.Size != firsts[2] || told != 2 {
		t.Errorf("%+v, told %d", r, told)
	}
	if got := segmentsIn(t, dir); !slices.Equal(got, firsts[2:]) {
		t.Errorf("segments %v, want %v", got, firsts[2:])
	}
	appendTest(t, j, ids("s", 5)...)
	all = append(all, ids("s", 5)...)

	// It goes on in the same folder, or in another one.
	if r, err = j.Archive(t.Context(), archive, firsts[3], nil, nil); err != nil || r.Head.Size != firsts[3] {
		t.Fatalf("%+v, %v", r, err)
	}
	if r, err = j.Archive(t.Context(), second, firsts[5], nil, nil); err != nil || r.Head.Size != firsts[5] || r.Segments != 2 {
		t.Fatalf("%+v, %v", r, err)
	}
	var got []string
	var reports []Report
	dirs := []string{archive, second, dir}
	for i, from := range []uint64{0, firsts[3], firsts[5]} {
		part, err := scanIDs(dirs[i], from)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, part...)
		report, err := Verify(t.Context(), dirs[i])
		if err != nil || report.First != from {
			t.Fatalf("%s: %+v, %v", dirs[i], report, err)
		}
		reports = append(reports, report)
	}
	if !slices.Equal(got, all) {
		t.Errorf("%d records in the parts, want %d", len(got), len(all))
	}
	if err := Joined(dirs, reports); err != nil {
		t.Error(err)
	}
	if err := Joined([]string{archive, dir}, []Report{reports[0], reports[2]}); !errors.Is(err, ErrMissing) {
		t.Errorf("without the second folder: %v", err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-followed; !errors.Is(err, ErrClosed) {
		t.Errorf("who followed the journal meanwhile: %v", err)
	}
	// It is opened again, and goes on.
	j = openTest(t, dir, Options{SegmentBytes: minSegmentBytes})
	appendTest(t, j, "last")
	if report, err := Verify(t.Context(), dir, r.Head); err != nil || report.Head.Size != uint64(len(all)+1) {
		t.Errorf("%+v, %v", report, err)
	}
	if n := len(segmentsIn(t, dir)); int64(n) != j.writer.segments.Load() {
		t.Errorf("%d segments, counted %d", n, j.writer.segments.Load())
	}
}

// Whatever is wrong, nothing leaves the journal.
func TestArchiveRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil  func(t *testing.T, dir, to string)
		want   error
		damage bool
	}{
		"another journal's archive": {spoil: func(t *testing.T, _, to string) {
			other := openTest(t, t.TempDir(), Options{SegmentBytes: minSegmentBytes})
			appendTest(t, other, ids("o", 30)...)
			if _, err := other.Archive(t.Context(), to, 1<<40, nil, nil); err != nil {
				t.Fatal(err)
			}
		}, want: ErrArchive},
		"another file of the name": {spoil: func(t *testing.T, _, to string) {
			if err := errors.Join(os.Mkdir(to, 0o700), os.WriteFile(filepath.Join(to, segmentName(0)), []byte("x"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}, want: ErrArchive},
		"a file in its place": {spoil: func(t *testing.T, _, to string) {
			if err := os.WriteFile(to, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, want: ErrArchive},
		"a folder that others may write": {spoil: func(t *testing.T, _, to string) {
			if err := errors.Join(os.Mkdir(to, 0o700), os.Chmod(to, 0o777)); err != nil {
				t.Fatal(err)
			}
		}, want: ErrArchive},
		"a damaged segment": {spoil: func(t *testing.T, dir, _ string) {
			path := filepath.Join(dir, segmentName(segmentsIn(t, dir)[1]))
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)-100] ^= 1
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}, damage: true},
		"a segment that lost its end": {spoil: func(t *testing.T, dir, _ string) {
			path := filepath.Join(dir, segmentName(segmentsIn(t, dir)[1]))
			seg, _, err := readLast(dir, segmentsIn(t, dir)[1])
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(seg.close(), os.Truncate(path, seg.batch)); err != nil {
				t.Fatal(err)
			}
		}, damage: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir, to := t.TempDir(), filepath.Join(t.TempDir(), "archive")
			j := openTest(t, dir, Options{SegmentBytes: minSegmentBytes})
			appendTest(t, j, ids("r", 40)...)
			before := segmentsIn(t, dir)
			tc.spoil(t, dir, to)
			_, err := j.Archive(t.Context(), to, 1<<40, nil, nil)
			if tc.want != nil && !errors.Is(err, tc.want) || tc.damage && damageIn(err) == nil {
				t.Errorf("archive: %v", err)
			}
			if after := segmentsIn(t, dir); !slices.Equal(before, after) {
				t.Errorf("segments %v, were %v", after, before)
			}
			if head, err := Archived(dir); err != nil || head.Size != 0 {
				t.Errorf("archived: %v, %v", head, err)
			}
		})
	}
	j := openTest(t, t.TempDir(), Options{SegmentBytes: minSegmentBytes})
	appendTest(t, j, ids("r", 40)...)
	for _, to := range []string{"relative", j.dir} {
		if _, err := j.Archive(t.Context(), to, 1<<40, nil, nil); !errors.Is(err, ErrArchive) {
			t.Errorf("archive to %s: %v", to, err)
		}
	}
}

// An archive that was interrupted at any step is gone on with, and no record is
// ever in neither place.
func TestArchiveInterrupted(t *testing.T) {
	for step := range 5 {
		dir, to := t.TempDir(), filepath.Join(t.TempDir(), "archive")
		j := openTest(t, dir, Options{SegmentBytes: minSegmentBytes})
		all := ids("r", 40)
		appendTest(t, j, all...)
		firsts := segmentsIn(t, dir)
		limit := firsts[3]
		if err := j.begin(to, firsts); err != nil {
			t.Fatal(err)
		}
		var head Head
		for i := range min(step+1, 3) { // step 0 to 2: some are copied
			if _, err := copySegment(dir, to, firsts[i]); err != nil {
				t.Fatal(err)
			}
			var err error
			if head, err = verifyCopy(dir, to, firsts[i], firsts[i+1]); err != nil {
				t.Fatal(err)
			}
		}
		if step >= 3 { // all are, and it is said
			if err := SetArchived(dir, head); err != nil {
				t.Fatal(err)
			}
		}
		if step >= 4 { // some have gone
			if err := j.drop(firsts[:2]); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Verify(t.Context(), dir); err != nil {
			t.Errorf("step %d: %v", step, err)
		}
		r, err := j.Archive(t.Context(), to, limit, nil, nil)
		if err != nil || r.Head.Size != limit {
			t.Fatalf("step %d: %+v, %v", step, r, err)
		}
		got, err := scanIDs(to, 0)
		if err != nil {
			t.Fatal(err)
		}
		rest, err := scanIDs(dir, limit)
		if err != nil || !slices.Equal(append(got, rest...), all) {
			t.Errorf("step %d: %d and %d records, %v", step, len(got), len(rest), err)
		}
	}
}

// What may not leave stays, and goes when it may.
func TestArchivePrevented(t *testing.T) {
	dir, to := t.TempDir(), filepath.Join(t.TempDir(), "archive")
	j := openTest(t, dir, Options{SegmentBytes: minSegmentBytes})
	appendTest(t, j, ids("r", 40)...)
	firsts := segmentsIn(t, dir)
	prevented := errors.New("the disk is full")
	r, err := j.Archive(t.Context(), to, firsts[3], nil, func(r ArchiveReport) error {
		if r.Records != firsts[3] || r.Head.Size != firsts[3] {
			t.Errorf("%+v", r)
		}
		return prevented
	})
	head, archived := Archived(dir)
	if !errors.Is(err, prevented) || r != (ArchiveReport{}) || archived != nil || head.Size != 0 {
		t.Errorf("%+v, %v; %v, %v", r, err, head, archived)
	}
	if all, err := scanIDs(dir, 0); err != nil || uint64(len(all)) != j.Size() {
		t.Errorf("%d records are left, %v", len(all), err)
	}
	if r, err = j.Archive(t.Context(), to, firsts[3], nil, func(ArchiveReport) error { return nil }); err != nil || r.Records != firsts[3] {
		t.Errorf("%+v, %v", r, err)
	}
}

// A Reader finds each record where it was seen, and says what is not there.
func TestReader(t *testing.T) {
	dir := t.TempDir()
	j := openTest(t, dir, Options{SegmentBytes: minSegmentBytes})
	appendTest(t, j, ids("r", 20)...)
	var all []Entry
	for e, err := range Scan(dir, 0) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	r := j.Reader()
	defer r.Close()
	for _, i := range []int{19, 0, 7, 7, 3, 18} {
		e, err := r.Read(all[i].Index, all[i].Place)
		if err != nil || e.Hash != all[i].Hash || e.Link != all[i].Link || !slices.Equal(e.Raw, all[i].Raw) || e.Record.GetRequestId() != all[i].Record.GetRequestId() {
			t.Errorf("record %d: %+v, %v", i, e, err)
		}
	}
	for name, tc := range map[string]struct {
		index uint64
		place Place
	}{
		"another record":     {8, all[7].Place},
		"between records":    {7, Place{all[7].Place.Segment, all[7].Place.Offset + 8}},
		"behind the last":    {20, Place{all[19].Place.Segment, 1 << 30}},
		"no such segment":    {7, Place{all[7].Place.Segment + 1, 80}},
		"a negative segment": {7, Place{1 << 63, 80}},
	} {
		if _, err := r.Read(tc.index, tc.place); damageIn(err) == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := j.Archive(t.Context(), filepath.Join(t.TempDir(), "archive"), all[7].Place.Segment, nil, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Read(0, all[0].Place); !errors.Is(err, ErrArchived) && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an archived record: %v", err)
	}
}
