package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/meshid/meshid/internal/durable"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

func TestAppendAndScan(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a", "ledger")
	j := openTest(t, dir, Options{SegmentBytes: 8 << 10})
	want := ids("r", 40)
	drafts := make([]*Draft, 0, len(want))
	for _, id := range want {
		drafts = append(drafts, testDraft(id))
	}
	var all []*Durable
	for i := 0; i < len(drafts); i += 5 {
		d, err := j.Append(t.Context(), drafts[i:i+5]...)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, d...)
	}
	for i, d := range all {
		r, chain := testRecord(want[i])
		if d.Index() != uint64(i) || !proto.Equal(d.Record(), r) || !cmp.Equal(d.Chain(), chain) {
			t.Fatalf("durable %d is not what was appended", i)
		}
	}
	wantIDs(t, dir, want)
	for e, err := range Scan(dir, 7) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Hash != all[e.Index].Hash() || e.Index < 7 {
			t.Fatalf("entry %d is not the record", e.Index)
		}
		if e.Index == 39 && (Head{Size: 40, Link: e.Link}) != j.Head() {
			t.Fatal("the last link is not the head's")
		}
	}
	head := j.Head()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j = openTest(t, dir, Options{})
	if j.Head() != head || j.Size() != 40 {
		t.Fatalf("head %v after opening again, want %v", j.Head(), head)
	}
	appendTest(t, j, "last")
	wantIDs(t, dir, append(want, "last"))
	if r, err := Verify(t.Context(), dir, Head{Link: genesis(j.writer.journal)}, head, j.Head()); err != nil || r.Segments < 3 {
		t.Fatalf("verify: %+v, %v", r, err)
	}
	for _, name := range []string{"", segmentName(0), lockName} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%q: mode %v, %v", name, st.Mode(), err)
		}
	}
}

func TestRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := openTest(t, dir, Options{})
	record, chain := testRecord("x")
	large, _ := testRecord("x")
	large.Diff = strings.Repeat("x", MaxRecordBytes)
	invalid, _ := testRecord("x")
	invalid.Detail = "\xff"
	big := make([]*Draft, maxAppendBytes/(MaxRecordBytes-10_000)+1)
	for i := range big {
		r, _ := testRecord("x")
		r.Diff = strings.Repeat("x", MaxRecordBytes-10_000)
		big[i] = NewDraft(r, nil)
	}
	for name, drafts := range map[string][]*Draft{
		"empty record":        {NewDraft(new(ledgerv1.Record), nil)},
		"nil record":          {NewDraft(nil, nil)},
		"large record":        {NewDraft(large, nil)},
		"not UTF-8":           {NewDraft(invalid, nil)},
		"another certificate": {NewDraft(record, [][]byte{[]byte("other")})},
		"no certificate":      {NewDraft(&ledgerv1.Record{Version: 1}, chain)},
		"one of two":          {testDraft("a"), NewDraft(record, [][]byte{[]byte("other")})},
		"too much at once":    big,
	} {
		if d, err := j.Append(t.Context(), drafts...); !errors.Is(err, ErrRecord) || d != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if d, err := j.Append(t.Context()); d != nil || err != nil {
		t.Errorf("nothing: %v, %v", d, err)
	}
	if j.Size() != 0 {
		t.Errorf("size is %d", j.Size())
	}
	if _, err := Open(dir, Options{}); !errors.Is(err, durable.ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("second open: %v", err)
	}
	if _, err := Open(dir, Options{SegmentBytes: 100}); err == nil {
		t.Error("tiny segments accepted")
	}
	open := t.TempDir()
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(open, Options{}); !errors.Is(err, durable.ErrUnsafe) {
		t.Errorf("directory that others can write: %v", err)
	}
	if err := errors.Join(j.Close(), j.Close()); err != nil {
		t.Error(err)
	}
	if _, err := j.Append(t.Context(), testDraft("late")); !errors.Is(err, ErrClosed) {
		t.Errorf("after close: %v", err)
	}
}

func TestDraftIsASnapshot(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := openTest(t, dir, Options{})
	r, chain := testRecord("before")
	d := NewDraft(r, chain)
	r.RequestId = "after"
	if _, err := j.Append(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, dir, []string{"before"})
}

func TestDraftPrintsNothing(t *testing.T) {
	t.Parallel()
	d := testDraft("x")
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q"} {
		for _, v := range []any{d, *d, []*Draft{d}} {
			if s := fmt.Sprintf(verb, v); strings.Contains(s, "leaf") || strings.Contains(s, "6c656166") || len(s) > 60 {
				t.Errorf("%s of %T prints %q", verb, v, s)
			}
		}
	}
}

// TestGroupCommit has one call in fdatasync and 63 behind it.
func TestGroupCommit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		d := &faultyDisk{}
		j := openTest(t, t.TempDir(), Options{disk: d})
		d.set(func(op string, _ int) (int, error) {
			if op == "datasync" {
				<-release
			}
			return 0, nil
		}, nil)
		var wg sync.WaitGroup
		wg.Go(func() { appendTest(t, j, "first") })
		synctest.Wait()
		for _, id := range ids("r", 63) {
			wg.Go(func() { appendTest(t, j, id) })
		}
		synctest.Wait()
		if j.Size() != 0 {
			t.Error("a record counts before it is durable")
		}
		close(release)
		wg.Wait()
		if n, w := d.count("datasync"), d.count("write")-1; n != 2 || w != 2 || j.Size() != 64 {
			t.Errorf("%d records took %d fdatasync and %d writes, want 2", j.Size(), n, w)
		}
	})
}

