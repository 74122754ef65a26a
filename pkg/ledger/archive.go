package ledger

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/internal/durable"
)

// archiveMode is that of segments in an archive: nobody writes them again.
const archiveMode = 0o400

// ErrArchive is wrapped by the error of Archive if the folder cannot be an archive
// of this journal.
var ErrArchive = errors.New("not a place for this ledger's archive")

// ArchiveReport is what Archive did.
type ArchiveReport struct {
	// Head is that of the records that have left the journal, now and earlier.
	Head Head
	// Segments, Records and SizeBytes are what was archived now.
	Segments  int
	Records   uint64
	SizeBytes int64
}

// Archive moves segments out of the journal into the folder to, which is made if
// it is missing: those that are closed and hold no record from index limit on. It
// is for the caller to see to it that nobody needs them any more. The journal may
// be written meanwhile, and readers of what stays notice nothing. Each step one
// function:
//
//  1. begin: the folder is empty, or an archive that ends where the journal begins.
//  2. each segment is copied durably, under its name (copySegment)
//  3. and the copy is verified: every record, up to the link that the next
//     segment in the journal has (verifyCopy).
//  4. archived is told what is about to leave, and may still prevent it.
//  5. SetArchived says durably that the records may be absent.
//  6. The segments leave the journal, the oldest first.
//
// progress and archived may be nil. Whatever interrupts it, every record is in the journal or in the folder, and the
// next call goes on. The folder is a journal to Scan and to Verify; Joined says
// whether folders are parts of one journal. progress is told how many of
// the segments have been copied. The error wraps ErrArchive if the
// folder is not fit, and is a *DamageError if a segment is not sound; then nothing
// has left the journal.
func (j *Journal) Archive(ctx context.Context, to string, limit uint64, progress func(done, all int), archived func(ArchiveReport) error) (ArchiveReport, error) {
	j.archiving.Lock()
	defer j.archiving.Unlock()
	r, err := j.archive(ctx, to, limit, progress, archived)
	if err != nil {
		return r, fmt.Errorf("archive ledger to %s: %w", to, err)
	}
	return r, nil
}

func (j *Journal) archive(ctx context.Context, to string, limit uint64, progress func(done, all int), archived func(ArchiveReport) error) (r ArchiveReport, err error) {
	firsts, err := listSegments(j.dir)
	if err != nil {
		return r, err
	}
	if r.Head, err = Archived(j.dir); err != nil {
		return r, err
	}
	closed := 0 // segments to archive
	for closed+1 < len(firsts) && firsts[closed+1] <= limit {
		closed++
	}
	if closed == 0 {
		return r, nil
	}
	if err := j.begin(to, firsts); err != nil {
		return r, err
	}
	head := r.Head
	for i, first := range firsts[:closed] {
		if ctx.Err() != nil {
			return r, context.Cause(ctx)
		}
		size, err := copySegment(j.dir, to, first)
		if err != nil {
			return r, err
		}
		if head, err = verifyCopy(j.dir, to, first, firsts[i+1]); err != nil {
			return r, err
		}
		r.SizeBytes += size
		if progress != nil {
			progress(i+1, closed)
		}
	}
	r.Head, r.Segments, r.Records = head, closed, head.Size-firsts[0]
	if archived != nil {
		if err := archived(r); err != nil {
			return ArchiveReport{}, err
		}
	}
	if err := SetArchived(j.dir, head); err != nil {
		return ArchiveReport{}, err
	}
	return r, j.drop(firsts[:closed])
}

