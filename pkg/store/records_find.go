package store

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
)

// condition collects the terms of a query.
type condition struct {
	terms []string
	args  []any
}

// arg returns the placeholder of a further argument.
func (c *condition) arg(v any) string {
	c.args = append(c.args, v)
	return fmt.Sprintf("?%d", len(c.args))
}

func (c *condition) add(term string, v any) {
	c.terms = append(c.terms, term+" "+c.arg(v))
}

func (c *condition) where() string {
	if len(c.terms) == 0 {
		return ""
	}
	return " WHERE " + strings.Join(c.terms, " AND ")
}

// limited bounds a limit.
func limited(n int) int {
	if n <= 0 || n > search.MaxFound {
		return search.MaxFound
	}
	return n
}

// Find returns records in the order of their times, and where to go on, which is
// not Valid if there are no more. What no record has, no record is found by.
func (r *Records) Find(ctx context.Context, q search.Query) ([]search.Found, search.Position, error) {
	query, args, some, err := r.findQuery(ctx, q)
	if err != nil || !some {
		return nil, search.Position{}, wrapFind(err)
	}
	var (
		places []place
		next   search.Position
	)
	err = scanRows(ctx, r.db.reader, query, args, func(rows *sql.Rows) error {
		var (
			p         place
			anomalies sql.NullInt64
		)
		if err := rows.Scan(&p.index, &p.place.Segment, &p.place.Offset, &p.key, &anomalies); err != nil {
			return err
		}
		p.found.Anomalies = search.AnomalySet(anomalies.Int64).Names()
		places = append(places, p)
		return nil
	})
	if err != nil {
		return nil, next, wrapFind(err)
	}
	return r.read(ctx, places, limited(q.Limit))
}

// findQuery makes the query of Find; it returns false if nothing can match.
func (r *Records) findQuery(ctx context.Context, q search.Query) (query string, args []any, some bool, err error) {
	c, some, err := r.condition(ctx, q)
	if err != nil || !some {
		return "", nil, some, err
	}
	order, behind := "DESC", "<"
	if q.Oldest {
		order, behind = "ASC", ">"
	}
	if q.After.Valid {
		c.terms = append(c.terms, fmt.Sprintf("(time, idx) %s (%s, %s)", behind, c.arg(q.After.Key), c.arg(q.After.Record)))
	}
	query = fmt.Sprintf(`SELECT idx, segment, position, time, anomalies FROM records%s ORDER BY time %s, idx %s LIMIT %s`,
		c.where(), order, order, c.arg(limited(q.Limit)+1))
	return r.db.dialect.rebind(query), c.args, true, nil
}

// wrapFind says what was attempted.
func wrapFind(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("search the ledger: %w", err)
}

// place is a row whose record is still to be read.
type place struct {
	index uint64
	place ledger.Place
	key   int64
	found search.Found
}

// read reads the records of at most limit rows from the journal. If there are more
// rows, it says where to go on.
func (r *Records) read(ctx context.Context, places []place, limit int) ([]search.Found, search.Position, error) {
	var next search.Position
	if len(places) > limit {
		places = places[:limit]
		last := places[limit-1]
		next = search.Position{Key: last.key, Record: last.index, Valid: true}
	}
	reader := r.journal.Reader()
	defer reader.Close() //nolint:errcheck // it was only read from
	found := make([]search.Found, 0, len(places))
	for _, p := range places {
		if ctx.Err() != nil {
			return nil, search.Position{}, wrapFind(context.Cause(ctx))
		}
		e, err := reader.Read(p.index, p.place)
		if errors.Is(err, ledger.ErrArchived) {
			continue // meanwhile; its row is about to go
		}
		if err != nil {
			return nil, search.Position{}, wrapFind(err)
		}
		p.found.Entry = e
		found = append(found, p.found)
	}
	return found, next, nil
}

