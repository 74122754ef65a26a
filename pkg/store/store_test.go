package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"

	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/server/registry"
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

func TestEntries(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	epoch := d.Epoch()
	rev, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry("b"), entry("a")}, nil, ignore)
	if err != nil || rev != 1 {
		t.Fatalf("ApplyEntries = %d, %v", rev, err)
	}
	changed := entry("b")
	changed.Ttl = nil
	if rev, err = d.ApplyEntries(t.Context(), []*entryv1.Entry{changed, entry("c")}, []string{"a"}, ignore); err != nil || rev != 2 {
		t.Fatalf("ApplyEntries = %d, %v", rev, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	got, rev, err := d.Entries(t.Context())
	if err != nil || rev != 2 {
		t.Fatalf("Entries: revision %d, %v", rev, err)
	}
	b, c := changed, entry("c")
	b.Revision, c.Revision = 2, 2
	if diff := cmp.Diff([]*entryv1.Entry{b, c}, got, protocmp.Transform()); diff != "" {
		t.Errorf("entries after restart (-want +got):\n%s", diff)
	}
	if d.Epoch() != epoch || len(epoch) < 20 {
		t.Errorf("epoch was %q, is %q", epoch, d.Epoch())
	}
}

// A change is made as a whole or not at all, wherever it fails.
func TestApplyEntriesAtomic(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry("a")}, nil, ignore); err != nil {
		t.Fatal(err)
	}
	before, _, err := d.Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	fault := errors.New("ledger is full")
	for _, tt := range []struct {
		name    string
		ctx     func() context.Context
		upserts []*entryv1.Entry
		removed []string
		record  func(uint64) error
		want    error
	}{
		{"record fails", t.Context, []*entryv1.Entry{entry("b")}, []string{"a"}, func(uint64) error { return fault }, fault},
		{"unknown name", t.Context, []*entryv1.Entry{entry("b")}, []string{"a", "nobody"}, ignore, ErrNotFound},
		{"invalid UTF-8", t.Context, []*entryv1.Entry{entry("b"), {Name: "x", Workloads: "\xff"}}, nil, ignore, nil},
		{"canceled", func() context.Context {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			return ctx
		}, []*entryv1.Entry{entry("b")}, nil, ignore, context.Canceled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := d.ApplyEntries(tt.ctx(), tt.upserts, tt.removed, tt.record)
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
				t.Fatalf("error is %v, want %v", err, tt.want)
			}
			after, rev, err := d.Entries(t.Context())
			if err != nil || rev != 1 {
				t.Fatalf("revision %d, %v", rev, err)
			}
			if diff := cmp.Diff(before, after, protocmp.Transform()); diff != "" {
				t.Errorf("entries changed:\n%s", diff)
			}
		})
	}
}

// Values are parameters: whatever is in a name stays a name.
func TestV_L4_ParametersOnly(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	names := []string{"'; DROP TABLE entries; --", "%", "_", "a\x00b", `"`, "?1", "Ä", "ä"}
	for _, name := range names {
		if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry(name)}, nil, ignore); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
	}
	if _, err := d.ApplyEntries(t.Context(), nil, []string{"%"}, ignore); err != nil {
		t.Fatal(err)
	}
	got, _, err := d.Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(names)-1 {
		t.Errorf("%d entries, want %d", len(got), len(names)-1)
	}
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) < 5 {
		t.Fatal(files, err)
	}
	// Those of the records put their statements together, of numbered parameters:
	// TestV_L4_FiltersAreValues.
	files = slices.DeleteFunc(files, func(f string) bool { return strings.HasSuffix(f, "_test.go") || strings.HasPrefix(f, "records") })
	for _, q := range []string{"SELECT *", "select *", "+ name", "Sprintf(`", "LIKE"} {
		for _, file := range files {
			src, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(src), q) {
				t.Errorf("%s has %q", file, q)
			}
		}
	}
}

// Names are compared byte by byte.
func TestV_A5_NamesAreBinary(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry("admin"), entry("Admin")}, nil, ignore); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ApplyEntries(t.Context(), nil, []string{"ADMIN"}, ignore); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete ADMIN: %v", err)
	}
	if got, _, err := d.Entries(t.Context()); err != nil || len(got) != 2 {
		t.Errorf("%d entries, %v", len(got), err)
	}
}