// begin is step 1.
func (j *Journal) begin(to string, firsts []uint64) error {
	if !filepath.IsAbs(to) {
		return fmt.Errorf("%w: write its whole path", ErrArchive)
	}
	if err := durable.MkdirAll(to, 0o700); err != nil {
		return fmt.Errorf("%w: %w", ErrArchive, err)
	}
	here, err := os.Stat(j.dir)
	if err != nil {
		return err
	}
	there, err := os.Stat(to)
	if err != nil {
		return err
	}
	if os.SameFile(here, there) {
		return fmt.Errorf("%w: it is the ledger's own folder", ErrArchive)
	}
	before, err := HeadAt(j.dir, firsts[0])
	if err != nil {
		return err
	}
	have, err := listSegments(to)
	if err != nil {
		return err
	}
	// What an interrupted call has copied is copied over.
	have = slices.DeleteFunc(have, func(first uint64) bool { return first >= firsts[0] })
	if len(have) == 0 {
		if before.Size == 0 {
			return nil
		}
		// An archive that begins later is told from one that is damaged.
		return SetArchived(to, before)
	}
	seg, torn, err := readLast(to, have[len(have)-1])
	if err != nil {
		return err
	}
	end := Head{Size: seg.index, Link: seg.link}
	if err := seg.close(); err != nil {
		return err
	}
	if end != before || torn > 0 {
		return fmt.Errorf("%w: what is in it does not end where the ledger begins, with record %d: name an empty folder", ErrArchive, before.Size)
	}
	return nil
}

// copySegment is step 2.
func copySegment(from, to string, first uint64) (size int64, err error) {
	name := segmentName(first)
	b, err := os.ReadFile(filepath.Join(from, name))
	if err != nil {
		return 0, err
	}
	path := filepath.Join(to, name)
	if err := durable.CreateFile(path, b, archiveMode); !errors.Is(err, fs.ErrExist) {
		return int64(len(b)), err
	}
	// An earlier call was interrupted, or there is something else: it is verified,
	// and replaced only if it is not what it should be.
	if have, err := os.ReadFile(path); err == nil && slices.Equal(have, b) {
		return int64(len(b)), durable.SyncDir(to)
	}
	return 0, fmt.Errorf("%w: there is another %s", ErrArchive, name)
}

// verifyCopy is step 3: it returns the head of all records up to the end of the
// copy.
func verifyCopy(journal, to string, first, end uint64) (Head, error) {
	next, err := openSegment(journal, end)
	if err != nil {
		return Head{}, wrapOpen(err)
	}
	want := Head{Size: end, Link: next.previous}
	if err := next.close(); err != nil {
		return Head{}, err
	}
	before, err := HeadAt(journal, first)
	if err != nil {
		return Head{}, err
	}
	seg, torn, err := readLast(to, first)
	if err != nil {
		return Head{}, err
	}
	defer func() { _ = seg.close() }() // it was only read from
	switch {
	case seg.journal != next.journal || seg.previous != before.Link:
		return Head{}, seg.headerDamage("the segment is of another journal")
	case torn > 0 || (Head{Size: seg.index, Link: seg.link}) != want:
		return Head{}, seg.damage(fmt.Sprintf("the records end here, and the next segment begins with record %d", end))
	default:
		return want, nil
	}
}

// drop is step 6.
func (j *Journal) drop(firsts []uint64) error {
	for _, first := range firsts {
		path := filepath.Join(j.dir, segmentName(first))
		st, err := os.Lstat(path)
		if err != nil {
			return err
		}
		if err := unix.Unlink(path); err != nil {
			return &os.PathError{Op: "remove", Path: path, Err: err}
		}
		j.metrics.bytes.Sub(float64(st.Size()))
		j.metrics.segments.Sub(1)
		j.writer.closed.Add(-st.Size())
		j.writer.segments.Add(-1)
	}
	return durable.SyncDir(j.dir)
}

// Joined checks that verified parts of a journal, in the order of their first
// records, follow one another without gap: that each begins with the head with
// which the one before ends. dirs are their folders. The error wraps ErrMissing.
func Joined(dirs []string, parts []Report) error {
	for i, p := range parts[1:] {
		before := parts[i]
		if p.Journal != before.Journal {
			return fmt.Errorf("%w: %s and %s are of different ledgers", ErrMissing, dirs[i], dirs[i+1])
		}
		if p.First > before.Head.Size {
			return fmt.Errorf("%w: %s ends before record %d, and %s begins with record %d", ErrMissing, dirs[i], before.Head.Size, dirs[i+1], p.First)
		}
		begin, err := HeadAt(dirs[i], p.First)
		if err != nil {
			return err
		}
		follows, err := HeadAt(dirs[i+1], p.First)
		if err != nil {
			return err
		}
		if begin != follows {
			return fmt.Errorf("%w: %s does not follow %s: the hash chain is broken between them", ErrMissing, dirs[i+1], dirs[i])
		}
	}
	return nil
}
