package ledger

import (
	"errors"
	"io"
	"math"
)

// Size returns the number of records of the journal in dir, which may be in use
// or a copy. It reads the last segment only. Its errors are those of Scan.
func Size(dir string) (uint64, error) {
	c := &cursor{dir: dir, from: math.MaxUint64}
	defer c.close()
	if _, err := c.next(); !errors.Is(err, io.EOF) {
		return 0, err
	}
	if c.seg == nil {
		return 0, nil
	}
	return c.seg.index, nil
}
