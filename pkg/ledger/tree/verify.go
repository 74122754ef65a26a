package tree

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sync/errgroup"

	"github.com/meshid/meshid/pkg/ledger"
)

// Verifier verifies a tree, and a journal against it, offline: both folders may be
// copies. The folders may be in use, if the tree was copied, or is read, before the
// journal.
type Verifier struct {
	// Key is the log's.
	Key note.Verifier
	// Witnesses are those whose cosignatures are reported.
	Witnesses []note.Verifier
	// Known are checkpoints that were kept elsewhere: the tree must continue them.
	Known []Checkpoint
	// KnownHeads are heads of the journal that were kept elsewhere.
	KnownHeads []ledger.Head
	// Progress, if it is not nil, is told now and then how many records more have
	// been read. It may be called concurrently.
	Progress func(records int)
}

// Report is what a Verifier found.
type Report struct {
	// Checkpoint is what the tree was compared with: the head that was signed last.
	Checkpoint Checkpoint
	// Published is the checkpoint that is published; it may cover less.
	Published Checkpoint
	// BundlesAbsent is the number of entry bundles that are not there, because
	// their records were archived.
	BundlesAbsent int
	// Journal is what was found in the journal; it is empty if none was given.
	Journal ledger.Report
}

// Verify verifies the tree in dir, its checkpoint, every tile and every entry bundle,
// and that the journal has the same records and not fewer. Of the bundles that belong
// to archived records, any may be missing. The error is that of the first file that is
// not what was signed, as a *DamageError; or wraps ErrInconsistent or ErrSignature.
func (v Verifier) Verify(ctx context.Context, dir, journal string) (Report, error) {
	archived, err := ledger.Archived(journal)
	if err != nil {
		return Report{}, err
	}
	r, s, terr := v.tree(ctx, dir, archived.Size)
	jv := ledger.Verifier{Known: v.KnownHeads, Progress: v.Progress}
	if terr == nil {
		if s.head != (ledger.Head{}) && s.head.Size >= archived.Size {
			jv.Known = append(slices.Clone(jv.Known), s.head)
		}
		jv.Visit = func() func(uint64, [32]byte) error { return compareLeaves(dir, r.Checkpoint) }
	}
	var jerr error
	if r.Journal, jerr = jv.Verify(ctx, journal); terr != nil || jerr != nil {
		return r, errors.Join(terr, jerr)
	}
	if have := r.Journal.Head.Size; have < r.Checkpoint.Size {
		return r, fmt.Errorf("%w: a checkpoint of %d records was signed, and the journal has %d", ledger.ErrMissing, r.Checkpoint.Size, have)
	}
	return r, nil
}

// compareLeaves returns a visitor of the journal's records that compares them with
// the leaves of the tree.
func compareLeaves(dir string, c Checkpoint) func(uint64, [32]byte) error {
	var leaves []tlog.Hash
	var of uint64 // the tile that leaves are of, plus 1
	return func(index uint64, hash [32]byte) error {
		if index >= c.Size {
			return nil // not in the tree yet
		}
		n := index / tileWidth
		if of != n+1 {
			var err error
			if leaves, err = readTile(dir, 0, n, bundleWidth(c.Size, n)); err != nil {
				return err
			}
			of = n + 1
		}
		if leaves[index%tileWidth] != tlog.Hash(hash) {
			return fmt.Errorf("%w: record %d of the journal is not record %d of the tree that was signed", ErrInconsistent, index, index)
		}
		return nil
	}
}

// tree verifies a tree:
//
//  1. the signatures, and that state, checkpoint and what is known are of one log;
//  2. each bundle against its tile of leaves;
//  3. each tile against those below it, and the last ones against the root.
func (v Verifier) tree(ctx context.Context, dir string, archived uint64) (Report, state, error) {
	r, s, err := v.signatures(dir)
	if err != nil {
		return r, s, err
	}
	w := &walk{dir: dir, size: r.Checkpoint.Size, archived: archived, progress: v.Progress}
	if err := w.leaves(ctx); err != nil {
		return r, s, err
	}
	r.BundlesAbsent = w.absent
	if err := w.judge(r.Checkpoint); err != nil {
		return r, s, err
	}
	if err := partials(dir, r.Checkpoint.Size); err != nil {
		return r, s, err
	}
	// Now all tiles are what was signed, and what they prove counts.
	if err := consistent(dir, r.Published, r.Checkpoint); err != nil {
		return r, s, fmt.Errorf("the published checkpoint: %w", err)
	}
	for _, k := range v.Known {
		if err := consistent(dir, k, r.Checkpoint); err != nil {
			return r, s, fmt.Errorf("the checkpoint that was kept: %w", err)
		}
	}
	return r, s, nil
}