// TestContext ends contexts of calls in the queue, and of one that is with the
// disk, which waits for it.
func TestContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		d := &faultyDisk{}
		dir := t.TempDir()
		j := openTest(t, dir, Options{disk: d})
		d.set(func(op string, _ int) (int, error) {
			if op == "datasync" {
				<-release
			}
			return 0, nil
		}, nil)
		ctx, cancel := context.WithCancel(t.Context())
		errs := make(chan error, 2*queueLength)
		call := func(ctx context.Context, id string) {
			_, err := j.Append(ctx, testDraft(id))
			errs <- err
		}
		go call(ctx, "with the disk")
		synctest.Wait()
		go call(t.Context(), "stays")
		synctest.Wait()
		for range queueLength + 10 { // more than there is room for
			go call(ctx, "gives up")
		}
		synctest.Wait()
		cancel()
		synctest.Wait()
		if len(errs) != queueLength+10 {
			t.Errorf("%d calls returned while the disk was stuck, want %d", len(errs), queueLength+10)
		}
		for range len(errs) {
			if err := <-errs; !errors.Is(err, context.Canceled) {
				t.Errorf("error is %v", err)
			}
		}
		close(release)
		for range 2 {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if _, err := j.Append(ctx, testDraft("late")); !errors.Is(err, context.Canceled) {
			t.Errorf("ended context: %v", err)
		}
		if err := j.Close(); err != nil {
			t.Error(err)
		}
		wantIDs(t, dir, []string{"with the disk", "stays"})
	})
}

// TestCloseWritesTheQueue closes a journal while calls wait.
func TestCloseWritesTheQueue(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		d := &faultyDisk{}
		dir := t.TempDir()
		j := openTest(t, dir, Options{disk: d})
		d.set(func(op string, _ int) (int, error) {
			if op == "datasync" {
				<-release
			}
			return 0, nil
		}, nil)
		var wg sync.WaitGroup
		for _, id := range ids("r", 10) {
			wg.Go(func() { appendTest(t, j, id) })
		}
		synctest.Wait()
		wg.Go(func() {
			if err := j.Close(); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		close(release)
		wg.Wait()
		if got, err := scanIDs(dir, 0); len(got) != 10 || err != nil {
			t.Errorf("%d records, %v", len(got), err)
		}
	})
}

func TestConcurrent(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := openTest(t, dir, Options{SegmentBytes: 16 << 10})
	var mu sync.Mutex
	byIndex := map[uint64]string{}
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for _, id := range ids(fmt.Sprint(g), 20) {
				for _, d := range appendTest(t, j, id) {
					mu.Lock()
					byIndex[d.Index()] = id
					mu.Unlock()
				}
			}
		})
	}
	// Readers see only what is sound, at any moment.
	readers := make(chan error, 1)
	go func() {
		for j.Size() < 320 {
			if _, err := Verify(context.Background(), dir, j.Head()); err != nil {
				readers <- err
				return
			}
		}
		readers <- nil
	}()
	wg.Wait()
	if err := <-readers; err != nil {
		t.Fatal(err)
	}
	got, err := scanIDs(dir, 0)
	if err != nil || len(got) != 320 {
		t.Fatalf("%d records, %v", len(got), err)
	}
	for i, id := range got {
		if byIndex[uint64(i)] != id {
			t.Fatalf("record %d is %s, was acknowledged as %s", i, id, byIndex[uint64(i)])
		}
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewPedanticRegistry()
	j := openTest(t, t.TempDir(), Options{Registerer: reg, SegmentBytes: 4 << 10})
	appendTest(t, j, ids("r", 9)...)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	for _, f := range families {
		for _, m := range f.GetMetric() {
			switch {
			case m.GetCounter() != nil:
				fmt.Fprintf(&got, "%s%v %v\n", f.GetName(), m.GetLabel(), m.GetCounter().GetValue())
			case m.GetHistogram() != nil:
				fmt.Fprintf(&got, "%s count %v\n", f.GetName(), m.GetHistogram().GetSampleCount())
			case f.GetName() != "meshid_ca_ledger_size_bytes":
				fmt.Fprintf(&got, "%s %v\n", f.GetName(), m.GetGauge().GetValue())
			}
		}
	}
	want := `meshid_ca_ledger_batch_records count 9
meshid_ca_ledger_failures_total[name:"reason" value:"full"] 0
meshid_ca_ledger_failures_total[name:"reason" value:"sync"] 0
meshid_ca_ledger_failures_total[name:"reason" value:"write"] 0
meshid_ca_ledger_fsync_duration_seconds count 9
meshid_ca_ledger_queue_requests 0
meshid_ca_ledger_records 9
meshid_ca_ledger_records_total[] 9
meshid_ca_ledger_segments 2
meshid_ca_ledger_writable 1
`
	if d := cmp.Diff(want, strings.ReplaceAll(got.String(), "  ", " ")); d != "" {
		t.Error(d)
	}
	if _, err := Open(t.TempDir(), Options{Registerer: reg}); err == nil {
		t.Error("two journals share one registry")
	}
}
