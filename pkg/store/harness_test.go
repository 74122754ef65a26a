package store

import (
	"crypto/sha256"
	"errors"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/server/registry"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
)

func open(t *testing.T, path string) *DB {
	t.Helper()
	d, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return d
}

func ignore(uint64) error { return nil }

func entry(name string) *entryv1.Entry {
	return &entryv1.Entry{
		Name: name, SpiffeId: "spiffe://example.org/" + name, Nodes: `node.method == "x509pop"`,
		Workloads: `docker.labels["team"] == "shop"`, Ttl: durationpb.New(90 * time.Minute),
		DnsNames: []string{"a.example.org", `{docker.labels["app"]}.example.org`}, Hint: "h", Admin: true, AcceptWeak: true,
	}
}

func node(id string) *registry.Node {
	at := time.Unix(1_700_000_000, 123456789)
	return &registry.Node{
		ID:         "spiffe://example.org/meshid/node/join_token/" + id,
		Attributes: &attributesv1.Node{Method: "join_token", Id: id, Labels: map[string]string{"zone": "a"}, JoinToken: &attributesv1.JoinToken{CreatedBy: "uid:0"}},
		State:      registry.Active, StateReason: "r", AttestedAt: at, Serial: []byte{1, 2}, NotAfter: at.Add(time.Hour),
		Confirmed: true, Previous: []byte{3}, PreviousUntil: at.Add(time.Minute), AgentVersion: "v1", Address: "10.0.0.1:1", LastSeen: at.Add(time.Second),
	}
}

func newToken(t *testing.T, d *DB, secret string, expires time.Time) [32]byte {
	t.Helper()
	sum := sha256.Sum256([]byte(secret))
	err := d.CreateToken(t.Context(), &registry.Token{
		SHA256: sum, NodeName: "n", CreatedBy: "uid:0", Labels: map[string]string{"a": "b"},
		CreatedAt: time.Unix(100, 0), ExpiresAt: expires,
	}, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// alongside opens a database that is open already, as another engine than SQLite
// would allow.
func alongside(t *testing.T, path string) *DB {
	t.Helper()
	writer, reader, err := openSQLite(path, "FULL")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(writer.Close(), reader.Close()); err != nil {
			t.Error(err)
		}
	})
	return &DB{dialect: sqlite, writer: writer, reader: reader}
}

func unrecorded(ca.Trust) error { return nil }