// condition makes the terms of q. It returns false if nothing can match, because a
// name is in no record.
//
// One term chooses the index: the one that the fewest records have, as a rule. The
// others get a "+", with which no index can be used for them.
func (r *Records) condition(ctx context.Context, q search.Query) (*condition, bool, error) {
	c := new(condition)
	driven := false
	term := func(column string, v any) {
		if driven {
			column = "+" + column
		}
		driven = true
		c.add(column+" =", v)
	}
	for _, by := range []struct {
		column string
		value  []byte
	}{{"serial", q.Serial}, {"sha256", q.SHA256}, {"spki_sha256", q.SPKI}} {
		if len(by.value) > 0 {
			driven = true
			c.terms = append(c.terms, fmt.Sprintf("idx IN (SELECT record FROM certificates WHERE %s = %s)", by.column, c.arg(by.value)))
		}
	}
	if q.RequestID != "" {
		term("request_id", q.RequestID)
	}
	if q.Anomaly != "" {
		a, ok := search.ParseAnomaly(q.Anomaly)
		if !ok {
			return nil, false, nil
		}
		driven = true
		c.terms = append(c.terms, "anomalies IS NOT NULL", fmt.Sprintf("anomalies & %s <> 0", c.arg(1<<a)))
	}
	for _, n := range []struct {
		column string
		kind   nameKind
		name   string
	}{
		{"identity", identityName, q.SPIFFEID},
		{"actor", actorName, q.Actor},
		{"reason", reasonName, q.Reason},
		{"node", nodeName, q.Node},
		{"entry", entryName, q.Entry},
		{"authority", authorityName, q.Authority},
	} {
		if n.name == "" {
			continue
		}
		id, ok, err := r.lookUpName(ctx, n.kind, n.name)
		if err != nil || !ok {
			return nil, false, err
		}
		term(n.column, id)
	}
	switch q.Outcome {
	case ledgerv1.Outcome_OUTCOME_UNSPECIFIED:
	case ledgerv1.Outcome_OUTCOME_SUCCESS:
		c.terms = append(c.terms, "failure IS NULL")
	default:
		term("failure", int(q.Outcome))
	}
	if q.Event != ledgerv1.Event_EVENT_UNSPECIFIED {
		term("event", int(q.Event))
	}
	if q.Revision != 0 {
		c.add("+revision =", q.Revision)
	}
	if !q.Since.IsZero() {
		c.add("time >=", toStored(q.Since))
	}
	if !q.Until.IsZero() {
		c.add("time <", toStored(q.Until))
	}
	return c, true, nil
}

// lookUpName returns the number of a name, and whether it has one.
func (r *Records) lookUpName(ctx context.Context, kind nameKind, name string) (int64, bool, error) {
	var id int64
	err := r.db.reader.QueryRowContext(ctx, r.db.dialect.rebind(`SELECT id FROM names WHERE kind = ?1 AND name = ?2`), int(kind), name).Scan(&id)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, false, nil
	}
	return id, err == nil, err
}

// Names returns the SPIFFE IDs, nodes, entries or authorities ("identity", "node",
// "entry", "authority") in records that begin with prefix, at most limit of them.
func (r *Records) Names(ctx context.Context, kind, prefix string, limit int) ([]string, error) {
	kinds := map[string]nameKind{"identity": identityName, "node": nodeName, "entry": entryName, "authority": authorityName}
	var list []string
	err := scanRows(ctx, r.db.reader, r.db.dialect.rebind(
		`SELECT name FROM names WHERE kind = ?1 AND name >= ?2 AND name < ?3 ORDER BY name LIMIT ?4`),
		[]any{int(kinds[kind]), prefix, prefix + "\U0010FFFF", limited(limit)}, func(rows *sql.Rows) error {
			var name string
			if err := rows.Scan(&name); err != nil {
				return err
			}
			list = append(list, name)
			return nil
		})
	return list, wrapFind(err)
}

// NodesNamed returns the nodes in records whose SPIFFE ID ends with "/"+name.
func (r *Records) NodesNamed(ctx context.Context, name string) ([]string, error) {
	var list []string
	suffix := "/" + name
	err := scanRows(ctx, r.db.reader, r.db.dialect.rebind(`SELECT name FROM names WHERE kind = ?1`), []any{int(nodeName)}, func(rows *sql.Rows) error {
		var id string
		if err := rows.Scan(&id); err != nil {
			return err
		}
		if strings.HasSuffix(id, suffix) {
			list = append(list, id)
		}
		return nil
	})
	return list, wrapFind(err)
}

