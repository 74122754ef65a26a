package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"time"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
)

// nameKind says what a name is the name of.
type nameKind int

const (
	identityName nameKind = iota + 1
	nodeName
	entryName
	authorityName
	reasonName
	actorName
)

// maxNames bounds what is remembered of the table of names.
const maxNames = 200_000

type nameKey struct {
	kind nameKind
	name string
}

// nameCache remembers the numbers of names.
type nameCache map[nameKey]int64

// overdueAt is when an X.509-SVID should have been replaced at the latest: the CA
// chooses half of the life, give or take 30 %, and what is left until three
// quarters of it is for tries that failed.
func overdueAt(issued, notAfter time.Time) time.Time {
	return issued.Add(notAfter.Sub(issued) / 4 * 3)
}

// Next implements ledger.Sink.
func (r *Records) Next(ctx context.Context) (uint64, error) {
	var next uint64
	row := r.db.reader.QueryRowContext(ctx, r.db.dialect.rebind(`SELECT next FROM cursor WHERE id = 1`))
	if err := row.Scan(&next); err != nil {
		return 0, fmt.Errorf("read cursor: %w", err)
	}
	return next, nil
}

// Put implements ledger.Sink. It may be called by one goroutine only.
func (r *Records) Put(ctx context.Context, entries []ledger.Entry) error {
	if len(entries) == 0 {
		return nil
	}
	if r.names == nil || len(r.names) > maxNames {
		r.names = make(nameCache)
	}
	b := &batch{r: r, ctx: context.WithoutCancel(ctx), statements: make(map[string]*sql.Stmt)}
	err := b.commit(ctx, entries)
	if err != nil {
		r.names = nil // it may have numbers that were rolled back
		return fmt.Errorf("take records from %d on: %w", entries[0].Index, err)
	}
	for rule, n := range b.raised {
		r.counts[rule].Add(n)
	}
	r.advance(entries[len(entries)-1].Index + 1)
	return nil
}

// batch is one transaction of Put.
type batch struct {
	r *Records
	// ctx has no end: a statement with a context that may end costs two goroutines,
	// more than itself. Put's own is looked at between records.
	ctx        context.Context //nolint:containedctx // it lives as long as the call that made it
	conn       *sql.Conn
	statements map[string]*sql.Stmt
	raised     [search.Rules]uint64
	tallies    tallies
}

