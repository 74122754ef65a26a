package file

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/pkg/config"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/export"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

var formats = export.Formats{"json": ledger.FormatJSON}

// batch is the records from first on and below next.
func batch(first, next uint64) export.Batch {
	b := export.Batch{Journal: "00", First: first, Next: next}
	for i := first; i < next; i++ {
		b.Entries = append(b.Entries, ledger.Entry{Index: i, Record: &ledgerv1.Record{Version: 1, Detail: strings.Repeat("x", 100)}})
	}
	return b
}

func newFile(t *testing.T, c Config) *File {
	t.Helper()
	f, err := New(c, formats)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if f.f != nil {
			f.f.Close()
		}
	})
	return f
}

func send(t *testing.T, f *File, first, next uint64) {
	t.Helper()
	if err := f.Send(context.Background(), batch(first, next)); err != nil {
		t.Fatal(err)
	}
}

func place(t *testing.T, f *File) json.RawMessage {
	t.Helper()
	p, err := f.Position()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// indexes reads the records of files with encoding/json.
func indexes(t *testing.T, paths ...string) []uint64 {
	t.Helper()
	var all []uint64
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var r io.Reader = f
		if strings.HasSuffix(p, ".gz") {
			if r, err = gzip.NewReader(f); err != nil {
				t.Fatal(err)
			}
		}
		for d := json.NewDecoder(r); d.More(); {
			var line struct {
				Index uint64 `json:"index"`
			}
			if err := d.Decode(&line); err != nil {
				t.Fatalf("%s: %v", p, err)
			}
			all = append(all, line.Index)
		}
	}
	return all
}

func upTo(n uint64) []uint64 {
	var all []uint64
	for i := range n {
		all = append(all, i)
	}
	return all
}

func want(t *testing.T, n uint64, paths ...string) {
	t.Helper()
	if d := cmp.Diff(upTo(n), indexes(t, paths...)); d != "" {
		t.Errorf("records (-want +got):\n%s", d)
	}
}

// TestFault_F5_ExportFileAfterACrash: the CA dies between a write to the file and
// that of its cursor, or within the first. Whatever the file holds then, each
// record is in it once in the end.
func TestFault_F5_ExportFileAfterACrash(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out", "ledger.jsonl")
	f := newFile(t, Config{Path: path})
	send(t, f, 0, 3)
	cursor := place(t, f)
	send(t, f, 3, 6)
	full, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var begin struct {
		Offset int `json:"offset"`
	}
	if err := json.Unmarshal(cursor, &begin); err != nil {
		t.Fatal(err)
	}
	for size := begin.Offset; size <= len(full); size++ {
		if err := os.WriteFile(path, full[:size], 0o600); err != nil { // the same inode
			t.Fatal(err)
		}
		f := newFile(t, Config{Path: path})
		if err := f.Resume(cursor); err != nil {
			t.Fatal(err)
		}
		send(t, f, 3, 4) // divided in another way than before
		send(t, f, 4, 8)
		want(t, 8, path)
		f.f.Close()
	}
}

// What is there is never taken for more than it is: other lines stay, and ours
// come behind them.
func TestOtherLinesStay(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.jsonl")
	if err := os.WriteFile(path, []byte("{\"index\":99}\n{\"ind"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := newFile(t, Config{Path: path})
	send(t, f, 0, 2)
	send(t, f, 2, 3)
	if d := cmp.Diff([]uint64{99, 0, 1, 2}, indexes(t, path)); d != "" {
		t.Error(d)
	}
}

func TestRotation(t *testing.T) {
	for _, zip := range []bool{false, true} {
		t.Run(fmt.Sprintf("gzip=%v", zip), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "ledger.jsonl")
			f := newFile(t, Config{Path: path, MaxBytes: 1 << 16, Keep: 3, Gzip: zip})
			for i := uint64(0); i < 2000; i += 100 {
				send(t, f, i, i+100)
			}
			all, err := filepath.Glob(path + ".*")
			if err != nil {
				t.Fatal(err)
			}
			if len(all) != 3 {
				t.Fatalf("kept %q, want three", all)
			}
			for _, p := range append(all, path) {
				st, err := os.Stat(p)
				if err != nil {
					t.Fatal(err)
				}
				if st.Mode().Perm() != 0o600 || st.Size() > 1<<16 || p != path && zip != strings.HasSuffix(p, ".gz") {
					t.Errorf("%s: mode %v, %d bytes", p, st.Mode(), st.Size())
				}
			}
			got := indexes(t, append(all, path)...)
			for i := 1; i < len(got); i++ {
				if got[i] != got[i-1]+1 {
					t.Fatalf("record %d follows %d", got[i], got[i-1])
				}
			}
			if got[len(got)-1] != 1999 {
				t.Errorf("the last record is %d", got[len(got)-1])
			}
		})
	}
}

