package ledger

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// Head identifies the first Size records of a journal, all their bytes and their
// order.
type Head struct {
	Size uint64
	Link [32]byte // the hash chain's value behind record Size-1
}

// String returns the head as ParseHead reads it: "<size>:<link in hexadecimal>".
func (h Head) String() string { return fmt.Sprintf("%d:%x", h.Size, h.Link) }

// ParseHead reads what String has written.
func ParseHead(s string) (Head, error) {
	size, link, _ := strings.Cut(s, ":")
	n, err := strconv.ParseUint(size, 10, 64)
	b, herr := hex.DecodeString(link)
	if err != nil || herr != nil || len(b) != 32 {
		return Head{}, fmt.Errorf("ledger head %q: want <number of records>:<64 hexadecimal digits>, as verify prints it", s)
	}
	return Head{Size: n, Link: [32]byte(b)}, nil
}

// Report is what Verify found.
type Report struct {
	// Journal is the journal's random name, in hexadecimal.
	Journal string
	// First is the index of the first record that is there: those before it were
	// archived.
	First uint64
	// Segments is the number of segments that were read, at least in part.
	Segments int
	// Head covers all records that are sound.
	Head Head
	// SizeBytes is what the sound segments, and the sound part of the last one,
	// take.
	SizeBytes int64
	// TornBytes is what is behind the last record: a write that is going on, or
	// one that was interrupted, which Open will cut off.
	TornBytes int64
	// Damage is the first place that is not sound, nil if there is none.
	Damage *DamageError
}

// ErrMissing is wrapped by Verify's error if the journal is not the one, or no
// longer the one, that a known head was taken of.
var ErrMissing = errors.New("ledger does not contain what was seen of it before")

// Verify is Verifier.Verify with known heads only.
func Verify(ctx context.Context, dir string, known ...Head) (Report, error) {
	return Verifier{Known: known}.Verify(ctx, dir)
}

// Verifier verifies a journal; the zero value is good.
type Verifier struct {
	// Known are heads that were taken earlier and kept elsewhere.
	Known []Head
	// Progress, if it is not nil, is told now and then how many records more have
	// been read. It may be called concurrently.
	Progress func(records int)
	// Visit, if it is not nil, is called once for each of several ranges of the
	// journal, and what it returns for each record of the range, in order, after
	// the record was found sound. Ranges are read concurrently. An error ends
	// verification at that record.
	Visit func() func(index uint64, hash [32]byte) error
}

// Verify reads the whole journal in dir, which may be in use or a copy, and checks
// every record: its checksum, its place, its hash chain, that it decodes, and that
// no segment is missing. The error is nil if all is sound; else it is that of the
// first place that is not, which for damage is Report.Damage, and the report
// describes what is before it. Segments are read in parallel.
//
// A journal proves by itself that nothing in it was changed by somebody who could
// not write all of it anew; and records that were cut off its end leave no trace
// in it. Against both, known gives heads that were taken earlier and kept
// elsewhere: if one is not in the journal, the error wraps ErrMissing.
func (v Verifier) Verify(ctx context.Context, dir string) (Report, error) {
	firsts, err := listSegments(dir)
	if err != nil {
		err = fmt.Errorf("open ledger: %w", err)
		return Report{Damage: damageIn(err)}, err
	}
	if len(firsts) == 0 {
		return Report{}, fmt.Errorf("%w: no segment in %s", ErrMissing, dir)
	}
	if firsts[0] > 0 {
		if err := v.begins(dir, firsts[0]); err != nil {
			return Report{Damage: damageIn(err)}, err
		}
	}
	// One range a segment: its cursor also reads the header of the next one, and
	// so compares the hash chain across them.
	parts := make([]*part, len(firsts))
	for i, first := range firsts {
		parts[i] = &part{v: &v, cursor: cursor{dir: dir, from: first}, end: math.MaxUint64}
		if i+1 < len(firsts) {
			parts[i].end = firsts[i+1]
		}
	}
	var bad atomic.Int64 // the first part that is not sound: later ones need not be read
	bad.Store(math.MaxInt64)
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, p := range parts {
		group.Go(func() error {
			if int64(i) > bad.Load() {
				return nil
			}
			if p.err = p.run(ctx); p.err != nil {
				for b := bad.Load(); int64(i) < b && !bad.CompareAndSwap(b, int64(i)); b = bad.Load() {
				}
			}
			return nil
		})
	}
	_ = group.Wait() // the errors are in the parts
	return v.report(firsts[0], parts)
}

