// Package store keeps what the CA must not forget: registration entries, nodes,
// quarantines, join tokens and roots, in SQL. It answers "what was decided" after a
// restart and orders all changes by one revision. Beside it, in a database of its own
// that can be made anew, is the index by which records of the ledger are found. It does
// not judge what it keeps, and nothing on the issuing path asks it.
package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshid/meshid/internal/durable"
)

// ErrNotFound is wrapped when what was to be changed does not exist.
var ErrNotFound = errors.New("not found")

// DB is the store. All methods may be called concurrently: changes are made one
// after the other and are on disk when the method returns. A method that fails
// has changed nothing. Nothing is retried here.
type DB struct {
	dialect dialect
	writer  *sql.DB // one connection
	reader  *sql.DB
	lock    *durable.Lock
	epoch   string
}

// Open opens the SQLite database at path, creating it with mode 0600 or
// bringing its schema up to date as needed. It refuses a database whose schema
// is newer than this program. A file has one DB: whoever comes second gets an
// error that wraps durable.ErrLocked and names the process that has it, before
// anything is read or written.
func Open(ctx context.Context, path string) (*DB, error) {
	lock, err := durable.Acquire(path + ".lock")
	if errors.Is(err, durable.ErrLocked) {
		return nil, fmt.Errorf("database %s belongs to a CA that runs: stop it, or give this one a data folder of its own: %w", path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("lock database %s: %w", path, err)
	}
	writer, reader, err := openSQLite(path, "FULL")
	if err != nil {
		return nil, errors.Join(err, lock.Release())
	}
	d := &DB{dialect: sqlite, writer: writer, reader: reader, lock: lock}
	if err := d.prepare(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open database %s: %w", path, err), d.Close())
	}
	return d, nil
}

// Close closes the database; calls in flight finish first. More calls do
// nothing.
func (d *DB) Close() error {
	err := errors.Join(d.writer.Close(), d.reader.Close())
	if lerr := d.lock.Release(); !errors.Is(lerr, fs.ErrClosed) {
		err = errors.Join(err, lerr)
	}
	return err
}

// Epoch names this history of revisions. It was chosen at random when the
// database was created, or by Restored, which is not called concurrently: revisions of two epochs cannot be compared.
func (d *DB) Epoch() string { return d.epoch }

// Revision returns the revision of the last change of entries or roots.
func (d *DB) Revision(ctx context.Context) (uint64, error) {
	var revision int64
	row := d.reader.QueryRowContext(ctx, d.dialect.rebind(`SELECT revision FROM state WHERE id = 1`))
	if err := row.Scan(&revision); err != nil {
		return 0, fmt.Errorf("read revision: %w", err)
	}
	return uint64(revision), nil //nolint:gosec // the table holds the CHECK that it is not negative
}

// Ledger returns the name of the ledger that this store belongs to, "" if it belongs
// to none yet.
func (d *DB) Ledger(ctx context.Context) (journal string, err error) {
	row := d.reader.QueryRowContext(ctx, d.dialect.rebind(`SELECT journal FROM ledgers`))
	if err := row.Scan(&journal); err != nil && !errors.Is(err, sql.ErrNoRows) {
		return "", fmt.Errorf("read the name of the ledger: %w", err)
	}
	return journal, nil
}

// ClaimLedger has this store belong to a ledger, if it belongs to none, and returns
// the one that it belongs to. Of any number of concurrent calls, one decides.
func (d *DB) ClaimLedger(ctx context.Context, journal string) (owner string, err error) {
	err = d.update(ctx, func(tx *sql.Tx) error {
		if _, err := d.exec(ctx, tx, `INSERT INTO ledgers (journal) SELECT ?1 WHERE NOT EXISTS (SELECT 1 FROM ledgers)`, journal); err != nil {
			return err
		}
		return tx.QueryRowContext(ctx, d.dialect.rebind(`SELECT journal FROM ledgers`)).Scan(&owner)
	})
	if err != nil {
		return "", fmt.Errorf("write the name of the ledger: %w", err)
	}
	return owner, nil
}

// Restored says that what is in the store was restored from a copy and counts
// from now on, for this ledger: a new history begins, at this revision and this
// sequence of the trust bundle, which must be above all that were ever told.
func (d *DB) Restored(ctx context.Context, journal string, revision, sequence uint64) error {
	epoch := rand.Text()
	err := d.update(ctx, func(tx *sql.Tx) error {
		if _, err := d.exec(ctx, tx, `DELETE FROM ledgers`); err != nil {
			return err
		}
		if _, err := d.exec(ctx, tx, `INSERT INTO ledgers (journal) VALUES (?1)`, journal); err != nil {
			return err
		}
		_, err := d.exec(ctx, tx, `UPDATE state SET epoch = ?1, revision = ?2, bundle_sequence = ?3 WHERE id = 1`,
			epoch, int64(revision), int64(sequence)) //nolint:gosec // the table holds the CHECK that they are not negative
		return err
	})
	if err != nil {
		return fmt.Errorf("begin a new history: %w", err)
	}
	d.epoch = epoch
	return nil
}

// update runs fn in a transaction that writes.
func (d *DB) update(ctx context.Context, fn func(tx *sql.Tx) error) error {
	tx, err := d.writer.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	if err := fn(tx); err != nil {
		if rerr := tx.Rollback(); rerr != nil && !errors.Is(rerr, sql.ErrTxDone) {
			return errors.Join(err, fmt.Errorf("roll back: %w", rerr))
		}
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

// exec runs one statement that writes.
func (d *DB) exec(ctx context.Context, tx *sql.Tx, query string, args ...any) (int64, error) {
	res, err := tx.ExecContext(ctx, d.dialect.rebind(query), args...)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// nextRevision is the one place where the revision grows: whatever changes
// entries or roots calls it in its own transaction. Since there is one writer,
// revisions are committed in their order and without gaps.
func (d *DB) nextRevision(ctx context.Context, tx *sql.Tx) (uint64, error) {
	var revision int64
	row := tx.QueryRowContext(ctx, d.dialect.rebind(
		`UPDATE state SET revision = revision + 1 WHERE id = 1 RETURNING revision`))
	if err := row.Scan(&revision); err != nil {
		return 0, fmt.Errorf("advance revision: %w", err)
	}
	return uint64(revision), nil //nolint:gosec // the table holds the CHECK that it is not negative
}

// migration is one embedded file: its number and what it does.
type migration struct {
	version int64
	name    string
	sql     string
}

// prepare brings the schema up to date and reads the epoch.
func (d *DB) prepare(ctx context.Context) error {
	all, err := d.readMigrations()
	if err != nil {
		return err
	}
	if err := d.migrate(ctx, all); err != nil {
		return err
	}
	return d.update(ctx, func(tx *sql.Tx) error {
		// Only the first start finds no row.
		if _, err := d.exec(ctx, tx,
			`INSERT INTO state (id, epoch, revision, bundle_sequence) VALUES (1, ?1, 0, 0) ON CONFLICT (id) DO NOTHING`,
			rand.Text()); err != nil {
			return fmt.Errorf("write epoch: %w", err)
		}
		if err := tx.QueryRowContext(ctx, d.dialect.rebind(`SELECT epoch FROM state WHERE id = 1`)).Scan(&d.epoch); err != nil {
			return fmt.Errorf("read epoch: %w", err)
		}
		return nil
	})
}

// migrate applies what is missing, each migration in a transaction of its own
// together with the note that it was applied: a start that is killed goes on
// where it was.
func (d *DB) migrate(ctx context.Context, all []migration) error {
	var applied int64
	err := d.update(ctx, func(tx *sql.Tx) error {
		if _, err := d.exec(ctx, tx, d.dialect.versionTable); err != nil {
			return fmt.Errorf("create table of migrations: %w", err)
		}
		row := tx.QueryRowContext(ctx, d.dialect.rebind(`SELECT COALESCE(MAX(version), 0) FROM schema_migrations`))
		return row.Scan(&applied)
	})
	if err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	if newest := all[len(all)-1].version; applied > newest {
		return fmt.Errorf("the database has schema version %d and this program knows versions up to %d: "+
			"it was used by a newer release, run that one", applied, newest)
	}
	for _, m := range all {
		if m.version <= applied {
			continue
		}
		err := d.update(ctx, func(tx *sql.Tx) error {
			if _, err := d.exec(ctx, tx, m.sql); err != nil {
				return err
			}
			_, err := d.exec(ctx, tx,
				`INSERT INTO schema_migrations (version, applied_at) VALUES (?1, ?2)`, m.version, time.Now().Unix())
			return err
		})
		if err != nil {
			return fmt.Errorf("migrate schema with %s: %w", m.name, err)
		}
	}
	return nil
}

// readMigrations returns the embedded migrations in their order.
func (d *DB) readMigrations() ([]migration, error) {
	names, err := fs.Glob(d.dialect.migrations, "migrations/*.sql")
	if err != nil {
		return nil, fmt.Errorf("list migrations: %w", err)
	}
	all := make([]migration, 0, len(names))
	for _, name := range names {
		raw, err := fs.ReadFile(d.dialect.migrations, name)
		if err != nil {
			return nil, fmt.Errorf("read migration: %w", err)
		}
		digits, _, _ := strings.Cut(strings.TrimPrefix(name, "migrations/"), "_")
		version, err := strconv.ParseInt(digits, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("name of migration %s: %w", name, err)
		}
		all = append(all, migration{version, name, string(raw)})
	}
	slices.SortFunc(all, func(a, b migration) int { return int(a.version - b.version) })
	if len(all) == 0 {
		return nil, errors.New("no migrations are embedded")
	}
	return all, nil
}
