package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/pkg/server/registry"
)

// tokenRetention is how long a token is remembered after it has expired, so that
// its late use is refused with the right reason.
const tokenRetention = 7 * 24 * time.Hour

// CreateToken stores a join token, and forgets those that expired long ago.
// Before it commits, it calls record: if record fails, nothing is stored.
// record must not call the store.
func (d *DB) CreateToken(ctx context.Context, t *registry.Token, record func() error) error {
	labels, err := json.Marshal(t.Labels)
	if err != nil {
		return fmt.Errorf("encode labels of token: %w", err)
	}
	err = d.update(ctx, func(tx *sql.Tx) error {
		if _, err := d.exec(ctx, tx, `DELETE FROM join_tokens WHERE expires_at < ?1`,
			toStored(t.CreatedAt.Add(-tokenRetention))); err != nil {
			return err
		}
		if _, err := d.exec(ctx, tx,
			`INSERT INTO join_tokens (sha256, node_name, labels, created_by, created_at, expires_at, used_at)
			VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0)`,
			t.SHA256[:], t.NodeName, string(labels), t.CreatedBy, toStored(t.CreatedAt), toStored(t.ExpiresAt)); err != nil {
			return err
		}
		return record()
	})
	if err != nil {
		return fmt.Errorf("store join token: %w", err)
	}
	return nil
}

// Tokens returns the join tokens that can still be used, the next to expire
// first.
func (d *DB) Tokens(ctx context.Context, now time.Time) ([]*registry.Token, error) {
	rows, err := d.reader.QueryContext(ctx, d.dialect.rebind(
		`SELECT sha256, node_name, labels, created_by, created_at, expires_at FROM join_tokens
		WHERE used_at = 0 AND expires_at > ?1 ORDER BY expires_at, sha256`), toStored(now))
	if err != nil {
		return nil, fmt.Errorf("read join tokens: %w", err)
	}
	defer rows.Close() //nolint:errcheck // rows.Err says what went wrong
	var tokens []*registry.Token
	for rows.Next() {
		var (
			t                registry.Token
			sum              []byte
			labels           string
			created, expires int64
		)
		if err := rows.Scan(&sum, &t.NodeName, &labels, &t.CreatedBy, &created, &expires); err != nil {
			return nil, fmt.Errorf("read join tokens: %w", err)
		}
		if err := json.Unmarshal([]byte(labels), &t.Labels); err != nil {
			return nil, fmt.Errorf("read labels of join token: %w", err)
		}
		copy(t.SHA256[:], sum)
		t.CreatedAt, t.ExpiresAt = fromStored(created), fromStored(expires)
		tokens = append(tokens, &t)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read join tokens: %w", err)
	}
	return tokens, nil
}

// DeleteToken withdraws a token that was not used; it wraps ErrNotFound if there
// is none. Before it commits, it calls record, as CreateToken does.
func (d *DB) DeleteToken(ctx context.Context, sum [32]byte, record func() error) error {
	err := d.update(ctx, func(tx *sql.Tx) error {
		n, err := d.exec(ctx, tx, `DELETE FROM join_tokens WHERE sha256 = ?1 AND used_at = 0`, sum[:])
		if err != nil {
			return err
		}
		if n == 0 {
			return ErrNotFound
		}
		return record()
	})
	if err != nil {
		return fmt.Errorf("delete join token: %w", err)
	}
	return nil
}

// ConsumeToken uses a join token up and returns it. Of any number of concurrent
// calls for one token, one succeeds. The error wraps jointoken.ErrUnknown,
// ErrUsed or ErrExpired.
func (d *DB) ConsumeToken(ctx context.Context, sum [32]byte, now time.Time) (*jointoken.Token, error) {
	var (
		t       jointoken.Token
		labels  string
		expires int64
	)
	err := d.update(ctx, func(tx *sql.Tx) error {
		// One statement decides: the row is only changed while it is unused.
		row := tx.QueryRowContext(ctx, d.dialect.rebind(
			`UPDATE join_tokens SET used_at = ?2 WHERE sha256 = ?1 AND used_at = 0 AND expires_at > ?2
			RETURNING node_name, labels, created_by, expires_at`), sum[:], toStored(now))
		err := row.Scan(&t.NodeName, &labels, &t.CreatedBy, &expires)
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		var used int64
		row = tx.QueryRowContext(ctx, d.dialect.rebind(`SELECT used_at FROM join_tokens WHERE sha256 = ?1`), sum[:])
		switch err := row.Scan(&used); {
		case errors.Is(err, sql.ErrNoRows):
			return jointoken.ErrUnknown
		case err != nil:
			return err
		case used != 0:
			return jointoken.ErrUsed
		default:
			return jointoken.ErrExpired
		}
	})
	if err != nil {
		return nil, fmt.Errorf("use join token: %w", err)
	}
	if err := json.Unmarshal([]byte(labels), &t.Labels); err != nil {
		return nil, fmt.Errorf("read labels of join token: %w", err)
	}
	t.ExpiresAt = fromStored(expires)
	return &t, nil
}

// usedRetention is how much longer than it is good a used token is remembered, for CAs
// whose clocks differ.
const usedRetention = time.Hour

// UseToken uses up a token that somebody else issued, named by a hash, and forgets
// those that have expired. Of any number of concurrent calls for one token, on
// all CAs, one returns true.
func (d *DB) UseToken(ctx context.Context, name [32]byte, expires, now time.Time) (first bool, err error) {
	err = d.update(ctx, func(tx *sql.Tx) error {
		if _, err := d.exec(ctx, tx, `DELETE FROM used_tokens WHERE expires_at <= ?1`, toStored(now.Add(-usedRetention))); err != nil {
			return err
		}
		n, err := d.exec(ctx, tx, `INSERT INTO used_tokens (sha256, expires_at) VALUES (?1, ?2) ON CONFLICT (sha256) DO NOTHING`,
			name[:], toStored(expires))
		first = n > 0
		return err
	})
	if err != nil {
		return false, fmt.Errorf("use token: %w", err)
	}
	return first, nil
}
