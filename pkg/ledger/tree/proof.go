package tree

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/meshid/meshid/pkg/ledger"
)

// ErrInconsistent is wrapped by the error about two heads of one log of which one
// does not continue the other. If both are signed, that is evidence against
// whoever has the log's key.
var ErrInconsistent = errors.New("the log was rewritten")

// ErrNotCovered is wrapped by the error about a record that a checkpoint does not
// cover, or not yet.
var ErrNotCovered = errors.New("record is not covered by the checkpoint")

const (
	proofMagic    = "c2sp.org/tlog-proof@v1\n"
	maxHashes     = 63      // of a proof, for any size
	maxProofBytes = 1 << 18 // a record in base64, hashes, a checkpoint
)

// Proof shows that a record is in a log, with nothing but the log's public key.
type Proof struct {
	Index  uint64
	Record []byte // the record's bytes, as the journal has them
	Hashes []tlog.Hash
	// Checkpoint is the signed note of the checkpoint that covers the record.
	Checkpoint []byte
}

// Prove makes the proof for the record at index from the tree in dir alone, against
// its checkpoint c. The proof is not checked: what was read is authenticated by the
// checkpoint, except for the record.
func Prove(dir string, c Checkpoint, index uint64) (Proof, error) {
	if index >= c.Size {
		return Proof{}, fmt.Errorf("%w: it is record %d, and the checkpoint covers the first %d: try again in a second, or see whether the CA signs (ca status)", ErrNotCovered, index, c.Size)
	}
	record, err := Record(dir, c, index)
	if err != nil {
		return Proof{}, err
	}
	hashes, err := tlog.ProveRecord(int64(c.Size), int64(index), hashReader(dir, c)) //nolint:gosec // G115: at most maxSize
	if err != nil {
		return Proof{}, fmt.Errorf("prove record %d: %w", index, err)
	}
	p := Proof{Index: index, Record: record, Hashes: hashes, Checkpoint: c.Note}
	if err := p.check(c); err != nil {
		return Proof{}, damage(entriesLevel, index/tileWidth, bundleWidth(c.Size, index/tileWidth), index, "the record is not the one that was signed")
	}
	return p, nil
}

// bundleWidth returns how many records bundle n has in a tree of this size.
func bundleWidth(size, n uint64) int {
	return int(min(size-n*tileWidth, tileWidth))
}

// Record returns the bytes of the record at index, which the checkpoint must cover,
// from its entry bundle. They are not checked.
func Record(dir string, c Checkpoint, index uint64) ([]byte, error) {
	n := index / tileWidth
	records, err := readBundle(dir, n, bundleWidth(c.Size, n))
	if err != nil {
		return nil, err
	}
	return bytes.Clone(records[index%tileWidth]), nil
}

// Find returns the index of the newest record below the checkpoint's size for which
// match, which is given the record's bytes, is true. It reads entry bundles from
// the newest to the oldest. ErrNotCovered if there is none.
func Find(dir string, c Checkpoint, match func(record []byte) bool) (uint64, error) {
	for n := (c.Size + tileWidth - 1) / tileWidth; n > 0; n-- {
		records, err := readBundle(dir, n-1, bundleWidth(c.Size, n-1))
		if err != nil {
			return 0, err
		}
		for i, r := range slices.Backward(records) {
			if match(r) {
				return (n-1)*tileWidth + uint64(i), nil //nolint:gosec // G115: below 256
			}
		}
	}
	return 0, ErrNotCovered
}

// ReadCheckpoint reads the published checkpoint of the tree in dir.
func ReadCheckpoint(dir string, key note.Verifier, witnesses ...note.Verifier) (Checkpoint, error) {
	b, err := readFile(filepath.Join(dir, checkpointName), maxNoteBytes)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("read checkpoint: %w", err)
	}
	c, err := ParseCheckpoint(b, key, witnesses...)
	if err != nil {
		return Checkpoint{}, &DamageError{Path: checkpointName, Reason: err.Error()}
	}
	return c, nil
}

// Encode returns the proof in the format of C2SP tlog-proof, with the record as its
// extra data.
func (p Proof) Encode() []byte {
	var b bytes.Buffer
	b.WriteString(proofMagic)
	fmt.Fprintf(&b, "extra %s\nindex %d\n", base64.StdEncoding.EncodeToString(p.Record), p.Index)
	for i := range p.Hashes {
		b.WriteString(base64.StdEncoding.EncodeToString(p.Hashes[i][:]) + "\n")
	}
	b.WriteByte('\n')
	b.Write(p.Checkpoint)
	return b.Bytes()
}