// An entry that a newer version wrote is not served with what this version
// understands of it.
func TestEntryWithUnknownField(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry("a"), entry("b")}, nil, ignore); err != nil {
		t.Fatal(err)
	}
	if _, err := d.writer.ExecContext(t.Context(),
		`UPDATE entries SET entry = '{"name":"a","workloads":"unix.uid == 0","placement":"required"}' WHERE name = 'a'`); err != nil {
		t.Fatal(err)
	}
	got, _, err := d.Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&entryv1.Entry{Name: "a", Revision: 1}, got[0], protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if got[1].GetWorkloads() == "" {
		t.Error("the entry beside it was lost")
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

func TestNodes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	a, b := node("a"), node("b")
	b.Previous, b.PreviousUntil, b.Confirmed = nil, time.Time{}, false
	for _, n := range []*registry.Node{b, a} {
		if err := d.PutNode(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.TouchNodes(t.Context(), []registry.Touch{
		{ID: a.ID, Serial: []byte("other"), LastSeen: time.Unix(9, 0)},
		{ID: b.ID, Serial: b.Serial, Confirmed: true, PreviousUntil: time.Unix(7, 0), LastSeen: time.Unix(8, 0)},
	}); err != nil {
		t.Fatal(err)
	}
	b.Confirmed, b.PreviousUntil, b.LastSeen = true, time.Unix(7, 0), time.Unix(8, 0)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	got, err := d.Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]*registry.Node{a, b}, got, protocmp.Transform()); diff != "" {
		t.Errorf("nodes (-want +got):\n%s", diff)
	}
	banned := *a
	banned.State = registry.Banned
	if err := d.PutNode(t.Context(), &banned); err != nil {
		t.Fatal(err)
	}
	if err := d.PruneNodes(t.Context(), a.NotAfter.Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if got, err = d.Nodes(t.Context()); err != nil || len(got) != 1 || got[0].State != registry.Banned {
		t.Errorf("after pruning: %v, %v: a banned node is never forgotten", got, err)
	}
	bad := node("c")
	bad.State = "sleeping"
	if err := d.PutNode(t.Context(), bad); err == nil {
		t.Error("a node in an unknown state was stored")
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

func TestTokens(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	now := time.Unix(200, 0)
	good := newToken(t, d, "good", time.Unix(300, 0))
	late := newToken(t, d, "late", time.Unix(150, 0))
	withdrawn := newToken(t, d, "withdrawn", time.Unix(400, 0))
	open, err := d.Tokens(t.Context(), now)
	if err != nil || len(open) != 2 || open[0].SHA256 != good || open[0].Labels["a"] != "b" {
		t.Fatalf("Tokens = %v, %v", open, err)
	}
	fault := errors.New("fault")
	if err := d.DeleteToken(t.Context(), withdrawn, func() error { return fault }); !errors.Is(err, fault) {
		t.Errorf("DeleteToken = %v", err)
	}
	if err := d.DeleteToken(t.Context(), withdrawn, func() error { return nil }); err != nil {
		t.Error(err)
	}
	if err := d.DeleteToken(t.Context(), withdrawn, func() error { return nil }); !errors.Is(err, ErrNotFound) {
		t.Errorf("second DeleteToken = %v", err)
	}
	tok, err := d.ConsumeToken(t.Context(), good, now)
	want := &jointoken.Token{NodeName: "n", CreatedBy: "uid:0", Labels: map[string]string{"a": "b"}, ExpiresAt: time.Unix(300, 0)}
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, tok); diff != "" {
		t.Error(diff)
	}
	for sum, want := range map[[32]byte]error{good: jointoken.ErrUsed, late: jointoken.ErrExpired, withdrawn: jointoken.ErrUnknown} {
		if _, err := d.ConsumeToken(t.Context(), sum, now); !errors.Is(err, want) {
			t.Errorf("ConsumeToken = %v, want %v", err, want)
		}
	}
	if err := d.CreateToken(t.Context(), &registry.Token{SHA256: sha256.Sum256([]byte("x")), CreatedAt: now, ExpiresAt: now.Add(time.Hour)},
		func() error { return fault }); !errors.Is(err, fault) {
		t.Errorf("CreateToken = %v", err)
	}
	if _, err := d.ConsumeToken(t.Context(), sha256.Sum256([]byte("x")), now); !errors.Is(err, jointoken.ErrUnknown) {
		t.Errorf("a token without a record exists: %v", err)
	}
}

// The secret itself is nowhere in the files.
func TestTokensAreHashedAtRest(t *testing.T) {
	dir := t.TempDir()
	d := open(t, filepath.Join(dir, "ca.db"))
	const secret = "canary-7b1d4c0e-join-token"
	newToken(t, d, secret, time.Unix(300, 0))
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		if strings.Contains(string(raw), secret) {
			t.Errorf("%s has the token", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
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

// 200 concurrent uses of one token, over two processes' worth of connections.
func TestV_C1_TokenSingleUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	dbs := []*DB{open(t, path), alongside(t, path)}
	for round := range 3 {
		sum := newToken(t, dbs[0], fmt.Sprint(round), time.Unix(300, 0))
		var won, used atomic.Int32
		var wg sync.WaitGroup
		start := make(chan struct{})
		for i := range 200 {
			wg.Go(func() {
				<-start
				_, err := dbs[i%2].ConsumeToken(t.Context(), sum, time.Unix(200, 0))
				switch {
				case err == nil:
					won.Add(1)
				case errors.Is(err, jointoken.ErrUsed):
					used.Add(1)
				default:
					t.Errorf("ConsumeToken: %v", err)
				}
			})
		}
		close(start)
		wg.Wait()
		if won.Load() != 1 || used.Load() != 199 {
			t.Fatalf("%d succeeded and %d found it used", won.Load(), used.Load())
		}
	}
}

func unrecorded(ca.Trust) error { return nil }

func TestTrust(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	if got, err := d.Trust(t.Context()); err != nil || len(got.Roots) != 0 || got.Sequence != 0 || got.Epoch != 0 {
		t.Fatalf("Trust = %+v, %v", got, err)
	}
	change := func(trust ca.Trust) ca.Trust {
		t.Helper()
		var recorded ca.Trust
		next, err := d.ChangeTrust(t.Context(), trust, func(r ca.Trust) error {
			recorded = r
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(recorded, next); diff != "" {
			t.Errorf("recorded and stored: %s", diff)
		}
		return next
	}
	first := change(ca.Trust{Roots: []ca.Root{{Certificate: []byte{1}, Key: "file:root-1.key", State: "active", CreatedAt: time.Unix(1, 2), Since: time.Unix(1, 3)}}})
	first.Roots = append(first.Roots, ca.Root{Certificate: []byte{0}, Key: "", State: "prepared", CreatedAt: time.Unix(3, 4), Since: time.Unix(3, 5), Automatic: true})
	second := change(first)
	if second.Epoch != 2 || second.Sequence != 2 || second.Roots[0].Sequence != 1 || second.Roots[1].Sequence != 2 {
		t.Errorf("%+v", second)
	}
	// States change without the bundle, a root that leaves changes it.
	second.Roots[0].State, second.Roots[0].Tainted, second.Roots[1].State, second.Paused = "retiring", true, "active", true
	third := change(second)
	if third.Epoch != 3 || third.Sequence != 2 {
		t.Errorf("%+v", third)
	}
	third.Roots[0].State = "gone"
	want := change(third)
	if want.Epoch != 4 || want.Sequence != 3 {
		t.Errorf("%+v", want)
	}
	// Who comes late, and what cannot be recorded, changes nothing.
	if _, err := d.ChangeTrust(t.Context(), third, unrecorded); !errors.Is(err, ca.ErrTrustChanged) {
		t.Errorf("an old epoch: %v", err)
	}
	broken := errors.New("no ledger")
	spoilt := want
	spoilt.Roots = []ca.Root{{Certificate: []byte{7}, State: "active"}}
	if _, err := d.ChangeTrust(t.Context(), spoilt, func(ca.Trust) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("no record: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	got, err := d.Trust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if rev, err := d.Revision(t.Context()); err != nil || rev != 3 {
		t.Errorf("revision %d, %v: each change of the bundle is one", rev, err)
	}
}

// Lists are part of what changes as one, over a restart too; the bundle has changed if
// they are in force.
func TestTrustWithRevocationLists(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	change := func(trust ca.Trust) ca.Trust {
		t.Helper()
		next, err := d.ChangeTrust(t.Context(), trust, unrecorded)
		if err != nil {
			t.Fatal(err)
		}
		return next
	}
	trust := change(ca.Trust{Roots: []ca.Root{{Certificate: []byte{1}, State: "active", CreatedAt: time.Unix(1, 2), Since: time.Unix(1, 3)}}})
	trust.Lists = []ca.RevocationList{{Issuer: []byte{1}, List: []byte{2}}, {Issuer: []byte{3}, List: []byte{4}}}
	trust = change(trust)
	if trust.Sequence != 1 || trust.Epoch != 2 {
		t.Errorf("not in force: %+v", trust)
	}
	trust.Listed = true
	trust = change(trust)
	if trust.Sequence != 2 {
		t.Errorf("in force: %+v", trust)
	}
	trust.Paused = true
	if trust = change(trust); trust.Sequence != 2 {
		t.Errorf("another change: %+v", trust)
	}
	trust.Lists = []ca.RevocationList{{Issuer: []byte{1}, List: []byte{9}}}
	if trust = change(trust); trust.Sequence != 3 {
		t.Errorf("one is newer, one gone: %+v", trust)
	}
	broken := errors.New("no ledger")
	spoilt := trust
	spoilt.Lists, spoilt.Listed = nil, false
	if _, err := d.ChangeTrust(t.Context(), spoilt, func(ca.Trust) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("no record: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	got, err := d.Trust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(trust, got); diff != "" {
		t.Error(diff)
	}
}

func TestIntermediates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	a := ca.Intermediate{ID: "a", Root: "r", Instance: "x", LiveUntil: time.Unix(100, 0)}
	b := ca.Intermediate{ID: "b", Root: "r", Instance: "y", LiveUntil: time.Unix(200, 0)}
	if err := d.PutIntermediates(t.Context(), time.Unix(50, 0), a, b); err != nil {
		t.Fatal(err)
	}
	a.LiveUntil = time.Unix(300, 0)
	if err := d.PutIntermediates(t.Context(), time.Unix(250, 0), a); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	got, err := d.Intermediates(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]ca.Intermediate{a}, got); diff != "" {
		t.Error(diff)
	}
}

// Two CAs that start for the first time on one database: the second one is told
// who has it, before it has touched anything.
func TestFault_F21_SecondOpenIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	_, err := Open(t.Context(), path)
	if !errors.Is(err, durable.ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) || !strings.Contains(err.Error(), "stop it") {
		t.Errorf("a second Open: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, path)
}

// Of 16 CAs with ledgers of their own, the store belongs to one, for good; or until an
// operator says otherwise.
func TestFault_F21_OneLedger(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	if owner, err := d.Ledger(t.Context()); owner != "" || err != nil {
		t.Errorf("a new store belongs to %q: %v", owner, err)
	}
	owners := make([]string, 16)
	var wg sync.WaitGroup
	for i := range owners {
		wg.Go(func() {
			var err error
			if owners[i], err = d.ClaimLedger(t.Context(), fmt.Sprint("ledger-", i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	first := owners[0]
	if slices.ContainsFunc(owners, func(o string) bool { return o != first }) || !strings.HasPrefix(first, "ledger-") {
		t.Errorf("it belongs to %v", owners)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	if owner, err := d.Ledger(t.Context()); owner != first || err != nil {
		t.Errorf("it belongs to %q: %v", owner, err)
	}
	if err := d.Restored(t.Context(), "another", 7, 7); err != nil {
		t.Fatal(err)
	}
	if owner, err := d.ClaimLedger(t.Context(), first); owner != "another" || err != nil {
		t.Errorf("it belongs to %q: %v", owner, err)
	}
}

// A ban is in force from its commit on, on every connection that reads: also on those
// that were in use while it was written, and while others go on writing.
func TestV_L5_CommittedIsRead(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	n := &registry.Node{ID: "spiffe://example.org/meshid/node/x/n", Attributes: &attributesv1.Node{Id: "n"}}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for i := range 2 * sqliteReaders { // no connection is idle
		wg.Go(func() {
			for ctx.Err() == nil {
				_, err := d.Nodes(ctx)
				if i == 0 && err == nil {
					_, err = d.ApplyEntries(ctx, []*entryv1.Entry{entry("a")}, nil, ignore)
				}
				if err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
		})
	}
	for round := range 30 {
		n.State = registry.Active
		if round%2 == 1 {
			n.State = registry.Banned
		}
		if err := d.PutNode(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		var read sync.WaitGroup
		for range 2 * sqliteReaders {
			read.Go(func() {
				if got, err := d.Nodes(t.Context()); err != nil || len(got) != 1 || got[0].State != n.State {
					t.Errorf("round %d: read is %v: %v", round, got, err)
				}
			})
		}
		read.Wait()
	}
	if used := d.reader.Stats().OpenConnections; used != sqliteReaders {
		t.Errorf("%d connections read, want %d", used, sqliteReaders)
	}
}

// 64 CAs add their first root at once: one of them succeeds.
func TestFault_F21_FirstRootOnce(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	var added atomic.Int64
	var wg sync.WaitGroup
	for n := range 64 {
		wg.Go(func() {
			_, err := d.ChangeTrust(t.Context(), ca.Trust{Roots: []ca.Root{{Certificate: []byte{byte(n)}, Key: fmt.Sprint(n), State: "active"}}}, unrecorded)
			switch {
			case err == nil:
				added.Add(1)
			case !errors.Is(err, ca.ErrTrustChanged):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got, err := d.Trust(t.Context())
	if err != nil || added.Load() != 1 || len(got.Roots) != 1 || got.Sequence != 1 {
		t.Errorf("%d added, %+v, %v", added.Load(), got, err)
	}
}

// 64 writers, some of which fail: revisions come out without gap, in the order
// in which they are committed, and a reader never sees a revision without its
// entries.
func TestV_E4_RevisionsInCommitOrder(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	fault := errors.New("aborted")
	var (
		mu   sync.Mutex
		seen []uint64
		wg   sync.WaitGroup
	)
	stop := make(chan struct{})
	readers := make(chan error, 1)
	go func() {
		last := uint64(0)
		for {
			select {
			case <-stop:
				readers <- nil
				return
			default:
			}
			entries, rev, err := d.Entries(t.Context())
			if err != nil {
				readers <- err
				return
			}
			if rev < last || uint64(len(entries)) != rev {
				readers <- fmt.Errorf("revision %d after %d with %d entries", rev, last, len(entries))
				return
			}
			last = rev
		}
	}()
	for w := range 64 {
		wg.Go(func() {
			for i := range 3 {
				abort := (w+i)%4 == 0
				rev, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry(fmt.Sprintf("w%d-%d", w, i))}, nil, func(uint64) error {
					if abort {
						return fault
					}
					return nil
				})
				switch {
				case abort && !errors.Is(err, fault), !abort && err != nil:
					t.Errorf("ApplyEntries: %v", err)
				case !abort:
					mu.Lock()
					seen = append(seen, rev)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	if err := <-readers; err != nil {
		t.Error(err)
	}
	have := make(map[uint64]bool)
	for _, r := range seen {
		have[r] = true
	}
	for r := uint64(1); r <= uint64(len(seen)); r++ {
		if !have[r] {
			t.Errorf("revision %d is missing of %d", r, len(seen))
		}
	}
}

func TestMigrations(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry("a")}, nil, ignore); err != nil {
		t.Fatal(err)
	}
	first, err := d.readMigrations()
	if err != nil {
		t.Fatal(err)
	}
	// A second migration that fails half-way leaves nothing of itself.
	next := migration{int64(len(first) + 1), "next", `CREATE TABLE later (a INTEGER) STRICT; INSERT INTO later (a) VALUES (1); SELECT nonsense;`}
	if err := d.migrate(t.Context(), append(first, next)); err == nil {
		t.Fatal("a broken migration passed")
	}
	var n int
	if err := d.reader.QueryRowContext(t.Context(), `SELECT COUNT(1) FROM sqlite_master WHERE name = 'later'`).Scan(&n); err != nil || n != 0 {
		t.Errorf("%d tables of the broken migration are left, %v", n, err)
	}
	next.sql = `CREATE TABLE later (a INTEGER) STRICT`
	for range 2 { // the second time there is nothing to do
		if err := d.migrate(t.Context(), append(first, next)); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	// This program does not know that version.
	_, err = Open(t.Context(), path)
	if err == nil || !strings.Contains(err.Error(), "newer release") {
		t.Errorf("a newer schema was opened: %v", err)
	}
}

func TestReadMigrations(t *testing.T) {
	for name, files := range map[string]fstest.MapFS{
		"none":      {},
		"bad name":  {"migrations/first.sql": {Data: []byte("SELECT 1")}},
		"wrong dir": {"0001_x.sql": {Data: []byte("SELECT 1")}},
	} {
		d := &DB{dialect: dialect{migrations: files}}
		if _, err := d.readMigrations(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestOpenFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ca.db")
	d := open(t, path)
	if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry("a")}, nil, ignore); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", f.Name(), info.Mode())
		}
	}
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1"} {
		var got string
		if err := d.writer.QueryRowContext(t.Context(), "PRAGMA "+pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %q, want %q: %v", pragma, got, want, err)
		}
	}
	if _, err := d.reader.ExecContext(t.Context(), `DELETE FROM entries`); err == nil {
		t.Error("a reader can write")
	}

	wide := filepath.Join(dir, "wide.db")
	if err := os.WriteFile(wide, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link.db")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	linked := filepath.Join(dir, "linked.db")
	if err := errors.Join(os.WriteFile(linked, nil, 0o600), os.Link(linked, filepath.Join(dir, "other.db"))); err != nil {
		t.Fatal(err)
	}
	garbage := filepath.Join(dir, "garbage.db")
	if err := os.WriteFile(garbage, []byte(strings.Repeat("not a database ", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		wide: "chmod 600", link: "not a regular file", linked: "hard link", dir: "not a regular file", garbage: "not a database",
		filepath.Join(dir, "missing", "ca.db"): "no such file",
	} {
		if _, err := Open(t.Context(), path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Open(%s) = %v, want %q", path, err, want)
		}
	}
	// A name that would mean something in a URI is only a name.
	odd := open(t, filepath.Join(dir, "a?mode=memory&x=%41#b.db"))
	if _, err := odd.Revision(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "a?mode=memory&x=%41#b.db")); err != nil {
		t.Error(err)
	}
}

// A change that was committed is there after the process was killed: the files
// are copied while the database is open, as they would be left behind.
func TestSurvivesKill(t *testing.T) {
	dir := t.TempDir()
	d := open(t, filepath.Join(dir, "ca.db"))
	for i := range 20 {
		if _, err := d.ApplyEntries(t.Context(), []*entryv1.Entry{entry(fmt.Sprint(i))}, nil, ignore); err != nil {
			t.Fatal(err)
		}
	}
	// A transaction that is under way is not.
	tx, err := d.writer.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.ExecContext(t.Context(), `DELETE FROM entries`); err != nil {
		t.Fatal(err)
	}
	left := t.TempDir()
	for _, name := range []string{"ca.db", "ca.db-wal"} {
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(left, name), raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := tx.Rollback(); err != nil && !errors.Is(err, sql.ErrTxDone) {
		t.Fatal(err)
	}
	got, rev, err := open(t, filepath.Join(left, "ca.db")).Entries(t.Context())
	if err != nil || rev != 20 || len(got) != 20 {
		t.Errorf("%d entries, revision %d, %v", len(got), rev, err)
	}
}

// A token of others is used once, over restarts and by several CAs at once, and is
// forgotten when it can be no good to anybody.
func TestUseToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	name := sha256.Sum256([]byte("a token"))
	use := func(d *DB, at time.Time) bool {
		t.Helper()
		first, err := d.UseToken(t.Context(), name, time.Unix(1000, 0), at)
		if err != nil {
			t.Fatal(err)
		}
		return first
	}
	var firsts atomic.Int32
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if use(d, time.Unix(500, 0)) {
				firsts.Add(1)
			}
		})
	}
	wg.Wait()
	if n := firsts.Load(); n != 1 {
		t.Errorf("used %d times", n)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	for at, want := range map[int64]bool{500: false, 1001: false} {
		if got := use(d, time.Unix(at, 0)); got != want {
			t.Errorf("at %d: %v, want %v", at, got, want)
		}
	}
	if !use(d, time.Unix(1000, 0).Add(usedRetention)) {
		t.Error("remembered after it has expired")
	}
}
