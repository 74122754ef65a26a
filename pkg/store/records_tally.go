package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
)

// maxTallies bounds what one question returns.
const maxTallies = 20_000

type tallyKey struct {
	minute  int64
	event   ledgerv1.Event
	outcome ledgerv1.Outcome
	reason  int64
}

type entryTallyKey struct {
	hour, entry int64
	outcome     ledgerv1.Outcome
}

type entryTallyValue struct {
	total uint64
	last  int64
}

// tallies counts the records of one batch.
type tallies struct {
	decisions map[tallyKey]uint64
	entries   map[entryTallyKey]entryTallyValue
}

// count counts a record, which may stand for several, unless it is too old.
func (t *tallies) count(w *row) {
	if time.Since(w.time) > search.TallyAge {
		return
	}
	if t.decisions == nil {
		t.decisions, t.entries = make(map[tallyKey]uint64), make(map[entryTallyKey]entryTallyValue)
	}
	n := max(w.Record.GetSummary().GetCount(), 1)
	reason, _ := w.reason.(int64)
	t.decisions[tallyKey{w.time.Unix() / 60, w.Record.GetEvent(), w.Record.GetOutcome(), reason}] += n
	entry, ok := w.entry.(int64)
	if !ok || w.Record.GetEvent() != ledgerv1.Event_EVENT_ISSUE {
		return
	}
	key := entryTallyKey{w.time.Unix() / 3600, entry, w.Record.GetOutcome()}
	v := t.entries[key]
	t.entries[key] = entryTallyValue{v.total + n, max(v.last, toStored(w.time))}
}

// tally writes what was counted, and forgets what is too old.
func (b *batch) tally() error {
	for k, n := range b.tallies.decisions {
		if err := b.exec(`INSERT INTO tallies (minute, event, outcome, reason, total) VALUES (?1, ?2, ?3, ?4, ?5)
			ON CONFLICT (minute, event, outcome, reason) DO UPDATE SET total = tallies.total + excluded.total`,
			k.minute, int(k.event), int(k.outcome), k.reason, int64(n)); err != nil { //nolint:gosec // G115: it counts records
			return fmt.Errorf("tally: %w", err)
		}
	}
	for k, v := range b.tallies.entries {
		if err := b.exec(`INSERT INTO entry_tallies (hour, entry, outcome, total, last) VALUES (?1, ?2, ?3, ?4, ?5)
			ON CONFLICT (hour, entry, outcome) DO UPDATE SET total = entry_tallies.total + excluded.total, last = max(entry_tallies.last, excluded.last)`,
			k.hour, k.entry, int(k.outcome), int64(v.total), v.last); err != nil { //nolint:gosec // G115: it counts records
			return fmt.Errorf("tally entry: %w", err)
		}
	}
	old := time.Now().Add(-search.TallyAge)
	if hour := old.Unix() / 3600; hour != b.r.tallied {
		if err := b.exec(`DELETE FROM tallies WHERE minute < ?1`, old.Unix()/60); err != nil {
			return fmt.Errorf("forget old tallies: %w", err)
		}
		if err := b.exec(`DELETE FROM entry_tallies WHERE hour < ?1`, hour); err != nil {
			return fmt.Errorf("forget old tallies: %w", err)
		}
		b.r.tallied = hour
	}
	return nil
}

// Tallies returns how many decisions of which kind there were from since until
// until, in steps of full minutes, the oldest first.
func (r *Records) Tallies(ctx context.Context, since, until time.Time, step time.Duration) ([]search.Tally, error) {
	from, minutes := since.Unix()/60, max(int64(step/time.Minute), 1)
	var list []search.Tally
	err := scanRows(ctx, r.db.reader, r.db.dialect.rebind(
		`SELECT (t.minute - ?1) / ?2, t.event, t.outcome, COALESCE(n.name, ''), sum(t.total)
		FROM tallies t LEFT JOIN names n ON n.id = t.reason
		WHERE t.minute >= ?1 AND t.minute < ?3 GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4 LIMIT ?4`),
		[]any{from, minutes, (until.Unix() + 59) / 60, maxTallies}, func(rows *sql.Rows) error {
			var slot int64
			var t search.Tally
			if err := rows.Scan(&slot, &t.Event, &t.Outcome, &t.Reason, &t.Total); err != nil {
				return err
			}
			t.Start = time.Unix((from+slot*minutes)*60, 0)
			list = append(list, t)
			return nil
		})
	return list, wrapFind(err)
}