// ParseProof reads what Encode has written. Nothing of it may be believed before
// Check.
func ParseProof(b []byte) (Proof, error) {
	if len(b) > maxProofBytes {
		return Proof{}, fmt.Errorf("proof has %d bytes, may have %d", len(b), maxProofBytes)
	}
	rest, ok := strings.CutPrefix(string(b), proofMagic)
	if !ok {
		return Proof{}, fmt.Errorf("not a proof: its first line must be %q", strings.TrimSpace(proofMagic))
	}
	head, checkpoint, ok := strings.Cut(rest, "\n\n")
	if !ok {
		return Proof{}, errors.New("proof is cut off: there is no checkpoint in it")
	}
	lines := strings.Split(head, "\n")
	extra, ok := strings.CutPrefix(lines[0], "extra ")
	if !ok || len(lines) < 2 {
		return Proof{}, errors.New("proof has no record in it: its second line must begin with \"extra\", its third one with \"index\"")
	}
	p := Proof{Checkpoint: []byte(checkpoint)}
	var err error
	if p.Record, err = base64.StdEncoding.Strict().DecodeString(extra); err != nil || len(p.Record) == 0 || len(p.Record) > ledger.MaxRecordBytes {
		return Proof{}, errors.New("proof has a record that is not base64, or is too large")
	}
	index, ok := strings.CutPrefix(lines[1], "index ")
	if p.Index, err = strconv.ParseUint(index, 10, 64); !ok || err != nil || strconv.FormatUint(p.Index, 10) != index {
		return Proof{}, fmt.Errorf("proof has the line %.40q where an index was expected", lines[1])
	}
	if len(lines)-2 > maxHashes {
		return Proof{}, fmt.Errorf("proof has %d hashes, may have %d", len(lines)-2, maxHashes)
	}
	for _, line := range lines[2:] {
		h, err := base64.StdEncoding.Strict().DecodeString(line)
		if err != nil || len(h) != tlog.HashSize {
			return Proof{}, fmt.Errorf("proof has the line %.64q where a hash was expected", line)
		}
		p.Hashes = append(p.Hashes, tlog.Hash(h))
	}
	return p, nil
}

// Check checks that the record is in the log with this key, at this index, and
// returns the checkpoint that says so.
func (p Proof) Check(key note.Verifier, witnesses ...note.Verifier) (Checkpoint, error) {
	c, err := ParseCheckpoint(p.Checkpoint, key, witnesses...)
	if err != nil {
		return Checkpoint{}, err
	}
	return c, p.check(c)
}

// check is Check for a checkpoint that is believed.
func (p Proof) check(c Checkpoint) error {
	if p.Index >= c.Size {
		return fmt.Errorf("%w: it is record %d of %d", ErrNotCovered, p.Index, c.Size)
	}
	//nolint:gosec // G115: at most maxSize
	if err := tlog.CheckRecord(p.Hashes, int64(c.Size), c.Root, int64(p.Index), tlog.RecordHash(p.Record)); err != nil {
		return fmt.Errorf("the record is not record %d of the log %s: the hashes of the proof do not lead to its checkpoint", p.Index, c.Origin)
	}
	return nil
}

// Consistent checks, with the tree in dir whose checkpoint is now, that newer
// continues older: that the records of older are the first ones of newer. The error
// wraps ErrInconsistent if it does not.
func Consistent(dir string, now, older, newer Checkpoint) error {
	if newer.Size > now.Size {
		now = newer
	}
	switch {
	case older.Origin != newer.Origin:
		return fmt.Errorf("the checkpoints are of two logs, %s and %s", older.Origin, newer.Origin)
	case older.Size > newer.Size:
		return fmt.Errorf("%w: there were %d records, now there are %d", ErrInconsistent, older.Size, newer.Size)
	case older.Size == newer.Size && older.Root != newer.Root:
		return fmt.Errorf("%w: there are two trees of %d records", ErrInconsistent, older.Size)
	case older.Size == newer.Size:
		return nil
	}
	if older.Size == 0 {
		if older.Root != (&edge{}).root() {
			return fmt.Errorf("%w: the root hash of the empty tree is wrong", ErrInconsistent)
		}
		return nil
	}
	proof, err := proveTree(dir, now, older.Size, newer.Size)
	if err != nil {
		return err
	}
	//nolint:gosec // G115: at most maxSize
	if err := tlog.CheckTree(proof, int64(newer.Size), newer.Root, int64(older.Size), older.Root); err != nil {
		return fmt.Errorf("%w: the first %d of the %d records are not those of the older checkpoint", ErrInconsistent, older.Size, newer.Size)
	}
	return nil
}

// consistent is Consistent for the tree of newer.
func consistent(dir string, older, newer Checkpoint) error {
	return Consistent(dir, newer, older, newer)
}

// proveTree makes the proof that the tree of size newer continues the one of size
// older, which is not 0, from the tiles of now, which is not smaller.
func proveTree(dir string, now Checkpoint, older, newer uint64) (tlog.TreeProof, error) {
	proof, err := tlog.ProveTree(int64(newer), int64(older), hashReader(dir, now)) //nolint:gosec // G115: at most maxSize
	if err != nil {
		return nil, fmt.Errorf("prove that the tree of %d records continues that of %d: %w", newer, older, err)
	}
	return proof, nil
}

// At returns the head that the log of c had when it had this many records. It is
// not signed.
func At(dir string, c Checkpoint, size uint64) (Checkpoint, error) {
	if size > c.Size {
		return Checkpoint{}, fmt.Errorf("%w: there are %d records, not %d", ErrNotCovered, c.Size, size)
	}
	if size == c.Size {
		return c, nil
	}
	root, err := tlog.TreeHash(int64(size), hashReader(dir, c)) //nolint:gosec // G115: at most maxSize
	if err != nil {
		return Checkpoint{}, fmt.Errorf("the tree of the first %d records: %w", size, err)
	}
	return Checkpoint{Origin: c.Origin, Size: size, Root: root}, nil
}
