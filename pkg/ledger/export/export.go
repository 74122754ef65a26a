// Package export sends the ledger's records to other systems. It answers "which
// records has this receiver got": for each export that an operator configured it
// keeps a cursor on the disk, leaves out what the export's filter leaves out, and
// gives the next records to the export's target. It does not know what a target
// speaks or where it is; each kind of target has a folder of its own, as has each
// format that is more than the ledger's own JSON.
//
// A receiver gets each record at least once and in order. One that comes again
// has the same index of the same journal, by which a receiver can tell.
package export

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/ledger"
)

const (
	cursorSuffix = ".cursor"
	cursorBytes  = 64 << 10 // of the largest cursor file that is read

	// fullBatch is how many records go without waiting; smaller batches go once in
	// paceInterval, so that neither the receiver nor the disk, on which each batch
	// costs an fsync beside the journal's, is asked for every record.
	fullBatch    = 256
	paceInterval = time.Second
)

// Target delivers records to one receiver. It is called by one goroutine.
type Target interface {
	// Send delivers a batch, and returns nil when the receiver has it, as far as
	// can be known. After an error the same records are sent again.
	Send(ctx context.Context, b Batch) error
}

// Positioned is a Target that has a place in its own output, which is kept with
// the cursor.
type Positioned interface {
	Target
	// Resume is called once, before the first Send, with what Position returned when
	// the cursor was written last, or nil. What is behind that place was sent by a
	// Send whose end is not known.
	Resume(position json.RawMessage) error
	// Position is called after each Send.
	Position() (json.RawMessage, error)
}

// Batch is some records of a journal.
type Batch struct {
	// Journal is the journal's name in lower-case hexadecimal: with it, an index
	// names a record everywhere.
	Journal string
	// First is the index that the batch begins with, and Next the one behind it. The
	// records between them that are not in Entries were left out by the filter.
	First, Next uint64
	// Entries are the records, at least one.
	Entries []ledger.Entry
}

// Options say what is exported.
type Options struct {
	// Dir is the folder of the cursors.
	Dir string
	// Name names the export in Dir.
	Name string
	// Filter says which records are sent.
	Filter Filter
	// FromBeginning lets an export that has no cursor yet begin with the journal's
	// first record instead of the next one.
	FromBeginning bool
}

// Export is a ledger.Sink: one target with its cursor.
type Export struct {
	target  Target
	options Options
	journal string
	path    string

	cursor cursor    // as on the disk
	sent   uint64    // the target has all below; at least cursor.Next
	last   time.Time // when the last batch was sent
}

// cursor is the content of a cursor file.
type cursor struct {
	Journal  string          `json:"journal"`
	Next     uint64          `json:"next"`
	Position json.RawMessage `json:"position,omitempty"`
}

// New returns the export of a journal's records to a target. An export that is new
// begins with the record that is appended next, or the first one; where it begins
// is durable when New returns.
func New(j *ledger.Journal, target Target, o Options) (*Export, error) {
	name := j.Name()
	x := &Export{target: target, options: o, journal: hex.EncodeToString(name[:]), path: filepath.Join(o.Dir, o.Name+cursorSuffix)}
	if err := x.load(j.Size()); err != nil {
		return nil, fmt.Errorf("export %s: %w", o.Name, err)
	}
	x.sent = x.cursor.Next
	return x, nil
}

// load reads the cursor, or makes one.
func (x *Export) load(size uint64) error {
	text, err := durable.ReadSecret(x.path, cursorBytes)
	fresh := errors.Is(err, fs.ErrNotExist)
	switch {
	case fresh:
		x.cursor = cursor{Journal: x.journal}
		if !x.options.FromBeginning {
			x.cursor.Next = size
		}
	case err != nil:
		return err
	default:
		if err := json.Unmarshal(text, &x.cursor); err != nil {
			return fmt.Errorf("%s is no cursor (%w): move it away to begin the export anew", x.path, err)
		}
		if x.cursor.Journal != x.journal {
			return fmt.Errorf("%s is of journal %s, and this one is %s: move it away to begin the export anew", x.path, x.cursor.Journal, x.journal)
		}
	}
	if p, ok := x.target.(Positioned); ok {
		if err := p.Resume(x.cursor.Position); err != nil {
			return err
		}
	}
	if !fresh {
		return nil
	}
	if err := durable.MkdirAll(x.options.Dir, 0o700); err != nil {
		return err
	}
	return x.save(x.cursor.Next)
}

// Next implements ledger.Sink.
func (x *Export) Next(context.Context) (uint64, error) { return x.cursor.Next, nil }

// Put implements ledger.Sink: it sends what the target has not got, and then moves
// the cursor. If only the second fails, the next call does not send again.
func (x *Export) Put(ctx context.Context, entries []ledger.Entry) error {
	b := Batch{Journal: x.journal, First: max(x.sent, entries[0].Index), Next: entries[len(entries)-1].Index + 1}
	for _, e := range entries {
		if e.Index >= x.sent && x.options.Filter.Match(e.Record) {
			b.Entries = append(b.Entries, e)
		}
	}
	if len(b.Entries) > 0 {
		if err := x.pace(ctx, len(entries)); err != nil {
			return err
		}
		if err := x.target.Send(ctx, b); err != nil {
			return err
		}
	}
	x.sent = max(x.sent, b.Next)
	return x.save(x.sent)
}

// pace waits until a batch of n records may go.
func (x *Export) pace(ctx context.Context, n int) error {
	if n < fullBatch {
		if err := backoff.Wait(ctx, paceInterval-time.Since(x.last)); err != nil {
			return err
		}
	}
	x.last = time.Now()
	return nil
}

// save makes the cursor durable.
func (x *Export) save(next uint64) error {
	c := cursor{Journal: x.journal, Next: next, Position: x.cursor.Position}
	if p, ok := x.target.(Positioned); ok {
		var err error
		if c.Position, err = p.Position(); err != nil {
			return err
		}
	}
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(x.path, append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("keep the cursor: %w", err)
	}
	x.cursor = c
	return nil
}

// Abandoned returns the cursor files in dir that belong to none of the names:
// their exports were removed from the configuration, and get nothing any more. An
// export that comes back under the same name goes on where it was.
func Abandoned(dir string, names []string) ([]string, error) {
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	known := make(map[string]bool, len(names))
	for _, n := range names {
		known[n+cursorSuffix] = true
	}
	var paths []string
	for _, f := range files {
		if strings.HasSuffix(f.Name(), cursorSuffix) && !strings.HasPrefix(f.Name(), ".") && !known[f.Name()] {
			paths = append(paths, filepath.Join(dir, f.Name()))
		}
	}
	return paths, nil
}

// SettingError is a mistake in an export's settings. New of each kind of target
// returns it, so that whoever knows the file can say where the setting stands.
type SettingError struct {
	// Setting is the path of the setting, such as "tls.ca".
	Setting string
	// Message says what is wrong and what to write instead.
	Message string
}

// Error returns "setting: message".
func (e *SettingError) Error() string { return e.Setting + ": " + e.Message }

// Bad returns a *SettingError.
func Bad(setting, format string, args ...any) error {
	return &SettingError{Setting: setting, Message: fmt.Sprintf(format, args...)}
}
