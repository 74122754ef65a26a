package tree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
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

	maxPendingFiles = 64      // full tiles and bundles in memory before they are written
	maxPendingBytes = 4 << 20 // likewise
	gathering       = 10      // the share of an interval for which records are gathered before they are added

	finalWitnessTime = 2 * time.Second // for witnesses, when the journal is closed
)

// retryPolicy is for checkpoints that could not be written.
var retryPolicy = backoff.Policy{Base: 2 * time.Second, Max: 15 * time.Second}

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

// tile is a file that is to be written.
type tile struct {
	path    string // below the tree's folder
	partial string // folder of the partial ones that it replaces
	content []byte
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

// load makes t what it was when it was signed last, in this order:
//
//  1. the key and the state, or new ones for a new log;
//  2. the journal must go on from where the state was taken;
//  3. the right edge of the tree must be what was signed;
//  4. so must the published checkpoint.
func (t *Tree) load() error {
	if err := t.identify(); err != nil {
		return err
	}
	if err := t.compareJournal(); err != nil {
		return err
	}
	if err := t.loadEdge(); err != nil {
		return err
	}
	return t.compareCheckpoint()
}

// halting is the error for what contradicts what was signed.
func halting(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrHalted, fmt.Errorf(format, args...))
}

// identify is step 1. The key's file is made last: where it is, there is a state.
func (t *Tree) identify() error {
	stored, err := readFile(filepath.Join(t.dir, stateName), maxNoteBytes)
	begun := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	t.key, err = ReadKey(t.options.Key)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return t.begin(stored)
	case err != nil:
		return err
	case !begun:
		return halting("the key %s has signed a log, and its state is not in %s: restore the folder from a copy; or, to begin another log with another key, move the key away", t.options.Key, t.dir)
	}
	if t.state, err = parseState(stored, t.key.verifier); err != nil {
		return halting("%w", &DamageError{Path: stateName, Reason: fmt.Sprintf("%v: restore the folder, or the key %s, from a copy", err, t.options.Key)})
	}
	if origin := t.key.Origin(); t.options.Origin != "" && origin != t.options.Origin {
		t.options.Logger.Info("the ledger's tree keeps the name that it was begun with", "origin", origin)
	}
	return nil
}

// begin makes a new log. What an interrupted attempt left is an empty log whose
// key nobody has.
func (t *Tree) begin(stored []byte) error {
	if stored != nil {
		_, signed, _ := bytes.Cut(stored, []byte("\n\n"))
		if c, err := parseText(string(signed)); err != nil || c.Size > 0 {
			return halting("there is a log in %s, and its key is not at %s: restore the key from a copy; or, to begin another log, move the folder away and keep it", t.dir, t.options.Key)
		}
	}
	key, content, err := newKey(t.options.Origin)
	if err != nil {
		return err
	}
	t.key = key
	if t.state.signed, err = sign(key, 0, t.edge.root()); err != nil {
		return err
	}
	if t.state.head, err = t.journal.HeadAt(0); errors.Is(err, ledger.ErrArchived) {
		return halting("a log cannot be begun, for the journal's first records are in an archive: restore them, or the folder %s, from a copy", t.dir)
	} else if err != nil {
		return err
	}
	if err := t.options.disk.replace(filepath.Join(t.dir, stateName), t.state.encode()); err != nil {
		return err
	}
	return createKey(t.options.Key, content)
}

// compareJournal is step 2.
func (t *Tree) compareJournal() error {
	want := t.state.head
	got, err := t.journal.HeadAt(want.Size)
	switch {
	case errors.Is(err, ledger.ErrMissing):
		return halting("%w: the journal is older than its tree: restore a newer copy of the journal; or, if the records are lost for good, move the folder %s and the key %s away and keep them, and another log begins", err, t.dir, t.options.Key)
	case err != nil:
		return halting("read the journal up to where the tree ends: %w", err)
	case got != want:
		return halting("the journal's first %d records are not those that were signed: restore the journal that belongs to %s", want.Size, t.dir)
	}
	t.last = got
	return nil
}

