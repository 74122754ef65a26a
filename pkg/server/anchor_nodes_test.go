package server

import (
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/server/registry"
	"github.com/meshid/meshid/pkg/store"
	"github.com/meshid/meshid/test/identitytest"
)

// anchored has the CA compare its store with the ledger, by a file in dir.
func (h *house) anchored(c *Config) {
	h.t.Helper()
	db, ok := c.Store.(*store.DB)
	if !ok {
		h.t.Fatalf("the store is a %T", c.Store)
	}
	a, err := OpenAnchor(h.t.Context(), filepath.Join(h.dir, "store.anchor"), c.Ledger, db, c.Version)
	if err != nil {
		h.t.Fatal(err)
	}
	c.Anchor = a
}

// edit changes the database of a CA that does not run.
func (h *house) edit(query string, args ...any) {
	h.t.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(h.dir, "ca.db"))
	if err != nil {
		h.t.Fatal(err)
	}
	result, err := db.ExecContext(h.t.Context(), query, args...)
	if err != nil {
		h.t.Fatal(err)
	}
	n, err := result.RowsAffected()
	if err := errors.Join(err, db.Close()); err != nil {
		h.t.Fatal(err)
	}
	if n == 0 {
		h.t.Fatalf("%s changes nothing", query)
	}
}

// newAnchoredHouse starts a CA over what is in dir.
func newAnchoredHouse(t *testing.T, dir string) *house {
	t.Helper()
	h := &house{t: t, dir: dir, log: new(identitytest.Log)}
	h.start(h.anchored)
	t.Cleanup(func() { h.stop() })
	return h
}

