package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	sqlitedriver "modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
)

//go:embed records/migrations/*.sql
var recordMigrations embed.FS

// Records finds the records of a journal: it is a projection into SQL, in a
// database of its own, so that writing it never competes with entries. It holds
// what records are found by, and where each one stands; the records themselves are
// read from the journal. It is a ledger.Sink: its cursor is committed together
// with what was taken, so nothing counts twice. If the file is gone, damaged or of
// another journal, it is made anew from the journal.
//
// All methods may be called concurrently, but Put by one goroutine only. Times are
// those of the records, to the nanosecond.
type Records struct {
	db      DB
	journal *ledger.Journal
	log     *slog.Logger
	metrics *recordMetrics

	counts [search.Rules]atomic.Uint64 // as committed
	live   atomic.Uint64               // records from here on raise alarms

	progress struct {
		sync.Mutex // guards what follows

		next  uint64        // as committed
		moved chan struct{} // closed when next changes
	}

	names   nameCache // owned by Put
	tallied int64     // hour up to which old tallies are forgotten; owned by Put

	gauges struct {
		sync.Mutex // guards what follows

		at     time.Time
		counts Inventory
	}
}

// RecordsOptions are the options of Records; the zero value is good.
type RecordsOptions struct {
	// Registerer gets the metrics, if it is not nil.
	Registerer prometheus.Registerer
	// Logger gets what an operator should know, if it is not nil.
	Logger *slog.Logger
}