// signatures is step 1.
func (v Verifier) signatures(dir string) (r Report, s state, err error) {
	if r.Published, err = ReadCheckpoint(dir, v.Key, v.Witnesses...); err != nil {
		return r, s, err
	}
	r.Checkpoint = r.Published
	b, err := readFile(filepath.Join(dir, stateName), maxNoteBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return r, s, nil // a mirror has none
	}
	if err != nil {
		return r, s, fmt.Errorf("read ledger tree: %w", err)
	}
	if s, err = parseState(b, v.Key); err != nil {
		return r, s, &DamageError{Path: stateName, Reason: err.Error()}
	}
	switch {
	case s.signed.Size < r.Published.Size:
		// The state was read after the checkpoint, and is written before it.
		return r, s, &DamageError{Path: stateName, Index: s.signed.Size, Reason: fmt.Sprintf("it is of %d records, and a checkpoint of %d was published: it was taken back", s.signed.Size, r.Published.Size)}
	case s.signed.Size == r.Published.Size && s.signed.Root != r.Published.Root:
		return r, s, fmt.Errorf("%w: the state and the checkpoint have two trees of %d records", ErrInconsistent, s.signed.Size)
	}
	if s.signed.Size > r.Published.Size {
		r.Checkpoint = s.signed
	}
	return r, s, nil
}

// walk goes through the files of a tree.
type walk struct {
	dir      string
	size     uint64
	archived uint64
	progress func(int)

	// For each tile of leaves: what it and its bundle hash to. Full tiles only;
	// of the last one, the leaves are in edge.
	tiles, bundles []tlog.Hash
	edges          [2][]tlog.Hash // from the tile, and from the bundle

	mu     sync.Mutex // guards what follows
	bad    []difference
	absent int
}

// difference is a place where two files do not fit together.
type difference struct {
	index  uint64 // of the first record concerned
	bundle error  // what to say if the tile is right
	tile   error  // what to say if the bundle is
}

// leaves is step 2. It returns errors about files that cannot be read; what does
// not fit together is judged later.
func (w *walk) leaves(ctx context.Context) error {
	full, width := part(w.size, 0)
	w.tiles, w.bundles = make([]tlog.Hash, full), make([]tlog.Hash, full)
	count := full
	if width > 0 {
		count++
	}
	// The first error counts, in the order of records.
	const stride = 16 // tiles that one goroutine takes at once
	var first struct {
		sync.Mutex
		n   uint64
		err error
	}
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for from := uint64(0); from < count; from += stride {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error {
			for n := from; n < min(from+stride, count); n++ {
				if err := w.leaf(n); err != nil {
					first.Lock()
					if first.err == nil || n < first.n {
						first.n, first.err = n, err
					}
					first.Unlock()
					return nil
				}
			}
			return nil
		})
	}
	_ = group.Wait() // the error is in first
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return first.err
}

// leaf reads one tile of leaves and its bundle.
func (w *walk) leaf(n uint64) error {
	width := bundleWidth(w.size, n)
	tile, err := readTile(w.dir, 0, n, width)
	if err != nil {
		return err
	}
	bundle := tile
	records, err := readBundle(w.dir, n, width)
	if err != nil {
		if firstIndex(0, n+1) > w.archived || !w.gone(n, width) {
			return err
		}
		w.mu.Lock()
		w.absent++
		w.mu.Unlock()
	} else if d := compareBundle(n, width, tile, records); d != nil {
		bundle = leafHashes(records)
		w.mu.Lock()
		w.bad = append(w.bad, *d)
		w.mu.Unlock()
	}
	if width < tileWidth {
		w.edges = [2][]tlog.Hash{tile, bundle}
	} else {
		w.tiles[n] = subtree(tile)
		w.bundles[n] = w.tiles[n]
		if &bundle[0] != &tile[0] {
			w.bundles[n] = subtree(bundle)
		}
	}
	if w.progress != nil {
		w.progress(width)
	}
	return nil
}

// gone reports whether a bundle is absent altogether.
func (w *walk) gone(n uint64, width int) bool {
	_, err := os.Lstat(filepath.Join(w.dir, tilePath(entriesLevel, n, width)))
	return errors.Is(err, fs.ErrNotExist)
}

// leafHashes returns the leaves of records.
func leafHashes(records [][]byte) []tlog.Hash {
	hashes := make([]tlog.Hash, len(records))
	for i, r := range records {
		hashes[i] = tlog.RecordHash(r)
	}
	return hashes
}

// compareBundle returns the first record that does not hash to its leaf.
func compareBundle(n uint64, width int, tile []tlog.Hash, records [][]byte) *difference {
	for i, r := range records {
		if tlog.RecordHash(r) == tile[i] {
			continue
		}
		index := firstIndex(0, n) + uint64(i)
		return &difference{
			index:  index,
			bundle: damage(entriesLevel, n, width, index, "the record is not the one that was signed"),
			tile:   damage(0, n, width, index, "the hash is not that of the record"),
		}
	}
	return nil
}