// loadEdge is step 3.
func (t *Tree) loadEdge() error {
	size := t.state.signed.Size
	e := edge{size: size}
	for level := range maxLevels {
		n, width := part(size, level)
		if width == 0 {
			continue
		}
		hashes, err := readTile(t.dir, level, n, width)
		if err != nil {
			return t.readError(err)
		}
		e.levels[level] = append(make([]tlog.Hash, 0, tileWidth), hashes...)
	}
	for level := entriesLevel; level < maxLevels; level++ {
		if n, _ := part(size, max(level, 0)); n > 0 { // left by a crash
			t.partials = append(t.partials, tilePath(level, n-1, tileWidth)+".p")
		}
	}
	if e.root() != tlog.Hash(t.state.signed.Root) {
		return halting("the right edge of the tree of %d records is not what was signed: `ca ledger verify` finds the file; restore it from a copy", size)
	}
	n, width := part(size, 0)
	if width > 0 {
		records, err := readBundle(t.dir, n, width)
		if err != nil {
			return t.readError(err)
		}
		for i, r := range records {
			if tlog.RecordHash(r) != e.levels[0][i] {
				return halting("%w", damage(entriesLevel, n, width, firstIndex(0, n)+uint64(i), "the record is not the one that was signed: restore the file from a copy"))
			}
			t.bundle = appendEntry(t.bundle, r)
		}
	}
	t.edge = e
	return nil
}

// readError makes damage a reason to halt.
func (t *Tree) readError(err error) error {
	if _, ok := errors.AsType[*DamageError](err); ok {
		return halting("%w", err)
	}
	return err
}