// commit takes entries in a transaction on the connection that writes, unless ctx
// ends before. sql.Tx would bring its own context to each query.
func (b *batch) commit(ctx context.Context, entries []ledger.Entry) (err error) {
	if b.conn, err = b.r.db.writer.Conn(ctx); err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer func() {
		for _, s := range b.statements {
			err = errors.Join(err, s.Close())
		}
		if err != nil {
			// It is closed, which takes back what was not committed.
			_ = b.conn.Raw(func(any) error { return driver.ErrBadConn }) // as it was asked to
			return
		}
		err = b.conn.Close()
	}()
	if _, err := b.conn.ExecContext(b.ctx, "BEGIN IMMEDIATE"); err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	if err := b.put(ctx, entries); err != nil {
		return err
	}
	if _, err := b.conn.ExecContext(b.ctx, "COMMIT"); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

func (b *batch) put(ctx context.Context, entries []ledger.Entry) error {
	var next uint64
	if _, err := b.lookUp(`SELECT next FROM cursor WHERE id = 1`, nil, &next); err != nil {
		return fmt.Errorf("read cursor: %w", err)
	}
	last := entries[len(entries)-1]
	if last.Index < next {
		return nil
	}
	for _, e := range entries {
		if e.Index < next {
			continue // taken although the call failed
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := b.record(e); err != nil {
			return fmt.Errorf("record %d: %w", e.Index, err)
		}
	}
	for rule, n := range b.raised {
		if n == 0 {
			continue
		}
		if err := b.exec(`INSERT INTO anomaly_counts (rule, total) VALUES (?1, ?2)
			ON CONFLICT (rule) DO UPDATE SET total = anomaly_counts.total + excluded.total`, rule, int64(n)); err != nil { //nolint:gosec // G115: it counts records of a batch
			return err
		}
	}
	if err := b.tally(); err != nil {
		return err
	}
	return b.exec(`UPDATE cursor SET next = ?1, segment = ?2, position = ?3, hash = ?4 WHERE id = 1`,
		last.Index+1, last.Place.Segment, last.Place.Offset, last.Hash[:])
}

// statement prepares a statement once a batch.
func (b *batch) statement(query string) (*sql.Stmt, error) {
	if s, ok := b.statements[query]; ok {
		return s, nil
	}
	s, err := b.conn.PrepareContext(b.ctx, b.r.db.dialect.rebind(query))
	if err != nil {
		return nil, err
	}
	b.statements[query] = s // commit closes it
	return s, nil
}

func (b *batch) exec(query string, args ...any) error {
	s, err := b.statement(query) //nolint:sqlclosecheck // commit closes it
	if err != nil {
		return err
	}
	_, err = s.ExecContext(b.ctx, args...)
	return err
}

// lookUp reports whether a query has a row, and scans it.
func (b *batch) lookUp(query string, args []any, into ...any) (bool, error) {
	s, err := b.statement(query) //nolint:sqlclosecheck // commit closes it
	if err != nil {
		return false, err
	}
	err = s.QueryRowContext(b.ctx, args...).Scan(into...)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return err == nil, err
}

// name returns the number of a name, nil for an empty one.
func (b *batch) name(kind nameKind, name string) (any, error) {
	if name == "" {
		return nil, nil //nolint:nilnil // NULL
	}
	key := nameKey{kind, name}
	if id, ok := b.r.names[key]; ok {
		return id, nil
	}
	var id int64
	found, err := b.lookUp(`SELECT id FROM names WHERE kind = ?1 AND name = ?2`, []any{int(kind), name}, &id)
	if err == nil && !found {
		_, err = b.lookUp(`INSERT INTO names (kind, name) VALUES (?1, ?2) RETURNING id`, []any{int(kind), name}, &id)
	}
	if err != nil {
		return nil, fmt.Errorf("name %q: %w", name, err)
	}
	b.r.names[key] = id
	return id, nil
}

// row is a record on its way into the tables.
type row struct {
	ledger.Entry
	time                                              time.Time
	identity, node, entry, authority, reason, actorID any // numbers of names, or nil
	anomalies                                         search.AnomalySet
}

// record takes one record.
func (b *batch) record(e ledger.Entry) (err error) {
	rec := e.Record
	w := &row{Entry: e, time: rec.GetTime().AsTime()}
	for _, n := range []struct {
		id   *any
		kind nameKind
		name string
	}{
		{&w.identity, identityName, rec.GetSpiffeId()},
		{&w.node, nodeName, rec.GetNode().GetId()},
		{&w.entry, entryName, rec.GetEntry().GetName()},
		{&w.authority, authorityName, rec.GetAuthority().GetId()},
		{&w.reason, reasonName, rec.GetReason()},
		{&w.actorID, actorName, rec.GetActor()},
	} {
		if *n.id, err = b.name(n.kind, n.name); err != nil {
			return err
		}
	}
	switch rec.GetEvent() {
	case ledgerv1.Event_EVENT_ISSUE, ledgerv1.Event_EVENT_ATTEST, ledgerv1.Event_EVENT_RENEW_AGENT:
		if rec.GetReason() == reasonClone {
			w.anomalies.Add(search.AgentClone)
		}
		if rec.GetOutcome() == ledgerv1.Outcome_OUTCOME_SUCCESS && len(rec.GetCertificate().GetSerial()) > 0 {
			err = b.certificate(w)
		}
	case ledgerv1.Event_EVENT_INSTANCE_ENDED:
		err = b.dropped(w)
	case ledgerv1.Event_EVENT_EVICT, ledgerv1.Event_EVENT_BAN:
		err = b.exec(`UPDATE certificates SET state = ?1, state_at = ?2, overdue_at = NULL WHERE node = ?3 AND overdue_at IS NOT NULL`,
			int(search.Withdrawn), toStored(w.time), w.node)
	case ledgerv1.Event_EVENT_ENTRY_APPLIED, ledgerv1.Event_EVENT_ENTRY_DELETED, ledgerv1.Event_EVENT_ENTRY_LOADED:
		err = b.exec(`INSERT INTO entry_changes (record, entry, revision) VALUES (?1, ?2, ?3)`,
			e.Index, w.entry, rec.GetEntry().GetRevision())
	default:
	}
	if err != nil {
		return err
	}
	b.tallies.count(w)
	var failure, anomalies, request any
	if o := rec.GetOutcome(); o != ledgerv1.Outcome_OUTCOME_SUCCESS {
		failure = int(o)
	}
	if w.anomalies != 0 {
		anomalies = int64(w.anomalies)
		if e.Index >= b.r.live.Load() {
			for rule := range w.anomalies.All() {
				b.raised[rule]++
			}
		}
	}
	if id := rec.GetRequestId(); id != "" {
		request = id
	}
	return b.exec(`INSERT INTO records (idx, segment, position, time, event, failure, reason, identity, node, entry, revision,
			authority, actor, request_id, anomalies)
		VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)`,
		e.Index, e.Place.Segment, e.Place.Offset, toStored(w.time), int(rec.GetEvent()), failure, w.reason, w.identity, w.node, w.entry,
		rec.GetEntry().GetRevision(), w.authority, w.actorID, request, anomalies)
}

// certificate takes an X.509-SVID into the inventory:
//
//  1. find the one that it replaces, by its serial, which only counts on the same
//     node: an agent must not be able to speak of what is not its own
//  2. judge what is unusual about it
//  3. what this instance had before for the same identity is no longer in use
func (b *batch) certificate(w *row) error {
	rec, c := w.Record, w.Record.GetCertificate()
	digest := rec.GetWorkload().GetDocker().GetImageDigest()
	if previous := rec.GetPreviousSerial(); len(previous) > 0 {
		var (
			before    int64
			oldDigest string
		)
		found, err := b.lookUp(`SELECT record, image_digest FROM certificates WHERE serial = ?1 AND +node = ?2`,
			[]any{previous, w.node}, &before, &oldDigest)
		if err != nil {
			return fmt.Errorf("find previous certificate: %w", err)
		}
		if found {
			if digest != "" && oldDigest != "" && digest != oldDigest {
				w.anomalies.Add(search.ImageDigestChange)
			}
			if err := b.replaced(`record = ?4 AND overdue_at IS NOT NULL`, w, before); err != nil {
				return err
			}
		}
	}
	if rec.GetEvent() == ledgerv1.Event_EVENT_ISSUE && w.node != nil {
		if err := b.sighting(w); err != nil {
			return err
		}
	}
	var other int64
	reused, err := b.lookUp(`SELECT record FROM certificates WHERE spki_sha256 = ?1 AND identity <> ?2 LIMIT 1`,
		[]any{blob(c.GetSpkiSha256()), w.identity}, &other)
	if err != nil {
		return fmt.Errorf("find key: %w", err)
	}
	if reused && len(c.GetSpkiSha256()) > 0 {
		w.anomalies.Add(search.KeyReuse)
	}
	if err := b.replaced(`node = ?4 AND instance = ?5 AND identity = ?6 AND overdue_at IS NOT NULL`, w, w.node, rec.GetInstance(), w.identity); err != nil {
		return err
	}
	notAfter := c.GetNotAfter().AsTime()
	err = b.exec(`INSERT INTO certificates (record, serial, sha256, spki_sha256, identity, node, entry, authority, instance, image_digest,
			not_before, not_after, state, state_at, overdue_at)
		VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)`,
		w.Index, c.GetSerial(), blob(c.GetSha256()), blob(c.GetSpkiSha256()), w.identity, w.node, w.entry, w.authority,
		rec.GetInstance(), digest, toStored(c.GetNotBefore().AsTime()), toStored(notAfter), int(search.Current), toStored(w.time),
		toStored(overdueAt(w.time, notAfter)))
	if err != nil {
		return fmt.Errorf("add certificate: %w", err)
	}
	return nil
}

// replaced marks certificates as replaced by w's.
func (b *batch) replaced(where string, w *row, args ...any) error {
	err := b.exec(`UPDATE certificates SET state = ?1, state_at = ?2, replaced_by = ?3, overdue_at = NULL WHERE `+where,
		append([]any{int(search.Replaced), toStored(w.time), w.Index}, args...)...)
	if err != nil {
		return fmt.Errorf("mark replaced certificate: %w", err)
	}
	return nil
}

// dropped marks the certificates of an instance that ended.
func (b *batch) dropped(w *row) error {
	for _, c := range w.Record.GetDropped() {
		if err := b.exec(`UPDATE certificates SET state = ?1, state_at = ?2, overdue_at = NULL
			WHERE serial = ?3 AND +node = ?4 AND overdue_at IS NOT NULL`, int(search.Dropped), toStored(w.time), blob(c.GetSerial()), w.node); err != nil {
			return err
		}
	}
	if w.Record.GetInstance() == "" {
		return nil
	}
	return b.exec(`UPDATE certificates SET state = ?1, state_at = ?2, overdue_at = NULL
		WHERE node = ?3 AND instance = ?4 AND overdue_at IS NOT NULL`, int(search.Dropped), toStored(w.time), w.node, w.Record.GetInstance())
}

// sighting notes that an identity is on a node.
func (b *batch) sighting(w *row) error {
	var record int64
	known, err := b.lookUp(`SELECT record FROM sightings WHERE identity = ?1 AND node = ?2`, []any{w.identity, w.node}, &record)
	if err != nil || known {
		return err
	}
	elsewhere, err := b.lookUp(`SELECT record FROM sightings WHERE identity = ?1 LIMIT 1`, []any{w.identity}, &record)
	if err != nil {
		return err
	}
	fresh := 1
	if elsewhere {
		fresh = 0
	}
	if err := b.exec(`INSERT INTO sightings (identity, node, record, time, fresh) VALUES (?1, ?2, ?3, ?4, ?5)`,
		w.identity, w.node, w.Index, toStored(w.time), fresh); err != nil {
		return err
	}
	w.anomalies.Add(search.NewIdentityOnNode)
	return b.fanOut(w)
}

// fanOut counts the identities of the node, and compares them with those of the
// other nodes.
func (b *batch) fanOut(w *row) error {
	var has, nodes, usual int64
	if _, err := b.lookUp(`INSERT INTO fan_out (node, identities) VALUES (?1, 1)
		ON CONFLICT (node) DO UPDATE SET identities = fan_out.identities + 1 RETURNING identities`, []any{w.node}, &has); err != nil {
		return err
	}
	if has <= fanOutLeast {
		return nil
	}
	if _, err := b.lookUp(`SELECT count(*) FROM fan_out WHERE node <> ?1`, []any{w.node}, &nodes); err != nil {
		return err
	}
	if nodes < fanOutPeers {
		return nil
	}
	// The node that one in a hundred stands above, rounded up: with few nodes, the
	// one with the most.
	if _, err := b.lookUp(`SELECT identities FROM fan_out WHERE node <> ?1 ORDER BY identities DESC LIMIT 1 OFFSET ?2`,
		[]any{w.node, nodes / 100}, &usual); err != nil {
		return err
	}
	if has > 2*usual {
		w.anomalies.Add(search.IdentityFanOut)
	}
	return nil
}
