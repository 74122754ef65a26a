package store

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/meshid/meshid/pkg/server/registry"
)

// Quarantines returns all quarantines, the oldest first.
func (d *DB) Quarantines(ctx context.Context) ([]*registry.Quarantine, error) {
	rows, err := d.reader.QueryContext(ctx, d.dialect.rebind(
		`SELECT spiffe_id, key_sha256, serial, reason, created_by, created_at FROM quarantines
		ORDER BY created_at, spiffe_id, key_sha256, serial`))
	if err != nil {
		return nil, fmt.Errorf("read quarantines: %w", err)
	}
	defer rows.Close() //nolint:errcheck // rows.Err says what went wrong
	var all []*registry.Quarantine
	for rows.Next() {
		var q registry.Quarantine
		var created int64
		if err := rows.Scan(&q.SPIFFEID, &q.KeySHA256, &q.Serial, &q.Reason, &q.CreatedBy, &created); err != nil {
			return nil, fmt.Errorf("read quarantines: %w", err)
		}
		q.CreatedAt = fromStored(created)
		all = append(all, &q)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read quarantines: %w", err)
	}
	return all, nil
}

// PutQuarantines stores quarantines, all or none, each in the place of one of the same.
func (d *DB) PutQuarantines(ctx context.Context, all ...*registry.Quarantine) error {
	return d.update(ctx, func(tx *sql.Tx) error {
		for _, q := range all {
			if _, err := d.exec(ctx, tx,
				`INSERT INTO quarantines (spiffe_id, key_sha256, serial, reason, created_by, created_at)
			VALUES (?1, ?2, ?3, ?4, ?5, ?6)
			ON CONFLICT (spiffe_id, key_sha256, serial) DO UPDATE SET
				reason = excluded.reason, created_by = excluded.created_by, created_at = excluded.created_at`,
				q.SPIFFEID, blob(q.KeySHA256), blob(q.Serial), q.Reason, q.CreatedBy, toStored(q.CreatedAt)); err != nil {
				return fmt.Errorf("store quarantine of %s: %w", q.Name(), err)
			}
		}
		return nil
	})
}

// DeleteQuarantines forgets quarantines, all or none. Before it commits, it calls
// record: if record fails, they stay. record must not call the store.
func (d *DB) DeleteQuarantines(ctx context.Context, record func() error, all ...*registry.Quarantine) error {
	return d.update(ctx, func(tx *sql.Tx) error {
		for _, q := range all {
			if _, err := d.exec(ctx, tx, `DELETE FROM quarantines WHERE spiffe_id = ?1 AND key_sha256 = ?2 AND serial = ?3`,
				q.SPIFFEID, blob(q.KeySHA256), blob(q.Serial)); err != nil {
				return fmt.Errorf("delete quarantine of %s: %w", q.Name(), err)
			}
		}
		return record()
	})
}
