package ledger

import (
	"errors"
	"fmt"
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

// Segments returns the index of the first record of each segment of the journal in
// dir, in order. Whoever has to look at a part of a long journal begins at one of
// them: a scan reads its first segment from the beginning.
func Segments(dir string) ([]uint64, error) {
	firsts, err := listSegments(dir)
	if err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	return firsts, nil
}
