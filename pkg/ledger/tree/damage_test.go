package tree

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/meshid/meshid/pkg/ledger"
)

// edit changes one file.
func edit(t *testing.T, path string, change func(b []byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, change(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

func flip(at int) func(b []byte) []byte {
	return func(b []byte) []byte { b[(at+len(b))%len(b)] ^= 1; return b }
}

func truncate(by int) func(b []byte) []byte {
	return func(b []byte) []byte { return b[:len(b)-by] }
}

// pristine is a stopped ledger of 700 records, of which the last 10 were signed
// after a checkpoint that was kept.
func pristine(t *testing.T) (e *env, kept Checkpoint) {
	t.Helper()
	e = newEnv(t)
	e.start()
	e.append(690)
	kept = e.covered()
	e.append(10)
	e.covered()
	e.stop()
	return e, kept
}

// TestV_J6_Tampering changes each kind of file of a ledger: verify names the file
// and the record, and a CA that starts on it signs nothing more, if it can see it.
func TestV_J6_Tampering(t *testing.T) {
	t.Parallel()
	e, _ := pristine(t)
	at := func(change func([]byte) []byte, names ...string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) { edit(t, filepath.Join(append([]string{dir}, names...)...), change) }
	}
	remove := func(name string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	// A record and its leaf, so that both fit together.
	forge := func(t *testing.T, dir string) {
		var record []byte
		edit(t, filepath.Join(dir, "tree/tile/entries/000"), func(b []byte) []byte {
			n := int(binary.BigEndian.Uint16(b))
			b[2+n-1] ^= 1
			record = bytes.Clone(b[2 : 2+n])
			return b
		})
		edit(t, filepath.Join(dir, "tree/tile/0/000"), func(b []byte) []byte {
			h := tlog.RecordHash(record)
			copy(b, h[:])
			return b
		})
	}
	for name, tc := range map[string]struct {
		tamper func(t *testing.T, dir string)
		path   string // that verify names
		index  uint64
		sees   bool // the CA at its start
	}{
		"a leaf":                          {at(flip(5*32+3), "tree/tile/0/001"), "tile/0/001", 261, false},
		"a leaf of the last tile":         {at(flip(7*32), "tree/tile/0/002.p/188"), "tile/0/002.p/188", 519, true},
		"a hash above":                    {at(flip(32), "tree/tile/1/000.p/2"), "tile/1/000.p/2", 256, true},
		"a record in a bundle":            {at(flip(-1), "tree/tile/entries/000"), "tile/entries/000", 255, false},
		"a record in the last bundle":     {at(flip(-1), "tree/tile/entries/002.p/188"), "tile/entries/002.p/188", 699, true},
		"a length in a bundle":            {at(flip(0), "tree/tile/entries/001"), "tile/entries/001", 257, false},
		"a tile cut off":                  {at(truncate(32), "tree/tile/0/000"), "tile/0/000", 0, false},
		"a partial tile cut off":          {at(truncate(1), "tree/tile/0/002.p/188"), "tile/0/002.p/188", 512, true},
		"a tile of level 1 cut off":       {at(truncate(32), "tree/tile/1/000.p/2"), "tile/1/000.p/2", 0, true},
		"a bundle cut off":                {at(truncate(1), "tree/tile/entries/001"), "tile/entries/001", 511, false},
		"more behind a bundle":            {at(func(b []byte) []byte { return append(b, 0) }, "tree/tile/entries/001"), "tile/entries/001", 512, false},
		"an empty tile":                   {at(func([]byte) []byte { return nil }, "tree/tile/0/001"), "tile/0/001", 256, false},
		"a tile removed":                  {remove("tree/tile/0/001"), "tile/0/001", 256, false},
		"a bundle removed":                {remove("tree/tile/entries/000"), "tile/entries/000", 0, false},
		"the last tile removed":           {remove("tree/tile/0/002.p/188"), "tile/0/002.p/188", 512, true},
		"an earlier partial tile":         {at(flip(9), "tree/tile/0/002.p/178"), "tile/0/002.p/178", 512, false},
		"an earlier partial tile cut off": {at(truncate(32), "tree/tile/0/002.p/178"), "tile/0/002.p/178", 512, false},
		"a record with its leaf":          {forge, "tile/1/000.p/2", 0, false},
		"the checkpoint's size":           {at(func(b []byte) []byte { return bytes.Replace(b, []byte("\n700\n"), []byte("\n699\n"), 1) }, "tree/checkpoint"), "checkpoint", 0, true},
		"the checkpoint's signature":      {at(flip(-10), "tree/checkpoint"), "checkpoint", 0, true},
		"the state":                       {at(flip(-10), "tree/state"), "state", 0, true},
		"the state emptied":               {at(func([]byte) []byte { return nil }, "tree/state"), "state", 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := copyTree(t, e.dir)
			tc.tamper(t, dir)
			_, err := e.verifier().Verify(t.Context(), filepath.Join(dir, "tree"), filepath.Join(dir, "ledger"))
			d, ok := errors.AsType[*DamageError](err)
			if !ok || d.Path != tc.path || d.Index != tc.index {
				t.Errorf("found %v, want %s, record %d", err, tc.path, tc.index)
			}
			halted := startOn(t, dir, e.options, 3)
			if (halted != nil) != tc.sees {
				t.Errorf("the CA says %v", halted)
			}
		})
	}
}

// startOn runs the CA's part on a folder, appends records, stops it, and returns why
// it signs nothing, if so. Then it must have changed nothing.
func startOn(t *testing.T, dir string, o Options, records int) error {
	t.Helper()
	e := &env{t: t, dir: dir, options: o, count: 10_000}
	e.options.Key = filepath.Join(dir, "keys", "log.key")
	before := contents(t, e.treeDir())
	e.start()
	defer e.stop()
	if err := e.tree.Halted(); err == nil {
		e.append(records)
		e.await("a checkpoint", func() bool { return e.tree.Halted() != nil || e.tree.Checkpoint().Size == e.journal.Size() })
		return e.tree.Halted()
	}
	e.append(records)
	err := e.tree.Halted()
	e.stop()
	if after := contents(t, e.treeDir()); after != before {
		t.Error("a tree that disagrees was changed")
	}
	if _, failure := e.tree.Health(e.tree.attempted); !errors.Is(failure, ErrHalted) {
		t.Errorf("health is %v", failure)
	}
	return err
}

// contents is all that is in the files of a tree, but for the lock.
func contents(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil || d.IsDir() || d.Name() == lockName {
			return err
		}
		content, err := os.ReadFile(path)
		b.WriteString(path + "\x00" + string(content) + "\x00")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestV_J6_Rollback puts older copies of parts of a ledger in the place of newer
// ones.
func TestV_J6_Rollback(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	e.start()
	e.append(300)
	e.covered()
	e.stop()
	old := copyTree(t, e.dir)
	e.start()
	e.append(300)
	now := e.covered()
	e.stop()
	swap := func(dir string, names ...string) {
		for _, name := range names {
			if err := errors.Join(os.RemoveAll(filepath.Join(dir, name)), os.Rename(filepath.Join(copyTree(t, old), name), filepath.Join(dir, name))); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, tc := range map[string]struct {
		restore []string
		verify  error // what verify's error is
		sees    bool
	}{
		"the journal":    {[]string{"ledger"}, ledger.ErrMissing, true},
		"the state":      {[]string{"tree/state"}, &DamageError{}, true},
		"the checkpoint": {[]string{"tree/checkpoint"}, nil, false}, // as a crash leaves it: not published yet
		// An older copy as a whole is sound; only what was kept elsewhere tells.
		"all but the journal": {[]string{"tree"}, nil, false},
		"all":                 {[]string{"tree", "ledger"}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := copyTree(t, e.dir)
			swap(dir, tc.restore...)
			v := e.verifier()
			_, err := v.Verify(t.Context(), filepath.Join(dir, "tree"), filepath.Join(dir, "ledger"))
			var d *DamageError
			if ok := errors.Is(err, tc.verify) || errors.As(tc.verify, &d) && errors.As(err, &d); !ok {
				t.Errorf("verify: %v", err)
			}
			v.Known = []Checkpoint{now}
			if _, _, err := v.tree(t.Context(), filepath.Join(dir, "tree"), 0); strings.HasPrefix(name, "all") != errors.Is(err, ErrInconsistent) {
				t.Errorf("with the newer checkpoint: %v", err)
			}
			if halted := startOn(t, dir, e.options, 2); (halted != nil) != tc.sees {
				t.Errorf("the CA says %v", halted)
			}
		})
	}
}

// TestV_J6_Fork lets a restored journal take other records, past where it was: the
// tree does not follow it, nor sign anything.
func TestV_J6_Fork(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	e.start()
	e.append(300)
	e.covered()
	e.stop()
	old := copyTree(t, e.dir)
	e.start()
	e.append(300)
	kept := e.covered()
	e.stop()

	other := &env{t: t, dir: old, options: e.options, count: 50_000}
	other.options.Key = filepath.Join(old, "keys", "log.key")
	other.start()
	other.append(400)
	forked := other.covered()
	other.stop()
	// Both are signed with one key: with both in hand, that is shown.
	v := e.verifier()
	v.Known = []Checkpoint{kept}
	if _, err := v.Verify(t.Context(), other.treeDir(), other.journalDir()); !errors.Is(err, ErrInconsistent) {
		t.Errorf("verify: %v", err)
	}
	if err := Consistent(other.treeDir(), forked, kept, forked); !errors.Is(err, ErrInconsistent) {
		t.Errorf("consistency: %v", err)
	}
	// The other journal below the first tree.
	if err := errors.Join(os.RemoveAll(e.journalDir()), os.CopyFS(e.journalDir(), os.DirFS(other.journalDir()))); err != nil {
		t.Fatal(err)
	}
	if _, err := e.verifier().Verify(t.Context(), e.treeDir(), e.journalDir()); !damagedJournal(err) {
		t.Errorf("verify: %v", err)
	}
	if halted := startOn(t, e.dir, e.options, 1); halted == nil || !strings.Contains(halted.Error(), "are not those that were signed") {
		t.Errorf("the CA says %v", halted)
	}
}

func damagedJournal(err error) bool {
	return errors.Is(err, ledger.ErrMissing) || errors.Is(err, ErrInconsistent)
}

// TestHalted loses what a log cannot do without.
func TestHalted(t *testing.T) {
	t.Parallel()
	e, _ := pristine(t)
	for name, tc := range map[string]struct{ gone, says string }{
		"the key":             {"keys/log.key", "its key is not at"},
		"the tree":            {"tree", "its state is not in"},
		"the state":           {"tree/state", "its state is not in"},
		"the whole journal":   {"ledger", "the journal is older than its tree"},
		"a tile in the edge":  {"tree/tile/1", "tile/1/000.p/2"},
		"the last bundle":     {"tree/tile/entries/002.p", "tile/entries/002.p/188"},
		"a tile that is next": {"", "the file exists, and its content is not the journal's"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := copyTree(t, e.dir)
			if tc.gone != "" {
				if err := os.RemoveAll(filepath.Join(dir, tc.gone)); err != nil {
					t.Fatal(err)
				}
			} else if err := os.WriteFile(filepath.Join(dir, "tree/tile/0/002"), []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
			halted := startOn(t, dir, e.options, 100)
			if halted == nil || !strings.Contains(halted.Error(), tc.says) {
				t.Errorf("the CA says %v", halted)
			}
		})
	}
}

// TestArchivedTree verifies a tree whose journal begins later, and whose bundles of
// archived records are gone; it still proves each record that it has.
func TestArchivedTree(t *testing.T) {
	t.Parallel()
	e, _ := pristine(t)
	segments, err := filepath.Glob(filepath.Join(e.journalDir(), "*.segment"))
	if err != nil || len(segments) < 2 {
		t.Fatalf("segments %v, %v", segments, err)
	}
	var first uint64
	for r, err := range ledger.Scan(e.journalDir(), 0) {
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(e.journalDir(), segmentName(r.Index))); err == nil && r.Index > tileWidth {
			first = r.Index
			break
		}
	}
	head, err := ledger.HeadAt(e.journalDir(), first)
	if err == nil {
		err = ledger.SetArchived(e.journalDir(), head)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range segments {
		if filepath.Base(s) < segmentName(first) {
			if err := os.Remove(s); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Remove(filepath.Join(e.treeDir(), "tile/entries/000")); err != nil {
		t.Fatal(err)
	}
	r, err := e.verifier().Verify(t.Context(), e.treeDir(), e.journalDir())
	if err != nil || r.BundlesAbsent != 1 || r.Journal.First != first {
		t.Fatalf("%+v, %v", r, err)
	}
	if _, err := Prove(e.treeDir(), r.Published, first); err != nil {
		t.Error(err)
	}
	e.start()
	e.append(10)
	e.covered()
	e.stop()
	if _, err := e.verifier().Verify(context.Background(), e.treeDir(), e.journalDir()); err != nil {
		t.Error(err)
	}
}

func segmentName(first uint64) string { return fmt.Sprintf("%020d.segment", first) }
