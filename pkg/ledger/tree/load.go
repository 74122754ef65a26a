package tree

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/meshid/meshid/pkg/ledger"
)

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