// Who returns the records of the X.509-SVIDs that are valid at a time, the next to
// expire first, and where to go on.
func (r *Records) Who(ctx context.Context, q search.Holders) ([]search.Found, search.Position, error) {
	authorities := q.Authorities
	if len(authorities) == 0 {
		authorities = []string{""}
	}
	// Each authority has its index in the order that is wanted: lists of several are
	// merged, and none is read to its end.
	var all []place
	for _, authority := range slices.Compact(slices.Sorted(slices.Values(authorities))) {
		c, some, err := r.holders(ctx, q, authority)
		if err != nil {
			return nil, search.Position{}, wrapFind(err)
		}
		if !some {
			continue
		}
		places, err := r.certificates(ctx, c, "c.not_after", q.After, q.Limit)
		if err != nil {
			return nil, search.Position{}, wrapFind(err)
		}
		all = append(all, places...)
	}
	if len(authorities) > 1 {
		slices.SortFunc(all, func(a, b place) int {
			return cmp.Or(cmp.Compare(a.key, b.key), cmp.Compare(a.index, b.index))
		})
		all = all[:min(len(all), limited(q.Limit)+1)]
	}
	return r.read(ctx, all, limited(q.Limit))
}

// holders makes the terms of q, for one authority or, if it is empty, for all. It
// returns false if nothing can match.
func (r *Records) holders(ctx context.Context, q search.Holders, authority string) (*condition, bool, error) {
	c := new(condition)
	for _, n := range []struct {
		column string
		kind   nameKind
		name   string
	}{
		{"c.identity", identityName, q.SPIFFEID},
		{"c.node", nodeName, q.Node},
		{"c.entry", entryName, q.Entry},
		{"c.authority", authorityName, authority},
	} {
		if n.name == "" {
			continue
		}
		id, ok, err := r.lookUpName(ctx, n.kind, n.name)
		if err != nil || !ok {
			return nil, false, err
		}
		column := n.column
		if len(c.terms) > 0 {
			column = "+" + column
		}
		c.add(column+" =", id)
	}
	at := toStored(q.At)
	c.add("c.not_after >", at)
	c.add("c.not_after <=", toStored(q.At.Add(search.MaxLife)))
	c.add("c.not_before <=", at)
	if q.Current {
		c.terms = append(c.terms, fmt.Sprintf("(c.state = %s OR c.state_at > %s)", c.arg(int(search.Current)), c.arg(at)))
	}
	return c, true, nil
}

// Overdue returns the records of the X.509-SVIDs that should have been replaced by
// now and were not, those that have waited longest first, and where to go on. With
// expired, it returns those that have expired since that time without having been
// replaced, too.
func (r *Records) Overdue(ctx context.Context, now, expired time.Time, limit int, after search.Position) ([]search.Found, search.Position, error) {
	c := new(condition)
	valid := now
	if !expired.IsZero() && expired.Before(now) {
		valid = expired
	}
	c.add("c.overdue_at >", toStored(valid.Add(-search.MaxLife)))
	c.add("c.overdue_at <=", toStored(now))
	c.add("c.not_after >", toStored(valid))
	places, err := r.certificates(ctx, c, "c.overdue_at", after, limit)
	if err != nil {
		return nil, search.Position{}, wrapFind(err)
	}
	return r.read(ctx, places, limited(limit))
}

// certificates returns where the records of certificates stand, in the order of key:
// one more than limit, if there are so many.
func (r *Records) certificates(ctx context.Context, c *condition, key string, after search.Position, limit int) ([]place, error) {
	if after.Valid {
		c.terms = append(c.terms, fmt.Sprintf("(%s, c.record) > (%s, %s)", key, c.arg(after.Key), c.arg(after.Record)))
	}
	query := fmt.Sprintf(`SELECT c.record, r.segment, r.position, %s, c.state, c.state_at, c.replaced_by, c.overdue_at, r.anomalies
		FROM certificates c JOIN records r ON r.idx = c.record%s ORDER BY %s, c.record LIMIT %s`, key, c.where(), key, c.arg(limited(limit)+1))
	var places []place
	err := scanRows(ctx, r.db.reader, r.db.dialect.rebind(query), c.args, func(rows *sql.Rows) error {
		var (
			p                            place
			state                        int
			since                        int64
			replaced, overdue, unusually sql.NullInt64
		)
		if err := rows.Scan(&p.index, &p.place.Segment, &p.place.Offset, &p.key, &state, &since, &replaced, &overdue, &unusually); err != nil {
			return err
		}
		p.found.State, p.found.Since = search.State(state), fromStored(since)
		if key == "c.overdue_at" {
			p.found.Since = fromStored(overdue.Int64)
		}
		if replaced.Valid {
			by := uint64(replaced.Int64) //nolint:gosec // G115: it is an index
			p.found.ReplacedBy = &by
		}
		p.found.Anomalies = search.AnomalySet(unusually.Int64).Names()
		places = append(places, p)
		return nil
	})
	return places, err
}

