package ledger

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
)

var errEnough = errors.New("enough")

// TestFollow follows a directory from before the journal is begun, through
// several segments, as another process does.
func TestFollow(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	want := ids("r", 30)
	seen := make(chan string, len(want))
	done := make(chan error, 1)
	go func() {
		done <- Follow(context.Background(), dir, 2, func(e Entry) error {
			seen <- e.Record.GetRequestId()
			if e.Index == 29 {
				return errEnough
			}
			return nil
		})
	}()
	j := openTest(t, dir, Options{SegmentBytes: 4 << 10})
	var got []string
	for i, id := range want {
		appendTest(t, j, id)
		if i >= 2 { // each is seen before the next is written
			got = append(got, <-seen)
		}
	}
	if err := <-done; !errors.Is(err, errEnough) {
		t.Error(err)
	}
	if d := cmp.Diff(want[2:], got); d != "" {
		t.Error(d)
	}
}

func TestFollowEnds(t *testing.T) {
	t.Parallel()
	p := newPristine(t)
	if err := Follow(t.Context(), filepath.Join(p.dir, "none"), 0, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	for _, cause := range []error{context.Canceled, errEnough} {
		ctx, cancel := context.WithCancelCause(t.Context())
		n := 0
		err := Follow(ctx, p.dir, 0, func(Entry) error {
			if n++; n == 20 {
				cancel(cause) // the next is waited for in the kernel, or not at all
			}
			return nil
		})
		if !errors.Is(err, cause) || n != 20 {
			t.Errorf("%d records, %v", n, err)
		}
	}
	edit(t, p.dir, segmentName(0), func(b []byte) []byte { b[headerSize+100] ^= 1; return b })
	err := Follow(t.Context(), p.dir, 0, func(Entry) error { return nil })
	if _, ok := errors.AsType[*DamageError](err); !ok {
		t.Errorf("damage: %v", err)
	}
}

// TestWatcherWithoutKernel waits as where inotify is exhausted.
func TestWatcherWithoutKernel(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &watcher{}
		if err := w.wait(t.Context()); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := w.wait(ctx); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		w.interrupt()
		if err := w.close(); err != nil {
			t.Error(err)
		}
	})
}

// TestJournalFollow has a follower that must not see a record before it is
// durable.
func TestJournalFollow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		d := &faultyDisk{}
		j := openTest(t, dir, Options{disk: d, SegmentBytes: 4 << 10})
		want := ids("r", 15)
		appendTest(t, j, want[:10]...)
		var got []string
		done := make(chan error, 1)
		go func() {
			done <- follow(t.Context(), j, 3, func(e Entry) error {
				got = append(got, e.Record.GetRequestId())
				return nil
			})
		}()
		synctest.Wait()
		for i, id := range want[10:] {
			release := make(chan struct{})
			d.set(func(op string, _ int) (int, error) {
				if op == "datasync" {
					<-release
				}
				return 0, nil
			}, nil)
			go appendTest(t, j, id)
			synctest.Wait()
			if len(got) != 7+i {
				t.Fatalf("%d records seen while record %d is with the disk", len(got), 10+i)
			}
			close(release)
			synctest.Wait()
			if len(got) != 8+i {
				t.Fatalf("%d records seen when record %d is durable", len(got), 10+i)
			}
		}
		if err := j.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		if d := cmp.Diff(want[3:], got); d != "" {
			t.Error(d)
		}
		// Whoever comes late still gets everything.
		n := 0
		if err := follow(t.Context(), j, 0, func(Entry) error { n++; return nil }); !errors.Is(err, ErrClosed) || n != 15 {
			t.Errorf("%d records, %v", n, err)
		}
	})
}

func TestJournalFollowEnds(t *testing.T) {
	t.Parallel()
	j := openTest(t, t.TempDir(), Options{})
	appendTest(t, j, "a", "b")
	if err := follow(t.Context(), j, 0, func(Entry) error { return errEnough }); !errors.Is(err, errEnough) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	err := follow(ctx, j, 0, func(Entry) error {
		if n++; n == 2 {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || n != 2 {
		t.Errorf("%d records, %v", n, err)
	}
}

// TestScanWhileWriting reads again and again while segments come and go.
func TestScanWhileWriting(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := openTest(t, dir, Options{SegmentBytes: 4 << 10})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 40 {
			appendTest(t, j, ids(fmt.Sprint(i), 3)...)
		}
	}()
	for reading := true; reading; {
		select {
		case <-done:
			reading = false
		default:
		}
		before := j.Size()
		got, err := scanIDs(dir, 0)
		if err != nil || uint64(len(got)) < before {
			t.Fatalf("%d of at least %d records: %v", len(got), before, err)
		}
	}
}
