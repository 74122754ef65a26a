package ledger

import (
	"context"
	"fmt"
	"slices"
	"time"
)

const (
	batchRecords = 1000    // that Next returns at most
	batchBytes   = 1 << 20 // likewise; a larger record comes alone

	recentRecords = 2 * batchRecords // that are kept in memory for tails
	recentBytes   = 2 << 20          // likewise
)

// recent are the newest records, as the writer made them: those that a tail has
// not taken, up to a bound. A tail that is further behind reads the disk.
type recent struct {
	entries []Entry
	bytes   int
	tails   []*Tail
}

// add adds what has become durable.
func (r *recent) add(entries []Entry) {
	if len(r.tails) == 0 {
		return
	}
	r.entries = append(r.entries, entries...)
	for _, e := range entries {
		r.bytes += len(e.Raw)
	}
	for len(r.entries) > recentRecords || r.bytes > recentBytes {
		r.drop(1)
	}
}

// drop forgets the n oldest.
func (r *recent) drop(n int) {
	for _, e := range r.entries[:n] {
		r.bytes -= len(e.Raw)
	}
	clear(r.entries[:n])
	if r.entries = r.entries[n:]; len(r.entries) == 0 {
		r.entries = nil
	}
}

// trim forgets what all tails have.
func (r *recent) trim() {
	if len(r.entries) == 0 {
		return
	}
	first := r.entries[0].Index
	taken := first + uint64(len(r.entries))
	for _, t := range r.tails {
		taken = min(taken, t.next)
	}
	if taken > first {
		r.drop(int(taken - first)) //nolint:gosec // G115: at most len(r.entries)
	}
}

// from returns a batch of the records from index next on; none if they are not
// there.
func (r *recent) from(next uint64) []Entry {
	if len(r.entries) == 0 || next < r.entries[0].Index || next > r.entries[len(r.entries)-1].Index {
		return nil
	}
	left := r.entries[next-r.entries[0].Index:]
	n := 0
	for bytes := 0; n < min(len(left), batchRecords) && bytes < batchBytes; n++ {
		bytes += len(left[n].Raw)
	}
	return slices.Clone(left[:n])
}

// Tail goes through a journal's records, in order, each as soon as it is durable
// and never before. Who keeps up gets what the writer had in memory; who does not
// reads it from the disk. It may be used by one goroutine.
type Tail struct {
	journal *Journal
	wake    chan struct{} // capacity 1: the journal has what was wanted
	disk    *cursor       // open while records of its segment may still be read

	next   uint64 // first record that Next has not returned; written under the journal's mu
	wanted uint64 // size of the journal that wake is for; guarded by the journal's mu
}

// Tail returns a Tail that begins with the record with index from. It must be
// closed.
func (j *Journal) Tail(from uint64) *Tail {
	t := &Tail{journal: j, wake: make(chan struct{}, 1), disk: &cursor{dir: j.dir}, next: from}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.recent.tails = append(j.recent.tails, t)
	return t
}

// Close gives up what t holds.
func (t *Tail) Close() {
	t.disk.close()
	j := t.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	j.recent.tails = slices.DeleteFunc(j.recent.tails, func(o *Tail) bool { return o == t })
	j.recent.trim()
}

// Next returns the records that follow, at least one and at most 1000: when there
// are so many, or linger after the first of them has come. It waits until there
// are some, ctx ends, the journal is damaged, or it is closed (ErrClosed, after
// its last record). What it returns must not be modified.
func (t *Tail) Next(ctx context.Context, linger time.Duration) ([]Entry, error) {
	if err := t.await(ctx, linger); err != nil {
		return nil, err
	}
	j := t.journal
	j.mu.Lock()
	batch := j.recent.from(t.next)
	j.mu.Unlock()
	if batch == nil {
		var err error
		if batch, err = t.read(); err != nil {
			return nil, fmt.Errorf("follow ledger: %w", err)
		}
	} else if s := t.disk.seg; s != nil && s.first != batch[len(batch)-1].Place.Segment {
		t.disk.close()
	}
	j.mu.Lock()
	t.next += uint64(len(batch))
	j.recent.trim()
	j.mu.Unlock()
	return batch, nil
}

// await waits for a batch.
func (t *Tail) await(ctx context.Context, linger time.Duration) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for !t.want(1) {
		select {
		case <-t.wake:
		case <-t.journal.stopped:
			if !t.want(1) {
				return ErrClosed
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if linger <= 0 || t.want(batchRecords) {
		return nil
	}
	timer := time.NewTimer(linger)
	defer timer.Stop()
	for !t.want(batchRecords) {
		select {
		case <-t.wake:
		case <-timer.C:
			return nil
		case <-t.journal.stopped:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// want reports whether there are n records more; if not, wake says when there are.
func (t *Tail) want(n uint64) bool {
	t.journal.mu.Lock()
	defer t.journal.mu.Unlock()
	t.wanted = t.next + n
	return t.journal.Size() >= t.wanted
}

// read reads a batch from the disk. The cursor may be behind: what was had from
// memory meanwhile is passed over.
func (t *Tail) read() ([]Entry, error) {
	t.disk.from = t.next
	var batch []Entry
	left := min(t.journal.Size()-t.next, batchRecords)
	for bytes := 0; uint64(len(batch)) < left && bytes < batchBytes; {
		f, err := t.disk.next()
		if err != nil {
			return nil, err
		}
		e, err := t.disk.entry(f)
		if err != nil {
			return nil, err
		}
		batch = append(batch, e)
		bytes += len(e.Raw)
	}
	return batch, nil
}

// announce says what has become durable.
func (j *Journal) announce(h Head, entries []Entry) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.head.Store(&h)
	j.recent.add(entries)
	for _, t := range j.recent.tails {
		if h.Size < t.wanted {
			continue
		}
		select {
		case t.wake <- struct{}{}:
		default: // it has not looked yet
		}
	}
}
