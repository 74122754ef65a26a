package ledger

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	readBytes = 256 << 10 // read at a time; a larger frame gets a larger buffer
	// searchBytes bounds the work of looking for frames behind damage.
	searchBytes = 1 << 30
)

// segment reads the frames of one segment, one after the other, and checks each
// against the one before. It may be used by one goroutine.
type segment struct {
	header
	name string
	f    *os.File

	offset int64    // of the next frame
	index  uint64   // of the next record
	link   [32]byte // before the next record
	base   uint64   // of the last frame
	batch  int64    // offset of the first frame of the last frame's batch

	buf   []byte
	start int64 // offset of buf's first byte
	sha   hash.Hash
	sum   [32]byte
}

// frame is one record as it was found. record is valid until the next call.
type frame struct {
	index  uint64
	hash   [32]byte
	link   [32]byte
	record []byte
	offset int64
}

// tornError says that there is something at a place that is no frame, or not
// yet.
type tornError struct{ reason string }

// Error is the reason.
func (e *tornError) Error() string { return e.reason }

// openSegment opens the segment of dir that begins with record first. The caller
// closes it.
func openSegment(dir string, first uint64) (*segment, error) {
	s := &segment{name: segmentName(first), sha: sha256.New()}
	f, err := os.OpenFile(filepath.Join(dir, s.name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	s.f = f
	if err := s.begin(first); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}

// begin reads the header and stands before the first frame.
func (s *segment) begin(first uint64) error {
	s.index = first
	b, err := s.peek(headerSize)
	if err != nil {
		return err
	}
	if s.header, err = parseHeader(b); err != nil {
		return s.damage(err.Error())
	}
	if s.first != first {
		return s.damage(fmt.Sprintf("header says that the first record is %d", s.first))
	}
	if s.first == 0 && s.previous != genesis(s.journal) {
		return s.damage("the first link is not that of this journal")
	}
	s.offset, s.link = headerSize, s.previous
	s.base, s.batch = first, headerSize
	return nil
}

// close closes the file.
func (s *segment) close() error { return s.f.Close() }

// damage is the error that names the place before the next frame.
func (s *segment) damage(reason string) error {
	return &DamageError{Segment: s.name, Offset: s.offset, Index: s.index, Reason: reason}
}

// headerDamage is the error that names the header.
func (s *segment) headerDamage(reason string) error {
	return &DamageError{Segment: s.name, Index: s.first, Reason: reason}
}

// peek returns n bytes from the current offset, fewer at the end of the file.
// They are valid until the next call.
func (s *segment) peek(n int) ([]byte, error) {
	if from := s.offset - s.start; from >= 0 && from+int64(n) <= int64(len(s.buf)) {
		return s.buf[from : from+int64(n)], nil
	}
	size := max(n, readBytes)
	if cap(s.buf) < size {
		s.buf = make([]byte, size)
	}
	got, err := s.f.ReadAt(s.buf[:cap(s.buf)], s.offset)
	if err != nil && !errors.Is(err, io.EOF) {
		s.forget()
		return nil, fmt.Errorf("read ledger segment: %w", err)
	}
	s.buf, s.start = s.buf[:got], s.offset
	return s.buf[:min(n, got)], nil
}

// forget drops what was read ahead: the file may have grown since.
func (s *segment) forget() { s.buf = s.buf[:0] }

// next returns the next frame. The error is io.EOF if there is nothing behind
// the last one, a *tornError if there is something else than a frame, and a
// *DamageError if there is a frame that does not belong there. After io.EOF and
// a *tornError, next may be called again, and looks again.
func (s *segment) next() (frame, error) {
	f, err := s.parse()
	if isEnd(err) {
		// What was read ahead may be older than the frame, and a read that
		// overlapped a write may have seen half of it.
		s.forget()
		f, err = s.parse()
	}
	if err != nil {
		s.forget()
		return frame{}, err
	}
	return f, nil
}

// isEnd reports whether err says that there is no frame, which at the end of a
// journal is as it should be.
func isEnd(err error) bool {
	_, torn := errors.AsType[*tornError](err)
	return torn || errors.Is(err, io.EOF)
}

// parse is one attempt of next.
func (s *segment) parse() (frame, error) {
	b, err := s.peek(frameHead)
	if err != nil {
		return frame{}, err
	}
	switch {
	case len(b) == 0:
		return frame{}, io.EOF
	case len(b) < frameHead:
		if isZero(b) {
			return frame{}, io.EOF
		}
		return frame{}, &tornError{"the frame's head is cut off"}
	}
	h := parseHead(b)
	if h.length == 0 {
		return frame{}, io.EOF
	}
	if h.length > MaxRecordBytes {
		return frame{}, &tornError{fmt.Sprintf("the length %d is impossible", h.length)}
	}
	size := frameHead + padded(int(h.length))
	if b, err = s.peek(size); err != nil {
		return frame{}, err
	}
	if len(b) < size {
		return frame{}, &tornError{"the record is cut off"}
	}
	if frameSum(b, s.seed()) != h.sum {
		return frame{}, &tornError{"the checksum is wrong"}
	}
	return s.accept(h, b)
}

// accept checks that a frame that is whole belongs behind the last one, and goes
// past it.
func (s *segment) accept(h head, b []byte) (frame, error) {
	end := frameHead + int(h.length)
	switch {
	case h.index != s.index:
		return frame{}, s.damage(fmt.Sprintf("this is record %d", h.index))
	case h.base != h.index && (h.base != s.base || h.index == s.first):
		return frame{}, s.damage(fmt.Sprintf("the batch cannot begin with record %d", h.base))
	case !isZero(b[end:]):
		return frame{}, s.damage("the padding is not zero")
	}
	s.sha.Reset()
	s.sha.Write([]byte{leafPrefix})
	s.sha.Write(b[frameHead:end])
	s.sha.Sum(s.sum[:0])
	f := frame{index: h.index, hash: s.sum, record: b[frameHead:end], offset: s.offset}
	f.link = nextLink(s.link, h.index, f.hash)
	if f.link != h.link {
		return frame{}, s.damage("the hash chain is broken: this record or one before it was changed, removed or put in another place")
	}
	if h.base == h.index {
		s.base, s.batch = h.base, s.offset
	}
	s.offset += int64(len(b))
	s.index++
	s.link = f.link
	return f, nil
}

// tail examines what is behind the last frame of the last segment. It returns
// the number of bytes up to the last one that is not zero: what a write left
// that never ended. If a frame in there was written after the next record had
// been made durable, then that record was lost later, and the error is a
// *DamageError.
func (s *segment) tail(why string) (torn int64, err error) {
	const overlap = frameHead - alignment
	buf, scratch := make([]byte, readBytes), []byte(nil)
	budget := int64(searchBytes)
	keep := 0 // bytes of buf that are from before at
	for at := s.offset; ; {
		n, rerr := s.f.ReadAt(buf[keep:], at)
		if rerr != nil && !errors.Is(rerr, io.EOF) {
			return 0, fmt.Errorf("read ledger segment: %w", rerr)
		}
		window, origin := buf[:keep+n], at-int64(keep)
		for i := len(window) - 1; i >= keep; i-- {
			if window[i] != 0 {
				torn = origin + int64(i) + 1 - s.offset
				break
			}
		}
		for i := 0; i+frameHead <= len(window); i += alignment {
			h := parseHead(window[i:])
			if !s.plausible(h, origin+int64(i)) {
				continue
			}
			size := frameHead + padded(int(h.length))
			scratch = slices.Grow(scratch[:0], size)[:size]
			n, err := s.f.ReadAt(scratch, origin+int64(i))
			if err != nil && !errors.Is(err, io.EOF) {
				return 0, fmt.Errorf("read ledger segment: %w", err)
			}
			later := n == size && frameSum(scratch, s.seed()) == h.sum
			if budget -= int64(n); later || budget < 0 {
				return 0, s.damage(why + ", and there are later records behind it: it is not what an interrupted write leaves")
			}
		}
		if errors.Is(rerr, io.EOF) {
			return torn, nil
		}
		at += int64(n)
		// Frames are aligned, so the next head to look at begins in the overlap.
		from := (len(window) - overlap) &^ (alignment - 1)
		keep = copy(buf, window[from:])
	}
}

// plausible reports whether h, found at offset, could be the head of a frame
// that proves the next record to have been durable: frames of a batch are
// written when all records before the batch are on the disk.
func (s *segment) plausible(h head, offset int64) bool {
	ahead := uint64(max(0, offset-s.offset)) / (frameHead + alignment)
	return h.length > 0 && h.length <= MaxRecordBytes &&
		h.base > s.index && h.index >= h.base && h.index-s.index <= ahead
}

// isZero reports whether all bytes of b are zero.
func isZero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}

// listSegments returns the indexes of the first records of the segments in dir,
// in order.
func listSegments(dir string) ([]uint64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var firsts []uint64
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), segmentSuffix) {
			continue
		}
		first, err := parseSegmentName(e.Name())
		if err != nil {
			return nil, &DamageError{Segment: e.Name(), Reason: err.Error()}
		}
		firsts = append(firsts, first)
	}
	slices.Sort(firsts)
	return firsts, nil
}
