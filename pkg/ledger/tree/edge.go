package tree

import (
	"crypto/sha256"
	"math/bits"

	"golang.org/x/mod/sumdb/tlog"
)

const (
	height    = 8           // C2SP tlog-tiles: the height of a tile
	tileWidth = 1 << height // hashes of a full tile
	maxLevels = 64 / height // for any size
)

// edge is the right edge of a Merkle tree: the hashes of the last tile of each
// level, as far as it is not full. It is all that is needed to add leaves and to
// compute the root.
type edge struct {
	size   uint64
	levels [maxLevels][]tlog.Hash
}

// add adds a leaf. full is called for each tile that becomes full by it, from
// level 0 upwards; it must not keep hashes.
func (e *edge) add(leaf tlog.Hash, full func(level int, n uint64, hashes []tlog.Hash)) {
	h := leaf
	for level := range e.levels {
		if e.levels[level] == nil {
			e.levels[level] = make([]tlog.Hash, 0, tileWidth)
		}
		e.levels[level] = append(e.levels[level], h)
		if len(e.levels[level]) < tileWidth {
			break
		}
		full(level, e.size>>(height*(level+1)), e.levels[level])
		h = subtree(e.levels[level])
		e.levels[level] = e.levels[level][:0]
	}
	e.size++
}

// root returns the tree's hash (RFC 6962 §2.1).
func (e *edge) root() tlog.Hash {
	// The perfect subtrees that the tree consists of, largest first.
	var peaks []tlog.Hash
	for level := maxLevels - 1; level >= 0; level-- {
		for hashes := e.levels[level]; len(hashes) > 0; {
			n := 1 << (bits.Len(uint(len(hashes))) - 1)
			peaks = append(peaks, subtree(hashes[:n]))
			hashes = hashes[n:]
		}
	}
	if len(peaks) == 0 {
		return sha256.Sum256(nil)
	}
	h := peaks[len(peaks)-1]
	for i := len(peaks) - 2; i >= 0; i-- {
		h = tlog.NodeHash(peaks[i], h)
	}
	return h
}

// subtree returns the hash of a perfect tree over hashes, whose number is a power
// of two.
func subtree(hashes []tlog.Hash) tlog.Hash {
	var buf [tileWidth]tlog.Hash
	level := buf[:copy(buf[:], hashes)]
	for len(level) > 1 {
		for i := range len(level) / 2 {
			level[i] = tlog.NodeHash(level[2*i], level[2*i+1])
		}
		level = level[:len(level)/2]
	}
	return level[0]
}

// part returns the last tile of a level of a tree of this size: its number and its
// width, which is 0 if the level has no partial tile.
func part(size uint64, level int) (n uint64, width int) {
	return size >> (height * (level + 1)), int(size >> (height * level) % tileWidth)
}
