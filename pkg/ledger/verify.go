package ledger

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

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

// Verify reads the whole journal in dir, which may be in use or a copy, and checks
// every record: its checksum, its place, its hash chain, that it decodes, and that
// no segment is missing. The error is nil if all is sound; for damage it is
// Report.Damage, and the report describes what is before it.
//
// A journal proves by itself that nothing in it was changed by somebody who could
// not write all of it anew; and records that were cut off its end leave no trace
// in it. Against both, known gives heads that were taken earlier and kept
// elsewhere: if one is not in the journal, the error wraps ErrMissing.
func Verify(ctx context.Context, dir string, known ...Head) (Report, error) {
	v := verifier{cursor: cursor{dir: dir}, known: make(map[uint64][][32]byte, len(known))}
	defer v.cursor.close()
	for _, h := range known {
		v.known[h.Size] = append(v.known[h.Size], h.Link)
	}
	err := v.run(ctx)
	r := v.report()
	r.Damage, _ = errors.AsType[*DamageError](err)
	return r, err
}

// verifier is one run of Verify.
type verifier struct {
	cursor cursor
	known  map[uint64][][32]byte // links by size, of heads not reached yet
	head   Head
	torn   int64
}

// run goes through the journal.
func (v *verifier) run(ctx context.Context) error {
	for n := 0; ; n++ {
		if n%1024 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		f, err := v.cursor.next()
		if n == 0 && v.cursor.seg != nil {
			v.head.Link = v.cursor.seg.previous
			if err := v.compare(); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			v.torn = v.cursor.torn
			return v.end()
		}
		if err != nil {
			return err
		}
		if err := proto.Unmarshal(f.record, new(ledgerv1.Record)); err != nil {
			return v.cursor.undecodable(f, err)
		}
		v.head = Head{Size: f.index + 1, Link: f.link}
		if err := v.compare(); err != nil {
			return err
		}
	}
}

// compare checks the known heads of the size that has been reached.
func (v *verifier) compare() error {
	for _, link := range v.known[v.head.Size] {
		if link != v.head.Link {
			return fmt.Errorf("%w: the first %d records are others than those of the head that was given", ErrMissing, v.head.Size)
		}
	}
	delete(v.known, v.head.Size)
	return nil
}

// end checks that nothing is missing at the end.
func (v *verifier) end() error {
	if v.cursor.seg == nil {
		return fmt.Errorf("%w: no segment in %s", ErrMissing, v.cursor.dir)
	}
	for size := range v.known {
		return fmt.Errorf("%w: there were %d records, now there are %d", ErrMissing, size, v.head.Size)
	}
	return nil
}

// report describes what was read.
func (v *verifier) report() Report {
	r := Report{Head: v.head, TornBytes: v.torn, Segments: v.cursor.segments, SizeBytes: v.cursor.closedBytes}
	if s := v.cursor.seg; s != nil {
		r.Journal = hex.EncodeToString(s.journal[:])
		r.SizeBytes += s.offset
	}
	return r
}
