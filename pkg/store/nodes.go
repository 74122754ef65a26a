package store

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"

	"github.com/meshid/meshid/pkg/server/registry"
)

// Nodes returns all nodes sorted by SPIFFE ID.
func (d *DB) Nodes(ctx context.Context) ([]*registry.Node, error) {
	rows, err := d.reader.QueryContext(ctx, d.dialect.rebind(
		`SELECT id, state, state_reason, attributes, attested_at, serial, not_after, confirmed,
			previous, previous_until, agent_version, address, last_seen
		FROM nodes ORDER BY id`))
	if err != nil {
		return nil, fmt.Errorf("read nodes: %w", err)
	}
	defer rows.Close() //nolint:errcheck // rows.Err says what went wrong
	var nodes []*registry.Node
	for rows.Next() {
		var (
			n                                         registry.Node
			state, attributes                         string
			attested, notAfter, previousUntil, seenAt int64
		)
		if err := rows.Scan(&n.ID, &state, &n.StateReason, &attributes, &attested, &n.Serial, &notAfter, &n.Confirmed,
			&n.Previous, &previousUntil, &n.AgentVersion, &n.Address, &seenAt); err != nil {
			return nil, fmt.Errorf("read nodes: %w", err)
		}
		n.State = registry.State(state)
		n.Attributes = new(attributesv1.Node)
		// A fact that this version does not know cannot be in a rule of its.
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal([]byte(attributes), n.Attributes); err != nil {
			return nil, fmt.Errorf("read node %s: %w", n.ID, err)
		}
		n.AttestedAt, n.NotAfter = fromStored(attested), fromStored(notAfter)
		n.PreviousUntil, n.LastSeen = fromStored(previousUntil), fromStored(seenAt)
		nodes = append(nodes, &n)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read nodes: %w", err)
	}
	return nodes, nil
}

// PutNodes writes all that is known about nodes, of all or none.
func (d *DB) PutNodes(ctx context.Context, nodes ...*registry.Node) error {
	return d.update(ctx, func(tx *sql.Tx) error {
		put, err := tx.PrepareContext(ctx, d.dialect.rebind(
			`INSERT INTO nodes (id, state, state_reason, attributes, attested_at, serial, not_after, confirmed,
				previous, previous_until, agent_version, address, last_seen)
			VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
			ON CONFLICT (id) DO UPDATE SET
				state = excluded.state, state_reason = excluded.state_reason, attributes = excluded.attributes,
				attested_at = excluded.attested_at, serial = excluded.serial, not_after = excluded.not_after,
				confirmed = excluded.confirmed, previous = excluded.previous, previous_until = excluded.previous_until,
				agent_version = excluded.agent_version, address = excluded.address, last_seen = excluded.last_seen`))
		if err != nil {
			return fmt.Errorf("write nodes: %w", err)
		}
		defer put.Close() //nolint:errcheck // the transaction's end says what went wrong
		for _, n := range nodes {
			attributes, err := protojson.Marshal(n.Attributes)
			if err != nil {
				return fmt.Errorf("encode node %s: %w", n.ID, err)
			}
			if _, err := put.ExecContext(ctx, n.ID, string(n.State), n.StateReason, string(attributes), toStored(n.AttestedAt), blob(n.Serial),
				toStored(n.NotAfter), n.Confirmed, blob(n.Previous), toStored(n.PreviousUntil), n.AgentVersion, n.Address, toStored(n.LastSeen)); err != nil {
				return fmt.Errorf("write node %s: %w", n.ID, err)
			}
		}
		return nil
	})
}

// TouchNodes writes what was noted about nodes in passing. A node that has
// another serial by now is left alone.
func (d *DB) TouchNodes(ctx context.Context, touched []registry.Touch) error {
	err := d.update(ctx, func(tx *sql.Tx) error {
		for _, t := range touched {
			if _, err := d.exec(ctx, tx,
				`UPDATE nodes SET confirmed = ?3, previous_until = ?4, last_seen = ?5 WHERE id = ?1 AND serial = ?2`,
				t.ID, blob(t.Serial), t.Confirmed, toStored(t.PreviousUntil), toStored(t.LastSeen)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("touch nodes: %w", err)
	}
	return nil
}

// PruneNodes forgets the nodes whose X.509-SVID had expired by then. Banned
// nodes are never forgotten.
func (d *DB) PruneNodes(ctx context.Context, expiredBy time.Time) error {
	err := d.update(ctx, func(tx *sql.Tx) error {
		_, err := d.exec(ctx, tx, `DELETE FROM nodes WHERE not_after < ?1 AND state <> 'banned'`, toStored(expiredBy))
		return err
	})
	if err != nil {
		return fmt.Errorf("prune nodes: %w", err)
	}
	return nil
}

// Times are stored as nanoseconds since 1970, the zero time as 0.

func toStored(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromStored(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}

// blob makes an absent value an empty one: the columns are NOT NULL.
func blob(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}
