package store

import (
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"

	_ "modernc.org/sqlite" // the driver "sqlite", without cgo
)

//go:embed migrations/*.sql
var migrations embed.FS

// dialect is all that differs between SQL engines. Queries are written once, in
// the SQL that SQLite and PostgreSQL share (INSERT ... ON CONFLICT, RETURNING),
// with parameters numbered ?1, ?2, ...; rebind turns them into the engine's own.
type dialect struct {
	name       string
	migrations fs.FS
	rebind     func(query string) string
	// versionTable creates the table of applied migrations, if it is missing.
	versionTable string
}

var sqlite = dialect{
	name:       "sqlite",
	migrations: migrations,
	rebind:     func(query string) string { return query },
	versionTable: `CREATE TABLE IF NOT EXISTS schema_migrations (
		version    INTEGER NOT NULL PRIMARY KEY,
		applied_at INTEGER NOT NULL
	) STRICT`,
}

// How many connections read, and how long a connection waits for a lock that
// another process (a backup, a shell) holds.
const (
	sqliteReaders = 4
	sqliteBusy    = 5 * time.Second
)

// openSQLite opens the file with one connection that writes and some that read.
// Each transaction of the writer begins as one that writes, so that it never
// fails half-way for want of the lock.
//
// synchronous is FULL if what was committed has to survive a power cut, NORMAL if
// the newest commits may be lost by it. Further pragmas are such as "cache_size(1)".
func openSQLite(path, synchronous string, pragmas ...string) (writer, reader *sql.DB, err error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, nil, fmt.Errorf("find database %s: %w", path, err)
	}
	if err := privateFile(abs); err != nil {
		return nil, nil, err
	}
	dsn := func(extra url.Values) string {
		q := url.Values{
			"_busy_timeout": {fmt.Sprint(sqliteBusy.Milliseconds())},
			"_foreign_keys": {"1"},
			"_journal_mode": {"WAL"},
			"_synchronous":  {synchronous},
			"_dqs":          {"0"},
			"_pragma":       pragmas,
		}
		maps.Copy(q, extra)
		return (&url.URL{Scheme: "file", Path: abs, RawQuery: q.Encode()}).String()
	}
	writer, err = sql.Open("sqlite", dsn(url.Values{"_txlock": {"immediate"}}))
	if err != nil {
		return nil, nil, fmt.Errorf("open database %s: %w", abs, err)
	}
	writer.SetMaxOpenConns(1)
	reader, err = sql.Open("sqlite", dsn(url.Values{"_query_only": {"1"}}))
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open database %s: %w", abs, err), writer.Close())
	}
	reader.SetMaxOpenConns(sqliteReaders)
	return writer, reader, nil
}

// privateFile makes sure that the database is a regular file that only its owner
// can read: the names of all workloads and nodes are in it. SQLite gives its
// companion files (-wal, -shm) the same mode.
func privateFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		return f.Close()
	}
	if !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create database: %w", err)
	}
	st, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("inspect database: %w", err)
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("database %s is not a regular file: name the file itself, not a link to it", path)
	}
	// SQLite keeps its log beside the name by which the file was opened: two processes
	// that use two names destroy the database.
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && sys.Nlink > 1 {
		return fmt.Errorf("database %s is a hard link: there are %d names of the file, remove the others, and give each CA a database of its own", path, sys.Nlink)
	}
	if perm := st.Mode().Perm(); perm&0o077 != 0 {
		return fmt.Errorf("database %s has mode %04o and can be read by others: run chmod 600 %s", path, perm, path)
	}
	return nil
}
