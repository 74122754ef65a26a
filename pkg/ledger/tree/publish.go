package tree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/meshid/meshid/internal/backoff"
)

const (
	maxPendingFiles = 64      // full tiles and bundles in memory before they are written
	maxPendingBytes = 4 << 20 // likewise
)

// retryPolicy is for checkpoints that could not be written.
var retryPolicy = backoff.Policy{Base: 2 * time.Second, Max: 15 * time.Second}

// tile is a file that is to be written.
type tile struct {
	path    string // below the tree's folder
	partial string // folder of the partial ones that it replaces
	content []byte
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