// begins checks that a journal may begin with this record.
func (v Verifier) begins(dir string, first uint64) error {
	head, err := Archived(dir)
	if err != nil {
		return err
	}
	if head.Size < first {
		return absent(dir, first, head.Size)
	}
	if head.Size > first {
		return nil // archived, and not removed yet: the head is compared on the way
	}
	got, err := headBefore(dir, first, ErrMissing)
	if err == nil && got != head {
		err = &DamageError{Segment: segmentName(first), Index: first, Reason: "the hash chain is broken: the segment does not follow what was archived"}
	}
	return err
}

// report puts the parts together: what is before the first error.
func (v Verifier) report(first uint64, parts []*part) (Report, error) {
	r := Report{First: first}
	for _, p := range parts {
		r.Segments += p.segments
		r.SizeBytes += p.bytes
		r.TornBytes = p.torn
		if p.segments > 0 {
			r.Journal, r.Head = p.journal, p.head
		}
		if p.err != nil {
			r.Damage = damageIn(p.err)
			return r, p.err
		}
	}
	for _, h := range v.Known {
		switch {
		case h.Size > r.Head.Size:
			return r, fmt.Errorf("%w: there were %d records, now there are %d", ErrMissing, h.Size, r.Head.Size)
		case h.Size < first:
			return r, fmt.Errorf("%w: the head is of %d records, and the journal begins with record %d: compare it with the archive", ErrArchived, h.Size, first)
		}
	}
	return r, nil
}

// part is the part of a journal that one goroutine verifies.
type part struct {
	v      *Verifier
	cursor cursor
	end    uint64 // index of the first record that is another part's

	err      error
	journal  string
	head     Head // of what is sound
	segments int
	bytes    int64
	torn     int64
}

// run verifies the part.
func (p *part) run(ctx context.Context) error {
	defer p.cursor.close()
	visit := func(uint64, [32]byte) error { return nil }
	if p.v.Visit != nil {
		visit = p.v.Visit()
	}
	const stride = 1024 // between looks at the context
	for n := 1; ; n++ {
		if n%stride == 0 {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if p.v.Progress != nil {
				p.v.Progress(stride)
			}
		}
		f, err := p.cursor.next()
		if n == 1 && p.cursor.segments == 1 && p.cursor.seg != nil {
			p.head = Head{Size: p.cursor.seg.first, Link: p.cursor.seg.previous}
			if err := p.compare(); err != nil {
				return err
			}
		}
		if p.passed(f, err) {
			return nil
		}
		p.observe()
		if errors.Is(err, io.EOF) {
			p.torn = p.cursor.torn
			return nil
		}
		if err != nil {
			return err
		}
		if err := proto.Unmarshal(f.record, new(ledgerv1.Record)); err != nil {
			return p.cursor.undecodable(f, err)
		}
		if err := visit(f.index, f.hash); err != nil {
			return err
		}
		p.head = Head{Size: f.index + 1, Link: f.link}
		if err := p.compare(); err != nil {
			return err
		}
	}
}

// passed reports whether the part was left behind: the cursor is in the segment
// that follows, whose header was compared with the end of this one.
func (p *part) passed(f frame, err error) bool {
	s := p.cursor.seg
	return p.head.Size == p.end && s != nil && s.first >= p.end && (err != nil || f.index >= p.end)
}

// observe keeps what the report says of the part.
func (p *part) observe() {
	p.segments, p.bytes = p.cursor.segments, p.cursor.closedBytes
	if s := p.cursor.seg; s != nil {
		p.journal = hex.EncodeToString(s.journal[:])
		p.bytes += s.offset
	}
}

// compare checks the known heads of the size that has been reached.
func (p *part) compare() error {
	for _, h := range p.v.Known {
		if h.Size == p.head.Size && h.Link != p.head.Link {
			return fmt.Errorf("%w: the first %d records are others than those of the head that was given", ErrMissing, h.Size)
		}
	}
	return nil
}

// damageIn returns the damage that err is about, nil if it is about none.
func damageIn(err error) *DamageError {
	d, _ := errors.AsType[*DamageError](err)
	return d
}
