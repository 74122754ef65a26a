package store

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/meshid/meshid/pkg/ca"
)

// Roots returns the roots in the order in which they were added, and the trust
// bundle's sequence.
func (d *DB) Roots(ctx context.Context) (roots []ca.Root, sequence uint64, err error) {
	tx, err := d.reader.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return nil, 0, fmt.Errorf("read roots: %w", err)
	}
	defer tx.Rollback() //nolint:errcheck // it only read
	var current int64
	if err := tx.QueryRowContext(ctx, d.dialect.rebind(`SELECT bundle_sequence FROM state WHERE id = 1`)).Scan(&current); err != nil {
		return nil, 0, fmt.Errorf("read bundle sequence: %w", err)
	}
	rows, err := tx.QueryContext(ctx, d.dialect.rebind(`SELECT certificate, key_ref, state, created_at FROM roots ORDER BY id`))
	if err != nil {
		return nil, 0, fmt.Errorf("read roots: %w", err)
	}
	defer rows.Close() //nolint:errcheck // rows.Err says what went wrong
	for rows.Next() {
		var (
			r       ca.Root
			created int64
		)
		if err := rows.Scan(&r.Certificate, &r.Key, &r.State, &created); err != nil {
			return nil, 0, fmt.Errorf("read roots: %w", err)
		}
		r.CreatedAt = fromStored(created)
		roots = append(roots, r)
	}
	if err := rows.Err(); err != nil {
		return nil, 0, fmt.Errorf("read roots: %w", err)
	}
	return roots, uint64(current), nil //nolint:gosec // the table holds the CHECK that it is not negative
}

// AddRoot adds a root to the trust bundle if its sequence is still after, and
// returns the bundle's new sequence; else the error wraps ca.ErrBundleChanged.
func (d *DB) AddRoot(ctx context.Context, after uint64, r ca.Root) (sequence uint64, err error) {
	err = d.update(ctx, func(tx *sql.Tx) error {
		var now int64
		row := tx.QueryRowContext(ctx, d.dialect.rebind(`SELECT bundle_sequence FROM state WHERE id = 1`))
		if err := row.Scan(&now); err != nil {
			return err
		}
		if uint64(now) != after { //nolint:gosec // the table holds the CHECK that it is not negative
			return fmt.Errorf("the bundle is at sequence %d, and %d was expected: %w", now, after, ca.ErrBundleChanged)
		}
		if _, err := d.nextRevision(ctx, tx); err != nil {
			return err
		}
		if _, err := d.exec(ctx, tx,
			`INSERT INTO roots (certificate, key_ref, state, created_at) VALUES (?1, ?2, ?3, ?4)`,
			r.Certificate, r.Key, r.State, toStored(r.CreatedAt)); err != nil {
			return err
		}
		var next int64
		row = tx.QueryRowContext(ctx, d.dialect.rebind(
			`UPDATE state SET bundle_sequence = bundle_sequence + 1 WHERE id = 1 RETURNING bundle_sequence`))
		if err := row.Scan(&next); err != nil {
			return err
		}
		sequence = uint64(next) //nolint:gosec // the table holds the CHECK that it is not negative
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("add root: %w", err)
	}
	return sequence, nil
}
