package tree

import (
	"context"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/ledger"
)

// BenchmarkVerify verifies the journal and the tree of 100,000 records.
func BenchmarkVerify(b *testing.B) {
	const n = 100_000
	e := newEnv(b)
	e.options.Interval = time.Second
	e.start()
	e.append(n)
	e.covered()
	e.stop()
	v := e.verifier()
	for b.Loop() {
		if _, err := v.Verify(context.Background(), e.treeDir(), e.journalDir()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)*n/b.Elapsed().Seconds(), "records/s")
}

// BenchmarkFollow is the tree that takes in a journal of 30,000 records, with a
// checkpoint a second: it must keep up with 3,000 a second.
func BenchmarkFollow(b *testing.B) {
	const n = 30_000
	for b.Loop() {
		b.StopTimer()
		e := newEnv(b)
		e.options.Interval = time.Second
		var err error
		if e.journal, err = ledger.Open(e.journalDir(), ledger.Options{}); err != nil {
			b.Fatal(err)
		}
		e.append(n)
		if err := e.journal.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		e.start()
		e.stop() // with the last checkpoint
	}
	b.ReportMetric(float64(b.N)*n/b.Elapsed().Seconds(), "records/s")
}

// BenchmarkAdd is the work for one record, without the disk.
func BenchmarkAdd(b *testing.B) {
	t := &Tree{}
	raw := make([]byte, 600)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		t.add([]ledger.Entry{{Index: uint64(i), Raw: raw}})
		t.pending = t.pending[:0]
	}
}