// Whoever writes the database lifts no ban, no eviction and no quarantine, and gives
// no node other facts or another certificate: whatever the anchor had by then, and
// whether there is one at all. It is recorded, said, and put right; and nobody cries
// wolf where nothing was changed.
func TestFault_F17_NodesEditedByHand(t *testing.T) {
	t.Parallel()
	origin := newAnchoredHouse(t, t.TempDir())
	origin.apply(shopEntry("web"))
	origin.join("early", nil)
	early, err := os.ReadFile(filepath.Join(origin.dir, "store.anchor"))
	if err != nil {
		t.Fatal(err)
	}
	good, banned, evicted, unbanned := origin.join("good", map[string]string{"zone": "a"}), origin.join("banned", nil), origin.join("evicted", nil), origin.join("unbanned", nil)
	renewed, err := good.client.Renew(t.Context(), &nodev1.RenewRequest{Csr: newCSR(t, good.key), PreviousSerial: good.serial()})
	if err != nil {
		t.Fatal(err)
	}
	good.use(renewed.GetIdentity())
	admin, ctx := origin.admin()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []string{banned.id, unbanned.id} {
		_, err = admin.BanNode(ctx, &adminv1.BanNodeRequest{Id: id, Reason: "stolen"})
		do(err)
	}
	_, err = admin.UnbanNode(ctx, &adminv1.UnbanNodeRequest{Id: unbanned.id})
	do(err)
	_, err = admin.EvictNode(ctx, &adminv1.EvictNodeRequest{Id: evicted.id, Reason: "old"})
	do(err)
	const bad = "spiffe://example.org/app/bad"
	origin.quarantine(&adminv1.Quarantine{SpiffeId: bad})
	origin.quarantine(&adminv1.Quarantine{SpiffeId: bad + "/lifted"})
	origin.lift(&adminv1.Quarantine{SpiffeId: bad + "/lifted"})
	origin.stop()

	edits := map[string]struct {
		query  string
		arg    string
		reason string // none for what is believed
		node   string // that is then in this state
		state  registry.State
	}{
		"nothing":                    {"UPDATE nodes SET last_seen = last_seen + 1 WHERE id = ?1", good.id, "", good.id, registry.Active},
		"a node is banned":           {"UPDATE nodes SET state = 'banned' WHERE id = ?1", good.id, "", good.id, registry.Banned},
		"a ban is lifted":            {"UPDATE nodes SET state = 'active' WHERE id = ?1", banned.id, reasonBanMissing, banned.id, registry.Banned},
		"a ban is made an eviction":  {"UPDATE nodes SET state = 'evicted' WHERE id = ?1", banned.id, reasonBanMissing, banned.id, registry.Banned},
		"a banned node is forgotten": {"DELETE FROM nodes WHERE id = ?1", banned.id, reasonBanMissing, banned.id, registry.Banned},
		"an eviction is lifted":      {"UPDATE nodes SET state = 'active' WHERE id = ?1", evicted.id, reasonEvictionMissing, evicted.id, registry.Evicted},
		"an unbanned node is let in": {"UPDATE nodes SET state = 'active' WHERE id = ?1", unbanned.id, reasonEvictionMissing, unbanned.id, registry.Evicted},
		"other facts":                {`UPDATE nodes SET attributes = replace(attributes, '"a"', '"b"') WHERE id = ?1`, good.id, reasonNodeUnrecorded, good.id, registry.Evicted},
		"another certificate":        {"UPDATE nodes SET serial = x'0102' WHERE id = ?1", good.id, reasonNodeUnrecorded, good.id, registry.Evicted},
		"another node": {`INSERT INTO nodes SELECT ?1, state, state_reason, attributes, attested_at, serial, not_after, confirmed, previous, previous_until,
			agent_version, address, last_seen FROM nodes WHERE id LIKE '%/good'`, good.id + "2", reasonNodeUnrecorded, good.id + "2", registry.Evicted},
		"a quarantine is lifted": {"DELETE FROM quarantines WHERE spiffe_id = ?1", bad, reasonQuarantineMissing, good.id, registry.Active},
	}
	for name, anchor := range map[string][]byte{"newest": nil, "from before": early, "none": {}, "without nodes": []byte("old version")} {
		for what, edit := range edits {
			t.Run(what+", anchor "+name, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				copyTree(t, dir, origin.dir)
				h := &house{t: t, dir: dir, log: new(identitytest.Log)}
				path := filepath.Join(dir, "store.anchor")
				switch string(anchor) {
				case "":
					if anchor != nil {
						do(os.Remove(path))
					}
				case "old version":
					kept, err := readAnchor(path)
					do(err)
					kept.anchoredNodes = anchoredNodes{}
					do(kept.write(path))
				default:
					do(os.WriteFile(path, anchor, 0o600))
				}
				h.edit(edit.query, edit.arg)
				h.start(h.anchored)
				defer func() { h.stop() }()
				check := func(when string, want string, alarm bool) {
					t.Helper()
					var reasons []string
					for _, r := range h.records(ledgerv1.Event_EVENT_STORE_EDITED) {
						reasons = append(reasons, r.GetReason())
					}
					if got := strings.Join(reasons, " "); got != want {
						t.Errorf("%s: recorded is %q, want %q", when, got, want)
					}
					if n, ok := h.server.registry.Node(edit.node); !ok || n.State != edit.state {
						t.Errorf("%s: the node is %v", when, n)
					}
					if _, quarantined := h.server.registry.Quarantines().Get(bad); !quarantined || h.server.registry.Quarantines().Len() != 1 {
						t.Errorf("%s: %d quarantines", when, h.server.registry.Quarantines().Len())
					}
					i := slices.IndexFunc(h.health.Conditions(), func(c health.Condition) bool { return c.Name == conditionUnrecorded && c.Severity != health.OK })
					if (i >= 0) != alarm {
						t.Errorf("%s: the alarm is %v", when, i >= 0)
					}
				}
				check("at the start", edit.reason, edit.reason != "")
				h.stop()
				h.start(h.anchored)
				check("at the next start", edit.reason, false) // it was put right
			})
		}
	}
}

