package tree

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/ledger"
)

const (
	defaultInterval = time.Second
	// staleAfter is from when on a checkpoint that does not cover the journal, or
	// that lacks cosignatures, is a condition.
	staleAfter = time.Minute

	gathering = 10 // the share of an interval for which records are gathered before they are added

	finalWitnessTime = 2 * time.Second // for witnesses, when the journal is closed
)

// ErrHalted is wrapped by Tree.Halted: the tree, its journal, its key or a witness
// contradict each other.
var ErrHalted = errors.New("the ledger's tree signs nothing more")

// Options are a tree's options.
type Options struct {
	// Key is the path of the log's key, which is made with the tree.
	Key string
	// Origin is the name of a log that is begun; one that exists keeps its own.
	Origin string
	// Witnesses are asked to cosign each checkpoint.
	Witnesses []Witness
	// Quorum is the number of them that must have cosigned a checkpoint before it
	// is published. With 0, it is published at once, and again with what came.
	Quorum int
	// Interval is the least time between two checkpoints; a second if 0.
	Interval time.Duration
	// Registerer gets the metrics, if it is not nil.
	Registerer prometheus.Registerer
	// Logger gets what an operator should know, if it is not nil.
	Logger *slog.Logger

	disk                disk           // nil except in tests
	retry, witnessRetry backoff.Policy // zero except in tests
}

// Tree is the Merkle tree over the journal of this process. All methods may be
// called concurrently, Run once.
type Tree struct {
	dir     string
	journal *ledger.Journal
	options Options
	metrics *metrics
	lock    *durable.Lock
	key     *Key // nil if halted for want of one

	// Owned by Run.
	edge      edge
	bundle    []byte // records of the bundle that is not full
	last      ledger.Head
	pending   []tile // full tiles that are not on the disk yet
	bytes     int    // in pending
	partials  []string
	dirs      map[string]bool // that are known to exist
	state     state
	witnesses []*witness
	attempted time.Time
	retry     *backoff.Backoff
	retryAt   time.Time

	mu        sync.Mutex // guards what follows
	published Checkpoint // newest
	waiting   time.Time  // since when records are not covered by it; zero if none are
	witnessed uint64     // size of the largest checkpoint that has enough cosignatures
	unseen    time.Time  // since when records are not covered by that; zero if none are
	halted    error
	problem   error // of the last attempt to publish
}

// Open opens the tree in dir over the journal, or begins one there, with a new key.
// It takes a lock (else the error wraps durable.ErrLocked), which Run gives back. A
// tree that disagrees with its journal is no error: Halted says so, and the tree
// is not touched.
func Open(dir string, journal *ledger.Journal, o Options) (_ *Tree, err error) {
	if o.Interval == 0 {
		o.Interval = defaultInterval
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.disk == nil {
		o.disk = osDisk{}
	}
	if o.retry == (backoff.Policy{}) {
		o.retry = retryPolicy
	}
	if o.witnessRetry == (backoff.Policy{}) {
		o.witnessRetry = witnessPolicy
	}
	if o.Quorum > len(o.Witnesses) {
		return nil, fmt.Errorf("open ledger tree: a quorum of %d of %d witnesses cannot be reached", o.Quorum, len(o.Witnesses))
	}
	t := &Tree{dir: dir, journal: journal, options: o, dirs: map[string]bool{}, retry: backoff.New(o.retry)}
	for _, w := range o.Witnesses {
		t.witnesses = append(t.witnesses, newWitness(w, o.witnessRetry))
	}
	if err := makeDir(dir); err != nil {
		return nil, fmt.Errorf("open ledger tree: %w", err)
	}
	if t.lock, err = durable.Acquire(filepath.Join(dir, lockName)); err != nil {
		return nil, fmt.Errorf("open ledger tree: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.lock.Release())
		}
	}()
	if err := t.load(); errors.Is(err, ErrHalted) {
		t.halt(err)
	} else if err != nil {
		return nil, fmt.Errorf("open ledger tree in %s: %w", dir, err)
	}
	if t.metrics, err = newMetrics(o.Registerer, t); err != nil {
		return nil, fmt.Errorf("open ledger tree: %w", err)
	}
	return t, nil
}

// Run adds the journal's records to the tree and publishes checkpoints, until the
// journal is closed, and a last one then; or until ctx ends. It returns why the
// last checkpoint does not cover the journal, if so.
func (t *Tree) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, t.lock.Release()) }()
	if err := t.Halted(); err != nil {
		return t.idle(ctx)
	}
	t.options.Logger.InfoContext(ctx, "the ledger's tree is signed", "origin", t.key.Origin(), "vkey", t.key.String(), "records", t.edge.size)

	follow, stop := context.WithCancel(ctx)
	batches := make(chan []ledger.Entry)
	ended := make(chan error, 1)
	tail := t.journal.Tail(t.edge.size)
	go func() {
		ended <- t.follow(follow, tail, batches)
		close(batches)
	}()
	t.run(ctx, batches)
	stop()
	if err := <-ended; ctx.Err() == nil && t.Halted() == nil && !errors.Is(err, ledger.ErrClosed) && !errors.Is(err, context.Canceled) {
		t.halt(halting("follow the journal: %w", err))
	}
	if t.Halted() != nil {
		return t.idle(ctx)
	}
	return t.finish(ctx)
}

