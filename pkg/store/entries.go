package store

import (
	"context"
	"database/sql"
	"fmt"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	entryv1 "github.com/meshid/meshid/proto/entry/v1"
)

// Entries returns all entries sorted by name, and the revision that they are of.
// An entry that this version cannot read is returned with its name only.
func (d *DB) Entries(ctx context.Context) (entries []*entryv1.Entry, revision uint64, err error) {
	tx, err := d.reader.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return nil, 0, fmt.Errorf("read entries: %w", err)
	}
	defer tx.Rollback() //nolint:errcheck // it only read
	var current int64
	if err := tx.QueryRowContext(ctx, d.dialect.rebind(`SELECT revision FROM state WHERE id = 1`)).Scan(&current); err != nil {
		return nil, 0, fmt.Errorf("read revision: %w", err)
	}
	rows, err := tx.QueryContext(ctx, d.dialect.rebind(`SELECT name, entry, revision FROM entries ORDER BY name`))
	if err != nil {
		return nil, 0, fmt.Errorf("read entries: %w", err)
	}
	defer rows.Close() //nolint:errcheck // rows.Err says what went wrong
	for rows.Next() {
		var (
			name, text string
			changed    int64
		)
		if err := rows.Scan(&name, &text, &changed); err != nil {
			return nil, 0, fmt.Errorf("read entries: %w", err)
		}
		// Unknown fields are refused: a newer version may have narrowed the
		// rule in one, and the entry must not be wider here.
		e := new(entryv1.Entry)
		if err := protojson.Unmarshal([]byte(text), e); err != nil || e.GetName() != name {
			e = &entryv1.Entry{Name: name}
		}
		e.Revision = uint64(changed) //nolint:gosec // revisions are written by this package and are not negative
		entries = append(entries, e)
	}
	if err := rows.Err(); err != nil {
		return nil, 0, fmt.Errorf("read entries: %w", err)
	}
	return entries, uint64(current), nil //nolint:gosec // the table holds the CHECK that it is not negative
}

// ApplyEntries makes all changes in one transaction, as one new revision, or
// none. Before it commits, it calls record with the revision: if record fails,
// nothing is changed. record must not call the store.
func (d *DB) ApplyEntries(ctx context.Context, upserts []*entryv1.Entry, removed []string,
	record func(revision uint64) error,
) (revision uint64, err error) {
	err = d.update(ctx, func(tx *sql.Tx) error {
		revision, err = d.nextRevision(ctx, tx)
		if err != nil {
			return err
		}
		for _, e := range upserts {
			stored := proto.CloneOf(e)
			stored.Revision = 0 // it is a column
			text, err := protojson.Marshal(stored)
			if err != nil {
				return fmt.Errorf("encode entry %s: %w", e.GetName(), err)
			}
			_, err = d.exec(ctx, tx,
				`INSERT INTO entries (name, entry, revision) VALUES (?1, ?2, ?3)
				ON CONFLICT (name) DO UPDATE SET entry = excluded.entry, revision = excluded.revision`,
				e.GetName(), string(text), int64(revision)) //nolint:gosec // it came from this column
			if err != nil {
				return fmt.Errorf("write entry %s: %w", e.GetName(), err)
			}
		}
		for _, name := range removed {
			n, err := d.exec(ctx, tx, `DELETE FROM entries WHERE name = ?1`, name)
			if err != nil {
				return fmt.Errorf("delete entry %s: %w", name, err)
			}
			if n == 0 {
				return fmt.Errorf("delete entry %s: %w", name, ErrNotFound)
			}
		}
		return record(revision)
	})
	if err != nil {
		return 0, err
	}
	return revision, nil
}
