package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/server/registry"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
)

// Values are parameters: whatever is in a name stays a name.
func TestV_L4_ParametersOnly(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	names := []string{"'; DROP TABLE entries; --", "%", "_", "a\x00b", `"`, "?1", "Ä", "ä"}
	for _, name := range names {
		if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry(name)}, nil, ignore); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
	}
	if _, err := d.ApplyEntries(t.Context(), nil, []string{"%"}, ignore); err != nil {
		t.Fatal(err)
	}
	got, _, err := d.Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(names)-1 {
		t.Errorf("%d entries, want %d", len(got), len(names)-1)
	}
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) < 5 {
		t.Fatal(files, err)
	}
	// Those of the records put their statements together, of numbered parameters:
	// TestV_L4_FiltersAreValues.
	files = slices.DeleteFunc(files, func(f string) bool { return strings.HasSuffix(f, "_test.go") || strings.HasPrefix(f, "records") })
	for _, q := range []string{"SELECT *", "select *", "+ name", "Sprintf(`", "LIKE"} {
		for _, file := range files {
			src, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(src), q) {
				t.Errorf("%s has %q", file, q)
			}
		}
	}
}

// Two CAs that start for the first time on one database: the second one is told
// who has it, before it has touched anything.
func TestFault_F21_SecondOpenIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	_, err := Open(t.Context(), path)
	if !errors.Is(err, durable.ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) || !strings.Contains(err.Error(), "stop it") {
		t.Errorf("a second Open: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, path)
}

// Of 16 CAs with ledgers of their own, the store belongs to one, for good; or until an
// operator says otherwise.
func TestFault_F21_OneLedger(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	if owner, err := d.Ledger(t.Context()); owner != "" || err != nil {
		t.Errorf("a new store belongs to %q: %v", owner, err)
	}
	owners := make([]string, 16)
	var wg sync.WaitGroup
	for i := range owners {
		wg.Go(func() {
			var err error
			if owners[i], err = d.ClaimLedger(t.Context(), fmt.Sprint("ledger-", i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	first := owners[0]
	if slices.ContainsFunc(owners, func(o string) bool { return o != first }) || !strings.HasPrefix(first, "ledger-") {
		t.Errorf("it belongs to %v", owners)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	if owner, err := d.Ledger(t.Context()); owner != first || err != nil {
		t.Errorf("it belongs to %q: %v", owner, err)
	}
	if err := d.Restored(t.Context(), "another", 7, 7); err != nil {
		t.Fatal(err)
	}
	if owner, err := d.ClaimLedger(t.Context(), first); owner != "another" || err != nil {
		t.Errorf("it belongs to %q: %v", owner, err)
	}
}

// A ban is in force from its commit on, on every connection that reads: also on those
// that were in use while it was written, and while others go on writing.
func TestV_L5_CommittedIsRead(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	n := &registry.Node{ID: "spiffe://example.org/meshid/node/x/n", Attributes: &attributesv1.Node{Id: "n"}}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for i := range 2 * sqliteReaders { // no connection is idle
		wg.Go(func() {
			for ctx.Err() == nil {
				_, err := d.Nodes(ctx)
				if i == 0 && err == nil {
					_, err = d.ApplyEntries(ctx, []*entryv1.Entry{entry("a")}, nil, ignore)
				}
				if err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
		})
	}
	for round := range 30 {
		n.State = registry.Active
		if round%2 == 1 {
			n.State = registry.Banned
		}
		if err := d.PutNodes(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		var read sync.WaitGroup
		for range 2 * sqliteReaders {
			read.Go(func() {
				if got, err := d.Nodes(t.Context()); err != nil || len(got) != 1 || got[0].State != n.State {
					t.Errorf("round %d: read is %v: %v", round, got, err)
				}
			})
		}
		read.Wait()
	}
	if used := d.reader.Stats().OpenConnections; used != sqliteReaders {
		t.Errorf("%d connections read, want %d", used, sqliteReaders)
	}
}

func TestMigrations(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry("a")}, nil, ignore); err != nil {
		t.Fatal(err)
	}
	first, err := d.readMigrations()
	if err != nil {
		t.Fatal(err)
	}
	// A second migration that fails half-way leaves nothing of itself.
	next := migration{int64(len(first) + 1), "next", `CREATE TABLE later (a INTEGER) STRICT; INSERT INTO later (a) VALUES (1); SELECT nonsense;`}
	if err := d.migrate(t.Context(), append(first, next)); err == nil {
		t.Fatal("a broken migration passed")
	}
	var n int
	if err := d.reader.QueryRowContext(t.Context(), `SELECT COUNT(1) FROM sqlite_master WHERE name = 'later'`).Scan(&n); err != nil || n != 0 {
		t.Errorf("%d tables of the broken migration are left, %v", n, err)
	}
	next.sql = `CREATE TABLE later (a INTEGER) STRICT`
	for range 2 { // the second time there is nothing to do
		if err := d.migrate(t.Context(), append(first, next)); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	// This program does not know that version.
	_, err = Open(t.Context(), path)
	if err == nil || !strings.Contains(err.Error(), "newer release") {
		t.Errorf("a newer schema was opened: %v", err)
	}
}

func TestReadMigrations(t *testing.T) {
	for name, files := range map[string]fstest.MapFS{
		"none":      {},
		"bad name":  {"migrations/first.sql": {Data: []byte("SELECT 1")}},
		"wrong dir": {"0001_x.sql": {Data: []byte("SELECT 1")}},
	} {
		d := &DB{dialect: dialect{migrations: files}}
		if _, err := d.readMigrations(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestOpenFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ca.db")
	d := open(t, path)
	if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry("a")}, nil, ignore); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", f.Name(), info.Mode())
		}
	}
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1"} {
		var got string
		if err := d.writer.QueryRowContext(t.Context(), "PRAGMA "+pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %q, want %q: %v", pragma, got, want, err)
		}
	}
	if _, err := d.reader.ExecContext(t.Context(), `DELETE FROM entries`); err == nil {
		t.Error("a reader can write")
	}

	wide := filepath.Join(dir, "wide.db")
	if err := os.WriteFile(wide, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link.db")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	linked := filepath.Join(dir, "linked.db")
	if err := errors.Join(os.WriteFile(linked, nil, 0o600), os.Link(linked, filepath.Join(dir, "other.db"))); err != nil {
		t.Fatal(err)
	}
	garbage := filepath.Join(dir, "garbage.db")
	if err := os.WriteFile(garbage, []byte(strings.Repeat("not a database ", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		wide: "chmod 600", link: "not a regular file", linked: "hard link", dir: "not a regular file", garbage: "not a database",
		filepath.Join(dir, "missing", "ca.db"): "no such file",
	} {
		if _, err := Open(t.Context(), path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Open(%s) = %v, want %q", path, err, want)
		}
	}
	// A name that would mean something in a URI is only a name.
	odd := open(t, filepath.Join(dir, "a?mode=memory&x=%41#b.db"))
	if _, err := odd.Revision(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "a?mode=memory&x=%41#b.db")); err != nil {
		t.Error(err)
	}
}

// A change that was committed is there after the process was killed: the files
// are copied while the database is open, as they would be left behind.
func TestSurvivesKill(t *testing.T) {
	dir := t.TempDir()
	d := open(t, filepath.Join(dir, "ca.db"))
	for i := range 20 {
		if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry(fmt.Sprint(i))}, nil, ignore); err != nil {
			t.Fatal(err)
		}
	}
	// A transaction that is under way is not.
	tx, err := d.writer.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.ExecContext(t.Context(), `DELETE FROM entries`); err != nil {
		t.Fatal(err)
	}
	left := t.TempDir()
	for _, name := range []string{"ca.db", "ca.db-wal"} {
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(left, name), raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := tx.Rollback(); err != nil && !errors.Is(err, sql.ErrTxDone) {
		t.Fatal(err)
	}
	got, rev, err := open(t, filepath.Join(left, "ca.db")).Entries(t.Context())
	if err != nil || rev != 20 || len(got) != 20 {
		t.Errorf("%d entries, revision %d, %v", len(got), rev, err)
	}
}