// compareCheckpoint is step 4.
func (t *Tree) compareCheckpoint() error {
	b, err := readFile(filepath.Join(t.dir, checkpointName), maxNoteBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // Run publishes it
	}
	if err != nil {
		return err
	}
	c, err := ParseCheckpoint(b, t.key.verifier)
	if err != nil {
		return halting("%w", &DamageError{Path: checkpointName, Reason: err.Error()})
	}
	if err := consistent(t.dir, c, t.state.signed); err != nil {
		return halting("the published checkpoint and the state: %w", err)
	}
	t.published = c
	return nil
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

// complete takes note of a full tile.
func (t *Tree) complete(level int, n uint64, content []byte) {
	path := tilePath(level, n, tileWidth)
	t.pending = append(t.pending, tile{path: path, partial: path + ".p", content: content})
	t.bytes += len(content)
}

// full reports whether there is too much in memory.
func (t *Tree) full() bool { return len(t.pending) >= maxPendingFiles || t.bytes >= maxPendingBytes }

// flush writes full tiles without signing, and reports whether it could. After a
// failure it is not tried again before it is due.
func (t *Tree) flush() bool {
	if time.Now().Before(t.retryAt) {
		return false
	}
	err := t.write(t.pending)
	if err == nil {
		t.written()
		return true
	}
	t.failed(err)
	return false
}

// written takes note that pending is durable.
func (t *Tree) written() {
	for _, f := range t.pending {
		t.partials = append(t.partials, f.partial)
	}
	t.pending, t.bytes = nil, 0
}

// due returns when publish is to be called, the zero time if there is no need.
func (t *Tree) due() time.Time {
	switch {
	case t.problemNow() != nil:
		return t.retryAt
	case t.edge.size > t.Checkpoint().Size && t.edge.size > t.state.signed.Size:
		return t.attempted.Add(t.options.Interval)
	default:
		return t.nextWitness()
	}
}

// publish makes a checkpoint of what is there, in the order that the package's
// comment gives.
func (t *Tree) publish(ctx context.Context) {
	start := time.Now()
	// The interval begins when this is done: on a slow disk, too, there is time to
	// take in records.
	defer func() { t.attempted = time.Now() }()
	if err := t.sign(); err != nil {
		t.failed(err)
		return
	}
	t.metrics.publish.Observe(time.Since(start).Seconds())
	signed := t.state.signed
	if t.options.Quorum == 0 && t.Checkpoint().Size < signed.Size || t.Checkpoint().Note == nil && t.options.Quorum == 0 {
		if err := t.expose(signed, start); err != nil {
			t.failed(err)
			return
		}
	}
	if err := t.collect(ctx, signed, start); err != nil {
		t.failed(err)
		return
	}
	t.retry.Reset()
	t.setProblem(nil)
}

// sign makes the tree of now durable, and then its head.
func (t *Tree) sign() error {
	if t.edge.size == t.state.signed.Size {
		return nil
	}
	files := slices.Concat(t.pending, t.edgeFiles())
	if err := t.write(files); err != nil {
		return err
	}
	t.written()
	c, err := sign(t.key, t.edge.size, t.edge.root())
	if err != nil {
		return err
	}
	s := state{signed: c, head: t.last}
	if err := t.options.disk.replace(filepath.Join(t.dir, stateName), s.encode()); err != nil {
		return fmt.Errorf("write the state: %w", err)
	}
	t.state = s
	return nil
}

// edgeFiles returns the partial tiles that the tree of now has, and the one signed
// last did not have.
func (t *Tree) edgeFiles() []tile {
	var files []tile
	for level := range maxLevels {
		n, width := part(t.edge.size, level)
		wasN, was := part(t.state.signed.Size, level)
		if width == 0 || n == wasN && width == was {
			continue
		}
		files = append(files, tile{path: tilePath(level, n, width), content: encodeTile(t.edge.levels[level])})
		if level == 0 {
			files = append(files, tile{path: tilePath(entriesLevel, n, width), content: t.bundle})
		}
	}
	return files
}

// write makes files durable. One that is there already must be the same.
func (t *Tree) write(files []tile) error {
	disk := t.options.disk
	folders := map[string]bool{}
	var staged []string
	for _, f := range files {
		path := filepath.Join(t.dir, f.path)
		folders[filepath.Dir(path)] = true
		old, err := readFile(path, maxBundleBytes)
		switch {
		case err == nil && bytes.Equal(old, f.content):
			continue // an earlier attempt came this far
		case err == nil:
			return halting("%w", &DamageError{Path: f.path, Index: t.state.signed.Size, Reason: "the file exists, and its content is not the journal's"})
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		if folder := filepath.Dir(path); !t.dirs[folder] {
			if err := disk.mkdir(folder); err != nil {
				return err
			}
			t.dirs[folder] = true
		}
		if err := disk.write(path+".new", f.content); err != nil {
			return err
		}
		staged = append(staged, path)
	}
	for _, path := range staged {
		if err := disk.rename(path+".new", path); err != nil {
			return err
		}
	}
	for folder := range folders {
		if err := disk.syncDir(folder); err != nil {
			return err
		}
	}
	return nil
}

// expose makes c the published checkpoint; it covers all records from before start.
func (t *Tree) expose(c Checkpoint, start time.Time) error {
	if err := t.options.disk.replace(filepath.Join(t.dir, checkpointName), c.Note); err != nil {
		return fmt.Errorf("write the checkpoint: %w", err)
	}
	t.metrics.checkpoints.Inc()
	t.mu.Lock()
	t.published = c
	t.waiting = time.Time{}
	if t.journal.Size() > c.Size {
		t.waiting = start
	}
	t.mu.Unlock()
	// A reader with an older checkpoint finds the full tile in place of these.
	for _, p := range t.partials {
		delete(t.dirs, filepath.Join(t.dir, p))
		if err := t.options.disk.removeAll(filepath.Join(t.dir, p)); err != nil {
			t.options.Logger.Warn("partial tiles of the ledger's tree were not removed", "err", err)
		}
	}
	t.partials = nil
	return nil
}

// failed takes note of why there is no checkpoint.
func (t *Tree) failed(err error) {
	t.metrics.failures.Inc()
	if errors.Is(err, ErrHalted) {
		t.halt(err)
		return
	}
	if t.problemNow() == nil {
		t.options.Logger.Error("no checkpoint of the ledger could be written; trying again", "err", err)
	}
	t.setProblem(err)
	t.retryAt = time.Now().Add(max(t.retry.Next(), t.options.Interval))
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