// EntryTallies returns how often each entry decided from since on, in full hours.
func (r *Records) EntryTallies(ctx context.Context, since time.Time) ([]search.EntryTally, error) {
	var list []search.EntryTally
	err := scanRows(ctx, r.db.reader, r.db.dialect.rebind(
		`SELECT n.name, sum(CASE WHEN t.outcome = ?1 THEN t.total ELSE 0 END), sum(CASE WHEN t.outcome <> ?1 THEN t.total ELSE 0 END),
			max(CASE WHEN t.outcome = ?1 THEN t.last ELSE 0 END)
		FROM entry_tallies t JOIN names n ON n.id = t.entry WHERE t.hour >= ?2 GROUP BY n.name ORDER BY n.name LIMIT ?3`),
		[]any{int(ledgerv1.Outcome_OUTCOME_SUCCESS), since.Unix() / 3600, maxTallies}, func(rows *sql.Rows) error {
			var t search.EntryTally
			var last int64
			if err := rows.Scan(&t.Entry, &t.Issued, &t.Refused, &last); err != nil {
				return err
			}
			t.Last = fromStored(last)
			list = append(list, t)
			return nil
		})
	return list, wrapFind(err)
}

// Identities returns the SPIFFE IDs that hold X.509-SVIDs which are valid at now
// and in use, in the order of their names behind after: at most limit of those
// that contain part.
func (r *Records) Identities(ctx context.Context, now time.Time, part, after string, limit int) ([]search.Identity, error) {
	var list []search.Identity
	at := toStored(now)
	err := scanRows(ctx, r.db.reader, r.db.dialect.rebind(
		`SELECT n.name, count(*), count(DISTINCT c.node), sum(c.overdue_at <= ?1), min(c.not_after), max(c.not_after)
		FROM certificates c JOIN names n ON n.id = c.identity
		WHERE c.state = ?2 AND c.not_after > ?1 AND n.name > ?3 AND (?4 = '' OR instr(n.name, ?4) > 0)
		GROUP BY n.name ORDER BY n.name LIMIT ?5`),
		[]any{at, int(search.Current), after, part, limited(limit)}, func(rows *sql.Rows) error {
			var i search.Identity
			var overdue sql.NullInt64
			var first, last int64
			if err := rows.Scan(&i.SPIFFEID, &i.Certificates, &i.Nodes, &overdue, &first, &last); err != nil {
				return err
			}
			i.Overdue = uint64(overdue.Int64) //nolint:gosec // G115: it is a count
			i.First, i.Last = fromStored(first), fromStored(last)
			list = append(list, i)
			return nil
		})
	return list, wrapFind(err)
}

// Horizon returns when the X.509-SVIDs that are valid at now and in use expire, in
// steps of time; those that expire later are in Active only.
func (r *Records) Horizon(ctx context.Context, now time.Time, step time.Duration, steps int) (search.Horizon, error) {
	h := search.Horizon{Expiring: make([]uint64, steps)}
	at := toStored(now)
	err := scanRows(ctx, r.db.reader, r.db.dialect.rebind(
		`SELECT (not_after - ?1) / ?2, count(*), sum(overdue_at <= ?1) FROM certificates WHERE state = ?3 AND not_after > ?1 GROUP BY 1`),
		[]any{at, int64(step), int(search.Current)}, func(rows *sql.Rows) error {
			var slot int64
			var n uint64
			var overdue sql.NullInt64
			if err := rows.Scan(&slot, &n, &overdue); err != nil {
				return err
			}
			h.Active += n
			h.Overdue += uint64(overdue.Int64) //nolint:gosec // G115: it is a count
			if slot < int64(steps) {
				h.Expiring[slot] += n
			}
			return nil
		})
	return h, wrapFind(err)
}

// Record returns the record with this index. The error wraps search.ErrNoRecord if
// there is none, or not yet, or no longer.
func (r *Records) Record(ctx context.Context, index uint64) (search.Found, error) {
	var (
		f         search.Found
		p         ledger.Place
		anomalies sql.NullInt64
	)
	row := r.db.reader.QueryRowContext(ctx, r.db.dialect.rebind(`SELECT segment, position, anomalies FROM records WHERE idx = ?1`), int64(index)) //nolint:gosec // G115: one that is too large is in no row
	if err := row.Scan(&p.Segment, &p.Offset, &anomalies); errors.Is(err, sql.ErrNoRows) {
		return f, fmt.Errorf("record %d: %w", index, search.ErrNoRecord)
	} else if err != nil {
		return f, wrapFind(err)
	}
	reader := r.journal.Reader()
	defer reader.Close() //nolint:errcheck // it was only read from
	var err error
	f.Anomalies = search.AnomalySet(anomalies.Int64).Names()
	f.Entry, err = reader.Read(index, p)
	if errors.Is(err, ledger.ErrArchived) {
		err = fmt.Errorf("record %d: %w", index, search.ErrNoRecord)
	}
	return f, err
}
