package store

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"slices"
	"time"

	"github.com/meshid/meshid/pkg/ca"
)

// Trust returns the roots in the order in which they were added, and the trust
// bundle's sequence and epoch.
func (d *DB) Trust(ctx context.Context) (t ca.Trust, err error) {
	tx, err := d.reader.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return t, fmt.Errorf("read roots: %w", err)
	}
	defer tx.Rollback() //nolint:errcheck // it only read
	if t, err = d.readTrust(ctx, tx); err != nil {
		return t, fmt.Errorf("read roots: %w", err)
	}
	return t, nil
}

func (d *DB) readTrust(ctx context.Context, tx *sql.Tx) (t ca.Trust, err error) {
	var sequence, epoch int64
	row := tx.QueryRowContext(ctx, d.dialect.rebind(`SELECT bundle_sequence, trust_epoch, trust_paused, lists_in_force FROM state WHERE id = 1`))
	if err := row.Scan(&sequence, &epoch, &t.Paused, &t.Listed); err != nil {
		return t, err
	}
	t.Sequence, t.Epoch = counter(sequence), counter(epoch)
	err = scanRows(ctx, tx, d.dialect.rebind(
		`SELECT certificate, key_ref, state, created_at, since, sequence, automatic, tainted FROM roots ORDER BY id`), nil,
		func(rows *sql.Rows) error {
			var (
				r              ca.Root
				created, since int64
			)
			if err := rows.Scan(&r.Certificate, &r.Key, &r.State, &created, &since, &sequence, &r.Automatic, &r.Tainted); err != nil {
				return err
			}
			r.CreatedAt, r.Since, r.Sequence = fromStored(created), fromStored(since), counter(sequence)
			t.Roots = append(t.Roots, r)
			return nil
		})
	if err != nil {
		return t, err
	}
	err = scanRows(ctx, tx, d.dialect.rebind(`SELECT issuer, list FROM revocation_lists ORDER BY issuer`), nil,
		func(rows *sql.Rows) error {
			var l ca.RevocationList
			if err := rows.Scan(&l.Issuer, &l.List); err != nil {
				return err
			}
			t.Lists = append(t.Lists, l)
			return nil
		})
	return t, err
}

// counter is a value of which the table holds the CHECK that it is not negative.
func counter(n int64) uint64 { return uint64(n) } //nolint:gosec // see above

// ChangeTrust replaces the roots if their epoch is still that of t, and returns
// what is stored then; else the error wraps ca.ErrTrustChanged. record is called
// before the change is committed, and nothing is changed if it fails.
func (d *DB) ChangeTrust(ctx context.Context, t ca.Trust, record func(ca.Trust) error) (next ca.Trust, err error) {
	err = d.update(ctx, func(tx *sql.Tx) error {
		now, err := d.readTrust(ctx, tx)
		if err != nil {
			return err
		}
		if now.Epoch != t.Epoch {
			return fmt.Errorf("the roots are at epoch %d, and %d was expected: %w", now.Epoch, t.Epoch, ca.ErrTrustChanged)
		}
		next = t
		next.Sequence, next.Epoch = now.Sequence, now.Epoch+1
		if !slices.EqualFunc(now.Bundle(), t.Bundle(), slices.Equal) || !now.SameLists(t) {
			next.Sequence++
			if _, err := d.nextRevision(ctx, tx); err != nil {
				return err
			}
		}
		next.Roots = slices.Clone(t.Roots)
		for i := range next.Roots {
			r := &next.Roots[i]
			if r.Sequence == 0 {
				r.Sequence = next.Sequence
			}
			if err := d.putRoot(ctx, tx, r); err != nil {
				return err
			}
		}
		if err := d.putLists(ctx, tx, now.Lists, next.Lists); err != nil {
			return err
		}
		if _, err := d.exec(ctx, tx, `UPDATE state SET bundle_sequence = ?1, trust_epoch = ?2, trust_paused = ?3, lists_in_force = ?4 WHERE id = 1`,
			next.Sequence, next.Epoch, number(next.Paused), number(next.Listed)); err != nil {
			return err
		}
		return record(next)
	})
	if err != nil {
		return ca.Trust{}, fmt.Errorf("change roots: %w", err)
	}
	return next, nil
}

func (d *DB) putRoot(ctx context.Context, tx *sql.Tx, r *ca.Root) error {
	_, err := d.exec(ctx, tx, `INSERT INTO roots (certificate, key_ref, state, created_at, since, sequence, automatic, tainted)
		VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
		ON CONFLICT (certificate) DO UPDATE SET key_ref = ?2, state = ?3, since = ?5, sequence = ?6, automatic = ?7, tainted = ?8`,
		r.Certificate, r.Key, r.State, toStored(r.CreatedAt), toStored(r.Since), r.Sequence, number(r.Automatic), number(r.Tainted))
	return err
}

// putLists replaces revocation lists: what has not changed is not written.
func (d *DB) putLists(ctx context.Context, tx *sql.Tx, now, next []ca.RevocationList) error {
	same := func(list ca.RevocationList) func(ca.RevocationList) bool {
		return func(other ca.RevocationList) bool { return bytes.Equal(list.Issuer, other.Issuer) }
	}
	for _, l := range now {
		if slices.ContainsFunc(next, same(l)) {
			continue
		}
		if _, err := d.exec(ctx, tx, `DELETE FROM revocation_lists WHERE issuer = ?1`, l.Issuer); err != nil {
			return err
		}
	}
	for _, l := range next {
		if i := slices.IndexFunc(now, same(l)); i >= 0 && bytes.Equal(now[i].List, l.List) {
			continue
		}
		if _, err := d.exec(ctx, tx, `INSERT INTO revocation_lists (issuer, list) VALUES (?1, ?2)
			ON CONFLICT (issuer) DO UPDATE SET list = ?2`, l.Issuer, l.List); err != nil {
			return err
		}
	}
	return nil
}

func number(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// Intermediates returns those of which something may live.
func (d *DB) Intermediates(ctx context.Context) ([]ca.Intermediate, error) {
	var all []ca.Intermediate
	err := scanRows(ctx, d.reader, d.dialect.rebind(`SELECT id, root, instance, live_until FROM intermediates ORDER BY live_until, id`), nil,
		func(rows *sql.Rows) error {
			var i ca.Intermediate
			var until int64
			if err := rows.Scan(&i.ID, &i.Root, &i.Instance, &until); err != nil {
				return err
			}
			i.LiveUntil = fromStored(until)
			all = append(all, i)
			return nil
		})
	if err != nil {
		return nil, fmt.Errorf("read intermediates: %w", err)
	}
	return all, nil
}

// PutIntermediates adds or replaces intermediates, and forgets those of which
// nothing lives at now.
func (d *DB) PutIntermediates(ctx context.Context, now time.Time, changed ...ca.Intermediate) error {
	err := d.update(ctx, func(tx *sql.Tx) error {
		for _, i := range changed {
			if _, err := d.exec(ctx, tx, `INSERT INTO intermediates (id, root, instance, live_until) VALUES (?1, ?2, ?3, ?4)
				ON CONFLICT (id) DO UPDATE SET live_until = ?4`, i.ID, i.Root, i.Instance, toStored(i.LiveUntil)); err != nil {
				return err
			}
		}
		_, err := d.exec(ctx, tx, `DELETE FROM intermediates WHERE live_until < ?1`, toStored(now))
		return err
	})
	if err != nil {
		return fmt.Errorf("write intermediates: %w", err)
	}
	return nil
}
