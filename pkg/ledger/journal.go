package ledger

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/internal/durable"
)

// The way of a record, each step one function:
//
//  1. NewDraft encodes and hashes it, in the goroutine of whoever decided.
//  2. Append puts it in the queue and waits.
//  3. gather takes what is in the queue: the batch.
//  4. writer.append gives the records their places and links, writes the batch
//     with one write and makes it durable with one fdatasync.
//  5. announce hands the records to the tails, settle tells those who wait, and
//     Append makes Durables.
//
// Steps 3 to 5 are the work of one of those who wait, who has the turn. The next
// batch is what arrived while the disk was busy with the one before: many callers
// share an fdatasync, and one alone waits for nothing but its own, and for no
// other goroutine.

const (
	defaultSegmentBytes = 64 << 20
	minSegmentBytes     = 4 << 10

	queueLength    = 1024     // calls of Append that wait for the writer; more wait to get into the queue
	maxBatchBytes  = 1 << 20  // a batch takes no further call from here on
	maxAppendBytes = 16 << 20 // in one call of Append
)

// ErrClosed is wrapped by the errors of a Journal that was closed.
var ErrClosed = errors.New("ledger is closed")

// Options are a journal's options; the zero value is good.
type Options struct {
	// SegmentBytes is the size at which the next segment is begun; 64 MiB if 0.
	SegmentBytes int64
	// Registerer gets the metrics, if it is not nil.
	Registerer prometheus.Registerer
	// Logger gets what an operator should know, if it is not nil.
	Logger *slog.Logger
	// OnState, if it is not nil, is called when records can no longer be written,
	// with the error (which wraps ErrFull or ErrFailed), and with nil when they
	// can be again. It is called by who writes: it must return quickly.
	OnState func(err error)

	disk disk // nil except in tests
}

// Journal is the ledger of one CA process: an append-only sequence of records on
// the local disk. All methods may be called concurrently.
type Journal struct {
	dir     string
	options Options
	metrics *metrics
	lock    *durable.Lock
	name    [16]byte
	head    atomic.Pointer[Head] // of what is durable

	queue   chan *request
	turn    chan struct{} // capacity 1: full while somebody writes
	closing chan struct{} // closed by Close
	broken  chan struct{} // closed after a final failure
	stopped chan struct{} // closed when Close has written what waited

	writer   *writer // of who has the turn
	state    error   // as last told to OnState; likewise
	closed   sync.Once
	closeErr error // written before stopped is closed

	archiving sync.Mutex // held by Archive

	mu     sync.Mutex // guards what follows
	failed error      // final
	recent recent
}

// The states of a request.
const (
	waiting   = iota // in the queue
	taken            // in a batch: it may become durable
	withdrawn        // its caller has given up; it is never written
)

// request is one call of Append on its way.
type request struct {
	drafts []*Draft
	bytes  int
	state  atomic.Int32
	done   chan struct{} // closed when what follows is set

	first uint64 // index of the first record
	err   error
}