// judge is step 3: it decides which of two files that do not fit together is the
// one that was signed.
func (w *walk) judge(c Checkpoint) error {
	fromTiles := w.build(w.tiles, w.edges[0])
	if fromTiles.root() == tlog.Hash(c.Root) {
		// All leaves are right. Then bundles that differ are wrong, and so are
		// tiles above that differ from what the leaves hash to.
		return first(w.bad, func(d difference) error { return d.bundle }, fromTiles.compare(w.dir))
	}
	fromBundles := w.build(w.bundles, w.edges[1])
	if len(w.bad) > 0 && fromBundles.root() == tlog.Hash(c.Root) {
		return first(w.bad, func(d difference) error { return d.tile }, fromBundles.compare(w.dir))
	}
	// A record and its leaf were changed together, or several files were: the first
	// place where the tree does not fit together.
	err := first(w.bad, func(d difference) error {
		return fmt.Errorf("%w (and the tree of the checkpoint is another one)", d.tile)
	}, fromTiles.compare(w.dir))
	if err == nil {
		err = fmt.Errorf("%w: the tiles fit together, but they are not those of the %d records that were signed", ErrInconsistent, c.Size)
	}
	return err
}

// first returns the error about the record that comes first.
func first(bad []difference, pick func(difference) error, other error) error {
	if len(bad) == 0 {
		return other
	}
	d := slices.MinFunc(bad, func(a, b difference) int { return cmp.Compare(a.index, b.index) })
	if o, ok := errors.AsType[*DamageError](other); ok && o.Index < d.index {
		return other
	}
	return pick(d)
}

// levels are the hashes of a whole tree from level 1 up, as computed.
type levels struct {
	edge
	size   uint64
	hashes [maxLevels][]tlog.Hash
}

// build computes a tree from the hashes of its full tiles of leaves and the leaves
// of the last one.
func (w *walk) build(tiles, edge []tlog.Hash) *levels {
	l := &levels{size: w.size}
	l.levels[0] = edge
	up := tiles
	for level := 1; level < maxLevels; level++ {
		l.hashes[level] = up
		_, width := part(w.size, level)
		l.levels[level] = up[len(up)-width:]
		next := make([]tlog.Hash, 0, len(up)/tileWidth)
		for i := 0; i+tileWidth <= len(up); i += tileWidth {
			next = append(next, subtree(up[i:i+tileWidth]))
		}
		up = next
	}
	return l
}

// compare compares the tiles above the leaves with what was computed, and returns
// the first difference, in the order of records.
func (l *levels) compare(dir string) error {
	var found *DamageError
	keep := func(err error) error {
		d, ok := errors.AsType[*DamageError](err)
		if !ok {
			return err
		}
		if found == nil || d.Index < found.Index {
			found = d
		}
		return nil
	}
	for level := 1; level < maxLevels; level++ {
		hashes := l.hashes[level]
		for n := uint64(0); n*tileWidth < uint64(len(hashes)); n++ {
			want := hashes[n*tileWidth : min((n+1)*tileWidth, uint64(len(hashes)))]
			if err := keep(compareTile(dir, level, n, want)); err != nil {
				return err
			}
		}
	}
	if found != nil {
		return found
	}
	return nil
}

// compareTile compares one tile.
func compareTile(dir string, level int, n uint64, want []tlog.Hash) error {
	got, err := readTile(dir, level, n, len(want))
	if err != nil {
		return err
	}
	for i := range want {
		if got[i] != want[i] {
			index := (n*tileWidth + uint64(i)) << (height * level)
			return damage(level, n, len(want), index, "hash %d is not that of the tile below it", i)
		}
	}
	return nil
}

// partials checks the partial tiles of the right edge that are narrower than the
// last one: those of earlier checkpoints, which clients may still ask for.
func partials(dir string, size uint64) error {
	for level := entriesLevel; level < maxLevels; level++ {
		n, width := part(size, max(level, 0))
		if width == 0 {
			continue
		}
		newest := tilePath(level, n, width)
		want, err := readFile(filepath.Join(dir, newest), maxBundleBytes)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the full one is in its place
		}
		if err != nil {
			return fmt.Errorf("read ledger tree: %w", err)
		}
		folder := filepath.Dir(newest)
		names, err := os.ReadDir(filepath.Join(dir, folder))
		if err != nil {
			return fmt.Errorf("read ledger tree: %w", err)
		}
		for _, e := range names {
			if strings.HasSuffix(e.Name(), ".new") {
				continue // never finished
			}
			got, err := readFile(filepath.Join(dir, folder, e.Name()), maxBundleBytes)
			if err != nil {
				return fmt.Errorf("read ledger tree: %w", err)
			}
			if !isPartial(level, e.Name(), got) || !bytes.HasPrefix(want, got) && !bytes.HasPrefix(got, want) {
				return &DamageError{Path: filepath.Join(folder, e.Name()), Index: firstIndex(level, n), Reason: "it is not the beginning of " + newest}
			}
		}
	}
	return nil
}

// isPartial reports whether b is a partial tile of the width that is its name.
func isPartial(level int, name string, b []byte) bool {
	width, err := strconv.Atoi(name)
	if err != nil || width < 1 || width >= tileWidth {
		return false
	}
	if level != entriesLevel {
		return len(b) == width*tlog.HashSize
	}
	for range width {
		if _, b, err = cutEntry(b); err != nil {
			return false
		}
	}
	return len(b) == 0
}
