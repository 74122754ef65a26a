package ledger

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/meshid/meshid/internal/durable"
)

// archivedName is the file that says up to where a journal was archived.
const archivedName = "archived"

// maxArchivedBytes bounds what is read of that file.
const maxArchivedBytes = 128

// ErrArchived is wrapped by errors about a record that is no longer in the
// journal, because everything up to it was archived.
var ErrArchived = errors.New("record was archived")

// SetArchived says that the records below head.Size may be absent from the journal
// in dir, because they were put elsewhere. Whoever archives calls it before the
// first segment is removed: without it, a journal that does not begin with record
// 0 is damaged. The head must be the journal's own at the beginning of a segment
// (HeadAt returns it). It may be called while the journal is in use.
func SetArchived(dir string, head Head) error {
	if err := durable.WriteFile(filepath.Join(dir, archivedName), []byte(head.String()+"\n"), 0o600); err != nil {
		return fmt.Errorf("mark ledger as archived: %w", err)
	}
	return nil
}

// Archived returns what SetArchived was told of the journal in dir, and the zero
// Head if nothing was archived.
func Archived(dir string) (Head, error) {
	f, err := os.Open(filepath.Join(dir, archivedName))
	if errors.Is(err, fs.ErrNotExist) {
		return Head{}, nil
	}
	if err != nil {
		return Head{}, fmt.Errorf("open ledger: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxArchivedBytes))
	if err := errors.Join(err, f.Close()); err != nil {
		return Head{}, fmt.Errorf("open ledger: %w", err)
	}
	head, err := ParseHead(strings.TrimSuffix(string(b), "\n"))
	if err != nil {
		return Head{}, &DamageError{Segment: archivedName, Reason: err.Error()}
	}
	return head, nil
}

// absent is the error for a record before the first one, for a journal that
// begins with record first.
func absent(dir string, first, index uint64) error {
	head, err := Archived(dir)
	if err != nil {
		return err
	}
	if head.Size >= first {
		return fmt.Errorf("%w: %d is below %d, the first one in %s: look in the archive", ErrArchived, index, first, dir)
	}
	return &DamageError{
		Segment: segmentName(first), Index: index,
		Reason: fmt.Sprintf("this is the first segment: the records before %d are missing", first),
	}
}

// HeadAt returns the head of the first size records of the journal in dir, which
// may be in use or a copy. If there are fewer, the error wraps ErrMissing. Its
// other errors are those of Scan.
func HeadAt(dir string, size uint64) (Head, error) {
	c := &cursor{dir: dir, from: size}
	if size > 0 {
		c.from = size - 1
	}
	defer c.close()
	f, err := c.next()
	switch {
	case c.seg != nil && c.seg.first == size:
		return Head{Size: size, Link: c.seg.previous}, nil
	case errors.Is(err, ErrArchived) && size > 0:
		// The last record that is gone has left its link in the first segment.
		return headBefore(dir, size, err)
	case errors.Is(err, io.EOF):
		have := uint64(0)
		if c.seg != nil {
			have = c.seg.index
		}
		return Head{}, fmt.Errorf("%w: there were %d records, now there are %d", ErrMissing, size, have)
	case err != nil:
		return Head{}, err
	default:
		return Head{Size: size, Link: f.link}, nil
	}
}

// headBefore is HeadAt for the records before the first segment.
func headBefore(dir string, size uint64, otherwise error) (Head, error) {
	seg, err := openSegment(dir, size)
	if errors.Is(err, fs.ErrNotExist) {
		return Head{}, otherwise
	}
	if err != nil {
		return Head{}, wrapOpen(err)
	}
	return Head{Size: size, Link: seg.previous}, seg.close()
}
