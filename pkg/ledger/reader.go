package ledger

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"google.golang.org/protobuf/proto"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// Place is where a record stands in a journal.
type Place struct {
	// Segment is the index of the first record of its segment.
	Segment uint64
	// Offset is that of its frame in the segment, in bytes.
	Offset int64
}

// guess is what is read of a frame at first: most records are smaller.
const guess = 4 << 10

// Reader reads single records of a journal, which may be in use, by their places.
// It may be used by one goroutine, and must be closed. The zero value is no
// Reader.
type Reader struct {
	dir string
	seg *segment // the one that was read last, nil before the first
	buf []byte
}

// Reader returns a Reader of the journal, whatever becomes of the journal.
func (j *Journal) Reader() *Reader { return &Reader{dir: j.dir} }

// Close closes what is open.
func (r *Reader) Close() error {
	if r.seg == nil {
		return nil
	}
	err := r.seg.close()
	r.seg = nil
	return err
}

// Read returns the record with this index, which stands at p. It is checked by
// itself, not against the hash chain. The error wraps ErrArchived if the segment
// is no longer in the journal, and is a *DamageError if another record or none
// stands there.
func (r *Reader) Read(index uint64, p Place) (Entry, error) {
	if err := r.open(index, p.Segment); err != nil {
		return Entry{}, err
	}
	f, link, err := r.frame(index, p.Offset)
	if err != nil {
		return Entry{}, err
	}
	e := Entry{Index: index, Raw: f, Link: link, Place: p, Record: new(ledgerv1.Record)}
	e.Hash = sha256.Sum256(append([]byte{leafPrefix}, f...))
	if err := proto.Unmarshal(e.Raw, e.Record); err != nil {
		return Entry{}, r.damage(index, p.Offset, fmt.Sprintf("the record does not decode: %v", err))
	}
	return e, nil
}

// open makes seg the segment that begins with record first.
func (r *Reader) open(index, first uint64) error {
	if r.seg != nil && r.seg.first == first {
		return nil
	}
	if err := r.Close(); err != nil {
		return err
	}
	seg, err := openSegment(r.dir, first)
	if errors.Is(err, fs.ErrNotExist) {
		firsts, lerr := listSegments(r.dir)
		if lerr != nil {
			return fmt.Errorf("open ledger: %w", lerr)
		}
		if len(firsts) > 0 && first < firsts[0] {
			return absent(r.dir, firsts[0], index)
		}
		return &DamageError{Segment: segmentName(first), Index: index, Reason: "there is no such segment"}
	}
	if err != nil {
		return wrapOpen(err)
	}
	r.seg = seg
	return nil
}

// frame returns a copy of the record of the frame at offset, and its link.
func (r *Reader) frame(index uint64, offset int64) (record []byte, link [32]byte, err error) {
	b, err := r.at(offset, guess)
	if err != nil {
		return nil, link, err
	}
	if len(b) < frameHead {
		return nil, link, r.damage(index, offset, "the frame's head is cut off")
	}
	h := parseHead(b)
	size := frameHead + padded(int(h.length))
	if h.length == 0 || h.length > MaxRecordBytes || h.index != index {
		return nil, link, r.damage(index, offset, "another record or none stands there")
	}
	if len(b) < size {
		if b, err = r.at(offset, size); err != nil {
			return nil, link, err
		}
	}
	if len(b) < size || frameSum(b[:size], r.seg.seed()) != h.sum {
		return nil, link, r.damage(index, offset, "the checksum is wrong")
	}
	return append([]byte(nil), b[frameHead:frameHead+int(h.length)]...), h.link, nil
}

// at reads up to n bytes. They are valid until the next call.
func (r *Reader) at(offset int64, n int) ([]byte, error) {
	if cap(r.buf) < n {
		r.buf = make([]byte, n)
	}
	got, err := r.seg.f.ReadAt(r.buf[:n], offset)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read ledger segment: %w", err)
	}
	return r.buf[:got], nil
}

func (r *Reader) damage(index uint64, offset int64, reason string) error {
	return &DamageError{Segment: segmentName(r.seg.first), Offset: offset, Index: index, Reason: reason}
}