// follow sends what the journal has until ctx ends or the journal is closed.
func (t *Tree) follow(ctx context.Context, tail *ledger.Tail, batches chan<- []ledger.Entry) error {
	defer tail.Close()
	for {
		batch, err := tail.Next(ctx, t.options.Interval/gathering)
		if err != nil {
			return err
		}
		select {
		case batches <- batch:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// run is Run's loop. It returns when there are no more records, or nothing more is
// to be signed.
func (t *Tree) run(ctx context.Context, batches <-chan []ledger.Entry) {
	// What was signed last is published, and shown to the witnesses, before
	// anything else is signed: they may know that this is an older copy.
	t.publish(ctx)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for t.Halted() == nil {
		if at := t.due(); !at.IsZero() {
			timer.Reset(time.Until(at))
		}
		in := batches
		if t.full() && !t.flush() {
			in = nil // no more into memory until there is room on the disk
		}
		select {
		case batch, ok := <-in:
			if !ok {
				return
			}
			t.add(batch)
		case <-timer.C:
			if t.due().IsZero() {
				continue // nothing happened for an hour
			}
			t.publish(ctx)
		case <-t.journal.Closed():
			if in == nil {
				return
			}
			// What is left in the journal still comes.
			select {
			case batch, ok := <-in:
				if !ok {
					return
				}
				t.add(batch)
			case <-ctx.Done():
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// idle waits for the end of a tree that signs nothing more.
func (t *Tree) idle(ctx context.Context) error {
	t.options.Logger.ErrorContext(ctx, "the ledger's tree disagrees with what was signed, nothing more is signed", "err", t.Halted())
	select {
	case <-t.journal.Closed():
	case <-ctx.Done():
	}
	return nil
}

// finish publishes the last checkpoint.
func (t *Tree) finish(ctx context.Context) error {
	if ctx.Err() != nil {
		return nil
	}
	if t.edge.size == t.Checkpoint().Size && t.problemNow() == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, finalWitnessTime)
	defer cancel()
	t.publish(ctx)
	if err := t.problemNow(); err != nil {
		return fmt.Errorf("sign the last checkpoint of the ledger: %w", err)
	}
	return nil
}

// add adds records.
func (t *Tree) add(batch []ledger.Entry) {
	for _, e := range batch {
		if e.Index != t.edge.size {
			t.halt(halting("the journal gave record %d where %d was expected", e.Index, t.edge.size))
			return
		}
		t.bundle = appendEntry(t.bundle, e.Raw)
		t.last = ledger.Head{Size: e.Index + 1, Link: e.Link}
		t.edge.add(e.Hash, func(level int, n uint64, hashes []tlog.Hash) {
			if level == 0 {
				t.complete(entriesLevel, n, t.bundle)
				t.bundle = nil
			}
			t.complete(level, n, encodeTile(hashes))
		})
	}
}

// halting is the error for what contradicts what was signed.
func halting(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrHalted, fmt.Errorf(format, args...))
}

// halt is final: nothing more is signed.
func (t *Tree) halt(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.halted == nil {
		t.halted = err
	}
}

func (t *Tree) setProblem(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.problem = err
}

func (t *Tree) problemNow() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.problem
}

// Halted returns nil, or why nothing more is signed; the error wraps ErrHalted.
func (t *Tree) Halted() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.halted
}

// Key returns the log's public key in the format of Key.String; "" if it is not
// known.
func (t *Tree) Key() string {
	if t.key == nil {
		return ""
	}
	return t.key.String()
}

// Checkpoint returns what is published.
func (t *Tree) Checkpoint() Checkpoint {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.published
}

// behind returns for how long a record has been waiting for a checkpoint.
func (t *Tree) behind(now time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return waited(&t.waiting, now, t.published.Size, t.journal.Size())
}

// waited returns since when size is less than all, and keeps it.
func waited(since *time.Time, now time.Time, size, all uint64) time.Duration {
	if size >= all {
		*since = time.Time{}
		return 0
	}
	if since.IsZero() {
		*since = now
	}
	return now.Sub(*since)
}

// Health returns what an operator should know at the time now: failure is that
// nothing more is signed, and stays; warning is that the newest records have been
// without a checkpoint for more than a minute, and heals.
func (t *Tree) Health(now time.Time) (warning, failure error) {
	if err := t.Halted(); err != nil {
		return nil, err
	}
	if d := t.behind(now); d > staleAfter {
		err := t.problemNow()
		if err == nil {
			err = errors.New("the newest one does not cover the journal")
		}
		return fmt.Errorf("no checkpoint of the ledger for %v: %w", d.Round(time.Second), err), nil
	}
	return nil, nil
}
