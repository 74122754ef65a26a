package tree

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/pkg/ledger"
)

// Names in a tree's folder.
const (
	checkpointName = "checkpoint"
	stateName      = "state"
	lockName       = "lock"

	entriesLevel = -1 // stands for the level of entry bundles

	maxBundleBytes = tileWidth * (2 + ledger.MaxRecordBytes)
)

// DamageError says which file of a tree is not what was written.
type DamageError struct {
	Path   string // below the tree's folder
	Index  uint64 // of the first record that is concerned
	Reason string
}

// Error names file and record.
func (e *DamageError) Error() string {
	return fmt.Sprintf("ledger tree, file %s (record %d): %s", e.Path, e.Index, e.Reason)
}

// damage returns a DamageError about a tile.
func damage(level int, n uint64, width int, index uint64, format string, args ...any) error {
	return &DamageError{Path: tilePath(level, n, width), Index: index, Reason: fmt.Sprintf(format, args...)}
}

// tilePath returns where a tile is (C2SP tlog-tiles): tile/<L>/<N>, with .p/<W> if
// it is not full.
func tilePath(level int, n uint64, width int) string {
	var b strings.Builder
	if level == entriesLevel {
		b.WriteString("tile/entries/")
	} else {
		fmt.Fprintf(&b, "tile/%d/", level)
	}
	digits := fmt.Sprintf("%03d", n)
	for len(digits)%3 != 0 {
		digits = "0" + digits
	}
	for ; len(digits) > 3; digits = digits[3:] {
		b.WriteString("x" + digits[:3] + "/")
	}
	b.WriteString(digits)
	if width < tileWidth {
		fmt.Fprintf(&b, ".p/%d", width)
	}
	return b.String()
}

// firstIndex returns the index of the first record below a tile.
func firstIndex(level int, n uint64) uint64 {
	if level == entriesLevel {
		level = 0
	}
	return n << (height * (level + 1))
}

// appendEntry adds a record to a bundle.
func appendEntry(bundle, record []byte) []byte {
	bundle = binary.BigEndian.AppendUint16(bundle, uint16(len(record))) //nolint:gosec // G115: at most ledger.MaxRecordBytes
	return append(bundle, record...)
}

// cutEntry takes the first record off a bundle.
func cutEntry(bundle []byte) (record, rest []byte, err error) {
	if len(bundle) < 2 {
		return nil, nil, errors.New("it is cut off")
	}
	n := int(binary.BigEndian.Uint16(bundle))
	if len(bundle) < 2+n {
		return nil, nil, errors.New("it is cut off")
	}
	return bundle[2 : 2+n], bundle[2+n:], nil
}

// encodeTile returns a tile's bytes.
func encodeTile(hashes []tlog.Hash) []byte {
	b := make([]byte, 0, len(hashes)*tlog.HashSize)
	for i := range hashes {
		b = append(b, hashes[i][:]...)
	}
	return b
}

// decodeTile is the opposite; b has a whole number of hashes.
func decodeTile(b []byte) []tlog.Hash {
	hashes := make([]tlog.Hash, len(b)/tlog.HashSize)
	for i := range hashes {
		copy(hashes[i][:], b[i*tlog.HashSize:])
	}
	return hashes
}

// readTile returns the first width hashes of a tile. A partial tile may have been
// replaced by the full one.
func readTile(dir string, level int, n uint64, width int) ([]tlog.Hash, error) {
	b, full, err := readEither(dir, level, n, width, tileWidth*tlog.HashSize)
	if err != nil {
		return nil, err
	}
	want := width
	if full {
		want = tileWidth
	}
	if len(b) != want*tlog.HashSize {
		return nil, damage(level, n, want, firstIndex(level, n), "it has %d bytes, and must have %d", len(b), want*tlog.HashSize)
	}
	return decodeTile(b[:width*tlog.HashSize]), nil
}

// readBundle returns the first width records of an entry bundle. They share
// memory.
func readBundle(dir string, n uint64, width int) ([][]byte, error) {
	b, full, err := readEither(dir, entriesLevel, n, width, maxBundleBytes)
	if err != nil {
		return nil, err
	}
	want := width
	if full {
		want = tileWidth
	}
	records := make([][]byte, 0, want)
	for i := range want {
		var record []byte
		if record, b, err = cutEntry(b); err != nil {
			return nil, damage(entriesLevel, n, want, firstIndex(0, n)+uint64(i), "%v", err)
		}
		records = append(records, record)
	}
	if len(b) > 0 {
		return nil, damage(entriesLevel, n, want, firstIndex(0, n)+uint64(want), "there are %d bytes behind its last record", len(b))
	}
	return records[:width], nil
}

// readEither reads a tile of this width, or the full one in its place.
func readEither(dir string, level int, n uint64, width int, limit int64) (b []byte, full bool, err error) {
	b, err = readFile(filepath.Join(dir, tilePath(level, n, width)), limit)
	if errors.Is(err, fs.ErrNotExist) && width < tileWidth {
		b, err = readFile(filepath.Join(dir, tilePath(level, n, tileWidth)), limit)
		full = err == nil
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, false, damage(level, n, width, firstIndex(level, n), "it is missing")
	case err != nil:
		return nil, false, fmt.Errorf("read ledger tree: %w", err)
	}
	return b, full || width == tileWidth, nil
}

// readFile reads a regular file of at most limit bytes.
func readFile(path string, limit int64) (_ []byte, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0) //nolint:gosec // G703: the operator names the folder
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > limit {
		return nil, &os.PathError{Op: "read", Path: path, Err: fmt.Errorf("not a regular file of at most %d bytes", limit)}
	}
	b := make([]byte, st.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, err
	}
	return b, nil
}

// hashReader reads the hashes of a tree from its tiles. Each is checked against
// the tree's root: what it returns is what was signed.
func hashReader(dir string, c Checkpoint) tlog.HashReader {
	// Only a size that ParseCheckpoint accepts fits.
	return tlog.TileHashReader(tlog.Tree{N: int64(c.Size), Hash: c.Root}, tileReader{dir}) //nolint:gosec // G115: see above
}

// maxSize is the largest size of a tree that is accepted.
const maxSize = math.MaxInt64 / 4

// tileReader is a folder, for tlog.
type tileReader struct{ dir string }

// Height implements tlog.TileReader.
func (tileReader) Height() int { return height }

// SaveTiles implements tlog.TileReader.
func (tileReader) SaveTiles([]tlog.Tile, [][]byte) {}

// ReadTiles implements tlog.TileReader.
func (r tileReader) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	data := make([][]byte, len(tiles))
	for i, t := range tiles {
		hashes, err := readTile(r.dir, t.L, uint64(t.N), t.W) //nolint:gosec // G115: never negative
		if err != nil {
			return nil, err
		}
		data[i] = encodeTile(hashes)
	}
	return data, nil
}