// OpenRecords opens the SQLite database at path, which is the projection of
// journal, or begins one there. The caller must Close it.
func OpenRecords(ctx context.Context, path string, journal *ledger.Journal, o RecordsOptions) (*Records, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	r, err := openRecords(ctx, path, journal, o.Logger)
	if errors.Is(err, errRebuild) {
		o.Logger.WarnContext(ctx, "the ledger's search index is made anew from the journal", "path", path, "err", err)
		if err := removeDatabase(path); err != nil {
			return nil, err
		}
		r, err = openRecords(ctx, path, journal, o.Logger)
	}
	if err != nil {
		return nil, fmt.Errorf("open search index %s: %w\n  It holds nothing of its own: if it is damaged, remove it and start again", path, err)
	}
	if r.metrics, err = newRecordMetrics(o.Registerer, r); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// errRebuild is wrapped by the errors after which the database is made anew.
var errRebuild = errors.New("it does not belong to this ledger")

func openRecords(ctx context.Context, path string, journal *ledger.Journal, log *slog.Logger) (*Records, error) {
	// NORMAL: after a power cut the newest commits may be gone, and their records
	// are taken again.
	// Hashes are spread over all of their indexes: pages are kept in memory, and
	// written back together after many batches, not after each.
	writer, reader, err := openSQLite(path, "NORMAL", "cache_size(-16384)", "wal_autocheckpoint(16384)")
	if err != nil {
		return nil, err
	}
	d := sqlite
	if d.migrations, err = fs.Sub(recordMigrations, "records"); err != nil {
		return nil, errors.Join(err, writer.Close(), reader.Close())
	}
	r := &Records{db: DB{dialect: d, writer: writer, reader: reader}, journal: journal, log: log}
	if err := r.prepare(ctx); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// damaged reports whether err says that the file is no sound SQLite database.
func damaged(err error) bool {
	e, ok := errors.AsType[*sqlitedriver.Error](err)
	return ok && (e.Code()&0xff == sqlite3.SQLITE_CORRUPT || e.Code()&0xff == sqlite3.SQLITE_NOTADB)
}

// removeDatabase removes a SQLite database.
func removeDatabase(path string) error {
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Remove(path + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove search index: %w", err)
		}
	}
	return nil
}

// prepare brings the schema up to date, and reads where the projection stands.
func (r *Records) prepare(ctx context.Context) error {
	all, err := r.db.readMigrations()
	if err != nil {
		return err
	}
	if err := r.db.migrate(ctx, all); err != nil {
		if damaged(err) {
			return fmt.Errorf("%w: %w", errRebuild, err)
		}
		return err
	}
	var live, next uint64
	err = r.db.update(ctx, func(tx *sql.Tx) error {
		// Only the first start finds no row: what is in the journal by then is
		// history.
		_, err := r.db.exec(ctx, tx, `INSERT INTO cursor (id, next, live_from, segment, position, hash)
			VALUES (1, 0, ?1, 0, 0, ?2) ON CONFLICT (id) DO NOTHING`, int64(r.journal.Size()), []byte{}) //nolint:gosec // G115: it counts records
		if err != nil {
			return err
		}
		if live, next, err = r.belongs(ctx, tx); err != nil {
			return err
		}
		return r.readCounts(ctx, tx)
	})
	if err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	r.live.Store(live)
	r.advance(next)
	return nil
}

// advance says that the records before next can be found.
func (r *Records) advance(next uint64) {
	p := &r.progress
	p.Lock()
	defer p.Unlock()
	if p.moved != nil {
		close(p.moved)
	}
	p.next, p.moved = max(p.next, next), make(chan struct{})
}

// CatchUp waits until every record that is durable in the ledger now can be found,
// or until ctx ends, and returns how many of them cannot.
func (r *Records) CatchUp(ctx context.Context) (behind uint64) {
	size := r.journal.Size()
	for {
		r.progress.Lock()
		next, moved := r.progress.next, r.progress.moved
		r.progress.Unlock()
		if next >= size {
			return 0
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return size - next
		}
	}
}

// belongs checks that the last record that was taken is the journal's, and returns
// from which one on they raise alarms, and which one is the next.
func (r *Records) belongs(ctx context.Context, tx *sql.Tx) (live, next uint64, err error) {
	var (
		place ledger.Place
		hash  []byte
	)
	row := tx.QueryRowContext(ctx, r.db.dialect.rebind(`SELECT next, live_from, segment, position, hash FROM cursor WHERE id = 1`))
	if err := row.Scan(&next, &live, &place.Segment, &place.Offset, &hash); err != nil {
		return 0, 0, fmt.Errorf("read cursor: %w", err)
	}
	if next == 0 {
		return live, next, nil
	}
	if size := r.journal.Size(); next > size {
		return 0, 0, fmt.Errorf("%w: it has %d records, the ledger has %d", errRebuild, next, size)
	}
	reader := r.journal.Reader()
	e, err := reader.Read(next-1, place)
	if err := errors.Join(err, reader.Close()); err != nil {
		return 0, 0, fmt.Errorf("%w: %w", errRebuild, err)
	}
	if string(e.Hash[:]) != string(hash) {
		return 0, 0, fmt.Errorf("%w: record %d is another", errRebuild, next-1)
	}
	return live, next, nil
}

// readCounts reads how many records each rule has marked.
func (r *Records) readCounts(ctx context.Context, tx *sql.Tx) error {
	return scanRows(ctx, tx, r.db.dialect.rebind(`SELECT rule, total FROM anomaly_counts`), nil, func(rows *sql.Rows) error {
		var rule, total uint64
		if err := rows.Scan(&rule, &total); err != nil {
			return err
		}
		if rule < search.Rules {
			r.counts[rule].Store(total)
		}
		return nil
	})
}

// Close closes the database; calls in flight finish first. The lock of the journal
// is that of the database too.
func (r *Records) Close() error { return errors.Join(r.db.writer.Close(), r.db.reader.Close()) }

// querier is a database or a transaction.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// scanRows calls fn for each row of a query's result.
func scanRows(ctx context.Context, q querier, query string, args []any, fn func(*sql.Rows) error) error {
	rows, err := q.QueryContext(ctx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close() //nolint:errcheck // rows.Err says what went wrong
	for rows.Next() {
		if err := fn(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}
