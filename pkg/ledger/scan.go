package ledger

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"

	"google.golang.org/protobuf/proto"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// Entry is one record as it stands in a journal. Neither Record nor Raw may be
// modified: others may have them too.
type Entry struct {
	// Index is the record's place, counted from 0: a cursor over the journal.
	Index uint64
	// Record is Raw, decoded.
	Record *ledgerv1.Record
	// Hash is the RFC 6962 §2.1 leaf hash of Raw.
	Hash [32]byte
	// Link is the hash chain's value after this record: it depends on every
	// record up to this one.
	Link [32]byte
	// Raw is the record's bytes, which all hashes are made of.
	Raw []byte
	// Place is where the record stands: a Reader finds it there again.
	Place Place
}

// Scan returns the records of the journal in dir from index from on, in order,
// each checked against its hash chain from the beginning of its segment. The
// directory may be a copy, or in use: what is being written at its end is left
// out, though the last few records may be on their way to the disk still, so that
// a power failure could undo them (Journal.Tail has only durable ones). Nothing
// is written, and no lock is taken. After an error, which for damage is a
// *DamageError and for a record that was archived wraps ErrArchived, the sequence
// ends.
func Scan(dir string, from uint64) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		c := &cursor{dir: dir, from: from}
		defer c.close()
		for {
			f, err := c.next()
			if errors.Is(err, io.EOF) {
				return
			}
			var e Entry
			if err == nil {
				e, err = c.entry(f)
			}
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}

// cursor goes through the segments of a directory. It may be used by one
// goroutine.
type cursor struct {
	dir  string
	from uint64 // index of the first record that is wanted

	seg     *segment // nil before the first
	quick   bool     // the end of the journal has been examined once
	torn    int64    // bytes behind the last record at the last io.EOF
	suspect string   // damage that may have been a read that overlapped a write

	segments    int   // begun
	closedBytes int64 // in those that were read to their end
}

// close ends the use of the files. It may be called again.
func (c *cursor) close() {
	if c.seg != nil {
		_ = c.seg.close() // nothing was written
		c.seg = nil
	}
}

// entry makes an Entry of the frame that next returned last.
func (c *cursor) entry(f frame) (Entry, error) {
	e := Entry{
		Index: f.index, Hash: f.hash, Link: f.link, Raw: bytes.Clone(f.record), Record: new(ledgerv1.Record),
		Place: Place{Segment: c.seg.first, Offset: f.offset},
	}
	if err := proto.Unmarshal(e.Raw, e.Record); err != nil {
		return Entry{}, c.undecodable(f, err)
	}
	return e, nil
}

// undecodable is the error for a record that is sound, but no record.
func (c *cursor) undecodable(f frame, err error) error {
	return &DamageError{
		Segment: c.seg.name, Offset: f.offset, Index: f.index,
		Reason: fmt.Sprintf("the record does not decode: %v", err),
	}
}

// next returns the next frame, or io.EOF if there is none at the moment; it may
// then be called again.
func (c *cursor) next() (frame, error) {
	c.suspect = ""
	for {
		if c.seg == nil {
			if err := c.open(); err != nil {
				return frame{}, err
			}
		}
		f, err := c.seg.next()
		if err == nil {
			c.suspect = ""
			if f.index < c.from {
				continue
			}
			return f, nil
		}
		if !isEnd(err) {
			return frame{}, err
		}
		if c.suspect != "" {
			return frame{}, c.seg.damage(c.suspect)
		}
		if err := c.advance(err); err != nil {
			return frame{}, err
		}
	}
}

// open opens the segment with the first record that is wanted.
func (c *cursor) open() error {
	firsts, err := listSegments(c.dir)
	if err != nil {
		return fmt.Errorf("open ledger: %w", err)
	}
	if len(firsts) == 0 {
		return io.EOF
	}
	i, found := slices.BinarySearch(firsts, c.from)
	if !found {
		i--
	}
	if i < 0 {
		return absent(c.dir, firsts[0], c.from)
	}
	if c.seg, err = openSegment(c.dir, firsts[i]); err != nil {
		return wrapOpen(err)
	}
	c.segments++
	return nil
}

// wrapOpen says what was attempted when a segment could not be opened.
func wrapOpen(err error) error {
	if _, damage := errors.AsType[*DamageError](err); damage || err == nil {
		return err
	}
	return fmt.Errorf("open ledger segment: %w", err)
}

// advance is called where the segment has no further frame, for the reason why.
// It goes on to the segment that follows, or returns io.EOF if there is none. It
// returns nil if next is to try again; a suspicion that stays is damage.
func (c *cursor) advance(why error) error {
	s := c.seg
	if c.quick && errors.Is(why, io.EOF) && !c.exists(s.index) {
		c.torn = 0
		return io.EOF
	}
	firsts, err := listSegments(c.dir)
	if err != nil {
		return fmt.Errorf("open ledger: %w", err)
	}
	i, _ := slices.BinarySearch(firsts, s.first+1)
	switch {
	case i == len(firsts): // this is the last one
	case firsts[i] == s.index:
		following, err := openSegment(c.dir, s.index)
		if err != nil {
			return wrapOpen(err)
		}
		return c.enter(following, why)
	case firsts[i] > s.index:
		if head, err := Archived(c.dir); err == nil && head.Size >= firsts[i] {
			return fmt.Errorf("%w: %d and those up to %d, while they were to be read", ErrArchived, s.index, firsts[i])
		}
		// Either it was filled and closed while we looked, or something is missing.
		c.suspect = fmt.Sprintf("%s, and the next segment begins with record %d", reason(why), firsts[i])
		return nil
	default:
		return s.damage(fmt.Sprintf("the segment runs into the one that begins with record %d", firsts[i]))
	}
	torn, err := s.tail(reason(why))
	if damage, ok := errors.AsType[*DamageError](err); ok {
		c.suspect = damage.Reason
		return nil
	}
	if err != nil {
		return err
	}
	c.torn, c.quick = torn, true
	return io.EOF
}

// exists reports whether there may be a segment that begins with record first.
func (c *cursor) exists(first uint64) bool {
	_, err := os.Lstat(filepath.Join(c.dir, segmentName(first)))
	return first != c.seg.first && !errors.Is(err, fs.ErrNotExist)
}

// enter goes on with the segment that follows.
func (c *cursor) enter(following *segment, why error) error {
	s := c.seg
	torn, err := s.tail(reason(why))
	switch {
	case err != nil:
	case torn > 0:
		err = s.damage(reason(why) + ", in a segment that was closed")
	case following.journal != s.journal:
		err = following.headerDamage("the segment is of another journal")
	case following.previous != s.link:
		err = following.headerDamage("the hash chain is broken: the segment does not follow the one before it")
	}
	if err != nil {
		_ = following.close() // nothing was written
		return err
	}
	c.closedBytes += s.offset
	c.close()
	c.seg = following
	c.segments++
	return nil
}

// reason is why there is no frame, for a message.
func reason(why error) string {
	if errors.Is(why, io.EOF) {
		return "the records end here"
	}
	return why.Error()
}