func TestRotationByAge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.jsonl")
	f := newFile(t, Config{Path: path, MaxAge: config.Duration(time.Nanosecond)})
	send(t, f, 0, 1)
	send(t, f, 1, 2)
	old, err := filepath.Glob(path + ".*")
	if err != nil || len(old) != 1 || !strings.HasSuffix(old[0], "Z-00000000000000000001") {
		t.Fatalf("%q, %v", old, err)
	}
	want(t, 2, old[0], path)
}

// Others rotate as well: the file is moved away, removed, or copied and cut.
func TestMovedAway(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.jsonl")
	f := newFile(t, Config{Path: path})
	send(t, f, 0, 2)
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	send(t, f, 2, 3)
	want(t, 3, path+".1", path)
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	send(t, f, 3, 4)
	if got := indexes(t, path); !slices.Equal(got, []uint64{3}) {
		t.Errorf("after a cut: %v", got)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	send(t, f, 4, 5)
	if got := indexes(t, path); !slices.Equal(got, []uint64{4}) {
		t.Errorf("after a removal: %v", got)
	}
}

// A rotation of ours and then a crash: the cursor is of the file before.
func TestCrashAfterRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.jsonl")
	f := newFile(t, Config{Path: path, MaxBytes: 1 << 16})
	send(t, f, 0, 300)
	cursor := place(t, f)
	send(t, f, 300, 600) // in a new file
	old, err := filepath.Glob(path + ".*")
	if err != nil || len(old) != 1 {
		t.Fatalf("%q, %v", old, err)
	}
	g := newFile(t, Config{Path: path, MaxBytes: 1 << 16})
	if err := g.Resume(cursor); err != nil {
		t.Fatal(err)
	}
	send(t, g, 300, 400)
	send(t, g, 400, 600)
	want(t, 600, old[0], path)
}

// The file is this user's and no link, or nothing is written.
func TestUnsafeFile(t *testing.T) {
	dir := t.TempDir()
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, make := range map[string]func(string) error{
		"symbolic link": func(p string) error { return os.Symlink(other, p) },
		"hard link":     func(p string) error { return os.Link(other, p) },
		"folder":        func(p string) error { return os.Mkdir(p, 0o700) },
	} {
		path := filepath.Join(dir, name)
		if err := make(path); err != nil {
			t.Fatal(err)
		}
		if err := newFile(t, Config{Path: path}).Send(context.Background(), batch(0, 1)); err == nil {
			t.Errorf("%s: written", name)
		}
	}
	if text, err := os.ReadFile(other); err != nil || len(text) > 0 {
		t.Errorf("%q, %v", text, err)
	}
}

func TestSettings(t *testing.T) {
	for _, c := range []struct {
		c    Config
		want string
	}{
		{Config{}, "path: "},
		{Config{Path: "ledger.jsonl"}, "path that begins with /"},
		{Config{Path: "/x", Format: "xml"}, `format: "xml" is none of json, ocsf, cef`},
		{Config{Path: "/x", MaxBytes: 10}, "write 65536 or more"},
		{Config{Path: "/x", Keep: -1}, "keep: "},
	} {
		if _, err := New(c.c, formats); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.c, err)
		}
	}
}