// Open opens the journal in dir, or begins one there; the directory is created if
// it is missing (0700), and must not be writable by others. Open takes a lock: a
// journal has one writer (else the error wraps durable.ErrLocked). What an
// interrupted write left behind the last record is cut off; any other damage is
// refused with a *DamageError. The caller must Close the journal.
func Open(dir string, o Options) (_ *Journal, err error) {
	if o.SegmentBytes == 0 {
		o.SegmentBytes = defaultSegmentBytes
	}
	if o.SegmentBytes < minSegmentBytes {
		return nil, fmt.Errorf("open ledger: segments of %d bytes are too small, the least is %d", o.SegmentBytes, minSegmentBytes)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.disk == nil {
		o.disk = osDisk{}
	}
	// Who may read is up to the operator; who may write is not.
	if err := durable.CheckDir(dir, 0o755); errors.Is(err, fs.ErrNotExist) {
		if err := durable.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("open ledger: %w", err)
		}
	} else if err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	lock, err := durable.Acquire(filepath.Join(dir, lockName))
	if err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Release())
		}
	}()
	queue := make(chan *request, queueLength)
	m, err := newMetrics(o.Registerer, func() float64 { return float64(len(queue)) })
	if err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	w := &writer{disk: o.disk, dir: dir, segmentBytes: o.SegmentBytes, metrics: m}
	if err := w.recover(o.Logger); err != nil {
		return nil, fmt.Errorf("open ledger in %s: %w", dir, err)
	}
	w.observe()
	m.writable.Set(1)
	j := &Journal{
		dir: dir, options: o, metrics: m, lock: lock, name: w.journal, writer: w,
		queue:   queue,
		turn:    make(chan struct{}, 1),
		closing: make(chan struct{}),
		broken:  make(chan struct{}),
		stopped: make(chan struct{}),
	}
	j.head.Store(&Head{Size: w.next, Link: w.link})
	return j, nil
}

// Append records the drafts, in this order and one directly behind the other, and
// returns them, in this order, when they are durable. If there is an error,
// nothing is released, and the records may be in the journal or not: ErrFull and
// ErrRecord (nothing was written), ErrFailed, ErrClosed, or the context's error,
// for which a call that has the turn waits until the disk has answered.
// The drafts may be appended again after ErrFull.
func (j *Journal) Append(ctx context.Context, drafts ...*Draft) ([]*Durable, error) {
	if len(drafts) == 0 {
		return nil, nil
	}
	r := &request{drafts: drafts, done: make(chan struct{})}
	for _, d := range drafts {
		if d.err != nil {
			return nil, fmt.Errorf("append to ledger: %w", d.err)
		}
		r.bytes += padded(len(d.frame))
	}
	if r.bytes > maxAppendBytes {
		return nil, fmt.Errorf("append to ledger: %w: %d bytes at once, may be %d", ErrRecord, r.bytes, maxAppendBytes)
	}
	if err := j.submit(ctx, r); err != nil {
		return nil, fmt.Errorf("append to ledger: %w", err)
	}
	list, durables := make([]Durable, len(drafts)), make([]*Durable, len(drafts))
	for i, d := range drafts {
		list[i] = Durable{record: d.record, index: r.first + uint64(i), hash: d.hash, chain: d.chain}
		durables[i] = &list[i]
	}
	return durables, nil
}