// FirstSeen returns the first record of each identity on each node from since on,
// the newest first, and where to go on. Of what was archived, nothing is returned.
func (r *Records) FirstSeen(ctx context.Context, since time.Time, node string, limit int, after search.Position) ([]search.Found, search.Position, error) {
	c := new(condition)
	c.add("s.time >=", toStored(since))
	if node != "" {
		id, ok, err := r.lookUpName(ctx, nodeName, node)
		if err != nil || !ok {
			return nil, search.Position{}, wrapFind(err)
		}
		c.add("s.node =", id)
	}
	if after.Valid {
		c.terms = append(c.terms, fmt.Sprintf("(s.time, s.record) < (%s, %s)", c.arg(after.Key), c.arg(after.Record)))
	}
	limit = limited(limit)
	query := `SELECT s.record, r.segment, r.position, s.time, s.fresh, r.anomalies FROM sightings s JOIN records r ON r.idx = s.record` +
		c.where() + ` ORDER BY s.time DESC, s.record DESC LIMIT ` + c.arg(limit+1)
	var places []place
	err := scanRows(ctx, r.db.reader, r.db.dialect.rebind(query), c.args, func(rows *sql.Rows) error {
		var (
			p         place
			anomalies sql.NullInt64
		)
		if err := rows.Scan(&p.index, &p.place.Segment, &p.place.Offset, &p.key, &p.found.Fresh, &anomalies); err != nil {
			return err
		}
		p.found.Anomalies = search.AnomalySet(anomalies.Int64).Names()
		places = append(places, p)
		return nil
	})
	if err != nil {
		return nil, search.Position{}, wrapFind(err)
	}
	return r.read(ctx, places, limit)
}

// EntryChanges returns the records that changed an entry, or say that it was in
// force, the oldest first: at most search.MaxFound.
func (r *Records) EntryChanges(ctx context.Context, entry string) ([]search.Found, error) {
	id, ok, err := r.lookUpName(ctx, entryName, entry)
	if err != nil || !ok {
		return nil, wrapFind(err)
	}
	var places []place
	err = scanRows(ctx, r.db.reader, r.db.dialect.rebind(
		`SELECT e.record, r.segment, r.position FROM entry_changes e JOIN records r ON r.idx = e.record
		WHERE e.entry = ?1 ORDER BY e.record DESC LIMIT ?2`), []any{id, search.MaxFound}, func(rows *sql.Rows) error {
		var p place
		if err := rows.Scan(&p.index, &p.place.Segment, &p.place.Offset); err != nil {
			return err
		}
		places = append([]place{p}, places...)
		return nil
	})
	if err != nil {
		return nil, wrapFind(err)
	}
	found, _, err := r.read(ctx, places, math.MaxInt)
	return found, err
}

// Before returns the number of records at the beginning of the journal that are
// all older than t, as far as they were taken.
func (r *Records) Before(ctx context.Context, t time.Time) (uint64, error) {
	var limit uint64
	row := r.db.reader.QueryRowContext(ctx, r.db.dialect.rebind(
		`SELECT COALESCE((SELECT min(idx) FROM records WHERE time >= ?1), next) FROM cursor WHERE id = 1`), toStored(t))
	if err := row.Scan(&limit); err != nil {
		return 0, wrapFind(err)
	}
	return limit, nil
}

// archiveRows is how many records are removed in one transaction: the sink waits
// meanwhile.
const archiveRows = 2000

// Forget removes the records below limit, which were archived. What was first seen
// when is kept.
func (r *Records) Forget(ctx context.Context, limit uint64) error {
	for {
		var removed int64
		err := r.db.update(ctx, func(tx *sql.Tx) error {
			var from sql.NullInt64
			row := tx.QueryRowContext(ctx, r.db.dialect.rebind(`SELECT min(idx) FROM records`))
			if err := row.Scan(&from); err != nil {
				return err
			}
			if !from.Valid || uint64(from.Int64) >= limit { //nolint:gosec // G115: it is an index
				return nil
			}
			to := min(uint64(from.Int64)+archiveRows, limit) //nolint:gosec // G115: it is an index
			for _, table := range []string{"certificates WHERE record", "entry_changes WHERE record", "records WHERE idx"} {
				n, err := r.db.exec(ctx, tx, `DELETE FROM `+table+` < ?1`, to)
				if err != nil {
					return err
				}
				removed += n
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("remove archived records from the search index: %w", err)
		}
		if removed == 0 {
			return nil
		}
	}
}
