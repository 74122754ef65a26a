package ledger

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"
)

// The on-disk format, which doc.go describes.
const (
	headerSize = 80 // a segment's header
	frameHead  = 56 // a frame, before the record's bytes
	alignment  = 8  // frames start at multiples of it

	segmentMagic  = "meshid ledger 1\n"
	segmentSuffix = ".segment"
	newSuffix     = ".new" // a segment that is being made
	lockName      = "lock"

	// Domain separation: no input of one hash can be an input of another.
	leafPrefix    = 0x00 // RFC 6962 §2.1
	linkPrefix    = "meshid ledger link 1\n"
	genesisPrefix = "meshid ledger genesis 1\n"
)

// castagnoli is the polynomial of CRC-32C, which processors compute by
// themselves.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is what a segment begins with.
type header struct {
	journal  [16]byte // random, one for all segments of a journal
	first    uint64   // index of the segment's first record
	previous [32]byte // link before the segment's first record
}

// encode returns h as it is on the disk.
func (h header) encode() []byte {
	b := make([]byte, 0, headerSize)
	b = append(b, segmentMagic...)
	b = append(b, h.journal[:]...)
	b = binary.BigEndian.AppendUint64(b, h.first)
	b = append(b, h.previous[:]...)
	b = append(b, 0, 0, 0, 0)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// parseHeader reads a header from the first headerSize bytes of a segment.
func parseHeader(b []byte) (header, error) {
	var h header
	switch {
	case len(b) < headerSize:
		return h, errors.New("segment header is cut off")
	case string(b[:16]) != segmentMagic:
		return h, errors.New("not a segment of this format")
	case binary.BigEndian.Uint32(b[76:]) != crc32.Checksum(b[:76], castagnoli):
		return h, errors.New("segment header has a wrong checksum")
	case binary.BigEndian.Uint32(b[72:]) != 0:
		return h, errors.New("segment header has reserved bytes in use")
	}
	copy(h.journal[:], b[16:])
	h.first = binary.BigEndian.Uint64(b[32:])
	copy(h.previous[:], b[40:])
	return h, nil
}

// seed starts the checksum of each frame of a journal with the journal's random
// name: what somebody managed to get into a record, or what an older file left
// in the same blocks, cannot look like a frame.
func (h header) seed() uint32 { return crc32.Checksum(h.journal[:], castagnoli) }

// head is the fixed part of a frame.
type head struct {
	length uint32 // of the record
	sum    uint32 // CRC-32C of the journal's name and everything else in the frame
	index  uint64
	base   uint64 // index of the first record that was written by the same write
	link   [32]byte
}

// put writes h over the first frameHead bytes of frame, with the checksum of the
// whole of it.
func (h head) put(frame []byte, seed uint32) {
	binary.BigEndian.PutUint32(frame, h.length)
	binary.BigEndian.PutUint64(frame[8:], h.index)
	binary.BigEndian.PutUint64(frame[16:], h.base)
	copy(frame[24:frameHead], h.link[:])
	binary.BigEndian.PutUint32(frame[4:], frameSum(frame, seed))
}

// parseHead reads the head of a frame from its first frameHead bytes.
func parseHead(b []byte) head {
	return head{
		length: binary.BigEndian.Uint32(b),
		sum:    binary.BigEndian.Uint32(b[4:]),
		index:  binary.BigEndian.Uint64(b[8:]),
		base:   binary.BigEndian.Uint64(b[16:]),
		link:   [32]byte(b[24:frameHead]),
	}
}

// frameSum is the checksum of a frame: all of it but the checksum itself.
func frameSum(frame []byte, seed uint32) uint32 {
	return crc32.Update(crc32.Update(seed, castagnoli, frame[:4]), castagnoli, frame[8:])
}

// nextLink chains the record with this index and hash to what stands before it.
func nextLink(previous [32]byte, index uint64, hash [32]byte) [32]byte {
	var b [len(linkPrefix) + 32 + 8 + 32]byte
	n := copy(b[:], linkPrefix)
	n += copy(b[n:], previous[:])
	binary.BigEndian.PutUint64(b[n:], index)
	copy(b[n+8:], hash[:])
	return sha256.Sum256(b[:])
}

// genesis is the link before the first record of a journal.
func genesis(journal [16]byte) [32]byte {
	return sha256.Sum256(append([]byte(genesisPrefix), journal[:]...))
}

// padded rounds a length up to the alignment.
func padded(n int) int { return (n + alignment - 1) &^ (alignment - 1) }

// segmentName is the file name of the segment whose first record has this index.
func segmentName(first uint64) string { return fmt.Sprintf("%020d%s", first, segmentSuffix) }

// parseSegmentName is the opposite of segmentName.
func parseSegmentName(name string) (uint64, error) {
	first, err := strconv.ParseUint(strings.TrimSuffix(name, segmentSuffix), 10, 64)
	if err != nil || segmentName(first) != name {
		return 0, fmt.Errorf("%s is not the name of a segment", name)
	}
	return first, nil
}

// DamageError says where a journal is not what was written. Everything before
// that place is sound.
type DamageError struct {
	Segment string // file name
	Offset  int64  // in the file
	Index   uint64 // of the record that was expected there
	Reason  string
}

// Error names segment, offset and record.
func (e *DamageError) Error() string {
	return fmt.Sprintf("ledger segment %s, offset %d (record %d): %s", e.Segment, e.Offset, e.Index, e.Reason)
}
