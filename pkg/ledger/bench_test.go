package ledger

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
)

// BenchmarkAppend is one caller alone: close to one fdatasync each.
func BenchmarkAppend(b *testing.B) {
	d := &faultyDisk{}
	j := openTest(b, b.TempDir(), Options{disk: d})
	r, chain := testRecord("x")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := j.Append(context.Background(), NewDraft(r, chain)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFsync is what BenchmarkAppend is to be compared with: the disk alone.
func BenchmarkFsync(b *testing.B) {
	f, err := osDisk{}.create(b.TempDir() + "/x")
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	frame := make([]byte, 624)
	offset, allocated := int64(0), int64(0)
	for b.Loop() {
		if offset+int64(len(frame)) > allocated {
			allocated = allocate(f, offset, 0, defaultSegmentBytes)
		}
		if _, err := f.WriteAt(frame, offset); err != nil {
			b.Fatal(err)
		}
		if err := f.dataSync(); err != nil {
			b.Fatal(err)
		}
		offset += int64(len(frame))
	}
}

// BenchmarkAppendParallel is many callers at once.
func BenchmarkAppendParallel(b *testing.B) {
	for _, callers := range []int{8, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			d := &faultyDisk{}
			j := openTest(b, b.TempDir(), Options{disk: d})
			r, chain := testRecord("x")
			var left atomic.Int64
			left.Store(int64(b.N))
			b.ReportAllocs()
			b.ResetTimer()
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						if _, err := j.Append(context.Background(), NewDraft(r, chain)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
			b.ReportMetric(float64(b.N)/float64(d.count("datasync")), "records/fsync")
		})
	}
}

// BenchmarkNewDraft is the work that is done outside the writer.
func BenchmarkNewDraft(b *testing.B) {
	r, chain := testRecord("x")
	b.ReportAllocs()
	for b.Loop() {
		NewDraft(r, chain)
	}
}

// benchmarkJournal is a journal of n records.
func benchmarkJournal(b *testing.B, n int, segmentBytes int64) string {
	b.Helper()
	dir := b.TempDir()
	j := openTest(b, dir, Options{SegmentBytes: segmentBytes})
	r, chain := testRecord("x")
	drafts := make([]*Draft, 1000)
	for i := range drafts {
		drafts[i] = NewDraft(r, chain)
	}
	for range n / len(drafts) {
		if _, err := j.Append(context.Background(), drafts...); err != nil {
			b.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		b.Fatal(err)
	}
	return dir
}

// BenchmarkVerify reads 100,000 records in some segments.
func BenchmarkVerify(b *testing.B) {
	const n = 100_000
	dir := benchmarkJournal(b, n, 8<<20)
	for b.Loop() {
		if r, err := Verify(context.Background(), dir); err != nil || r.Head.Size != n {
			b.Fatal(r, err)
		}
	}
	b.ReportMetric(float64(b.N)*n/b.Elapsed().Seconds(), "records/s")
}

// BenchmarkOpen is the start of a CA with 20,000 records in its last segment.
func BenchmarkOpen(b *testing.B) {
	dir := benchmarkJournal(b, 20_000, 0)
	for b.Loop() {
		j, err := Open(dir, Options{})
		if err == nil {
			err = j.Close()
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFormatJSON is one record as JSON.
func BenchmarkFormatJSON(b *testing.B) {
	r, _ := testRecord("x")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := FormatJSON(Entry{Record: r}); err != nil {
			b.Fatal(err)
		}
	}
}
