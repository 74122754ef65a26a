package store

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	entryv1 "github.com/meshid/meshid/proto/entry/v1"
)

func TestEntries(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	epoch := d.Epoch()
	rev, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry("b"), entry("a")}, nil, ignore)
	if err != nil || rev != 1 {
		t.Fatalf("ApplyEntries = %d, %v", rev, err)
	}
	changed := entry("b")
	changed.Ttl = nil
	if rev, err = d.ApplyEntries(t.Context(), []*entryv1.Entry{changed, entry("c")}, []string{"a"}, ignore); err != nil || rev != 2 {
		t.Fatalf("ApplyEntries = %d, %v", rev, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	got, rev, err := d.Entries(t.Context())
	if err != nil || rev != 2 {
		t.Fatalf("Entries: revision %d, %v", rev, err)
	}
	b, c := changed, entry("c")
	b.Revision, c.Revision = 2, 2
	if diff := cmp.Diff([]*entryv1.Entry{b, c}, got, protocmp.Transform()); diff != "" {
		t.Errorf("entries after restart (-want +got):\n%s", diff)
	}
	if d.Epoch() != epoch || len(epoch) < 20 {
		t.Errorf("epoch was %q, is %q", epoch, d.Epoch())
	}
}

// A change is made as a whole or not at all, wherever it fails.
func TestApplyEntriesAtomic(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry("a")}, nil, ignore); err != nil {
		t.Fatal(err)
	}
	before, _, err := d.Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	fault := errors.New("ledger is full")
	for _, tt := range []struct {
		name    string
		ctx     func() context.Context
		upserts []*entryv1.Entry
		removed []string
		record  func(uint64) error
		want    error
	}{
		{"record fails", t.Context, []*entryv1.Entry{entry("b")}, []string{"a"}, func(uint64) error { return fault }, fault},
		{"unknown name", t.Context, []*entryv1.Entry{entry("b")}, []string{"a", "nobody"}, ignore, ErrNotFound},
		{"invalid UTF-8", t.Context, []*entryv1.Entry{entry("b"), {Name: "x", Workloads: "\xff"}}, nil, ignore, nil},
		{"canceled", func() context.Context {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			return ctx
		}, []*entryv1.Entry{entry("b")}, nil, ignore, context.Canceled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := d.ApplyEntries(tt.ctx(), tt.upserts, tt.removed, tt.record)
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
				t.Fatalf("error is %v, want %v", err, tt.want)
			}
			after, rev, err := d.Entries(t.Context())
			if err != nil || rev != 1 {
				t.Fatalf("revision %d, %v", rev, err)
			}
			if diff := cmp.Diff(before, after, protocmp.Transform()); diff != "" {
				t.Errorf("entries changed:\n%s", diff)
			}
		})
	}
}

// Names are compared byte by byte.
func TestV_A5_NamesAreBinary(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry("admin"), entry("Admin")}, nil, ignore); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ApplyEntries(t.Context(), nil, []string{"ADMIN"}, ignore); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete ADMIN: %v", err)
	}
	if got, _, err := d.Entries(t.Context()); err != nil || len(got) != 2 {
		t.Errorf("%d entries, %v", len(got), err)
	}
}

// An entry that a newer version wrote is not served with what this version
// understands of it.
func TestEntryWithUnknownField(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry("a"), entry("b")}, nil, ignore); err != nil {
		t.Fatal(err)
	}
	if _, err := d.writer.ExecContext(t.Context(),
		`UPDATE entries SET entry = '{"name":"a","workloads":"unix.uid == 0","placement":"required"}' WHERE name = 'a'`); err != nil {
		t.Fatal(err)
	}
	got, _, err := d.Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&entryv1.Entry{Name: "a", Revision: 1}, got[0], protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if got[1].GetWorkloads() == "" {
		t.Error("the entry beside it was lost")
	}
}

// 64 writers, some of which fail: revisions come out without gap, in the order
// in which they are committed, and a reader never sees a revision without its
// entries.
func TestV_E4_RevisionsInCommitOrder(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	fault := errors.New("aborted")
	var (
		mu   sync.Mutex
		seen []uint64
		wg   sync.WaitGroup
	)
	stop := make(chan struct{})
	readers := make(chan error, 1)
	go func() {
		last := uint64(0)
		for {
			select {
			case <-stop:
				readers <- nil
				return
			default:
			}
			entries, rev, err := d.Entries(t.Context())
			if err != nil {
				readers <- err
				return
			}
			if rev < last || uint64(len(entries)) != rev {
				readers <- fmt.Errorf("revision %d after %d with %d entries", rev, last, len(entries))
				return
			}
			last = rev
		}
	}()
	for w := range 64 {
		wg.Go(func() {
			for i := range 3 {
				abort := (w+i)%4 == 0
				rev, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry(fmt.Sprintf("w%d-%d", w, i))}, nil, func(uint64) error {
					if abort {
						return fault
					}
					return nil
				})
				switch {
				case abort && !errors.Is(err, fault), !abort && err != nil:
					t.Errorf("ApplyEntries: %v", err)
				case !abort:
					mu.Lock()
					seen = append(seen, rev)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	if err := <-readers; err != nil {
		t.Error(err)
	}
	have := make(map[uint64]bool)
	for _, r := range seen {
		have[r] = true
	}
	for r := uint64(1); r <= uint64(len(seen)); r++ {
		if !have[r] {
			t.Errorf("revision %d is missing of %d", r, len(seen))
		}
	}
}