// submit puts r into the queue and waits until it is durable: it returns nil in
// no other case. While nobody writes, who waits writes.
func (j *Journal) submit(ctx context.Context, r *request) error {
	if err := j.refusal(ctx); err != nil {
		return err
	}
	queue, closing := j.queue, j.closing // nil once r is in the queue: what is there before Close is still written
	select {
	case queue <- r: // before the turn is taken: the batch has it
		queue, closing = nil, nil
	default:
	}
	for {
		select {
		case <-r.done:
			return r.err
		case queue <- r:
			queue, closing = nil, nil
			continue
		case j.turn <- struct{}{}:
			j.write()
			continue
		case <-closing:
			return ErrClosed
		case <-ctx.Done():
			if queue != nil || r.state.CompareAndSwap(waiting, withdrawn) {
				return context.Cause(ctx)
			}
		case <-j.stopped:
		}
		select { // what has happened already counts
		case <-r.done:
			return r.err
		default:
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return ErrClosed // it came after the last batch
	}
}

// refusal is why nothing more is taken, if so.
func (j *Journal) refusal(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	select {
	case <-j.closing:
		return ErrClosed
	default:
		return j.Failed()
	}
}

// write writes one batch, if something waits. Who calls it has the turn, which write
// gives up.
func (j *Journal) write() {
	defer func() {
		if p := recover(); p != nil {
			// What is on the disk is unknown, and no caller that answers its own
			// panics may go on from here.
			go panic(fmt.Sprintf("write to ledger: %v\n%s", p, debug.Stack()))
			select {}
		}
		<-j.turn
	}()
	select {
	case r := <-j.queue:
		j.commit(r)
	default:
	}
}

// commit writes one batch, which begins with r.
func (j *Journal) commit(r *request) {
	batch := j.gather(r)
	if len(batch) == 0 {
		return
	}
	if err := j.Failed(); err != nil {
		j.settle(batch, err)
		return
	}
	entries, f := j.writer.append(batch)
	if f != nil {
		j.fail(f)
		j.settle(batch, f.err)
		return
	}
	j.recordState(nil)
	j.announce(Head{Size: j.writer.next, Link: j.writer.link}, entries)
	j.settle(batch, nil)
	if len(batch) > 1 {
		// Those who were told are about to ask again, and the next batch would
		// begin with the first of them.
		runtime.Gosched()
	}
}

// gather returns r and what else is waiting, without those who gave up.
func (j *Journal) gather(r *request) []*request {
	var batch []*request
	for bytes := 0; ; {
		if r.state.CompareAndSwap(waiting, taken) {
			batch = append(batch, r)
			bytes += r.bytes
		}
		if bytes >= maxBatchBytes {
			return batch
		}
		select {
		case r = <-j.queue:
		default:
			return batch
		}
	}
}

// settle tells those who wait how it ended.
func (j *Journal) settle(batch []*request, err error) {
	for _, r := range batch {
		r.err = err
		close(r.done)
	}
}

// fail records that a batch could not be written.
func (j *Journal) fail(f *failure) {
	j.metrics.failures.WithLabelValues(f.reason).Inc()
	if f.final {
		j.mu.Lock()
		j.failed = f.err
		j.mu.Unlock()
		close(j.broken)
	}
	j.recordState(f.err)
}

// recordState says that records can or cannot be written, if that has changed.
func (j *Journal) recordState(err error) {
	if (err == nil) == (j.state == nil) && !errors.Is(err, ErrFailed) {
		return
	}
	j.state = err
	if err == nil {
		j.metrics.writable.Set(1)
		j.options.Logger.Info("ledger is writable again")
	} else {
		j.metrics.writable.Set(0)
		j.options.Logger.Error("ledger is not writable, nothing is issued", "err", err)
	}
	if j.options.OnState != nil {
		j.options.OnState(err)
	}
}

// Name returns the journal's name: random, the same as long as it lives, and
// different for every other journal. With it, an index names a record everywhere.
func (j *Journal) Name() [16]byte { return j.name }

// Size returns the number of durable records: the index of the next one.
func (j *Journal) Size() uint64 { return j.head.Load().Size }

// Head returns what identifies everything that is durable: keep it elsewhere, and
// Verify will find out if any of it is changed, or gone.
func (j *Journal) Head() Head { return *j.head.Load() }

// Failed returns nil, or why no record can be written any more; then the process
// should end. The error wraps ErrFailed.
func (j *Journal) Failed() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.failed
}

// Broken returns a channel that is closed when Failed begins to return an error.
func (j *Journal) Broken() <-chan struct{} { return j.broken }

// Closed returns a channel that is closed when Close has written what waited.
func (j *Journal) Closed() <-chan struct{} { return j.stopped }

// HeadAt returns the head of the first size records, as the function HeadAt does.
func (j *Journal) HeadAt(size uint64) (Head, error) { return HeadAt(j.dir, size) }

// Close takes no further records, writes those that wait, and gives up the lock.
// It may be called again, and then returns the same.
func (j *Journal) Close() error {
	j.closed.Do(func() {
		close(j.closing)
		j.turn <- struct{}{} // for good
		for len(j.queue) > 0 {
			j.commit(<-j.queue)
		}
		j.closeErr = errors.Join(j.writer.close(j.Failed() != nil), j.lock.Release())
		close(j.stopped)
	})
	return j.closeErr
}

// Dir returns the journal's folder.
func (j *Journal) Dir() string { return j.dir }
