package ledger

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
)

// recover prepares w for appending to the journal in its directory:
//
//  1. remove a segment that was never finished;
//  2. if there is no segment, begin a journal;
//  3. read the last segment to its last sound record; what is behind it must be
//     what an interrupted write leaves, else the journal is refused;
//  4. cut that off, and make durable, anew, what the last write wrote: whether its
//     fdatasync succeeded is unknown, and if it failed, the kernel may take data
//     that is only in memory for written.
func (w *writer) recover(logger *slog.Logger) error {
	if err := w.removeUnfinished(); err != nil {
		return err
	}
	firsts, err := listSegments(w.dir)
	if err != nil {
		return err
	}
	if len(firsts) == 0 {
		return w.found()
	}
	seg, torn, err := readLast(w.dir, firsts[len(firsts)-1])
	if err != nil {
		return err
	}
	defer func() { _ = seg.close() }() // it was only read from
	for _, first := range firsts[:len(firsts)-1] {
		st, err := os.Lstat(filepath.Join(w.dir, segmentName(first)))
		if err != nil {
			return err
		}
		w.closed.Add(st.Size())
	}
	if torn > 0 {
		logger.Warn("cut an interrupted write off the end of the ledger",
			"segment", seg.name, "offset", seg.offset, "record", seg.index, "size_bytes", torn)
	}
	w.segments.Store(int64(len(firsts)))
	return w.resume(seg)
}

// removeUnfinished is step 1.
func (w *writer) removeUnfinished() error {
	entries, err := os.ReadDir(w.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), segmentSuffix+newSuffix) {
			if err := w.disk.remove(filepath.Join(w.dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// found is step 2.
func (w *writer) found() error {
	if _, err := rand.Read(w.journal[:]); err != nil {
		return err
	}
	w.link = genesis(w.journal)
	w.seed = header{journal: w.journal}.seed()
	if f := w.begin(); f != nil {
		return f.err
	}
	return nil
}

// readLast is step 3.
func readLast(dir string, first uint64) (seg *segment, torn int64, err error) {
	seg, err = openSegment(dir, first)
	if err != nil {
		return nil, 0, wrapOpen(err)
	}
	for {
		_, err := seg.next()
		if err == nil {
			continue
		}
		if isEnd(err) {
			torn, err = seg.tail(reason(err))
		}
		if err != nil {
			return nil, 0, errors.Join(err, seg.close())
		}
		return seg, torn, nil
	}
}

// resume is step 4.
func (w *writer) resume(seg *segment) (err error) {
	f, err := w.disk.open(filepath.Join(w.dir, seg.name))
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if err := f.Truncate(seg.offset); err != nil {
		return fmt.Errorf("cut off the end of the ledger: %w", err)
	}
	buf := make([]byte, readBytes)
	for at := seg.batch; at < seg.offset; {
		n := min(int64(len(buf)), seg.offset-at)
		if _, err := seg.f.ReadAt(buf[:n], at); err != nil {
			return fmt.Errorf("read the end of the ledger: %w", err)
		}
		if _, err := f.WriteAt(buf[:n], at); err != nil {
			return fmt.Errorf("write the end of the ledger again: %w", err)
		}
		at += n
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("make the end of the ledger durable: %w", err)
	}
	if err := w.disk.syncDir(w.dir); err != nil {
		return fmt.Errorf("make the end of the ledger durable: %w", err)
	}
	w.file, w.first, w.offset, w.allocated = f, seg.first, seg.offset, seg.offset
	w.journal, w.seed = seg.journal, seg.seed()
	w.next, w.link = seg.index, seg.link
	return nil
}