// What nodes attested is not judged by what another version has noted: it may know
// other facts. Bans are.
func TestAnchorOfAnotherVersion(t *testing.T) {
	t.Parallel()
	h := newAnchoredHouse(t, t.TempDir())
	h.apply(shopEntry("web"))
	good, banned := h.join("good", map[string]string{"zone": "a"}), h.join("banned", nil)
	admin, ctx := h.admin()
	if _, err := admin.BanNode(ctx, &adminv1.BanNodeRequest{Id: banned.id, Reason: "stolen"}); err != nil {
		t.Fatal(err)
	}
	h.stop()
	h.edit(`UPDATE nodes SET attributes = replace(attributes, '"zone":"a"', '"zone":"a","new":"b"'), state = 'active'`)
	h.start(func(c *Config) { c.Version = "v1" }, h.anchored)
	if n, _ := h.server.registry.Node(good.id); n.State != registry.Active {
		t.Errorf("the good node is %s", n.State)
	}
	if n, _ := h.server.registry.Node(banned.id); n.State != registry.Banned {
		t.Errorf("the banned node is %s", n.State)
	}
}

// A database that is accepted though it is older lifts nothing that was withdrawn
// since; that it was accepted is recorded with what was lost.
func TestAcceptedStoreLiftsNothing(t *testing.T) {
	t.Parallel()
	h := newAnchoredHouse(t, t.TempDir())
	h.apply(shopEntry("web"))
	good, banned := h.join("good", nil), h.join("banned", nil)
	h.stop()
	older := t.TempDir()
	copyTree(t, older, h.dir)
	h.start(h.anchored)
	h.apply(shopEntry("lost"))
	admin, ctx := h.admin()
	if _, err := admin.BanNode(ctx, &adminv1.BanNodeRequest{Id: banned.id, Reason: "stolen"}); err != nil {
		t.Fatal(err)
	}
	h.quarantine(&adminv1.Quarantine{SpiffeId: "spiffe://example.org/app/bad"})
	h.stop()
	for _, suffix := range []string{"-wal", "-shm"} {
		if err := os.Remove(filepath.Join(h.dir, "ca.db"+suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	copyFile(t, filepath.Join(h.dir, "ca.db"), filepath.Join(older, "ca.db"))

	accepted := false
	accept := func(c *Config) {
		db, ok := c.Store.(*store.DB)
		if !ok || accepted {
			return
		}
		accepted = true
		err := AcceptStore(t.Context(), filepath.Join(h.dir, "store.anchor"), c.Ledger, db, Acceptance{By: "uid:7", Version: c.Version, TrustDomain: td.Name(), Instance: c.Instance},
			func(revision, sequence uint64) (string, error) {
				err := db.Restored(context.WithoutCancel(t.Context()), LedgerName(c.Ledger), revision, sequence)
				return db.Epoch(), err
			})
		if err != nil {
			t.Fatal(err)
		}
	}
	h.start(accept, h.anchored)
	if n, _ := h.server.registry.Node(good.id); n.State != registry.Active {
		t.Errorf("the good node is %s", n.State)
	}
	if n, _ := h.server.registry.Node(banned.id); n.State != registry.Banned {
		t.Errorf("the banned node is %s", n.State)
	}
	if h.server.registry.Quarantines().Len() != 1 {
		t.Error("the quarantine was lifted")
	}
	records := h.records(ledgerv1.Event_EVENT_STORE_ACCEPTED)
	if len(records) != 1 || records[0].GetActor() != "uid:7" || records[0].GetTrustDomain() != td.Name() ||
		records[0].GetStore().GetRevision() >= records[0].GetStore().GetLedgerRevision() ||
		len(records[0].GetStore().GetLost()) != 1 || !strings.Contains(records[0].GetStore().GetLost()[0], "entry lost applied") {
		t.Errorf("recorded is %v", records)
	}
}

// copyTree copies a folder's files into another.
func copyTree(t *testing.T, to, from string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		copyFile(t, filepath.Join(to, rel), path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func copyFile(t *testing.T, to, from string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
